// The tool that changes what an image means, from one text to another, as a strip over how far to go.

import { h, iconButton, range } from "./dom.js";
import { drawFoot, pick, shorten, textField } from "./tools/controls.js";
import { spaceNumbers } from "./tools/blend.js";

// By the direction of the change: how far to go, and the person's settings that it takes
const WAYS = {
  prior: { furthest: 1, hint: "At 0 the image comes back as it is. At 1 it has changed as much as the texts do.", settings: ["steps", "prior_steps", "prior_guidance_scale", "prior_sampler"] },
  // The paper goes to 0.25 to 0.5
  text: { furthest: 0.5, hint: "At 0 the image comes back as it is. At 1 nothing but the new direction is left.", settings: ["steps"] },
};
const DEFAULT_FRAMES = 6;
const MAX_FRAMES = 10; // where the server does not say

/** Fill a dialog with the two texts for an image. */
export function openDiff({ image, view, app }) {
  const direction = chooseDirection(app.model);
  const way = WAYS[direction];
  const source = textField({ label: "From", value: image.prompt, placeholder: "what the image shows", rows: 1 });
  const target = textField({ label: "To", placeholder: "what it should show", rows: 1 });
  const swap = iconButton("swap", "Swap the two texts", () => {
    [source.input.value, target.input.value] = [target.input.value, source.input.value];
    foot.update();
  });
  const furthest = range({
    label: "How far",
    min: 0.05,
    max: 1,
    step: 0.05,
    value: way.furthest,
    format: (value) => value.toFixed(2),
    hint: way.hint,
    oninput: () => showStops(),
  });
  const most = app.model.max_n ?? MAX_FRAMES;
  const frames = range({ label: "Images", min: 1, max: most, step: 1, value: Math.min(most, DEFAULT_FRAMES), oninput: () => showStops() });
  const stops = h("ol", { class: "strip-stops", "aria-label": "The strip" });
  const listThetas = () => spaceNumbers(0, furthest.input.valueAsNumber, frames.input.valueAsNumber);

  function showStops() {
    const thetas = listThetas();
    stops.replaceChildren(
      ...thetas.map((theta, place) => {
        const tile = h("div", { class: "strip-tile" }, h("img", { src: image.url, alt: "" }));
        tile.style.setProperty("--share", String(thetas.length > 1 ? place / (thetas.length - 1) : 1));
        return h("li", {}, tile, h("span", {}, theta.toFixed(2)));
      }),
    );
  }

  const foot = drawFoot({
    text: "Draw the strip",
    inputs: [source.input, target.input],
    explain: () => explainTexts(source.input.value, target.input.value),
    draw() {
      const [from, to] = [source.input.value.trim(), target.input.value.trim()];
      const thetas = listThetas();
      // The image keeps its own noise, which guidance would not give back
      const fields = { ...pick(app.settings("edits"), way.settings), source: from, target: to, direction, theta: thetas };
      app.draw([{ route: "edits", fields, images: [image], count: thetas.length }], {
        title: `From “${shorten(from, 30)}” to “${shorten(to, 30)}”`,
        layout: "strip",
        captions: thetas.map((theta) => theta.toFixed(2)),
        parents: [image],
      });
      view.close();
    },
  });

  view.body.append(
    h(
      "div",
      { class: "tool-layout" },
      h("div", { class: "tool-work" }, h("div", { class: "board still" }, h("img", { class: "board-image", src: image.url, alt: image.prompt || "the image" }))),
      h(
        "div",
        { class: "tool-panel" },
        h("div", { class: "diff-texts" }, source.element, swap, target.element),
        h("div", { class: "tool-group" }, furthest.element, frames.element),
        stops,
      ),
    ),
  );
  view.actions.append(...foot.elements);
  showStops();
  // A keyboard on the screen would hide the image
  if (matchMedia("(hover: hover)").matches) (source.input.value ? target : source).input.focus();
}

/** The direction of a model's changes: with a prior the images stay what the model knows. */
export const chooseDirection = (model) => (model.defaults?.candidates === undefined ? "text" : "prior");

/** What keeps two texts from being drawn, as a sentence; null if nothing does. */
export function explainTexts(source, target) {
  const [from, to] = [source, target].map((text) => text.trim().replace(/\s+/g, " ").toLowerCase());
  if (!from) return "Say what the image shows now.";
  if (!to) return "Say what it should show.";
  if (from === to) return "The two texts are the same.";
  return null;
}
