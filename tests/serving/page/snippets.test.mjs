// Run by `node --test`: the code of a drawing, for a server that asks for a key and for one that does not.

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, readdirSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";

import { writeCurl, writePython } from "../../../pipelines/serving/page/snippets.js";

test("code for a server with keys reads the key from a variable", () => {
  const request = { route: "generations", fields: { prompt: "a cat" } };
  const write = (writer, isLocked) => writer(request, "http://host/", "emoji", isLocked);
  assert.match(write(writePython, true), /^import base64\nimport os\n/);
  assert.match(write(writePython, true), /api_key=os\.environ\["T2I_KEY"\]\)/);
  assert.match(write(writeCurl, true), /^curl 'http:\/\/host\/v1\/images\/generations' \\\n  -H "Authorization: Bearer \$T2I_KEY" \\\n/);
  assert.match(write(writePython, false), /api_key="none"\)/);
  assert.doesNotMatch(write(writePython, false), /import os/);
  assert.doesNotMatch(write(writeCurl, false), /Authorization/);
});

test("the command saves every image, under names that the given files have not", () => {
  const images = [{}, {}].map(() => ({ blob: new Blob(["given"]) }));
  const command = writeCurl({ route: "edits", fields: { n: 2 }, images }, "http://host/", "emoji");
  assert.match(command, /image-1\.png.*\n.*image-2\.png/);
  // What the server and jq hand on: an image a line
  const lines = ["first", "second"].map((text) => Buffer.from(text).toString("base64")).join("\n");
  const saving = command.slice(command.indexOf("| {")).replace(/^\| /, `printf '%s\\n' '${lines}' | `);
  const folder = mkdtempSync(join(tmpdir(), "t2i-"));
  execFileSync("sh", ["-c", saving], { cwd: folder });
  assert.deepEqual(readdirSync(folder), ["drawn-0.png", "drawn-1.png"]);
  assert.equal(readFileSync(join(folder, "drawn-1.png"), "utf-8"), "second");
});
