// Parts that several tools have: a prompt, a choice of a few, the number of images, the button that draws.

import { h, newId } from "../dom.js";

/** A text field of several lines under its label, with a hint below. Returns {element, input}. */
export function textField({ label, value = "", hint = "", placeholder = "", rows = 2 }) {
  const id = newId("text");
  const described = hint ? { "aria-describedby": `${id}-hint` } : {};
  const input = h("textarea", { id, rows, placeholder, maxlength: 4096, ...described });
  input.value = value;
  const element = h("div", { class: "field" }, h("label", { for: id }, label), input);
  if (hint) element.append(h("p", { class: "hint", id: `${id}-hint` }, hint));
  return { element, input };
}

/** A choice of a few, as radio buttons in one row. options: [[value, text], ...]. Returns {element, value()}. */
export function choice({ label, options, value, onchange = () => {} }) {
  const name = newId("choice");
  const inputs = options.map(([option]) => {
    const input = h("input", { type: "radio", name, value: option, onchange: () => onchange(option) });
    input.checked = option === value;
    return input;
  });
  const parts = options.map(([, text], place) => h("label", {}, inputs[place], h("span", {}, text)));
  const element = h("div", { class: "segmented", role: "radiogroup", "aria-label": label }, ...parts);
  return {
    element,
    value: () => inputs.find((input) => input.checked)?.value,
    select(option) {
      const input = inputs.find((other) => other.value === option);
      if (!input || input.checked) return;
      input.checked = true;
      onchange(option);
    },
  };
}

/** The number of images to draw: 1, 2 or 4. */
export function countChoice() {
  const found = choice({ label: "Number of images", options: [["1", "1"], ["2", "2"], ["4", "4"]], value: "4" });
  const element = h("div", { class: "tool-count" }, h("span", { class: "hint", "aria-hidden": "true" }, "Images"), found.element);
  return { ...found, element };
}

/** A button with a text. */
export function textButton(text, onclick, kind = "") {
  return h("button", { class: `button ${kind}`.trim(), type: "button", onclick }, text);
}

/** The foot of a tool: what keeps it from drawing, said as it changes, and the button that draws.
 *
 * inputs: texts that change it, in which Enter draws. explain() returns a sentence, or null where the tool may draw.
 * Returns {elements, update}.
 */
export function drawFoot({ text, inputs = [], explain, draw }) {
  const reason = h("p", { class: "hint tool-reason", role: "status" });
  const button = h("button", { class: "button primary", type: "button" }, text);
  const update = () => {
    const found = explain() ?? "";
    if (reason.textContent !== found) reason.textContent = found;
    // It stays focusable, so that a screen reader can say why it does nothing
    button.setAttribute("aria-disabled", String(found !== ""));
  };
  button.addEventListener("click", () => {
    update();
    if (reason.textContent !== "") return;
    button.disabled = true; // it draws once
    draw();
  });
  for (const input of inputs) {
    input.addEventListener("input", update);
    input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      button.click();
    });
  }
  update();
  return { elements: [reason, button], update };
}

/** Whether a key is meant for a text that has the focus. */
export function isTyping(event) {
  return event.target.matches?.("textarea, select, input:not([type=radio], [type=checkbox], [type=range])");
}

/** Some of a person's settings, those that a task takes. */
export function pick(settings, names) {
  return Object.fromEntries(Object.entries(settings).filter(([name]) => names.includes(name)));
}

/** A text as titles show it. */
export function shorten(text, length = 60) {
  const line = text.trim().replace(/\s+/g, " ");
  return line.length > length ? `${line.slice(0, length - 1)}…` : line;
}
