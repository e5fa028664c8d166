// Run by `node --test`: the code of a drawing, for a server that asks for a key and for one that does not.

import assert from "node:assert/strict";
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
