// The page: what a person types, drops and presses, and what happens then. It uses the public API alone.
//
// The contract with the tools (brush.js, outpaint.js, mix.js, diff.js), each of which exports one function:
//   openBrush, openOutpaint, openDiff({image, view, app}), openMix({images, view, app})
// view: of `openView` in dom.js. A tool fills view.body and view.actions, and ends with app.draw(...) and view.close().
// image: an item of history.js. app: `app` below. A request is {route, fields, images, mask}, as api.js sends it.

import { buildActions, openMenu, saveFile } from "./actions.js";
import * as api from "./api.js";
import { Composer } from "./composer.js";
import { h, openView, say, toast } from "./dom.js";
import { Gallery, explain } from "./gallery.js";
import { createItem, findCard, measure, openHistory, readItems, removeItems } from "./history.js";
import { areShortcutsOn, isComposing, isTaken, readEscape, turnShortcuts } from "./keys.js";
import { readRecord } from "./png.js";
import { retryWhileBusy } from "./retries.js";
import { Settings } from "./settings.js";
import { chooseItems, findAction, openViewer } from "./viewer.js";
import { buildZip } from "./zip.js";

const TOOLS = {
  edit: { title: "Edit", module: "./brush.js", open: "openBrush" },
  extend: { title: "Extend", module: "./outpaint.js", open: "openOutpaint" },
  mix: { title: "Mix", module: "./mix.js", open: "openMix" },
  change: { title: "Change", module: "./diff.js", open: "openDiff" },
};
const KEYS = {
  "/": "Write a prompt", Enter: "Draw", s: "Settings", o: "Open an image", "*": "Starred only", Escape: "Close, or cancel what is drawn", "Ctrl Z": "Bring back what was removed", "?": "These shortcuts",
};
const find = (selector) => document.querySelector(selector);

const app = {
  api,
  say,
  model: {},
  /** Start a card: see gallery.js. */
  draw: (requests, options) => app.gallery.draw(requests, options),
  /** Return the settings that the person changed, of those that a route takes. */
  settings: (route) => app.drawer.collect(route),
  get count() {
    return app.drawer.count;
  },
  seed: () => app.drawer.chooseSeed(),
  newSeed: () => crypto.getRandomValues(new Uint32Array(1))[0],
  choose: (options) => chooseItems(options, app),
  open: openImage,
  openFile: chooseFile,
  openTool,
  view: (item) => openViewer(item, app),
  openMenu: (item, button) => openMenu(item, app.actions, button),
  waitForServer,
  recall,
  drawAgain,
  /** Return whether a key does something: a person may turn single characters off. */
  takesKey: (key) => isTaken(key, areShortcutsOn()),
};

// Images from elsewhere

/** Return an item of an image file. Raises Error with a sentence for people. */
async function openImage(file) {
  const record = await readRecord(file);
  const prompt = record?.prompt ?? record?.target ?? "";
  try {
    return await createItem(file, { record, prompt });
  } catch {
    throw new Error("This file is no image that the browser can read.");
  }
}

/** Put a dropped, pasted or chosen file into the gallery; an image that was drawn here brings its settings. */
async function takeFile(file) {
  // In a dialog it is an ingredient: the words and settings of the page are the person's own
  const isIngredient = find("dialog[open]") !== null;
  try {
    const item = await openImage(file);
    await app.gallery.add(item, item.prompt || file.name || "Your image");
    if (isIngredient) return item;
    if (item.record) recall(item);
    else toast("Vary it, edit it or mix it");
    return item;
  } catch (error) {
    toast(explain(error));
    return null;
  }
}

/** Let the person choose a file, and return its item; null if none was chosen. */
function chooseFile() {
  const input = find("#file");
  return new Promise((resolve) => {
    input.onchange = async () => resolve(input.files.length ? await takeFile(input.files[0]) : null);
    input.oncancel = () => resolve(null);
    input.value = "";
    input.click();
  });
}

function watchDrops() {
  let depth = 0;
  const hasFile = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  const veil = (shown) => find("#drop-veil").classList.toggle("shown", shown);
  addEventListener("dragenter", (event) => hasFile(event) && veil((depth += 1) > 0));
  addEventListener("dragleave", (event) => hasFile(event) && veil((depth -= 1) > 0));
  addEventListener("dragover", (event) => hasFile(event) && event.preventDefault());
  addEventListener("drop", (event) => {
    if (!hasFile(event)) return;
    event.preventDefault();
    veil((depth = 0) > 0);
    takeFiles(event.dataTransfer.files);
  });
  addEventListener("paste", (event) => event.clipboardData.files.length && takeFiles(event.clipboardData.files));
}

async function takeFiles(files) {
  for (const file of [...files].slice(0, 16)) await takeFile(file);
}

// Drawing

/** Draw what the prompt says. */
function drawPrompt(prompt) {
  const fields = { ...app.settings("generations"), prompt, n: app.count, seed: app.seed() };
  app.draw([{ route: "generations", fields }], { title: prompt });
}

