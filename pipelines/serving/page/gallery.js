// The gallery: a card for each drawing, with previews while it is drawn, then with its images.

import { ApiError, draw, LostServer } from "./api.js";
import { h, iconButton, newId, say, toast } from "./dom.js";
import { createItem, findCard, findItem, findItems, putBack, readCards, removeItems, saveDrawing } from "./history.js";
import { Slot, buildPath, findSteps } from "./pictures.js";
import { readRecord } from "./png.js";
import { BusyServer, PASSING_CODES } from "./retries.js";

// What each stage does, in words, and the share of the time in which it usually does it
const STAGES = {
  inversion: ["Looking at the image", 0, 0.3],
  prior: ["Finding the meaning", 0, 0.15],
  decoder: ["Drawing", 0.15, 0.95],
  upsampler: ["Enlarging", 0.5, 1],
};
const MAX_LOSSES = 5; // of the connection in one drawing: a request that ends the server is not sent for ever

/** A card: its head, its progress and its images. */
class CardView {
  constructor(gallery, card) {
    Object.assign(this, { gallery, card, app: gallery.app, progress: [], slots: [], told: new Set(), isDrawing: false });
    this.starts = [];
    for (const request of card.requests) {
      this.starts.push(this.slots.length);
      const count = request.count ?? request.fields.n ?? 1;
      for (let place = 0; place < count; place++) this.slots.push(new Slot(this, card.captions?.[this.slots.length]));
    }
    const id = newId("card");
    this.tools = h("div", { class: "card-tools" });
    this.head = h("header", { class: "card-head" }, h("div", { class: "card-names" }, h("h2", { id }, card.title)), this.tools);
    this.bar = h("div", { class: "progress", role: "progressbar", "aria-valuemin": 0, "aria-valuemax": 100, "aria-label": `Progress of ${card.title}` }, h("i"));
    this.text = h("span", { class: "status-text" });
    this.status = h("div", { class: "card-status", hidden: true }, this.bar, h("div", { class: "status-line" }, this.text));
    this.pictures = h("div", { class: `pictures ${card.layout ?? "grid"}` }, this.slots.map((slot) => slot.element));
    if (card.layout === "strip") Object.entries({ tabindex: 0, role: "group", "aria-label": card.title }).forEach(([name, value]) => this.pictures.setAttribute(name, value));
    this.notes = h("ul", { class: "card-notes hint", "aria-label": "Notes", hidden: true });
    this.element = h("article", { class: "card", "aria-labelledby": id }, this.head, this.status, this.pictures, this.notes);
    this.showPath();
  }

  async showPath() {
    const path = buildPath(await findSteps(await findItems(this.card.parents)), this.app);
    if (path) this.head.querySelector(".card-names").prepend(path);
  }

  /** Show a card of the history. */
  async restore() {
    const items = await findItems(this.card.items);
    const slots = items.map((item) => this.slots[this.starts[item.request] + (item.place ?? 0)]);
    // Slots without an image, of those that were removed or cancelled, go
    this.slots.filter((slot) => !slots.includes(slot)).forEach((slot) => slot.element.remove());
    this.slots = slots;
    items.forEach((item, index) => slots[index].show(item));
    const notes = this.card.notes ?? [];
    this.notes.hidden = !notes.length;
    this.notes.replaceChildren(...notes.map((note) => h("li", {}, formatSentence(note))));
    this.finish();
  }

  finish() {
    this.isDrawing = false;
    this.status.hidden = true;
    this.element.classList.remove("drawing", "failed");
    const tools = [];
    if (hasChance(this.card.requests[0])) {
      tools.push(iconButton("again", "Draw again, with a new seed", () => this.app.drawAgain(this.card)));
    }
    tools.push(iconButton("trash", "Remove these images", () => this.gallery.removeCard(this)));
    this.showTools(tools);
    this.gallery.update();
  }

  /** Show the buttons of the card's head; the focus that one of those before had goes to the first. */
  showTools(tools) {
    const hadFocus = this.tools.contains(document.activeElement);
    this.tools.replaceChildren(...tools);
    if (hadFocus) tools[0].focus();
  }

