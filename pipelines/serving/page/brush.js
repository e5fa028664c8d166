// The tool that paints a part of an image anew, by brush, or the whole of it.

import { h, iconButton, range } from "./dom.js";
import { choice, countChoice, drawFoot, isTyping, shorten, textField } from "./tools/controls.js";
import { describeCost } from "./tools/frame.js";
import { Mask, explainMask, listAreas } from "./tools/mask.js";
import { buildStage } from "./tools/stage.js";

const DEFAULT_STRENGTH = 0.6; // as the API's

/** Fill a dialog with the brush for an image. */
export function openBrush({ image, view, app }) {
  const mask = new Mask(image.width, image.height);
  const side = Math.min(image.width, image.height);
  const brush = { erases: false, radius: Math.max(1, side / 12), maxRadius: side / 2 };
  const panel = { part: true };
  const refresh = () => [stage.repaint, bar.update, areas.update, foot.update].forEach((update) => update());

  // The image with the brush over it, and the brush's controls
  const stage = buildStage({ image, mask, brush, onchange: refresh, onresize: (radius) => bar.size.set(radius) });
  const bar = buildBar({ mask, brush, stage, refresh, cost: describeCost(image, app.model.side ?? 0) });
  const areas = buildAreas(mask, refresh);
  const partControls = h("div", { class: "tool-group" }, bar.elements, areas.element);

  // What is to be drawn
  const prompt = textField({
    label: "What the whole image shows",
    value: image.prompt,
    hint: "Describe all of it, not only the part that changes.",
  });
  const percent = (value) => `${Math.round(100 * value)} %`;
  const strength = range({ label: "How much changes", min: 0.05, max: 1, step: 0.05, value: DEFAULT_STRENGTH, format: percent });
  strength.element.hidden = true;
  const mode = choice({
    label: "What changes",
    options: [["part", "A part"], ["whole", "All of it"]],
    value: "part",
    onchange(value) {
      panel.part = value === "part";
      partControls.hidden = !panel.part;
      strength.element.hidden = panel.part;
      stage.enable(panel.part);
      foot.update();
    },
  });
  const count = countChoice();
  const foot = drawFoot({
    text: "Draw",
    inputs: [prompt.input],
    explain: () => (prompt.input.value.trim() ? (panel.part ? explainMask(mask) : null) : "Say what the image shows."),
    async draw() {
      const text = prompt.input.value.trim();
      const fields = { ...app.settings("edits"), prompt: text, seed: app.seed(), n: Number(count.value()) };
      const kind = panel.part ? { fields, mask: await encodeMask(mask) } : { fields: { ...fields, strength: strength.input.valueAsNumber } };
      app.draw([{ route: "edits", images: [image], ...kind }], { title: shorten(text), layout: "grid", parents: [image] });
      view.close();
    },
  });

  const controls = [mode.element, partControls, prompt.element, strength.element];
  view.body.append(h("div", { class: "tool-layout" }, h("div", { class: "tool-work" }, stage.element), h("div", { class: "tool-panel" }, controls)));
  view.actions.append(count.element, ...foot.elements);
  view.dialog.addEventListener("close", stage.close, { once: true });
  listenForKeys(view, { app, mask, brush, panel, bar, refresh });
  stage.element.focus({ preventScroll: true });
  refresh();
}

