// Run by `node --test`: what a mix asks the API for, and what keeps tools from drawing.

import assert from "node:assert/strict";
import { test } from "node:test";

import { explainTexts } from "../../../pipelines/serving/page/diff.js";
import { planStrip } from "../../../pipelines/serving/page/tools/blend.js";
import * as anchors from "../../../pipelines/serving/page/tools/anchors.js";

const image = (prompt) => ({ item: { prompt }, weight: 50 });
const text = (words) => ({ text: words, weight: 50 });
const [cat, dog, bird] = [image("a cat"), image("a dog"), image("a bird")];

test("images come first, then texts, and so do their shares", () => {
  const request = anchors.buildMixRequest([cat, text(" snow "), dog], [0.5, 0.2, 0.3], { seed: 3 });
  assert.deepEqual(request, {
    route: "edits",
    fields: { seed: 3, texts: ["snow"], weights: [0.5, 0.3, 0.2] },
    images: [cat.item, dog.item],
  });
  const texts = anchors.buildMixRequest([text("sun"), text("rain")], [0.25, 0.75], {});
  assert.deepEqual(texts, { route: "generations", fields: { texts: ["sun", "rain"], weights: [0.25, 0.75] }, images: [] });
});

test("what has no share is left out, but two things stay", () => {
  const build = (things, shares) => {
    const { fields, images } = anchors.buildMixRequest(things, shares, {});
    return [images.map((item) => item.prompt), fields.texts, fields.weights];
  };
  assert.deepEqual(build([cat, dog, bird], [0, 0.5, 0.5]), [["a dog", "a bird"], undefined, [0.5, 0.5]]);
  assert.deepEqual(build([cat, text("snow"), dog], [0, 1, 0]), [["a dog"], ["snow"], [0, 1]]);
});

test("a strip is one request, or several with what has a share in each", () => {
  const [one] = anchors.buildStripRequests([cat, text("snow")], [[1, 0], [0.5, 0.5], [0, 1]], { seed: 3 }, 10);
  assert.deepEqual(one, {
    route: "edits",
    fields: { seed: 3, texts: ["snow"], weights: [[1, 0], [0.5, 0.5], [0, 1]] },
    images: [cat.item],
    count: 3,
  });
  const rows = planStrip(3, 7);
  const parts = anchors.buildStripRequests([cat, dog, text("snow")], rows, {}, 10);
  assert.deepEqual(parts.map((part) => part.count), [7, 6]);
  assert.deepEqual(parts[0].images, [cat.item, dog.item]);
  assert.deepEqual(parts[0].fields.weights[6], [0, 1]);
  assert.deepEqual([parts[1].images, parts[1].fields.texts], [[dog.item], ["snow"]]);
  assert.deepEqual(parts[1].fields.weights.at(-1), [0, 1]);
});

test("mixes that cannot be drawn are explained", () => {
  const explain = (things, count = 1) => anchors.explainMix(things, count, 32);
  assert.match(explain([cat]), /Add something/);
  assert.match(explain([cat, text("  ")]), /Write the text/);
  assert.match(explain([{ ...cat, weight: 0 }, { ...dog, weight: 0 }]), /share above 0/);
  assert.match(explain([cat, dog], 33), /33 images are too many/);
  assert.equal(explain([cat, text("snow")]), null);
  assert.equal(explain([text("sun"), text("rain")]), null);
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
