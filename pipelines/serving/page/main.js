// The page: what a person types, drops and presses, and what happens then. It uses the public API alone.
//
// The contract with the tools (brush.js, outpaint.js, mix.js, diff.js), each of which exports one function:
//   openBrush, openOutpaint, openDiff({image, view, app}), openMix({images, view, app})
// view: of `openView` in dom.js. A tool fills view.body and view.actions, and ends with app.draw(...) and view.close().
// image: an item of history.js: {id, blob, url, width, height, record, prompt, parents, starred, created}.
// app: {draw(requests, {title, layout, captions, parents}), settings(route), seed(), choose({title, multiple}),
//   open(file), say(text), model, api}. A request is {route, fields, images, mask}, as api.js sends it.

import { openView } from "./dom.js";

const TOOLS = {
  edit: { title: "Edit", module: "./brush.js", open: "openBrush" },
  extend: { title: "Extend", module: "./outpaint.js", open: "openOutpaint" },
  mix: { title: "Mix", module: "./mix.js", open: "openMix" },
  change: { title: "Change", module: "./diff.js", open: "openDiff" },
};

/** Open a tool for an image; its module is loaded when it is first needed. */
export async function openTool(name, image, app) {
  const tool = TOOLS[name];
  const module = await import(tool.module);
  const view = openView(tool.title, { kind: `tool ${name}` });
  module[tool.open]({ image, images: [image], view, app });
}