  /** Draw, from the start to the end. */
  async run() {
    this.controller = new AbortController();
    this.isDrawing = true;
    this.losses = 0;
    this.progress = [];
    this.element.classList.add("drawing");
    this.element.classList.remove("failed");
    this.status.hidden = false;
    this.showTools([h("button", { class: "button quiet", type: "button", onclick: () => this.cancel() }, "Cancel")]);
    this.showText("Sending");
    this.gallery.update();
    say(`Drawing: ${this.card.title}`);
    const signal = this.controller.signal;
    const results = await Promise.allSettled(this.card.requests.map((request, number) => this.runRequest(request, number, signal)));
    const failure = results.find(({ reason }) => reason && reason.name !== "AbortError")?.reason;
    await this.keep();
    if (this.card.items.length) {
      await this.restore();
      say(`Drawn: ${this.card.title}`);
      if (failure) toast(explain(failure));
    } else if (failure) this.fail(failure);
    else {
      this.gallery.drop(this);
      toast("Cancelled");
    }
  }

  async runRequest(request, number, signal) {
    const images = await Promise.all((request.images ?? []).map(async (image) => (image.id ? await findItem(image.id) : image)));
    if (images.includes(null)) throw new Error("the image that it is drawn from was removed");
    const arrived = [];
    const onEvent = (kind, data) => {
      const slot = this.slots[this.starts[number] + (data.index ?? 0)];
      if (kind === "preview") slot?.preview(data.blob);
      else if (kind === "image") arrived.push(this.takeImage(slot, number, data));
      else this.showProgress(number, kind, data);
    };
    for (;;) {
      try {
        const { id: model, fields: taken = {} } = this.app.model;
        await draw({ ...request, images, fields: { model, ...request.fields } }, { signal, onEvent, taken: taken[request.route] });
        await Promise.all(arrived);
        return;
      } catch (error) {
        const isLost = error instanceof LostServer || PASSING_CODES.includes(error.code);
        if (!isLost || ++this.losses > MAX_LOSSES * this.card.requests.length) throw error;
        this.showText("The server does not answer. This goes on when it is back.");
        await this.app.waitForServer(signal);
      }
    }
  }

  async takeImage(slot, number, { blob, index, notes = [] }) {
    notes.forEach((note) => this.told.add(note));
    const record = await readRecord(blob);
    const { prompt, title, id, parents } = { prompt: this.card.requests[number].fields.prompt, ...this.card };
    slot.drawn = await createItem(blob, { record, prompt: prompt ?? title, parents, card: id, request: number, place: index });
    slot.preview(blob);
  }

  /** Keep what was drawn in the history. */
  async keep() {
    const items = this.slots.map((slot) => slot.drawn).filter(Boolean);
    this.card.items = items.map((item) => item.id);
    if (!items.length) return;
    this.card.notes = [...this.told];
    const isKept = await saveDrawing(this.card, items).catch((error) => console.error(error));
    // They are there all the same, and can be downloaded
    if (!isKept) toast("The browser has no room for these images: they last until this tab is closed");
  }

  showProgress(number, kind, data) {
    if (kind === "waiting") {
      this.showText(data.text);
      return;
    }
    const { stage, step = 0, steps = 1 } = data;
    if (stage === "queued") {
      const before = data.position ? `: ${countImages(data.position)} first` : "";
      this.showText(`Waiting for its turn${before}${formatSeconds(data.seconds_left)}`);
      return;
    }
    const [doing, from, to] = STAGES[stage] ?? STAGES.decoder;
    const before = this.progress[number];
    const started = before?.started ?? performance.now();
    const elapsed = (performance.now() - started) / 1000;
    // As the server estimates it, else by the usual shares of the stages
    const left = data.seconds_left ?? null;
    const part = left === null ? from + ((to - from) * step) / steps : elapsed / (elapsed + left || 1);
    this.progress[number] = { started, left, part: Math.max(part, before?.part ?? 0) };
    const all = this.card.requests.map((_, index) => this.progress[index]);
    const longest = Math.max(...all.map((one) => one?.left ?? NaN));
    this.showText(`${doing}${formatSeconds(longest, " left")}`, all.reduce((sum, one) => sum + (one?.part ?? 0), 0) / all.length);
  }

