// Run by `node --test`: what the history keeps when the browser has no room, and what comes back when a removal is undone.

import assert from "node:assert/strict";
import { test } from "node:test";

import * as history from "../../../pipelines/serving/page/history.js";
import { nameImage } from "../../../pipelines/serving/page/pictures.js";

globalThis.createImageBitmap = async () => ({ width: 1, height: 1, close() {} });
const database = buildDatabase(100);

/** Return a database of this browser's kind, which refuses a transaction at its end if it would hold more bytes than its quota. */
function buildDatabase(quota) {
  const kept = { items: new Map(), cards: new Map() };
  const answer = (result) => {
    const request = { result };
    queueMicrotask(() => request.onsuccess());
    return request;
  };
  const transaction = () => {
    const next = { items: new Map(kept.items), cards: new Map(kept.cards) };
    const found = {
      objectStore: (name) => ({
        put: (value) => next[name].set(value.id, structuredClone({ ...value, blob: null, size: value.blob?.size ?? 0 })),
        delete: (id) => next[name].delete(id),
        get: (id) => answer(kept[name].get(id)),
        getAll: () => answer([...kept[name].values()]),
      }),
    };
    queueMicrotask(() => {
      const bytes = [...next.items.values()].reduce((sum, { size }) => sum + size, 0);
      if (bytes > quota) {
        found.error = new DOMException("", "QuotaExceededError");
        return found.onabort?.();
      }
      Object.assign(kept, next);
      found.oncomplete?.();
    });
    return found;
  };
  globalThis.indexedDB = { open: () => answer({ transaction, createObjectStore() {} }) };
  return kept;
}

let lastNumber = 0;

/** Draw a card of some images, each of `size` bytes, and keep it. */
async function draw(count, size) {
  const card = { id: `card-${++lastNumber}`, title: "a cat", created: lastNumber, parents: [], items: [] };
  const items = [];
  for (let place = 0; place < count; place++) items.push(await history.createItem(new Blob(["x".repeat(size)]), { prompt: "a cat", card: card.id, place }));
  card.items = items.map((item) => item.id);
  return { card, items, isKept: await history.saveDrawing(card, items) };
}

const sortKept = () => [...database.items.keys()].sort();
const list = (...drawings) => drawings.flatMap(({ items }) => items.map((item) => item.id)).sort();

test("a write is repeated while room can be made", async () => {
  const full = () => Promise.reject(new DOMException("", "QuotaExceededError"));
  const shares = [];
  assert.equal(await history.writeWithRoom(full, async (share) => shares.push(share)), false);
  assert.deepEqual(shares, [0.7, 0.4]);
  assert.equal(await history.writeWithRoom(full, async () => 0), false);
  await assert.rejects(history.writeWithRoom(() => Promise.reject(new Error("broken")), async () => 1), /broken/);
});

test("the oldest without a star go", () => {
  const found = [4, 3, 2, 1].map((id) => ({ id, starred: id === 1, blob: { size: 10 } }));
  const choose = (bounds) => history.chooseOldest(found, bounds).map((item) => item.id);
  assert.deepEqual(choose({ count: 4, bytes: 40 }), []);
  assert.deepEqual(choose({ count: 3, bytes: 40 }), [2]);
  assert.deepEqual(choose({ count: 4, bytes: 15 }), [2, 3, 4]);
});

test("a full browser drops old images and keeps the new ones; where only stars are left, it says so", async () => {
  assert.equal(await history.openHistory(), true);
  const first = await draw(2, 40);
  const second = await draw(2, 30);
  assert.deepEqual([first.isKept, second.isKept], [true, true]);
  assert.deepEqual(sortKept(), list({ items: first.items.slice(1) }, second));
  await history.setStar(second.items[0], true);
  await history.setStar(second.items[1], true);
  const third = await draw(1, 90);
  assert.equal(third.isKept, false);
  // It lasts as long as the page, and the stars are still there
  assert.equal(await history.findItem(third.items[0].id), third.items[0]);
  assert.deepEqual(sortKept(), list(second));
  await history.removeItems([...list(second), ...list(third)]);
  assert.deepEqual([database.items.size, database.cards.size], [0, 0]);
});

test("a star of another tab keeps an image", async () => {
  const first = await draw(2, 40);
  const { id } = first.items[0];
  database.items.get(id).starred = true;
  const second = await draw(1, 30);
  assert.equal(second.isKept, true);
  assert.deepEqual(sortKept(), list({ items: first.items.slice(0, 1) }, second));
  await history.removeItems([...list(first), ...list(second)]);
});

test("what was removed comes back to its place, with its star", async () => {
  const { card, items } = await draw(4, 1);
  const ids = [...card.items];
  await history.setStar(items[1], true);
  const one = await history.removeItems([ids[1]]);
  await history.removeItems([ids[3]]);
  assert.equal(await history.findItem(ids[1]), null);
  assert.equal(await history.putBack(one), true);
  assert.deepEqual(card.items, ids.slice(0, 3));
  assert.equal(database.items.get(ids[1]).starred, true);
  const rest = await history.removeItems(card.items);
  assert.equal(history.findCard(items[0]), null);
  await history.putBack(rest);
  assert.deepEqual(database.cards.get(card.id).items, ids.slice(0, 3));
  assert.equal(await history.findItem(ids[0]), items[0]);
  await history.removeItems(card.items);
});

test("names of images of one card differ", async () => {
  const { card, items } = await draw(2, 1);
  assert.deepEqual(items.map((item) => nameImage(item, card)), ["a cat, 1 of 2", "a cat, 2 of 2"]);
  assert.equal(nameImage({ id: "x", prompt: "" }, null), "without words");
  await history.removeItems([items[0].id]);
  assert.equal(nameImage(items[1]), "a cat");
});
