// The tool that mixes what images and texts mean: one mix by sliders, or a strip from each to the next.

import { h, iconButton, newId, range } from "./dom.js";
import { normalizeWeights, planStrip, roundShares } from "./tools/blend.js";
import { buildMixRequest, buildStripRequests, describeMix, explainMix, limitAnchors } from "./tools/anchors.js";
import { choice, countChoice, drawFoot, pick, shorten, textButton } from "./tools/controls.js";

const DEFAULT_FRAMES = 7;
const MAX_STRIP = 32; // images
const MAX_PER_REQUEST = 10; // images, where the server does not say

/** Fill a dialog with the things to mix, images to start with. */
export function openMix({ images, view, app }) {
  const state = { anchors: [], strip: false };
  const planRows = () => planStrip(state.anchors.length, frames.input.valueAsNumber);
  function update() {
    const { anchors, strip } = state;
    const shares = normalizeWeights(anchors.map((anchor) => anchor.weight)) ?? anchors.map(() => 0);
    const percents = roundShares(shares);
    anchors.forEach((anchor, place) => anchor.row.show(percents[place], place, state));
    canvas.update({ anchors, shares, percents, rows: strip ? planRows() : null });
    const room = limitAnchors(anchors);
    [addImage.disabled, addText.disabled] = [!room.image, !room.text];
    count.element.hidden = strip || !anchors.some((anchor) => anchor.text !== undefined);
    foot.update();
  }

  // The things in the mix, and more of them
  const canvas = buildCanvas();
  const addImage = textButton("Add images", () => addChosen(), "quiet");
  const addText = textButton("Add a text", () => list.add({ text: "" }).focus(), "quiet");
  const list = buildList(state, update, addImage);
  async function addChosen() {
    const chosen = await app.choose({ title: "Add to the mix", multiple: true });
    for (const item of chosen) list.add({ item });
    addImage.focus();
  }
  takeFiles(view, app, canvas.element, (item) => list.add({ item }));

  // A mix, or a strip
  const frames = range({ label: "Images from each to the next", min: 3, max: 11, step: 1, value: DEFAULT_FRAMES, oninput: update });
  frames.element.hidden = true;
  const mode = choice({
    label: "What to draw",
    options: [["mix", "One mix"], ["strip", "A strip"]],
    value: "mix",
    onchange(value) {
      state.strip = value === "strip";
      frames.element.hidden = !state.strip;
      update();
    },
  });
  const count = countChoice();
  const foot = drawFoot({
    text: "Draw",
    explain: () => explainMix(state.anchors, state.strip ? planRows().length : 1, MAX_STRIP),
    draw() {
      draw({ state, rows: planRows(), count: Number(count.value()), app });
      view.close();
    },
  });

  const controls = [mode.element, frames.element, list.element, h("div", { class: "tool-chips" }, addImage, addText)];
  view.body.append(h("div", { class: "tool-layout" }, h("div", { class: "tool-work" }, canvas.element), h("div", { class: "tool-panel" }, controls)));
  view.actions.append(count.element, ...foot.elements);
  for (const item of images) list.add({ item });
  update();
}

/** What a mix or a strip will be of, before it is drawn. Returns {element, update}. */
function buildCanvas() {
  const bar = h("div", { class: "mix-bar", "aria-hidden": "true" });
  const stops = h("ol", { class: "strip-stops large", "aria-label": "The strip" });
  const hint = h("p", { class: "hint mix-empty" }, "Add images or texts, or drop images here.");
  const element = h("div", { class: "board mix-board" }, bar, stops, hint);
  /** rows: of a strip; null for a mix. */
  const update = ({ anchors, shares, percents, rows }) => {
    bar.replaceChildren(...anchors.map((anchor, place) => buildPart(anchor, shares[place], percents[place])));
    stops.replaceChildren(...(rows ?? []).map((row) => buildStop(anchors, row)));
    bar.hidden = rows !== null || !anchors.length;
    stops.hidden = !rows?.length;
    element.classList.toggle("bare", !anchors.length);
  };
  return { element, update };
}

/** The list of what is mixed. other: what gets the focus when the list is empty. Returns {element, add}. */
function buildList(state, update, other) {
  const element = h("ol", { class: "anchors", "aria-label": "In the mix" });

  function remove(anchor) {
    const { anchors } = state;
    const place = anchors.indexOf(anchor);
    anchors.splice(place, 1);
    anchor.row.element.remove();
    update();
    // The focus stays in the list
    (anchors[Math.min(place, anchors.length - 1)]?.row.remove ?? other).focus();
  }

  function raise(anchor) {
    const { anchors } = state;
    const place = anchors.indexOf(anchor);
    anchors.splice(place, 1);
    anchors.splice(place - 1, 0, anchor);
    element.insertBefore(anchor.row.element, element.children[place - 1]);
    update();
    (anchor.row.raise.disabled ? anchor.row.remove : anchor.row.raise).focus();
  }

  /** Add an image, {item}, or a text, {text}, and return its row; null if there is no room. */
  function add(found) {
    if (!limitAnchors(state.anchors)[found.text === undefined ? "image" : "text"]) return null;
    const anchor = { ...found, weight: 50 };
    anchor.row = buildRow(anchor, { change: update, remove: () => remove(anchor), raise: () => raise(anchor) });
    state.anchors.push(anchor);
    element.append(anchor.row.element);
    update();
    return anchor.row;
  }

  return { element, add };
}

