// The images API: requests, events while images are drawn, errors, keys, and what to do when the server is busy or gone.

import { h, openView } from "./dom.js";
import { readRetryAfter, retryWhileBusy } from "./retries.js";

const MAX_STREAMS = 4; // browsers open six connections to a server: two stay for what is short
const KEY_NAME = "t2i.key";

/** An error that the server answered with. retryAfter: seconds; isFinal: the same request would fail again. */
export class ApiError extends Error {
  constructor(status, body, { retryAfter = null, isFinal = false } = {}) {
    const error = body?.error ?? {};
    super(error.message ?? `the server answered with status ${status}`);
    Object.assign(this, { status, code: error.code ?? null, param: error.param ?? null, retryAfter, isFinal });
  }
}

/** No answer, or one that was cut off. */
export class LostServer extends Error {
  constructor() {
    super("the server does not answer");
  }
}

/** Return the address of a route, also behind a proxy that adds a folder. */
export const locate = (path) => new URL(path, document.baseURI);

/** Return whether the person has given a key. */
export const hasKey = () => sessionStorage.getItem(KEY_NAME) !== null;

function buildHeaders() {
  const key = sessionStorage.getItem(KEY_NAME);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** Return the response of a route. Raises ApiError, LostServer, and AbortError if the signal says so. */
async function send(path, { method = "GET", body, headers = {}, signal } = {}) {
  let response;
  try {
    response = await fetch(locate(path), { method, body, signal, headers: { ...buildHeaders(), ...headers } });
  } catch (error) {
    throw error.name === "AbortError" ? error : new LostServer();
  }
  if (response.ok) return response;
  const retryAfter = readRetryAfter(response.headers.get("retry-after"));
  const isFinal = response.headers.get("x-should-retry") === "false";
  const found = new ApiError(response.status, await response.json().catch(() => null), { retryAfter, isFinal });
  if (found.status !== 401) throw found;
  await askKey(found.message, signal);
  return send(path, { method, body, headers, signal });
}

/** Return the JSON of a route. */
export async function read(path, options) {
  return (await send(path, options)).json();
}

/** Return the JSON of a route that takes JSON. */
export function post(path, value, options = {}) {
  return read(path, { ...options, method: "POST", body: JSON.stringify(value), headers: { "content-type": "application/json" } });
}

/** Return whether the server answers and takes requests. */
export async function isReady() {
  try {
    return (await fetch(locate("ready"), { cache: "no-store" })).ok;
  } catch {
    return false;
  }
}

let askedKey = null;

/** Ask the person for a key, once for all requests that wait for it. */
function askKey(message, signal) {
  askedKey ??= new Promise((resolve, reject) => {
    const hadKey = hasKey();
    const view = openView("This server asks for a key", { kind: "small" });
    const input = h("input", { id: "key", type: "password", autocomplete: "current-password", required: true });
    const why = hadKey ? h("p", { class: "hint", role: "alert" }, `The server refused the last one: ${message}.`) : null;
    const note = h("p", { class: "hint" }, "It is kept until this tab is closed.");
    const form = h("form", { method: "dialog", class: "field" }, h("label", { for: "key" }, "Key"), input, why, note);
    let accepted = false;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY_NAME, input.value.trim());
      accepted = true;
      view.close();
    });
    view.dialog.addEventListener("close", () => {
      askedKey = null;
      if (accepted) resolve();
      else reject(new ApiError(401, { error: { message: "the server asks for a key" } }));
    });
    view.body.append(form);
    view.actions.append(h("button", { class: "button primary", type: "button", onclick: () => form.requestSubmit() }, "Use key"));
    input.focus();
  });
  return Promise.race([askedKey, rejectOnAbort(signal)]);
}

const rejectOnAbort = (signal) =>
  new Promise((_, reject) => signal?.addEventListener("abort", () => reject(new DOMException("", "AbortError"))));

/** Wait, unless the signal says to stop. */
export function sleep(seconds, signal) {
  return Promise.race([new Promise((resolve) => setTimeout(resolve, 1000 * seconds)), rejectOnAbort(signal)]);
}

let streams = 0;
const waiting = [];