  showText(text, part = null) {
    this.text.textContent = text;
    this.bar.classList.toggle("unknown", part === null);
    if (part === null) return this.bar.removeAttribute("aria-valuenow");
    this.bar.setAttribute("aria-valuenow", Math.round(100 * part));
    this.bar.firstChild.style.setProperty("--part", part);
  }

  cancel() {
    this.controller.abort();
  }

  /** Show why nothing was drawn. */
  fail(error) {
    this.isDrawing = false;
    this.element.classList.remove("drawing");
    this.element.classList.add("failed");
    this.showText(explain(error));
    say(explain(error));
    const again = h("button", { class: "button quiet", type: "button", onclick: () => this.run() }, "Try again");
    this.showTools([again, iconButton("close", "Dismiss", () => this.gallery.drop(this))]);
    this.gallery.update();
  }
}

/** Return an error as a sentence. */
export function explain(error) {
  if (![ApiError, LostServer, BusyServer].some((kind) => error instanceof kind)) console.error(error);
  return formatSentence(error.message || "Something went wrong");
}

function formatSentence(text) {
  return `${text[0].toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;
}

const countImages = (count) => (count === 1 ? "one image" : `${count} images`);

function formatSeconds(seconds, after = "") {
  if (!Number.isFinite(seconds)) return "";
  return seconds < 90 ? ` · about ${Math.max(1, Math.round(seconds))} s${after}` : ` · about ${Math.round(seconds / 60)} min${after}`;
}

/** All cards, the newest first. */
export class Gallery {
  /** onchange: called when a card begins, ends or goes. */
  constructor(element, app, onchange) {
    Object.assign(this, { element, app, onchange, views: [], starred: false, more: false, undo: null });
  }

  get isEmpty() {
    return !this.views.length;
  }

  get drawing() {
    return this.views.filter((view) => view.isDrawing);
  }

  update() {
    this.onchange();
  }

  /** Start a drawing: a new card at the top. Returns a promise of its end. */
  draw(requests, { title, layout = "grid", captions, parents = [] }) {
    const kept = requests.map((request) => ({ ...request, images: request.images?.map((image) => (image.id ? { id: image.id } : image)) }));
    const about = { title, layout, captions, requests: kept, parents: parents.map((item) => item.id) };
    const view = new CardView(this, { id: newCardId(), created: Date.now(), items: [], ...about });
    this.views.unshift(view);
    this.element.prepend(view.element);
    view.element.scrollIntoView({ block: "nearest", behavior: "smooth" });
    return view.run();
  }

  /** Put an image of the person's own into the gallery, and the history. */
  async add(item, title) {
    const card = { id: newCardId(), created: Date.now(), title, layout: "grid", requests: [{ route: null, fields: { n: 1 } }], parents: [], items: [item.id] };
    item.card = card.id;
    const isKept = await saveDrawing(card, [item]);
    if (!isKept) toast("The browser has no room for this image: it lasts until this tab is closed");
    await this.place(card);
  }

  /** Show a card as it is now: where it was, or at its place in time. Returns its view. */
  async place(card) {
    const view = new CardView(this, card);
    const before = this.views.find((other) => other.card === card);
    const at = before ? this.views.indexOf(before) : this.views.findIndex((other) => other.card.created < card.created);
    if (before) {
      before.element.replaceWith(view.element);
      this.views[at] = view;
    } else {
      this.element.insertBefore(view.element, this.views[at]?.element ?? null);
      this.views.splice(at < 0 ? this.views.length : at, 0, view);
    }
    await view.restore();
    return view;
  }

  /** Show the history, or those cards that have a star. */
  async load({ starred = false } = {}) {
    this.starred = starred;
    const drawing = this.drawing;
    this.views = drawing;
    this.element.replaceChildren(...drawing.map((view) => view.element));
    await this.loadMore();
  }

  /** Show older cards. While some are being read, the newest call goes on and those before it end. */
  async loadMore() {
    const turn = (this.turn = {});
    const shown = this.views.filter((view) => !view.isDrawing);
    const before = shown.length ? Math.min(...shown.map((view) => view.card.created)) : Infinity;
    const { cards, more } = await readCards({ before, starred: this.starred });
    if (this.turn !== turn) return;
    this.more = more;
    for (const card of cards) {
      // One that was being drawn when the others were read has its view
      if (this.views.some((view) => view.card.id === card.id)) continue;
      const view = new CardView(this, card);
      this.views.push(view);
      this.element.append(view.element);
      await view.restore();
      if (this.turn !== turn) return;
    }
    this.update();
  }

  /** Show an item's star, wherever it is. */
  mark(item) {
    for (const slot of this.views.flatMap((view) => view.slots)) if (slot.item === item) slot.mark();
  }

  /** Take a card away; the focus that was in it goes to the next card. */
  drop(view) {
    const next = view.element.nextElementSibling ?? view.element.previousElementSibling;
    const hadFocus = view.element.contains(document.activeElement);
    this.views = this.views.filter((other) => other !== view);
    view.element.remove();
    if (hadFocus) (next?.querySelector(".picture-open") ?? document.querySelector("#prompt")).focus();
    this.update();
  }

  async removeCard(view) {
    const removed = await removeItems(view.card.items);
    this.drop(view);
    this.offerUndo(removed);
  }

  /** Remove one image; with the last one its card goes. */
  async remove(item) {
    const view = this.views.find((other) => other.slots.some((slot) => slot.item === item));
    if (view && view.card.items.length < 2) return this.removeCard(view);
    const removed = await removeItems([item.id]);
    if (view) {
      const at = view.slots.findIndex((slot) => slot.item === item);
      view.slots.splice(at, 1)[0].element.remove();
      // The focus stays in the card, as the image that had it is gone
      view.slots[Math.min(at, view.slots.length - 1)]?.focus();
    }
    this.offerUndo(removed);
  }

  /** Say what was removed. `undo` brings it back, until something else is removed. */
  offerUndo(removed) {
    this.undo = async () => {
      this.undo = null;
      const isKept = await putBack(removed);
      for (const { card } of removed.cards) {
        const view = await this.place(card);
        view.slots.find((slot) => removed.items.includes(slot.item))?.focus();
      }
      toast(isKept ? "Brought back" : "Brought back, until this tab is closed: the browser has no room");
    };
    const { undo } = this;
    const run = () => this.undo === undo && undo();
    toast(removed.items.length > 1 ? `${removed.items.length} images removed` : "Removed", { label: "Undo", run });
  }

  cancelAll() {
    this.drawing.forEach((view) => view.cancel());
  }
}

const newCardId = () => crypto.getRandomValues(new Uint32Array(4)).join("-");

/** Return the request that drew an item, alone and with its own seed; null for an image from elsewhere. */
export function findRequest(item) {
  const request = findCard(item)?.requests[item.request ?? 0];
  if (!request?.route) return null;
  const { count, ...alone } = request;
  const { theta, weights } = request.fields;
  // Of a strip, its own place
  const own = Array.isArray(theta) ? { theta: theta[item.place] } : Array.isArray(weights?.[0]) ? { weights: weights[item.place] } : { n: 1 };
  return { ...alone, fields: { ...request.fields, ...own, seed: item.record?.seed ?? request.fields.seed } };
}

/** Return whether another seed draws other images: of a change nothing to speak of, of a mix of images nothing is drawn by chance. */
export function hasChance({ route, fields, images = [] }) {
  const isMix = fields.weights !== undefined;
  return Boolean(route) && fields.source === undefined && !(isMix && images.length > 0 && !fields.texts);
}
