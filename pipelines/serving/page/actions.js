// What can be done with an image: one list for the buttons under it, its menu, its large view, and the keyboard.

import { nameFile } from "./api.js";
import { h, icon, newId, toast } from "./dom.js";
import { findRequest, hasChance } from "./gallery.js";
import { findItems, setStar } from "./history.js";
import { readFields } from "./settings.js";
import { showSnippets } from "./snippets.js";

/**
 * Return the actions by name: {label, hint, icon, key, run(item), isPossible(item), staysOpen}.
 * staysOpen: the large view of the image remains.
 */
export function buildActions(app) {
  const name = (item) => item.prompt || "an image";
  const always = () => true;
  return {
    variations: {
      label: "Variations", icon: "variations", key: "v", hint: "Other images with the same meaning", isPossible: always,
      run: (item) => {
        const fields = { ...app.settings("variations"), n: app.count, seed: app.seed() };
        return app.draw([{ route: "variations", fields, images: [item] }], { title: describeVariations(item), parents: [item] });
      },
    },
    edit: { label: "Edit", icon: "brush", key: "e", hint: "Paint over a part, and say what belongs there", isPossible: always, run: (item) => app.openTool("edit", item) },
    mix: { label: "Mix", icon: "mix", key: "m", hint: "Mix its meaning with that of other images and texts", isPossible: always, run: (item) => app.openTool("mix", item) },
    extend: { label: "Extend", icon: "extend", key: "x", hint: "Paint beyond its edges", isPossible: always, run: (item) => app.openTool("extend", item) },
    change: { label: "Change", icon: "change", key: "c", hint: "Move its meaning from one text towards another", isPossible: always, run: (item) => app.openTool("change", item) },
    again: {
      label: "Same again", icon: "again", key: "r", hint: "The same words and settings, with new seeds", isPossible: (item) => Boolean(findOrigin(item)) && hasChance(findOrigin(item)),
      run: async (item) => {
        const request = findOrigin(item);
        const parents = await findItems(item.parents);
        const fields = { ...request.fields, n: app.count, seed: app.newSeed() };
        return app.draw([{ ...request, fields }], { title: request.fields.prompt ?? name(item), parents });
      },
    },
    recall: {
      label: "Use settings", icon: "recall", key: "u", hint: "Words, settings and seed, to draw the same image or change one thing", isPossible: (item) => Boolean(item.record),
      run: (item) => app.recall(item),
    },
    upsample: {
      label: "Upsample", icon: "upsample", key: "z", hint: "The same image, drawn larger", isPossible: () => app.model.upsample > 0,
      run: (item) => {
        const fields = { seed: app.seed(), upsample: 1 };
        return app.draw([{ route: "upsamplings", fields, images: [item] }], { title: `${name(item)}, larger`, parents: [item] });
      },
    },
    download: { staysOpen: true, label: "Download", icon: "download", key: "d", hint: "The PNG file, with its settings in it", isPossible: always, run: (item) => saveFile(item.blob, nameFile(item)) },
    code: {
      staysOpen: true, label: "As code", icon: "copy", key: "p", hint: "Copy the drawing as Python or curl", isPossible: (item) => Boolean(findOrigin(item)),
      run: async (item) => {
        const request = findOrigin(item);
        const images = await Promise.all((request.images ?? []).map(async (image) => (image.id ? ((await findItems([image.id]))[0] ?? image) : image)));
        showSnippets({ ...request, images }, app.model.id);
      },
    },
    star: {
      staysOpen: true, label: "Star", icon: "star", key: "f", hint: "Keep it, whatever else goes", isPossible: always,
      run: async (item) => {
        const isKept = await setStar(item, !item.starred);
        app.gallery.mark(item);
        if (!isKept) toast("The browser has no room to keep this");
        else toast(item.starred ? "Starred" : "Star removed");
      },
    },
    remove: { label: "Remove", icon: "trash", key: "Delete", hint: "Forget it", isPossible: always, run: (item) => app.gallery.remove(item) },
  };
}

/** Return the request that draws an item: the one that did, or by its record if a prompt alone drew it elsewhere. */
function findOrigin(item) {
  const request = findRequest(item);
  if (request) return request;
  const { record } = item;
  if (!record?.prompt || record.image || record.mask_image || record.images || record.anchors) return null;
  return { route: "generations", fields: { prompt: record.prompt, ...readFields(record), n: 1 }, images: [] };
}

const describeVariations = (item) => (item.prompt ? `Variations of ${item.prompt.replace(/^Variations of /, "")}` : "Variations");

/** Let the person save a file. */
export function saveFile(blob, name) {
  const url = URL.createObjectURL(blob);
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** Open the menu of an image's actions beside a button. */
export function openMenu(item, actions, button) {
  const menu = h("div", { class: "menu", role: "menu", popover: "auto", id: newId("menu"), "aria-label": "Actions" });
  for (const action of Object.values(actions)) {
    if (!action.isPossible(item)) continue;
    const run = () => {
      menu.hidePopover();
      action.run(item);
    };
    const key = h("kbd", { "aria-hidden": "true" }, action.key === "Delete" ? "Del" : action.key);
    menu.append(h("button", { type: "button", role: "menuitem", tabindex: -1, title: action.hint, onclick: run }, icon(action.icon), h("span", {}, action.label), key));
  }
  const entries = [...menu.children];
  menu.addEventListener("keydown", (event) => {
    const at = entries.indexOf(document.activeElement);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: -1 }[event.key];
    if (event.key === "Tab") menu.hidePopover();
    if (to === undefined) return;
    event.preventDefault();
    entries.at(to % entries.length).focus();
  });
  menu.addEventListener("toggle", (event) => {
    if (event.newState !== "closed") return;
    const hadFocus = menu.contains(document.activeElement) || document.activeElement === document.body;
    menu.remove();
    if (hadFocus && button.isConnected) button.focus();
  });
  // Where the button is: what is outside of an open dialog takes no presses
  button.closest("dialog, main").append(menu);
  menu.showPopover();
  placeMenu(menu, button.getBoundingClientRect());
  entries[0].focus();
}

function placeMenu(menu, { left, right, top, bottom }) {
  const { offsetWidth: width, offsetHeight: height } = menu;
  const x = Math.max(8, Math.min(right - width, innerWidth - width - 8, Math.max(left, 8)));
  const y = bottom + 6 + height <= innerHeight ? bottom + 6 : Math.max(8, top - 6 - height);
  menu.style.left = `${x}px`;
  menu.style.top = `${y}px`;
}