/** Draw a card again, with a new seed. */
async function drawAgain(card) {
  const seed = app.newSeed();
  const requests = card.requests.map((request) => ({ ...request, fields: { ...request.fields, seed } }));
  return app.draw(requests, { ...card, parents: card.parents.map((id) => ({ id })) });
}

/** Bring the words and settings of an image back. */
function recall(item) {
  app.drawer.recall(item.record);
  app.composer.write(item.record.prompt ?? "");
  toast("Its words, settings and seed are set");
}

/** Open a tool for an image; its module is loaded when it is first needed. */
async function openTool(name, image) {
  const tool = TOOLS[name];
  const module = await import(tool.module);
  const view = openView(tool.title, { kind: `tool ${name}` });
  // For the tool, its own settings
  const settings = (route) => app.drawer.collect(route, name);
  module[tool.open]({ image, images: [image], view, app: { ...app, settings } });
}

// The connection

let returning = null;

function showBanner(...content) {
  const banner = find("#banner");
  banner.replaceChildren(...content);
  banner.hidden = !content.length;
}

/** Return when the server answers again; the banner says that it does not. */
function waitForServer(signal) {
  returning ??= (async () => {
    for (let seconds = 1; ; seconds = Math.min(10, seconds + 1)) {
      showBanner("The server does not answer. Trying again…");
      await api.sleep(seconds);
      if (await api.isReady()) break;
    }
    showBanner();
    returning = null;
    toast("The server is back");
  })();
  return Promise.race([returning, new Promise((_, reject) => signal?.addEventListener("abort", () => reject(signal.reason)))]);
}

/** Return the descriptions of the server's models; waits for a server that does not answer, or is busy. */
async function readModels() {
  for (;;) {
    try {
      return (await retryWhileBusy(() => api.read("v1/models"), { sleep: api.sleep, onWait: showBanner })).data;
    } catch (error) {
      if (!(error instanceof api.LostServer)) throw error;
      await waitForServer();
    }
  }
}

/** Begin to take prompts; what keeps the page from that is said, with a button to try again. */
async function connect() {
  try {
    const models = await readModels();
    showBanner();
    showModels(models);
  } catch (error) {
    const again = () => {
      showBanner();
      connect();
    };
    showBanner(`${explain(error)} `, h("button", { class: "button quiet", type: "button", onclick: again }, "Try again"));
  }
}

/** Draw with a model from now on. */
function useModel(model) {
  app.model = { ...model, side: model.size?.[0] };
  app.drawer = new Settings(app.model, find("#settings"));
  document.title = `t2i · ${model.id}`;
  localStorage.setItem("t2i.model", model.id);
  app.composer.ready();
}

/** Show the name of the model; of several, a choice. */
function showModels(models) {
  const last = models.find(({ id }) => id === localStorage.getItem("t2i.model")) ?? models[0];
  const choose = () => useModel(models[select.selectedIndex]);
  const select = h("select", { "aria-label": "Model", onchange: choose }, models.map((model) => h("option", { selected: model === last }, model.id)));
  find("#model-name").replaceChildren(models.length > 1 ? select : last.id);
  useModel(last);
}

// The history

/** Save all images, or those with a star, in one ZIP file. */
async function exportImages() {
  const items = await readItems({ starred: app.gallery.starred });
  if (!items.length) return toast(app.gallery.starred ? "No image has a star" : "Nothing is drawn yet");
  const used = new Set();
  const files = items.map((item) => {
    const base = api.nameFile(item).replace(/\.png$/, "");
    const number = ["", ...Array(items.length).keys()].find((suffix) => !used.has(`${base}${suffix && `-${suffix}`}`));
    const name = `${base}${number && `-${number}`}`;
    used.add(name);
    return { name: `${name}.png`, blob: item.blob, created: item.created };
  });
  const names = new Map(items.map((item, index) => [item.id, files[index].name]));
  const tree = items.map((item) => ({
    file: names.get(item.id), prompt: item.prompt, starred: item.starred, created: new Date(item.created).toISOString(),
    drawn_from: item.parents.map((id) => names.get(id) ?? null), card: findCard(item)?.title ?? "", record: item.record,
  }));
  files.push({ name: "images.json", blob: new Blob([JSON.stringify(tree, null, 2)]), created: Date.now() });
  saveFile(await buildZip(files), `t2i-${new Date().toISOString().slice(0, 10)}.zip`);
  toast(`${items.length} images are in the file`);
}

