// The large view of one image, with what it was drawn from, what was drawn from it, and its settings; and the choice of
// images for a tool.

import { h, icon, iconButton, openView } from "./dom.js";
import { findChildren, findItems, readItems } from "./history.js";
import { buildPath, buildThumbnail, findSteps, nameImage } from "./pictures.js";

const RECORD_LABELS = {
  seed: "Seed",
  num_inference_steps: "Steps",
  guidance_scale: "Guidance",
  sampler: "Sampler",
  eta: "Distance",
  strength: "Strength",
  direction: "Direction",
  theta: "Theta",
  source: "From",
  target: "To",
  anchors: "Mixed from",
  weights: "Weights",
  negative_prompt: "Negative prompt",
  prior_num_inference_steps: "Prior steps",
  prior_guidance_scale: "Prior guidance",
  prior_candidates: "Candidates",
  upsample: "Upsampled",
  model: "Model",
};

/** Open the large view of an item. Arrow keys lead to the next image of the gallery. */
export function openViewer(first, app) {
  const view = openView(first.prompt || "Image", { kind: "viewer" });
  let item = first;
  const neighbours = () => [...new Set([...document.querySelectorAll(".picture[data-item]")].map((element) => element.dataset.item))];
  const move = async (by) => {
    const ids = neighbours();
    const at = ids.indexOf(item.id) + by;
    const [next] = await findItems(ids.slice(Math.max(0, at), at + 1));
    if (next) show(next);
  };
  const show = async (next) => {
    item = next;
    const content = await readContent(next);
    // Another one may have been asked for meanwhile
    if (item === next) fill(view, content, app, { move, show });
  };
  view.dialog.addEventListener("keydown", (event) => {
    if (event.target.closest("[role=menu], input, textarea") || event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "ArrowRight") move(1);
    else if (event.key === "ArrowLeft") move(-1);
    else {
      const action = findAction(app, event.key, item);
      if (action) run(view, action, item, () => show(item));
      if (!action) return;
    }
    event.preventDefault();
  });
  show(first);
}

/** Return what the view shows of an item: {item, steps, children}. steps: of the path to it, the oldest first. */
async function readContent(item) {
  const steps = await findSteps(await findItems(item.parents));
  const children = (await Promise.all(findChildren(item).map((card) => findItems(card.items)))).flat();
  return { item, steps, children };
}

/** Return the action of a key, if it is possible for an item, and the key is not turned off. */
export const findAction = (app, key, item) => (app.takesKey(key) ? Object.values(app.actions).find((action) => action.key === key && action.isPossible(item)) : undefined);

/** Run an action of the view. Those that lead elsewhere close it first. */
function run(view, action, item, refresh) {
  if (action.staysOpen) {
    Promise.resolve(action.run(item)).then(refresh);
  } else {
    view.close();
    action.run(item);
  }
}

function fill(view, { item, steps, children }, app, { move, show }) {
  view.setTitle(item.prompt || "Image");
  const go = { ...app, view: show };
  const image = h("img", { src: item.url, alt: item.prompt || "Image without words", width: item.width, height: item.height });
  const stage = h("div", { class: "viewer-stage" }, iconButton("previous", "Previous image", () => move(-1), { class: "turn" }), image, iconButton("next", "Next image", () => move(1), { class: "turn" }));

  const actions = h("div", { class: "action-list", role: "group", "aria-label": "Actions" });
  for (const [name, action] of Object.entries(app.actions)) {
    if (!action.isPossible(item)) continue;
    const pressed = name === "star" ? item.starred : undefined;
    const given = { class: `button row ${name}`, type: "button", title: `${action.hint} (${action.key})`, onclick: () => run(view, action, item, () => show(item)) };
    actions.append(h("button", { ...given, ...(pressed === undefined ? {} : { "aria-pressed": String(pressed) }) }, icon(action.icon), h("span", {}, action.label)));
  }

  const path = buildPath(steps, go);
  const side = h(
    "div",
    { class: "side" },
    path ? h("section", {}, h("h3", {}, "Drawn from"), path) : null,
    actions,
    children.length ? h("section", {}, h("h3", {}, "Drawn from it"), h("div", { class: "children" }, children.map((child) => buildThumbnail(child, go)))) : null,
    buildDetails(item),
  );
  const focused = view.body.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") ?? document.activeElement.textContent : null;
  view.body.replaceChildren(stage, side);
  // The same button keeps the focus when its image has changed
  if (focused) [...view.body.querySelectorAll("button")].find((button) => (button.getAttribute("aria-label") ?? button.textContent) === focused)?.focus();
}

/** Return the settings of an image, as its file has them. */
function buildDetails(item) {
  const list = h("dl", { class: "details" });
  const add = (label, value) => list.append(h("div", {}, h("dt", {}, label), h("dd", {}, String(value))));
  add("Size", `${item.width} × ${item.height}`);
  for (const [name, label] of Object.entries(RECORD_LABELS)) {
    const value = item.record?.[name];
    // Of images that are no mix, `weights` is a digest of the model's
    if (value === undefined || value === null || (name === "weights" && !Array.isArray(value))) continue;
    if (Array.isArray(value)) add(label, value.join(", "));
    else add(label, typeof value === "object" ? (value.scale ?? JSON.stringify(value)) : value);
  }
  return h("section", {}, h("h3", {}, "Settings"), list);
}

/** Let the person choose images of the history, or a file. Returns the items; none if nothing was chosen. */
export async function chooseItems({ title = "Choose an image", multiple = false }, app) {
  const items = await readItems();
  const view = openView(title, { kind: "chooser" });
  const chosen = new Set();
  return new Promise((resolve) => {
    const done = () => {
      resolve([...chosen]);
      view.close();
    };
    const toggle = (item, button) => {
      if (!multiple) chosen.clear();
      if (chosen.has(item)) chosen.delete(item);
      else chosen.add(item);
      if (!multiple) return done();
      button.setAttribute("aria-pressed", chosen.has(item));
      use.disabled = !chosen.size;
    };
    const grid = h("div", { class: "choices" });
    for (const item of items) {
      const given = { class: "thumbnail large", type: "button", "aria-label": nameImage(item), ...(multiple ? { "aria-pressed": "false" } : {}) };
      grid.append(h("button", { ...given, onclick: (event) => toggle(item, event.currentTarget) }, h("img", { src: item.url, alt: "", loading: "lazy" })));
    }
    const open = async () => {
      const item = await app.openFile();
      if (!item) return;
      chosen.add(item);
      done();
    };
    const use = h("button", { class: "button primary", type: "button", disabled: true, onclick: done }, "Use these");
    view.body.append(items.length ? grid : h("p", { class: "hint" }, "Nothing is drawn yet. Open a file."));
    view.actions.append(h("button", { class: "button quiet", type: "button", onclick: open }, icon("image"), h("span", {}, "Open a file")));
    if (multiple) view.actions.append(use);
    view.dialog.addEventListener("close", () => resolve([]));
  });
}
