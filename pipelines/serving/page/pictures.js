// Images as the page shows them: thumbnails, the path to an image from its ancestors, and the places of a card.

import { h, icon, iconButton } from "./dom.js";
import { findCard, findPath } from "./history.js";

/** Return words for an image that no other of its card has. */
export function nameImage(item, card = findCard(item)) {
  const words = item.prompt || card?.title || "without words";
  const ids = card?.items ?? [];
  return ids.length > 1 ? `${words}, ${ids.indexOf(item.id) + 1} of ${ids.length}` : words;
}

/** Return a thumbnail that opens its image. */
export function buildThumbnail(item, app) {
  return h("button", { class: "thumbnail", type: "button", "aria-label": `Open the image: ${nameImage(item)}`, onclick: () => app.view(item) }, h("img", { src: item.url, alt: "", loading: "lazy" }));
}

/** Return the steps of the path to images that are drawn from some parents, the oldest first; none without parents. */
export async function findSteps(parents) {
  return parents.length ? [...(await findPath(parents[0])), parents] : [];
}

/** Return a path as thumbnails; null without steps. */
export function buildPath(steps, app) {
  if (!steps.length) return null;
  const list = h("ol", { class: "path", "aria-label": "Drawn from" });
  for (const step of steps) list.append(h("li", {}, step.map((item) => buildThumbnail(item, app)), icon("next")));
  return list;
}

/** One place for an image in a card: empty, with a preview, or with the image. */
export class Slot {
  constructor(view, caption) {
    this.view = view;
    this.item = null;
    this.image = h("img", { alt: "", decoding: "async" });
    this.frame = h("div", { class: "picture-frame blank" });
    this.tools = h("div", { class: "picture-tools" });
    this.element = h("figure", { class: "picture" }, this.frame, caption ? h("figcaption", {}, caption) : null, this.tools);
  }

  /** Show an estimate of the image. */
  preview(blob) {
    if (this.item) return;
    const url = URL.createObjectURL(blob);
    const image = h("img", { alt: "", class: "preview", src: url });
    image.addEventListener("load", () => {
      URL.revokeObjectURL(url);
      if (this.item) return;
      this.frame.classList.remove("blank");
      // The one before stays below, so that each preview appears over the last
      this.frame.append(image);
      setTimeout(() => [...this.frame.children].slice(0, -1).forEach((older) => older.remove()), 400);
    });
  }

  /** Show an item, with its actions. */
  show(item) {
    const { app, card } = this.view;
    const label = nameImage(item, card);
    Object.assign(this, { item, label });
    this.element.dataset.item = item.id;
    this.image.src = item.url;
    this.image.width = item.width;
    this.image.height = item.height;
    const open = h("button", { class: "picture-open", type: "button", "aria-label": `Open the image: ${label}`, onclick: () => app.view(item) }, this.image);
    this.frame.classList.remove("blank");
    this.frame.classList.toggle("wide", item.width > item.height);
    this.frame.replaceChildren(open);
    this.star = iconButton("star", "Star", () => app.actions.star.run(item), { class: "star" });
    const text = (name) => {
      const action = app.actions[name];
      return h("button", { class: "button text", type: "button", title: action.hint, "aria-label": `${action.label}: ${label}`, onclick: () => action.run(item) }, icon(action.icon), h("span", {}, action.label));
    };
    const more = iconButton("more", `More actions: ${label}`, (event) => app.openMenu(item, event.currentTarget), { "aria-haspopup": "menu" });
    // Those that the menu has too show where there is room
    const roomy = (name) => {
      const action = app.actions[name];
      return action.isPossible(item) ? iconButton(action.icon, `${action.label}: ${label}`, () => action.run(item), { class: "roomy", title: action.label }) : null;
    };
    const buttons = [text("variations"), text("edit"), text("mix"), h("span", { class: "spacer" }), roomy("again"), roomy("download"), this.star, more];
    this.tools.replaceChildren(...buttons.filter(Boolean));
    this.mark();
  }

  /** Show whether the image has a star. */
  mark() {
    this.star.setAttribute("aria-pressed", this.item.starred);
    this.star.setAttribute("aria-label", `Star: ${this.label}`);
  }

  focus() {
    this.element.querySelector(".picture-open")?.focus();
  }
}
