// Run by `node --test`: the direction of a change, also as code.

import assert from "node:assert/strict";
import { test } from "node:test";

import { chooseDirection, explainTexts } from "../../../pipelines/serving/page/diff.js";
import { writeCurl, writePython } from "../../../pipelines/serving/page/snippets.js";

test("a model with a prior changes images by its direction", () => {
  assert.equal(chooseDirection({ defaults: { steps: 8, candidates: 2 } }), "prior");
  assert.equal(chooseDirection({ defaults: { steps: 8 } }), "text");
  assert.equal(chooseDirection({}), "text");
});

test("code of a change names its direction", () => {
  const fields = { source: "a cat", target: "a fox", direction: "prior", theta: 0.6, seed: 0 };
  const request = { route: "edits", fields, images: [{ prompt: "a cat" }] };
  const extra = 'extra_body={"source": "a cat", "target": "a fox", "direction": "prior", "theta": 0.6, "seed": 0}';
  assert.ok(writePython(request, "http://host/", "emoji").includes(extra));
  assert.ok(writeCurl(request, "http://host/", "emoji").includes("--form-string 'direction=prior'"));
});

test("what keeps two texts from being drawn is said", () => {
  assert.equal(explainTexts("a cat", "A  cat "), "The two texts are the same.");
  assert.equal(explainTexts("a cat", "a fox"), null);
});
