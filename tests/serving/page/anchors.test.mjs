// Run by `node --test`: what a mix asks the API for, and what keeps tools from drawing.

import assert from "node:assert/strict";
import { test } from "node:test";

import { explainTexts } from "../../../pipelines/serving/page/diff.js";
import * as anchors from "../../../pipelines/serving/page/tools/anchors.js";

const image = (prompt) => ({ item: { prompt }, weight: 50 });
const text = (words) => ({ text: words, weight: 50 });
const [cat, dog, bird] = [image("a cat"), image("a dog"), image("a bird")];

test("images come first, and the text's share is the last", () => {
  const request = anchors.buildMixRequest([cat, text(" snow "), dog], [0.5, 0.2, 0.3], { seed: 3 });
  assert.deepEqual(request, {
    route: "edits",
    fields: { seed: 3, prompt: "snow", weights: [0.5, 0.3, 0.2] },
    images: [cat.item, dog.item],
  });
});

test("what has no share is left out, but two things and an image stay", () => {
  const build = (things, shares) => {
    const { fields, images } = anchors.buildMixRequest(things, shares, {});
    return [images.map((item) => item.prompt), fields.weights, fields.prompt];
  };
  assert.deepEqual(build([cat, dog, bird], [0, 0.5, 0.5]), [["a dog", "a bird"], [0.5, 0.5], undefined]);
  assert.deepEqual(build([cat, dog, bird], [0, 0, 1]), [["a cat", "a bird"], [0, 1], undefined]);
  assert.deepEqual(build([cat, text("snow"), dog], [0, 1, 0]), [["a cat"], [0, 1], "snow"]);
});

test("mixes that cannot be drawn are explained", () => {
  const explain = (things, count = 1) => anchors.explainMix(things, count, 32);
  assert.match(explain([cat]), /Add something/);
  assert.match(explain([cat, text("  ")]), /Write the text/);
  assert.match(explain([{ ...cat, weight: 0 }, { ...dog, weight: 0 }]), /share above 0/);
  assert.match(explain([cat, dog], 33), /33 images are too many/);
  assert.equal(explain([cat, text("snow")]), null);
  assert.equal(explain([{ ...cat, weight: 0 }, { ...dog, weight: 0 }], 5), null);
});

test("titles name a few things, and count many", () => {
  assert.equal(anchors.describeMix([cat, text("snow")]), "a cat + snow");
  assert.equal(anchors.describeMix([cat, dog, bird, text("snow")]), "Mix of 4");
  assert.equal(anchors.describeMix([image(""), dog]), "Mix of 2");
});

test("a change needs two texts that differ", () => {
  assert.match(explainTexts(" ", "sad"), /what the image shows now/);
  assert.match(explainTexts("happy", ""), /what it should show/);
  assert.match(explainTexts("Happy  face", "happy face "), /the same/);
  assert.equal(explainTexts("happy", "sad"), null);
});
