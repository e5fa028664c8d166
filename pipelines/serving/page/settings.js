// Settings: what the person changed, kept in this browser; all else is the server's own default and is not sent.

import { h, icon, iconButton, newId, range, say } from "./dom.js";

const KEPT_UNDER = "t2i.settings";
const MAX_SEED = 2 ** 32 - 1;
const whole = (value) => String(Math.round(value));
const decimal = (value) => value.toFixed(1);
const percent = (value) => `${Math.round(100 * value)} %`;

// The sliders, by the API's names. routes: g, e, v for generations, edits, variations. fallback: where the server names
// no default. A value beyond a slider's end, as another program may have used, moves the end.
const SLIDERS = {
  n: { label: "Images at once", min: 1, max: 10, step: 1, format: whole, routes: "gev", fallback: 4, group: "" },
  steps: { label: "Steps", min: 1, max: 100, step: 1, format: whole, routes: "gev", fallback: 25, group: "", hint: "More steps take longer, and draw finer." },
  guidance_scale: { label: "Guidance", min: 1, max: 10, step: 0.1, format: decimal, routes: "gev", fallback: 1.5, group: "", hint: "How closely an image keeps to its meaning. 1 is off." },
  eta: { label: "Distance of variations", min: 0, max: 1, step: 0.05, format: percent, routes: "v", fallback: 1, group: "", hint: "0 % is the image itself, 100 % only its meaning." },
  prior_steps: { label: "Steps", min: 1, max: 100, step: 1, format: whole, routes: "ge", fallback: 25, group: "prior" },
  prior_guidance_scale: { label: "Guidance", min: 1, max: 10, step: 0.1, format: decimal, routes: "ge", fallback: 2, group: "prior", hint: "How closely the meaning keeps to the words." },
  candidates: { label: "Candidates", min: 1, max: 16, step: 1, format: whole, routes: "g", fallback: 2, group: "prior", hint: "Meanings to choose the nearest from." },
};
const ROUTE_LETTERS = { generations: "g", edits: "e", variations: "v" };
// Settings of a route that some of its tasks have no use for, and the server refuses
const IDLE = { change: ["negative_prompt"], mix: ["negative_prompt"] };
const OTHERS = { sampler: "gv", prior_sampler: "ge", negative_prompt: "gev", size: "g", seed: "" };

// Names of records in PNG files, which are those of the pipelines, by the API's names
const RECORD_NAMES = {
  num_inference_steps: "steps",
  prior_num_inference_steps: "prior_steps",
  prior_candidates: "candidates",
};
const SENT_BACK = new Set([...Object.keys(SLIDERS), ...Object.keys(OTHERS), "strength", "source", "target", "direction", "theta", "upsample"]);

/** Return the fields of the API that a record names, with its seed; what only describes the image is left out. */
export function readFields(record) {
  const fields = {};
  for (const [name, value] of Object.entries(record ?? {})) {
    const field = RECORD_NAMES[name] ?? name;
    if (!SENT_BACK.has(field) || value === null) continue;
    // Guidance with more than a scale is recorded as a table
    const plain = typeof value === "object" ? value.scale : value;
    if (["number", "string"].includes(typeof plain)) fields[field] = plain;
  }
  if (record?.width && record.height) fields.size = `${record.width}x${record.height}`;
  return fields;
}

/** The drawer of settings. */
export class Settings {
  /** model: as /v1/models/ID describes it. onchange: called after every change. */
  constructor(model, element, onchange = () => {}) {
    Object.assign(this, { model, element, onchange, sliders: {} });
    this.defaults = { ...mapValues(SLIDERS, ({ fallback }) => fallback), ...(model.defaults ?? {}), n: Math.min(4, model.max_n ?? 10), size: model.size?.join("x") };
    try {
      const kept = Object.entries(JSON.parse(localStorage.getItem(KEPT_UNDER)) ?? {});
      this.values = Object.fromEntries(kept.filter(([name]) => name in SLIDERS || name in OTHERS));
    } catch {
      this.values = {};
    }
    this.build();
  }