/** What the brush does, its size, undo and redo, and how much is selected. Returns {elements, kind, size, update}. */
function buildBar({ mask, brush, stage, refresh, cost }) {
  const kind = choice({
    label: "The brush",
    options: [["paint", "Select"], ["erase", "Erase"]],
    value: "paint",
    onchange: (value) => (brush.erases = value === "erase"),
  });
  const size = buildSize(brush, stage);
  const build = (icon, label, action) =>
    iconButton(icon, label, () => {
      mask[action]();
      refresh();
    });
  const [undo, redo] = [build("undo", "Undo", "undo"), build("redo", "Redo", "redo")];
  const others = [build("invert", "Invert the selection", "invert"), build("trash", "Clear the selection", "clear")];
  const selected = h("span", { role: "status" });
  const elements = [
    h("div", { class: "tool-bar" }, kind.element, h("div", { class: "tool-buttons" }, undo, redo, others), size.element),
    h("p", { class: "hint tool-amount" }, selected, cost && ` · ${cost}`),
  ];
  const update = () => {
    undo.disabled = !mask.done.length;
    redo.disabled = !mask.undone.length;
    const percent = (100 * mask.painted) / mask.data.length;
    selected.textContent = percent > 0 && percent < 1 ? "Less than 1 % selected" : `${Math.round(percent)} % selected`;
  };
  return { elements, kind, size, update };
}

/** The slider of the brush's diameter, in pixels of the image. */
function buildSize(brush, stage) {
  const low = 1;
  const high = Math.max(2, Math.round(2 * brush.maxRadius));
  const slider = range({
    label: "Size",
    min: low,
    max: high,
    step: 1,
    value: Math.round(2 * brush.radius),
    format: (value) => `${value} px`,
    oninput: (value) => {
      brush.radius = Number(value) / 2;
      stage.repaint();
    },
  });
  /** Set the radius, from keys or a wheel. */
  const set = (radius) => {
    const diameter = Math.min(high, Math.max(low, Math.round(2 * radius)));
    slider.input.value = String(diameter);
    slider.input.dispatchEvent(new Event("input"));
  };
  return { element: slider.element, set };
}

/** Nine buttons that select, or erase, a ninth of the image each: for those who do not draw with a pointer. */
function buildAreas(mask, refresh) {
  const areas = listAreas(mask.width, mask.height);
  const buttons = areas.map((area) =>
    h("button", {
      class: "area",
      type: "button",
      "aria-label": area.name,
      title: area.name,
      "aria-pressed": "false",
      onclick() {
        mask.begin();
        mask.fillBox(area, mask.measure(area) === 1 ? 0 : 1);
        mask.end();
        refresh();
      },
    }),
  );
  const grid = h("div", { class: "areas", role: "group", "aria-label": "Areas of the image" }, ...buttons);
  const element = h("details", { class: "tool-details" }, h("summary", {}, "Select areas by name"), grid);
  const update = () =>
    buttons.forEach((button, place) => {
      const part = mask.measure(areas[place]);
      button.setAttribute("aria-pressed", part === 1 ? "true" : part === 0 ? "false" : "mixed");
    });
  return { element, update };
}

/** Keys of the whole dialog: undo and redo, size, erase. */
function listenForKeys(view, { app, mask, brush, panel, bar, refresh }) {
  view.dialog.addEventListener("keydown", onKey);
  view.dialog.addEventListener("close", () => view.dialog.removeEventListener("keydown", onKey), { once: true });

  function onKey(event) {
    if (!panel.part || isTyping(event) || event.altKey) return;
    const key = event.key.toLowerCase();
    if (event.ctrlKey || event.metaKey) {
      const action = key === "y" || (key === "z" && event.shiftKey) ? "redo" : key === "z" ? "undo" : null;
      if (!action) return;
      mask[action]();
      refresh();
    } else if (!app.takesKey(key)) {
      return;
    } else if (key === "[" || key === "]") {
      const step = Math.max(1, Math.round(0.2 * brush.radius));
      bar.size.set(brush.radius + (key === "]" ? step : -step));
    } else if (key === "e" || key === "b") {
      bar.kind.select(key === "e" ? "erase" : "paint");
    } else return;
    event.preventDefault();
  }
}

/** The file of a mask, transparent where it is to be painted. */
async function encodeMask(mask) {
  const canvas = new OffscreenCanvas(mask.width, mask.height);
  canvas.getContext("2d").putImageData(new ImageData(mask.toPixels(), mask.width, mask.height), 0, 0);
  return canvas.convertToBlob({ type: "image/png" });
}
