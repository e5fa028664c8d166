// Helpers for elements. Values become text nodes and attributes, never markup.

/** Return an element. Attributes that begin with "on" are listeners; undefined, null and false leave one out. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else if (name === "dataset") Object.assign(element.dataset, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== undefined && child !== null && child !== false));
  return element;
}

/** Return an icon of the sprite in index.html, hidden from screen readers: its button has the name. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  svg.setAttribute("class", "glyph");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** Return a button with an icon alone; its label is its name and its tooltip. */
export function iconButton(name, label, onclick, attributes = {}) {
  const { class: extra = "", ...others } = attributes;
  const given = { class: `button icon ${extra}`, type: "button", "aria-label": label, title: label, onclick, ...others };
  return h("button", given, icon(name));
}

let lastNumber = 0;

/** Return a name for an element that no other has. */
export const newId = (prefix) => `${prefix}-${++lastNumber}`;

/** Return a labelled slider that shows its value: {element, input, set(value)}. */
export function range({ label, min, max, step, value, hint, format = String, oninput = () => {} }) {
  const id = newId("range");
  const output = h("output", { for: id, class: "range-value" });
  const input = h("input", { id, type: "range", min, max, step, value });
  const show = () => {
    const share = (input.valueAsNumber - min) / (max - min);
    input.style.setProperty("--fill", `${100 * share}%`);
    output.textContent = format(input.valueAsNumber);
    input.setAttribute("aria-valuetext", output.textContent);
  };
  input.addEventListener("input", () => {
    show();
    oninput(input.valueAsNumber);
  });
  show();
  const note = hint ? h("p", { class: "hint", id: `${id}-hint` }, hint) : null;
  if (note) input.setAttribute("aria-describedby", note.id);
  const head = h("div", { class: "range-head" }, h("label", { for: id }, label), output);
  const set = (given) => {
    input.value = given;
    show();
  };
  return { element: h("div", { class: "range" }, head, input, note), input, set };
}

/** Open a dialog with a heading, a body and a foot, and return {dialog, body, actions, close, setTitle}. */
export function openView(title, { kind = "" } = {}) {
  const id = newId("dialog");
  const heading = h("h2", { id }, title);
  const body = h("div", { class: "view-body" });
  const actions = h("div", { class: "view-actions" });
  const opener = document.activeElement;
  const dialog = h("dialog", { class: `view ${kind}`, "aria-labelledby": id });
  const close = () => dialog.close();
  const head = h("div", { class: "view-head" }, heading, iconButton("close", "Close", close));
  dialog.append(head, body, actions);
  // A press that begins and ends on the backdrop closes; a brush stroke that ends there does not
  let pressed = null;
  dialog.addEventListener("pointerdown", (event) => (pressed = event.target));
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog && pressed === dialog) close();
  });
  dialog.addEventListener("close", () => {
    dialog.remove();
    if (opener?.isConnected) opener.focus({ preventScroll: true });
  });
  document.body.append(dialog);
  dialog.showModal();
  return { dialog, body, actions, close, setTitle: (text) => (heading.textContent = text) };
}

/** Announce a sentence to screen readers, politely. */
export function say(text) {
  document.querySelector("#announcer").textContent = text;
}

let toastTimer = 0;

/** Show a short note at the foot of the page for a few seconds, and announce it. action: {label, run} of a button in it. */
export function toast(text, action = null) {
  const note = document.querySelector("#toast");
  const hide = () => {
    // One who is about to press has time
    if (note.matches(":hover, :focus-within")) return wait();
    note.classList.remove("shown");
    button?.remove();
  };
  const wait = () => (toastTimer = setTimeout(hide, action ? 10_000 : 3500));
  const press = () => {
    button.remove();
    note.classList.remove("shown");
    action.run();
  };
  const button = action && h("button", { class: "toast-button", type: "button", onclick: press }, action.label);
  note.replaceChildren(h("span", {}, text), ...(button ? [button] : []));
  note.classList.add("shown");
  clearTimeout(toastTimer);
  wait();
}
