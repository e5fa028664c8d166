// Run by `node --test`: the mask of the brush.

import assert from "node:assert/strict";
import { test } from "node:test";

import { Mask, explainMask, listAreas } from "../../../pipelines/serving/page/tools/mask.js";

function listPainted(mask) {
  const places = [];
  mask.data.forEach((value, place) => value && places.push([place % mask.width, Math.floor(place / mask.width)]));
  return places;
}

test("a dab paints the pixels whose centres are inside the circle, and no other", () => {
  const mask = new Mask(20, 16);
  const [x, y, radius] = [7.3, 6.8, 4.4];
  mask.stroke({ x, y }, { x, y }, radius);
  for (let row = 0; row < 16; row++) {
    for (let column = 0; column < 20; column++) {
      const inside = Math.hypot(column + 0.5 - x, row + 0.5 - y) <= radius;
      assert.equal(mask.data[row * 20 + column], Number(inside), `${column}, ${row}`);
    }
  }
  assert.equal(mask.painted, listPainted(mask).length);
});

test("a stroke is all dabs along its line", () => {
  const [stroke, dabs] = [new Mask(32, 32), new Mask(32, 32)];
  stroke.stroke({ x: 4, y: 5 }, { x: 27, y: 20 }, 3);
  for (let part = 0; part <= 2000; part++) {
    const point = { x: 4 + (23 * part) / 2000, y: 5 + (15 * part) / 2000 };
    dabs.stroke(point, point, 3);
  }
  assert.deepEqual(listPainted(stroke), listPainted(dabs));
});

test("a stroke that begins and ends outside reaches both edges", () => {
  const mask = new Mask(16, 16);
  mask.stroke({ x: -9, y: 8 }, { x: 40, y: 8 }, 1);
  assert.equal(mask.painted, 32); // two rows, from edge to edge
  assert.equal(mask.data[8 * 16], 1);
  assert.equal(mask.data[8 * 16 + 15], 1);
  // One that passes by outside paints nothing
  mask.stroke({ x: -9, y: -9 }, { x: 40, y: -9 }, 3);
  assert.equal(mask.painted, 32);
});

test("the smallest brush paints one pixel", () => {
  const mask = new Mask(8, 8);
  mask.stroke({ x: 3.5, y: 2.5 }, { x: 3.5, y: 2.5 }, 0.5);
  assert.deepEqual(listPainted(mask), [[3, 2]]);
});

test("undo and redo go through strokes, inversions and clearings, each as a whole", () => {
  const mask = new Mask(16, 12);
  const states = [mask.data.slice()];
  const keep = () => states.push(mask.data.slice());
  mask.begin();
  mask.stroke({ x: 2, y: 2 }, { x: 9, y: 3 }, 2);
  mask.stroke({ x: 9, y: 3 }, { x: 30, y: 9 }, 2);
  mask.end();
  keep();
  mask.begin();
  mask.stroke({ x: 5, y: 0 }, { x: 5, y: 12 }, 1, 0);
  mask.end();
  keep();
  mask.invert();
  keep();
  mask.clear();
  keep();
  for (let step = states.length - 2; step >= 0; step--) {
    assert.ok(mask.undo());
    assert.deepEqual(mask.data, states[step]);
  }
  assert.ok(!mask.undo());
  for (let step = 1; step < states.length; step++) {
    assert.ok(mask.redo());
    assert.deepEqual(mask.data, states[step]);
    assert.equal(mask.painted, listPainted(mask).length);
  }
  assert.ok(!mask.redo());
  // A new change ends what could be made again
  mask.undo();
  mask.fillBox({ left: 0, top: 0, right: 2, bottom: 2 });
  mask.begin();
  mask.fillBox({ left: 0, top: 0, right: 16, bottom: 1 });
  mask.end();
  assert.ok(!mask.redo());
});

test("changes that change nothing are no steps of undo, and a stroke can be taken back while it is drawn", () => {
  const mask = new Mask(8, 8);
  mask.clear();
  mask.begin();
  mask.stroke({ x: 50, y: 50 }, { x: 60, y: 50 }, 2);
  mask.end();
  assert.ok(!mask.undo());
  mask.begin();
  mask.stroke({ x: 4, y: 4 }, { x: 4, y: 4 }, 2);
  assert.ok(mask.painted > 0);
  mask.cancel();
  assert.equal(mask.painted, 0);
  assert.ok(!mask.undo());
});

test("the API's mask is transparent where it is to be painted", () => {
  const mask = new Mask(3, 1);
  mask.fillBox({ left: 1, top: 0, right: 2, bottom: 1 });
  assert.deepEqual([...mask.toPixels()], [0, 0, 0, 255, 0, 0, 0, 0, 0, 0, 0, 255]);
});

test("painters learn where the mask has changed", () => {
  const mask = new Mask(16, 16);
  assert.deepEqual(mask.takeFresh(), { left: 0, top: 0, right: 16, bottom: 16 });
  assert.equal(mask.takeFresh(), null);
  mask.begin();
  mask.stroke({ x: 4, y: 4 }, { x: 4, y: 4 }, 2);
  mask.stroke({ x: 9, y: 4 }, { x: 9, y: 4 }, 2);
  const box = { left: 2, top: 2, right: 11, bottom: 6 };
  assert.deepEqual(mask.takeFresh(), box);
  mask.end();
  assert.equal(mask.takeFresh(), null);
  mask.undo();
  assert.deepEqual(mask.takeFresh(), box);
});

test("a softened mask has its border at one half, and none at the edges of the image", () => {
  const mask = new Mask(8, 6);
  mask.fillBox({ left: 0, top: 0, right: 4, bottom: 6 });
  const soft = mask.soften();
  for (let row = 0; row < 6; row++) {
    assert.deepEqual([...soft.slice(8 * row, 8 * row + 8)], [255, 255, 255, 191, 64, 0, 0, 0]);
  }
});

test("the nine areas cover every pixel once", () => {
  const mask = new Mask(17, 13);
  const areas = listAreas(17, 13);
  assert.deepEqual(areas.map((area) => area.name).slice(0, 5), ["top left", "top", "top right", "left", "middle"]);
  for (const area of areas) {
    assert.equal(mask.measure(area), 0);
    mask.fillBox(area);
    assert.equal(mask.measure(area), 1);
  }
  assert.equal(mask.painted, 17 * 13);
  const sum = areas.reduce((total, area) => total + (area.right - area.left) * (area.bottom - area.top), 0);
  assert.equal(sum, 17 * 13);
});

test("nothing and all are no masks", () => {
  const mask = new Mask(4, 4);
  assert.match(explainMask(mask), /Paint over/);
  mask.invert();
  assert.match(explainMask(mask), /Everything/);
  mask.fillBox({ left: 0, top: 0, right: 1, bottom: 1 }, 0);
  assert.equal(explainMask(mask), null);
});
