// The tool that paints beyond the borders of an image: a frame around it, by pointer, keys and numbers.

import { h, newId } from "./dom.js";
import { countChoice, drawFoot, shorten, textButton, textField } from "./tools/controls.js";
import * as frames from "./tools/frame.js";

const MAX_MARGIN = 4096; // of the API
const MAX_PIXELS = 4_000_000; // what a person waits for
const MAX_TIMES_SIDE = 8; // sides of the model's square along the longer side
const MIN_AREA = 0.75; // of the model's square, as the pipelines ask for
const STEP = 8; // pixels of the image: the frame goes in such steps, numbers may be any
// Each handle, and the sides that it moves
const HANDLES = [["left"], ["right"], ["top"], ["bottom"], ["left", "top"], ["right", "top"], ["left", "bottom"], ["right", "bottom"]];
const NAMES = { left: "Left", right: "Right", top: "Top", bottom: "Bottom" };
const TOWARDS = { ArrowLeft: ["x", -1], ArrowRight: ["x", 1], ArrowUp: ["y", -1], ArrowDown: ["y", 1] };

/** Fill a dialog with the frame for an image. */
export function openOutpaint({ image, view, app }) {
  const limits = findLimits(image, app.model.side ?? 0);
  const start = Math.round(Math.max(image.width, image.height) / 4 / STEP) * STEP;
  const state = { margins: frames.growSides(image, frames.NO_MARGINS, ["left", "right"], start, limits) };
  const set = (margins, { settle = true } = {}) => {
    state.margins = margins;
    stage.update({ settle });
    numbers.update();
    foot.update();
    const { width, height } = frames.measureFrame(image, margins);
    const cost = frames.describeCost({ width, height }, limits.side);
    size.textContent = `${image.width} × ${image.height} becomes ${width} × ${height} pixels${cost ? ` · ${cost}` : ""}`;
  };

  // The frame, and its numbers
  const stage = buildFrameStage({ image, limits, state, set });
  const numbers = buildNumbers({ image, limits, state, set });
  const size = h("p", { class: "hint tool-amount", role: "status" });
  const shapes = h("div", { class: "tool-chips", role: "group", "aria-label": "Shapes" });
  const fit = (ratio) => () => set(frames.fitRatio(image, ratio, limits));
  const around = () => set(frames.growSides(image, frames.NO_MARGINS, frames.SIDES, start, limits));
  shapes.append(
    textButton("All around", around, "quiet"),
    textButton("16 : 9", fit(16 / 9), "quiet"),
    textButton("3 : 2", fit(3 / 2), "quiet"),
    textButton("1 : 1", fit(1), "quiet"),
    textButton("2 : 3", fit(2 / 3), "quiet"),
    textButton("9 : 16", fit(9 / 16), "quiet"),
    textButton("Reset", () => set(frames.NO_MARGINS), "quiet"),
  );

  // What is to be drawn
  const prompt = textField({
    label: "What the whole image shows",
    value: image.prompt,
    hint: "Describe the image as it will be, with what surrounds it.",
  });
  const count = countChoice();
  const foot = drawFoot({
    text: "Draw",
    inputs: [prompt.input],
    explain: () => frames.explainFrame(image, state.margins, limits) ?? (prompt.input.value.trim() ? null : "Say what the image shows."),
    draw() {
      const text = prompt.input.value.trim();
      const fields = { ...app.settings("edits"), prompt: text, seed: app.seed(), n: Number(count.value()) };
      for (const side of frames.SIDES) if (state.margins[side]) fields[side] = state.margins[side];
      app.draw([{ route: "edits", fields, images: [image] }], { title: shorten(text), layout: "grid", parents: [image] });
      view.close();
    },
  });

  view.body.append(
    h(
      "div",
      { class: "tool-layout" },
      h("div", { class: "tool-work" }, stage.element),
      h("div", { class: "tool-panel" }, h("div", { class: "tool-group" }, shapes, numbers.element, size), prompt.element),
    ),
  );
  view.actions.append(count.element, ...foot.elements);
  set(state.margins);
}

/** What the frame of an image may be, for a model whose square has a side; 0 if the server does not say. */
function findLimits(image, side) {
  const longest = Math.max(image.width, image.height);
  return {
    side,
    minPixels: MIN_AREA * side * side,
    maxMargin: MAX_MARGIN,
    maxSide: Math.max(MAX_TIMES_SIDE * (side || longest), longest),
    maxPixels: Math.max(MAX_PIXELS, image.width * image.height),
  };
}

/** The four margins as numbers. */
function buildNumbers({ image, limits, state, set }) {
  const inputs = Object.fromEntries(
    frames.SIDES.map((side) => {
      const read = () => set(frames.setMargin(image, state.margins, side, input.valueAsNumber, limits));
      const input = h("input", { id: newId(side), type: "number", min: 0, step: 1, inputmode: "numeric", onchange: read });
      return [side, input];
    }),
  );
  const field = (side) => h("div", { class: `field margin-${side}` }, h("label", { for: inputs[side].id }, NAMES[side]), inputs[side]);
  const element = h("div", { class: "margins", role: "group", "aria-label": "Pixels to add on each side" }, ...frames.SIDES.map(field));
  const update = () => {
    for (const side of frames.SIDES) {
      inputs[side].value = String(state.margins[side]);
      inputs[side].max = String(frames.limitMargin(image, state.margins, side, limits));
    }
  };
  return { element, update };
}

