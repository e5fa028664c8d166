// The prompt: a field that grows, words that the model has never seen underlined, and examples to begin with.

import { h } from "./dom.js";

// Prompts to press on the empty page: words that any model of images has seen
const EXAMPLES = [
  "a cat", "red apple", "rocket", "smiling face with sunglasses", "sailboat", "a fox", "strawberry", "rainbow", "waving hand: dark skin tone",
  "snow-capped mountain", "a butterfly", "pineapple", "red heart", "sunflower",
];
const SHOWN_EXAMPLES = 6;
const TYPING_PAUSE = 350; // milliseconds

export class Composer {
  /** ondraw: called with the prompt. */
  constructor(app, ondraw) {
    Object.assign(this, { app, ondraw, checked: new Map() });
    this.form = document.querySelector("#composer");
    this.input = document.querySelector("#prompt");
    this.words = document.querySelector("#prompt-words");
    this.note = document.querySelector("#prompt-note");
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    this.input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.submit();
    });
    this.input.addEventListener("input", () => this.change());
    this.input.addEventListener("scroll", () => (this.words.scrollTop = this.input.scrollTop));
    this.showExamples();
  }

  showExamples() {
    const left = [...EXAMPLES];
    const shown = Array.from({ length: SHOWN_EXAMPLES }, () => left.splice(Math.floor(Math.random() * left.length), 1)[0]);
    const press = (text) => {
      this.write(text);
      this.submit();
    };
    document.querySelector("#examples").replaceChildren(...shown.map((text) => h("button", { class: "chip", type: "button", onclick: () => press(text) }, text)));
  }

  /** Take prompts: the model is known. */
  ready() {
    this.isReady = true;
    this.change();
  }

  focus() {
    this.input.focus();
    this.input.select();
  }

  write(text) {
    this.input.value = text;
    this.change();
  }

  submit() {
    const prompt = this.input.value.trim();
    if (!prompt) {
      this.note.textContent = "Write a few words first.";
      this.input.focus();
    } else if (this.isReady) this.ondraw(prompt);
  }

  change() {
    this.input.style.height = "auto";
    this.input.style.height = `${this.input.scrollHeight}px`;
    this.show([]);
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.check(), TYPING_PAUSE);
  }

  /** Ask the server which words the model has never seen. */
  async check() {
    const text = this.input.value;
    if (!text.trim() || !this.app.model.knows_words) return;
    try {
      if (!this.checked.has(text)) this.checked.set(text, await this.app.api.findUnknownWords(text));
      if (this.input.value === text) this.show(this.checked.get(text));
    } catch {
      // A server that is away or busy may answer for the next words
    }
  }

  /** Underline words. unknown: [{word, near}]. */
  show(unknown) {
    const text = this.input.value;
    const parts = [];
    let rest = text;
    for (const { word } of unknown) {
      const at = rest.toLowerCase().indexOf(word.toLowerCase());
      if (at < 0) continue;
      parts.push(rest.slice(0, at), h("mark", {}, rest.slice(at, at + word.length)));
      rest = rest.slice(at + word.length);
    }
    this.words.replaceChildren(...parts, rest);
    this.note.textContent = unknown.map(describe).join(" ");
  }
}

function describe({ word, near }) {
  const instead = near?.length ? ` One that it knows: ${near[0]}.` : "";
  return `The model has never seen “${word}”.${instead}`;
}
