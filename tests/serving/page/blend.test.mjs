// Run by `node --test`: shares of mixes, and steps of strips.

import assert from "node:assert/strict";
import { test } from "node:test";

import * as blend from "../../../pipelines/serving/page/tools/blend.js";

test("shares have the sum 1, and none without a slider above 0", () => {
  assert.deepEqual(blend.normalizeWeights([50, 50]), [0.5, 0.5]);
  assert.deepEqual(blend.normalizeWeights([30, 0, 10]), [0.75, 0, 0.25]);
  assert.equal(blend.normalizeWeights([0, 0]), null);
  assert.equal(blend.normalizeWeights([]), null);
});

test("percents that are shown have the sum 100", () => {
  assert.deepEqual(blend.roundShares([1 / 3, 1 / 3, 1 / 3]), [34, 33, 33]);
  assert.deepEqual(blend.roundShares([0.5, 0.5]), [50, 50]);
  assert.deepEqual(blend.roundShares([0, 0]), [0, 0]);
  for (const values of [[1, 2, 4, 7], [99, 1, 1], [5, 5, 5, 5, 5, 5, 5]]) {
    const percents = blend.roundShares(blend.normalizeWeights(values));
    assert.equal(percents.reduce((sum, value) => sum + value), 100);
  }
});

test("a strip goes from each thing to the next", () => {
  assert.deepEqual(blend.planStrip(2, 3), [[1, 0], [0.5, 0.5], [0, 1]]);
  assert.deepEqual(blend.planStrip(3, 2), [[1, 0, 0], [0, 1, 0], [0, 0, 1]]);
  assert.equal(blend.planStrip(4, 5).length, 3 * 4 + 1);
  assert.deepEqual(blend.planStrip(1, 5), []);
});

test("numbers are equally spaced, both ends included", () => {
  assert.deepEqual(blend.spaceNumbers(0, 0.5, 6), [0, 0.1, 0.2, 0.3, 0.4, 0.5]);
  assert.deepEqual(blend.spaceNumbers(0, 0.5, 1), [0.5]);
});

test("lists are split into parts of about one length", () => {
  const sizes = (length, size) => blend.splitEvenly(new Array(length).fill(0), size).map((part) => part.length);
  assert.deepEqual(sizes(10, 10), [10]);
  assert.deepEqual(sizes(13, 10), [7, 6]);
  assert.deepEqual(sizes(31, 10), [8, 8, 7, 8]);
  assert.deepEqual(blend.splitEvenly([1, 2, 3], 2), [[1, 2], [3]]);
  assert.deepEqual(sizes(0, 10), []);
});