/** Run a function when fewer than `MAX_STREAMS` others run. A signal takes one that waits out of the line. */
async function takeTurn(signal, run) {
  while (streams >= MAX_STREAMS) {
    const turn = new Promise((resolve) => waiting.push(resolve));
    await Promise.race([turn, rejectOnAbort(signal)]);
  }
  signal?.throwIfAborted();
  streams += 1;
  try {
    return await run();
  } finally {
    streams -= 1;
    // All look again: some may have been cancelled
    waiting.splice(0).forEach((wake) => wake());
  }
}

/**
 * Draw, and report what happens: onEvent(kind, data) with
 *   "waiting" {text}               the server is busy: the request is sent again after a while, as the text says
 *   "progress" {stage, step, steps, ...}
 *   "preview" {index, blob}        an estimate of image `index` of the request
 *   "image" {index, blob, seed, notes}  the image, and what the server notes about the request
 * request: {route, fields, images, mask}. taken: the names of the fields that the route takes.
 * Raises ApiError, BusyServer, LostServer and AbortError.
 */
export async function draw(request, { signal, onEvent, taken }) {
  const watch = Object.entries({ stream: true, partial_images: 3, progress: true }).filter(([name]) => taken?.includes(name) ?? true);
  const { n, ...others } = request.fields;
  const fields = { response_format: "b64_json", ...others, ...Object.fromEntries(watch), ...((taken?.includes("n") ?? true) ? { n } : {}) };
  const run = async () => {
    const response = await send(`v1/images/${request.route}`, { ...buildBody(request, fields), method: "POST", signal });
    return readEvents(response, onEvent);
  };
  const waits = { sleep: (seconds) => sleep(seconds, signal), onWait: (text) => onEvent("waiting", { text }) };
  return takeTurn(signal, () => retryWhileBusy(run, waits));
}

/** Return the body of a request: JSON for a prompt, a form with images. */
function buildBody({ route, images = [], mask }, fields) {
  const given = Object.entries(fields).filter(([, value]) => value !== undefined && value !== null && value !== "");
  if (route === "generations") {
    return { body: JSON.stringify(Object.fromEntries(given)), headers: { "content-type": "application/json" } };
  }
  const form = new FormData();
  for (const [name, value] of given) {
    // Lists in a list have no form of their own
    if (Array.isArray(value?.[0])) form.append(name, JSON.stringify(value));
    else if (Array.isArray(value)) value.forEach((item) => form.append(`${name}[]`, item));
    else form.append(name, value);
  }
  for (const image of images) form.append(images.length > 1 ? "image[]" : "image", image.blob ?? image, nameFile(image));
  if (mask) form.append("mask", mask, "mask.png");
  return { body: form };
}

/** Return a name for an image's file, by what it shows. */
export function nameFile(image) {
  const words = (image.prompt ?? "").normalize("NFKD").toLowerCase().match(/[a-z0-9]+/g) ?? ["image"];
  const seed = image.record?.seed;
  return `${words.join("-").slice(0, 60)}${Number.isInteger(seed) ? `-${seed}` : ""}.png`;
}

/** Read the events of a response until its end. */
async function readEvents(response, onEvent) {
  let images = 0;
  const handle = ({ type, ...data }) => {
    if (data.error) throw new ApiError(500, data);
    if (type === "t2i.progress") return onEvent("progress", data);
    if (!data.b64_json) return;
    const blob = decodeImage(data.b64_json, data.output_format);
    if (type.endsWith(".completed")) images += 1;
    onEvent(type.endsWith(".completed") ? "image" : "preview", { index: data.image_index ?? 0, blob, seed: data.seed, notes: data.notes ?? [] });
  };
  if (!response.headers.get("content-type")?.startsWith("text/event-stream")) {
    const { data, notes } = await response.json();
    data.forEach((image, index) => handle({ type: "x.completed", image_index: index, notes, ...image }));
    return;
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      throw error.name === "AbortError" ? error : new LostServer();
    }
    if (part.done) break;
    text += part.value;
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      const lines = event.split("\n").filter((line) => line.startsWith("data:"));
      if (lines.length) handle(JSON.parse(lines.map((line) => line.slice(5)).join("\n")));
    }
  }
  // A stream without images was cut off, however politely
  if (!images) throw new LostServer();
}

/** Return an image of base64 as a Blob. */
function decodeImage(text, format = "png") {
  return new Blob([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))], { type: `image/${format}` });
}

/** Return the words of a text that the model has never seen: [{word, near}]. */
export async function findUnknownWords(text) {
  const { data } = await post("v1/texts", { texts: [text] });
  return data[0].unknown_words.filter((word) => !word.is_keyword);
}