/** The image in its frame, whose sides and corners can be dragged. Returns {element, update}. */
function buildFrameStage({ image, limits, state, set }) {
  const picture = h("img", { class: "frame-image", src: image.url, alt: image.prompt || "the image", draggable: "false" });
  const paper = h("div", { class: "frame-paper" });
  const area = h("div", { class: "frame-area" }, paper, picture);
  const element = h("div", { class: "board frame-board" }, area);
  let view = frames.chooseView(image, state.margins, limits);

  const handles = HANDLES.map((sides) => {
    const handle = buildHandle(sides);
    handle.addEventListener("pointerdown", (event) => drag(event, sides, handle));
    // Corners are for pointers: each side has a handle for keys
    if (sides.length === 1) handle.addEventListener("keydown", (event) => press(event, sides[0]));
    area.append(handle);
    return { sides, handle };
  });

  function drag(event, sides, handle) {
    if (event.button !== 0) return;
    event.preventDefault();
    handle.focus({ preventScroll: true });
    handle.setPointerCapture(event.pointerId);
    const [from, before, zoom] = [{ x: event.clientX, y: event.clientY }, state.margins, view.side / area.clientWidth];
    const move = (moved) => {
      const by = { x: (moved.clientX - from.x) * zoom, y: (moved.clientY - from.y) * zoom };
      set(frames.dragSides(image, before, sides, by, limits, STEP), { settle: false });
    };
    const end = (ended) => {
      handle.removeEventListener("pointermove", move);
      handle.removeEventListener("pointerup", end);
      handle.removeEventListener("pointercancel", end);
      set(ended.type === "pointercancel" ? before : state.margins);
    };
    handle.addEventListener("pointermove", move);
    handle.addEventListener("pointerup", end);
    handle.addEventListener("pointercancel", end);
  }

  function press(event, side) {
    const step = event.shiftKey ? 1 : STEP;
    const outwards = side === "left" || side === "top" ? -1 : 1;
    const [axis, direction] = TOWARDS[event.key] ?? [];
    const along = side === "left" || side === "right" ? "x" : "y";
    let pixels = null;
    if (event.key === "Home") pixels = 0;
    else if (event.key === "PageUp") pixels = state.margins[side] + 4 * STEP;
    else if (event.key === "PageDown") pixels = state.margins[side] - 4 * STEP;
    // The frame follows the arrow; arrows across it make the margin larger and smaller, as sliders do
    else if (axis === along) pixels = state.margins[side] + direction * outwards * step;
    else if (axis) pixels = state.margins[side] + (axis === "y" ? -direction : direction) * step;
    if (pixels === null) return;
    event.preventDefault();
    set(frames.setMargin(image, state.margins, side, pixels, limits));
  }

  function update({ settle }) {
    const { margins } = state;
    // While a side is dragged the scale stays, so that the handle stays under the pointer
    if (settle) view = frames.chooseView(image, margins, limits);
    area.classList.toggle("settling", settle);
    const { width, height } = frames.measureFrame(image, margins);
    place(picture, 0, 0, image.width, image.height);
    place(paper, -margins.left, -margins.top, width, height);
    const xs = { left: -margins.left, right: image.width + margins.right };
    const ys = { top: -margins.top, bottom: image.height + margins.bottom };
    for (const { sides, handle } of handles) {
      const [x, y] = [sides.find((side) => side in xs), sides.find((side) => side in ys)];
      const left = x ? xs[x] : image.width / 2 + (margins.right - margins.left) / 2;
      const top = y ? ys[y] : image.height / 2 + (margins.bottom - margins.top) / 2;
      place(handle, left, top);
      if (sides.length > 1) continue;
      handle.setAttribute("aria-valuenow", String(margins[sides[0]]));
      handle.setAttribute("aria-valuemax", String(frames.limitMargin(image, margins, sides[0], limits)));
      handle.setAttribute("aria-valuetext", `${margins[sides[0]]} pixels`);
    }
  }

  /** Put an element at a point of the image's plane, in percents of the view. */
  function place(target, left, top, width, height) {
    const share = (pixels) => `${(100 * pixels) / view.side}%`;
    target.style.left = share(left - view.left);
    target.style.top = share(top - view.top);
    if (width === undefined) return;
    target.style.width = share(width);
    target.style.height = share(height);
  }

  return { element, update };
}

/** A handle of the frame: a slider for a side, a mere grip for a corner. */
function buildHandle(sides) {
  const shape = { class: `frame-handle ${sides.join(" ")}` };
  if (sides.length > 1) return h("div", { ...shape, "aria-hidden": "true" });
  const upright = sides[0] === "top" || sides[0] === "bottom";
  return h("div", {
    ...shape,
    tabindex: "0",
    role: "slider",
    "aria-label": `${NAMES[sides[0]]} side, pixels to add`,
    "aria-orientation": upright ? "vertical" : "horizontal",
    "aria-valuemin": "0",
  });
}