async function showHistorySize() {
  const { images, bytes, limit } = await measure();
  const size = bytes < 1e6 ? `${Math.ceil(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
  const clear = h("button", { class: "button text", type: "button", onclick: clearHistory, disabled: !images }, "Remove all");
  const kept = app.isKept ? "are kept in this browser" : "last until this tab is closed";
  find("#history-size").replaceChildren(`${images} of at most ${limit} images ${kept}, ${size}. Beyond that the oldest go; those with a star stay. `, clear);
}

function clearHistory() {
  const view = openView("Remove all images?", { kind: "small" });
  view.body.append(h("p", {}, "Images with a star go too. Files that you downloaded stay."));
  const remove = async () => {
    await removeItems((await readItems()).map((item) => item.id));
    app.gallery.undo = null;
    view.close();
    await app.gallery.load();
    showHistorySize();
    toast("All images are removed");
  };
  view.actions.append(
    h("button", { class: "button quiet", type: "button", onclick: view.close }, "Keep them"),
    h("button", { class: "button primary", type: "button", onclick: remove }, "Remove all"),
  );
}

// The keyboard

function showKeys() {
  const view = openView("Keyboard", { kind: "keys" });
  const list = (entries) => h("dl", { class: "keys" }, entries.map(([key, label]) => h("div", {}, h("dt", {}, h("kbd", {}, key)), h("dd", {}, label))));
  const actions = Object.values(app.actions).map(({ key, label }) => [key, label]);
  const switcher = h("input", { type: "checkbox", checked: areShortcutsOn(), onchange: () => turnShortcuts(switcher.checked) });
  view.body.append(
    h("label", { class: "check" }, switcher, h("span", {}, "Shortcuts of a single character are on")),
    h("section", {}, h("h3", {}, "Everywhere"), list(Object.entries(KEYS))),
    h("section", {}, h("h3", {}, "On an image"), list([["← →", "The next image"], ["Enter", "Open it"], ...actions])),
  );
}

function watchKeys() {
  addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.altKey || isComposing(event) || find("dialog[open]")) return;
    const field = event.target.closest("input, textarea, select");
    if (event.ctrlKey || event.metaKey) return undo(event, field);
    if (event.key === "Escape") return leave(event);
    if (field || event.target.closest("[role=menu]")) return;
    const picture = event.target.closest(".picture[data-item]");
    const slot = picture && app.gallery.views.flatMap((view) => view.slots).find((one) => one.element === picture);
    const action = slot && findAction(app, event.key, slot.item);
    const moves = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const shortcuts = { "/": () => app.composer.focus(), s: () => app.drawer.toggle(), o: chooseFile, "*": toggleStarred, "?": showKeys };
    if (action) action.run(slot.item);
    else if (picture && moves) focusNeighbour(picture, moves);
    else if (shortcuts[event.key] && app.takesKey(event.key)) shortcuts[event.key]();
    else return;
    event.preventDefault();
  });
}

/** Close the drawer, or cancel the newest drawing. */
function leave(event) {
  const [drawing] = app.gallery.drawing;
  const inChoice = event.target.closest("select") !== null;
  const meaning = readEscape({ hasMenu: find("[role=menu]") !== null, inChoice, isDrawerOpen: app.drawer.isOpen, isDrawing: Boolean(drawing) });
  if (meaning === "close") app.drawer.toggle(false);
  else if (meaning === "cancel") drawing.cancel();
}

/** Bring back what was removed last; a field with words has an undo of its own. */
function undo(event, field) {
  if (event.key.toLowerCase() !== "z" || event.shiftKey || field?.value || !app.gallery.undo) return;
  event.preventDefault();
  app.gallery.undo();
}

function focusNeighbour(picture, by) {
  const all = [...document.querySelectorAll(".picture[data-item]")];
  all[all.indexOf(picture) + by]?.querySelector(".picture-open").focus();
}

async function toggleStarred() {
  const starred = !app.gallery.starred;
  find("#show-starred").setAttribute("aria-pressed", starred);
  await app.gallery.load({ starred });
  toast(starred ? "Starred only" : "All images");
}

/** Show what depends on how many cards there are. */
function update() {
  const { gallery } = app;
  find("#main").classList.toggle("empty", gallery.isEmpty && !gallery.starred);
  find("#cancel-all").hidden = gallery.drawing.length < 2;
  find("#show-more").hidden = !gallery.more;
}

async function start() {
  app.isKept = await openHistory();
  app.actions = buildActions(app);
  app.gallery = new Gallery(find("#gallery"), app, update);
  app.composer = new Composer(app, drawPrompt);
  find("#show-starred").onclick = toggleStarred;
  find("#export").onclick = exportImages;
  find("#show-keys").onclick = showKeys;
  find("#attach").onclick = chooseFile;
  find("#cancel-all").onclick = () => app.gallery.cancelAll();
  find("#show-more").onclick = () => app.gallery.loadMore();
  find("#show-settings").onclick = () => {
    app.drawer.toggle();
    if (app.drawer.isOpen) showHistorySize();
  };
  watchDrops();
  watchKeys();
  await app.gallery.load();
  // The history is there at once, also while the server is not
  app.drawer = new Settings({}, find("#settings"));
  await connect();
}

start();
