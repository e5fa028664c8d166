// Run by `node --test`: the frame of outpainting.

import assert from "node:assert/strict";
import { test } from "node:test";

import * as frame from "../../../pipelines/serving/page/tools/frame.js";

const image = { width: 128, height: 96 };
const limits = { side: 128, minPixels: 0.75 * 128 * 128, maxMargin: 300, maxSide: 400, maxPixels: 100_000 };

test("sides go outwards by what the pointer went, and never into the image", () => {
  const start = { left: 10, right: 0, top: 0, bottom: 4 };
  const moved = frame.dragSides(image, start, ["left", "top"], { x: -30, y: -7 }, limits);
  assert.deepEqual(moved, { left: 40, right: 0, top: 7, bottom: 4 });
  const inwards = frame.dragSides(image, start, ["left", "bottom"], { x: 50, y: -50 }, limits);
  assert.deepEqual(inwards, frame.NO_MARGINS);
  assert.deepEqual(frame.dragSides(image, start, ["right"], { x: 21, y: 0 }, limits, 8).right, 24);
});

test("no margin goes beyond any limit", () => {
  // The longest side, then the number of pixels
  assert.equal(frame.limitMargin(image, frame.NO_MARGINS, "right", limits), 400 - 128);
  assert.equal(frame.limitMargin(image, { ...frame.NO_MARGINS, right: 272 }, "top", limits), Math.floor(100_000 / 400) - 96);
  assert.equal(frame.limitMargin(image, frame.NO_MARGINS, "right", { ...limits, maxMargin: 50 }), 50);
  let margins = frame.NO_MARGINS;
  for (const side of frame.SIDES) margins = frame.setMargin(image, margins, side, 10_000, limits);
  const { width, height } = frame.measureFrame(image, margins);
  assert.ok(width <= 400 && height <= 400 && width * height <= 100_000);
  // An image beyond the limits has no room
  assert.equal(frame.limitMargin({ width: 500, height: 500 }, frame.NO_MARGINS, "left", limits), 0);
  assert.equal(frame.setMargin(image, frame.NO_MARGINS, "left", NaN, limits).left, 0);
});

test("a ratio is reached by equal margins", () => {
  const wide = frame.fitRatio(image, 16 / 9, limits);
  assert.deepEqual(wide, { left: 21, right: 22, top: 0, bottom: 0 });
  assert.deepEqual(frame.fitRatio(image, 1, limits), { left: 0, right: 0, top: 16, bottom: 16 });
  assert.deepEqual(frame.fitRatio({ width: 10, height: 10 }, 1, limits), frame.NO_MARGINS);
});

test("frames that add nothing, or are too small for the model, are explained", () => {
  assert.match(frame.explainFrame(image, frame.NO_MARGINS, limits), /Drag the frame outwards/);
  assert.equal(frame.explainFrame(image, { ...frame.NO_MARGINS, left: 8 }, limits), null);
  assert.match(frame.explainFrame({ width: 32, height: 32 }, { ...frame.NO_MARGINS, left: 8 }, limits), /128 × 128/);
});

test("images beyond the model's square are said to take longer", () => {
  assert.equal(frame.describeCost({ width: 192, height: 128 }, 128), null);
  assert.equal(frame.describeCost({ width: 256, height: 256 }, 128), "as long as about 9 images");
  assert.equal(frame.describeCost({ width: 4000, height: 3000 }, 0), null);
});

test("the view is a square around the frame, with room on every side", () => {
  const margins = { left: 64, right: 0, top: 0, bottom: 32 };
  const view = frame.chooseView(image, margins, limits);
  assert.ok(view.left < -64 && view.top < 0);
  assert.ok(view.left + view.side > 128 && view.top + view.side > 128);
});
