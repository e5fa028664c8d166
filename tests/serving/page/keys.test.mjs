// Run by `node --test`: which keys act, and what Escape means.

import assert from "node:assert/strict";
import { test } from "node:test";

import { isComposing, isTaken, readEscape } from "../../../pipelines/serving/page/keys.js";

test("shortcuts of one character can be turned off, other keys not", () => {
  for (const key of ["s", "*", "?", "ß"]) assert.deepEqual([isTaken(key, true), isTaken(key, false)], [true, false]);
  for (const key of ["Delete", "ArrowLeft", "Enter"]) assert.equal(isTaken(key, false), true);
});

test("Escape closes what is open before it cancels", () => {
  const read = (given) => readEscape({ hasMenu: false, inChoice: false, isDrawerOpen: false, isDrawing: true, ...given });
  assert.equal(read({}), "cancel");
  assert.equal(read({ hasMenu: true }), null);
  assert.equal(read({ hasMenu: true, isDrawerOpen: true }), null);
  assert.equal(read({ isDrawerOpen: true }), "close");
  assert.equal(read({ inChoice: true }), null);
  assert.equal(read({ isDrawing: false }), null);
  assert.deepEqual([{ isComposing: true }, { keyCode: 229 }, { isComposing: false, keyCode: 27 }].map(isComposing), [true, true, false]);
});