  /** Return the fields to send to a route, for a tool if one asks: those that were changed. */
  collect(route, tool = null) {
    const names = Object.keys(this.values).filter(
      (name) =>
        name !== "n" &&
        (SLIDERS[name]?.routes ?? OTHERS[name]).includes(ROUTE_LETTERS[route]) &&
        (this.model.fields?.[route]?.includes(name) ?? true) &&
        this.takes(name) &&
        !IDLE[tool]?.includes(name),
    );
    // A variation near the image inverts it, with nothing to guide it away from
    const idle = route === "variations" && names.includes("eta") ? ["negative_prompt"] : [];
    return Object.fromEntries(names.filter((name) => !idle.includes(name)).map((name) => [name, this.values[name]]));
  }

  /** The number of images of a drawing. */
  get count() {
    return this.values.n ?? this.defaults.n;
  }

  /** The seed of the next drawing: the locked one, or a random one. */
  chooseSeed() {
    return this.values.seed ?? crypto.getRandomValues(new Uint32Array(1))[0];
  }

  /** Take the settings of an image; those that it does not name return to the defaults. */
  recall(record, { seed = true } = {}) {
    const fields = readFields(record);
    const known = Object.keys({ ...SLIDERS, ...OTHERS }).filter((name) => name in fields && (seed || name !== "seed"));
    const { n } = this.values;
    this.values = { ...(n ? { n } : {}), ...Object.fromEntries(known.map((name) => [name, fields[name]])) };
    for (const name of Object.keys(this.values)) if (this.values[name] === this.defaults[name]) delete this.values[name];
    this.keep();
    this.build();
  }

  /** Change one setting. The default, or nothing, takes it out. */
  change(name, value) {
    if (value === undefined || value === "" || value === this.defaults[name]) delete this.values[name];
    else this.values[name] = value;
    this.keep();
    this.mark();
  }

  keep() {
    localStorage.setItem(KEPT_UNDER, JSON.stringify(this.values));
    this.onchange();
  }

  get isOpen() {
    return !this.element.hidden;
  }

  toggle(open = !this.isOpen) {
    const opener = document.querySelector("#show-settings");
    this.element.hidden = !open;
    document.documentElement.classList.toggle("with-drawer", open);
    opener.setAttribute("aria-expanded", open);
    if (open) this.element.querySelector("button").focus();
    else if (this.element.contains(document.activeElement) || document.activeElement === document.body) opener.focus();
  }

  /** Fill the drawer. */
  build() {
    const sliders = (group) => Object.entries(SLIDERS).filter(([name, slider]) => slider.group === group && this.takes(name));
    const prior = sliders("prior");
    const close = iconButton("close", "Close settings", () => this.toggle(false));
    this.resetButton = h("button", { class: "button quiet", type: "button", onclick: () => this.reset() }, "Back to the defaults");
    this.element.replaceChildren(
      h("header", { class: "drawer-head" }, h("h2", {}, "Settings"), close),
      h(
        "div",
        { class: "drawer-body" },
        sliders("").map(([name]) => this.buildSlider(name)),
        this.buildSeed(),
        this.buildNegative(),
        this.buildChoices("sampler", "Sampler", this.model.samplers),
        this.buildChoices("size", "Image size", listSizes(this.model)),
        prior.length ? h("details", { class: "more-settings" }, h("summary", {}, "From words to meaning"), prior.map(([name]) => this.buildSlider(name)), this.buildChoices("prior_sampler", "Sampler", this.model.prior_samplers)) : null,
        h("p", { class: "hint", id: "history-size" }),
      ),
      h("div", { class: "drawer-foot" }, this.resetButton),
    );
    this.mark();
  }

  /** Return whether the server takes a field; where it does not say, it does. */
  takes(name) {
    const { fields, prior_samplers } = this.model;
    // Some priors have no steps
    if (name === "prior_sampler" && !prior_samplers?.length) return false;
    return !fields || Object.values(fields).some((names) => names.includes(name));
  }