/** Start drawing a mix, or a strip. */
function draw({ state, rows, count, app }) {
  const { anchors } = state;
  const hasText = anchors.some((anchor) => anchor.text !== undefined);
  const parents = anchors.filter((anchor) => anchor.item).map((anchor) => anchor.item);
  // Images keep their own noise, which guidance would not give back
  const taken = ["steps", ...(hasText ? ["prior_steps", "prior_guidance_scale", "prior_sampler"] : []), ...(parents.length ? [] : ["guidance_scale"])];
  const fields = { ...pick(app.settings("generations"), taken), seed: app.seed() };
  const title = describeMix(anchors);
  if (state.strip) {
    const captions = rows.map((row) => roundShares(row.filter((share) => share > 0)).map((percent) => `${percent} %`).join(" · "));
    app.draw(buildStripRequests(anchors, rows, fields, app.model.max_n ?? MAX_PER_REQUEST), { title, layout: "strip", captions, parents });
  } else {
    const weights = normalizeWeights(anchors.map((anchor) => anchor.weight));
    // Nothing of a mix of images is drawn by chance
    app.draw([buildMixRequest(anchors, weights, { ...fields, n: hasText ? count : 1 })], { title, layout: "grid", parents });
  }
}

/** One thing of the list: its image or text, its share, and buttons. */
function buildRow(anchor, { change, remove, raise }) {
  const id = newId("anchor");
  const name = () => (anchor.text === undefined ? anchor.item.prompt || "image" : anchor.text || "text");
  let input = null;
  if (anchor.text !== undefined) {
    input = h("input", { type: "text", id, maxlength: 4096, placeholder: "a text", "aria-label": "Text to mix in" });
    input.addEventListener("input", () => {
      anchor.text = input.value;
      change();
    });
  }
  const slider = h("input", { type: "range", min: 0, max: 100, step: 1, value: anchor.weight });
  slider.addEventListener("input", () => {
    anchor.weight = slider.valueAsNumber;
    change();
  });
  const share = h("output", { class: "range-value" });
  const face = input
    ? h("div", { class: "anchor-face words", "aria-hidden": "true" }, "Aa")
    : h("img", { class: "anchor-face", src: anchor.item.url, alt: "" });
  const up = iconButton("up", "Move up", raise);
  const bin = iconButton("close", "Remove", remove);
  const title = input ? h("div", { class: "field" }, input) : h("span", { class: "anchor-name" }, shorten(name(), 40));
  const head = h("div", { class: "anchor-head" }, title, share);
  const element = h("li", { class: "anchor" }, face, h("div", { class: "anchor-main range" }, head, slider), up, bin);
  return {
    element,
    remove: bin,
    raise: up,
    focus: () => (input ?? slider).focus(),
    show(percent, place, { strip }) {
      slider.hidden = strip;
      share.hidden = strip;
      up.hidden = !strip;
      up.disabled = place === 0;
      share.textContent = `${percent} %`;
      slider.style.setProperty("--fill", `${anchor.weight}%`);
      slider.setAttribute("aria-valuetext", `${percent} % of the mix`);
      slider.setAttribute("aria-label", `Share of ${shorten(name(), 40)}`);
      up.setAttribute("aria-label", `Move ${shorten(name(), 40)} up`);
      bin.setAttribute("aria-label", `Remove ${shorten(name(), 40)}`);
    },
  };
}

/** The part of the bar that shows one thing's share. */
function buildPart(anchor, share, percent) {
  const face = buildFace(anchor);
  const part = h("div", { class: "mix-part" }, face, h("span", { class: "mix-share" }, `${percent} %`));
  part.style.flexGrow = String(share);
  part.hidden = share === 0;
  return part;
}

/** A place of the strip before it is drawn: the two things of the way over each other. */
function buildStop(anchors, row) {
  const tile = h("div", { class: "strip-tile" });
  let under = 0;
  row.forEach((share, place) => {
    if (share === 0) return;
    const face = buildFace(anchors[place]);
    // What lies on top lets through what is below it
    face.style.opacity = String(under ? share / (under + share) : 1);
    under += share;
    tile.append(face);
  });
  return h("li", {}, tile);
}

function buildFace(anchor) {
  if (anchor.text === undefined) return h("img", { src: anchor.item.url, alt: "", draggable: "false" });
  return h("div", { class: "words" }, shorten(anchor.text, 30) || "Aa");
}

/** Take images that are dropped on the dialog, or pasted, into the gallery and the mix. */
function takeFiles(view, app, canvas, add) {
  async function take(event, files) {
    const images = [...(files ?? [])].filter((file) => file.type.startsWith("image/"));
    if (!images.length) return;
    event.preventDefault();
    event.stopPropagation();
    for (const file of images) {
      try {
        const item = await app.open(file);
        await app.gallery.add(item, item.prompt || file.name || "Your image");
        add(item);
      } catch (error) {
        app.say(error.message);
      }
    }
  }
  // The page below takes what is dropped too
  const watch = (name, act) =>
    view.dialog.addEventListener(name, (event) => {
      event.preventDefault();
      event.stopPropagation();
      act(event);
    });
  const mark = (isOver) => () => canvas.classList.toggle("over", isOver);
  watch("dragenter", mark(true));
  watch("dragover", mark(true));
  watch("dragleave", mark(false));
  watch("drop", (event) => {
    mark(false)();
    take(event, event.dataTransfer?.files);
  });
  view.dialog.addEventListener("paste", (event) => take(event, event.clipboardData?.files));
}
