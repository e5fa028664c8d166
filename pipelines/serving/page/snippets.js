// A drawing as code: what a person did with the page, to go on with in Python or a shell.

import { hasKey, nameFile } from "./api.js";
import { h, newId, openView, toast } from "./dom.js";

const CLIENT_FIELDS = { generations: ["prompt", "n", "size"], edits: ["prompt", "n", "size"], variations: ["n", "size"] };
const METHODS = { generations: "generate", edits: "edit", variations: "create_variation" };

/** Return a request as Python, for the client of OpenAI's API. isLocked: the server asks for a key, which the code reads from $T2I_KEY. */
export function writePython(request, base, model, isLocked = false) {
  const own = CLIENT_FIELDS[request.route];
  const given = listFields(request);
  const files = listFiles(request);
  const lines = [`    model=${quotePython(model)},`];
  if (files.images.length === 1) lines.push(`    image=open(${quotePython(files.images[0])}, "rb"),`);
  if (files.images.length > 1) lines.push(`    image=[${files.images.map((name) => `open(${quotePython(name)}, "rb")`).join(", ")}],`);
  if (files.mask) lines.push(`    mask=open(${quotePython(files.mask)}, "rb"),`);
  // The client's method insists on a prompt
  if (request.route === "edits" && !("prompt" in given)) lines.push('    prompt="",');
  for (const name of own) if (name in given) lines.push(`    ${name}=${quotePython(given[name])},`);
  lines.push('    response_format="b64_json",');
  const extra = Object.entries(given).filter(([name]) => !own.includes(name));
  if (extra.length) lines.push(`    extra_body={${extra.map(([name, value]) => `"${name}": ${quotePython(value)}`).join(", ")}},`);
  return [
    "import base64",
    ...(isLocked ? ["import os"] : []),
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${quotePython(`${base}v1`)}, api_key=${isLocked ? 'os.environ["T2I_KEY"]' : '"none"'})`,
    `answer = client.images.${METHODS[request.route]}(`,
    ...lines,
    ")",
    "for number, image in enumerate(answer.data):",
    '    with open(f"drawn-{number}.png", "wb") as file:',
    "        file.write(base64.b64decode(image.b64_json))",
  ].join("\n");
}

/** Return a request as a command of a shell. isLocked: as above. */
export function writeCurl(request, base, model, isLocked = false) {
  const given = { model, ...listFields(request), response_format: "b64_json" };
  const address = `${base}v1/images/${request.route}`;
  // In double quotes, so that the shell puts the key there
  const parts = [`curl ${quoteShell(address)}`, ...(isLocked ? ['-H "Authorization: Bearer $T2I_KEY"'] : [])];
  if (request.route === "generations") {
    parts.push("-H 'Content-Type: application/json'", `-d ${quoteShell(JSON.stringify(given))}`);
  } else {
    const { images, mask } = listFiles(request);
    images.forEach((name) => parts.push(`-F ${quoteShell(`${images.length > 1 ? "image[]" : "image"}=@${name}`)}`));
    if (mask) parts.push(`-F ${quoteShell(`mask=@${mask}`)}`);
    for (const [name, value] of Object.entries(given)) {
      const values = Array.isArray(value) ? value.map((item) => `${name}[]=${item}`) : [`${name}=${value}`];
      // Unlike -F, --form-string reads no file when a text begins with @
      values.forEach((text) => parts.push(`--form-string ${quoteShell(text)}`));
    }
  }
  // One image a line, under the names that the Python gives, which no given file has
  const save = 'echo "$image" | base64 -d > "drawn-$number.png"; number=$((number + 1))';
  parts.push("| jq -r '.data[].b64_json'", `| { number=0; while read -r image; do ${save}; done; }`);
  return parts.join(" \\\n  ");
}

function listFields({ fields }) {
  const left = ["stream", "partial_images", "progress", "response_format"];
  return Object.fromEntries(Object.entries(fields).filter(([name, value]) => !left.includes(name) && value !== undefined && value !== ""));
}

/** Return names for a request's files, each once. */
function listFiles({ images = [], mask }) {
  const names = images.map((image, index) => (image.prompt || images.length < 2 ? nameFile(image) : `image-${index + 1}.png`));
  return { images: names.map((name, index) => (names.indexOf(name) < index ? name.replace(".png", `-${index + 1}.png`) : name)), mask: mask && "mask.png" };
}

function quotePython(value) {
  if (Array.isArray(value)) return `[${value.map(quotePython).join(", ")}]`;
  if (typeof value === "boolean") return value ? "True" : "False";
  return typeof value === "number" ? String(value) : JSON.stringify(value);
}

const quoteShell = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** Show a request as code, to copy. */
export function showSnippets(request, model) {
  const base = new URL(".", document.baseURI).href;
  const view = openView("The same as code", { kind: "code" });
  const code = h("pre", { tabindex: 0, "aria-label": "Code" });
  // Routes that OpenAI's API does not have are no methods of its client
  const kinds = { ...(request.route in METHODS ? { Python: writePython } : {}), curl: writeCurl };
  const name = newId("kind");
  const radios = Object.entries(kinds).map(([label, write], index) => {
    const show = () => (code.textContent = write(request, base, model, hasKey()));
    const input = h("input", { type: "radio", name, checked: index === 0, onchange: show });
    if (index === 0) show();
    return h("label", {}, input, h("span", {}, label));
  });
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      toast("Copied");
    } catch {
      // Browsers keep the clipboard from pages without https
      getSelection().selectAllChildren(code);
      toast("Selected: copy it with the keyboard");
    }
  };
  const hasFiles = request.route !== "generations";
  view.body.append(h("fieldset", { class: "segmented" }, h("legend", { class: "unseen" }, "Language"), radios), code);
  if (hasFiles) view.body.append(h("p", { class: "hint" }, "Download the images first; the code opens them by these names."));
  if (hasKey()) view.body.append(h("p", { class: "hint" }, "The code reads your key from the variable T2I_KEY: set it first."));
  view.actions.append(h("button", { class: "button primary", type: "button", onclick: copy }, "Copy"));
}