  buildSlider(name) {
    const { label, min, max, step, format, hint } = SLIDERS[name];
    const value = this.values[name] ?? this.defaults[name];
    const top = name === "n" ? (this.model.max_n ?? max) : Math.max(max, value);
    const oninput = (given) => this.change(name, Math.round(given * 1000) / 1000);
    const slider = range({ label, min: Math.min(min, value), max: top, step, value, hint, format, oninput });
    this.sliders[name] = slider;
    return slider.element;
  }

  buildSeed() {
    const id = newId("seed");
    const input = h("input", { id, type: "text", inputmode: "numeric", pattern: "[0-9]*", maxlength: 16, placeholder: "A new one each time", value: this.values.seed ?? "", "aria-describedby": `${id}-hint` });
    input.addEventListener("input", () => {
      input.value = input.value.replace(/\D/g, "");
      this.change("seed", input.value === "" ? undefined : Math.min(Number(input.value), Number.MAX_SAFE_INTEGER));
    });
    const roll = iconButton("dice", "Choose a seed", () => {
      input.value = Math.floor(Math.random() * MAX_SEED);
      this.change("seed", Number(input.value));
    });
    const clear = iconButton("close", "A new seed each time", () => {
      input.value = "";
      this.change("seed", undefined);
    });
    const hint = h("p", { class: "hint", id: `${id}-hint` }, "The same seed draws the same image, whatever else is drawn.");
    return h("div", { class: "field" }, h("label", { for: id }, "Seed"), h("div", { class: "with-buttons" }, input, roll, clear), hint);
  }

  buildNegative() {
    const id = newId("negative");
    const input = h("textarea", { id, rows: 2, maxlength: 4096, placeholder: "What the images should not show" }, this.values.negative_prompt ?? "");
    input.addEventListener("input", () => this.change("negative_prompt", input.value.trim()));
    return h("div", { class: "field" }, h("label", { for: id }, "Negative prompt"), input);
  }

  buildChoices(name, label, choices) {
    if (!choices?.length || choices.length < 2 || !this.takes(name)) return null;
    const id = newId(name);
    const standard = this.defaults[name];
    const chosen = this.values[name] ?? standard;
    // An image that another program drew may have a size of its own
    const all = name in this.values && !choices.includes(chosen) ? [...choices, chosen] : choices;
    const options = all.map((choice) => h("option", { value: choice, selected: choice === chosen }, choice));
    if (!choices.includes(standard)) options.unshift(h("option", { value: "", selected: !this.values[name] }, "The model's own"));
    const select = h("select", { id, onchange: () => this.change(name, select.value) }, options);
    return h("div", { class: "field" }, h("label", { for: id }, label), select);
  }

  /** Show which settings differ from the defaults. */
  mark() {
    for (const [name, { element }] of Object.entries(this.sliders)) element.classList.toggle("changed", name in this.values);
    const changed = Object.keys(this.values).length;
    this.resetButton.disabled = !changed;
    document.querySelector("#show-settings").classList.toggle("changed", changed > 0);
  }

  reset() {
    this.values = {};
    this.keep();
    this.build();
    this.resetButton.closest("aside").querySelector("button").focus();
    say("All settings are the defaults");
  }
}

/** Return sizes with about the area of the model's square: it, and upright and wide ones. */
function listSizes({ size, size_multiple: multiple }) {
  if (!size || !multiple) return [];
  const sides = (ratio) => [Math.sqrt(ratio), 1 / Math.sqrt(ratio)].map((part, index) => Math.max(1, Math.round((size[index] * part) / multiple)) * multiple);
  return [...new Set([1, 3 / 2, 2 / 3, 16 / 9, 9 / 16, 2, 1 / 2].map((ratio) => sides(ratio).join("x")))];
}

const mapValues = (object, change) => Object.fromEntries(Object.entries(object).map(([name, value]) => [name, change(value)]));
