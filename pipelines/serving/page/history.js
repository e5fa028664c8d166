// The history in this browser: images and the cards that drew them, in IndexedDB, bounded, stars kept.
//
// An item is one image: {id, blob, url, width, height, record, prompt, parents, starred, created, card, request, place}.
// Its request is a number, of its card's requests, and its place one of that request's images.
// A card is one drawing: {id, title, layout, captions, requests, parents, items, created}. Both refer to items by id.

const MAX_IMAGES = 600;
const MAX_BYTES = 300_000_000;
const PAGE_OF_CARDS = 12;

const items = new Map(); // all that this page has read, by id: one object for each image
const cards = new Map(); // all cards, newest last in time; small, so all are in memory
let database = null;

const finish = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

const store = (name, mode = "readonly") => database.transaction(name, mode).objectStore(name);

/** Open the history. Where the browser keeps nothing, it lasts as long as the page; returns whether it is kept. */
export async function openHistory() {
  try {
    const request = indexedDB.open("t2i", 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("items", { keyPath: "id" });
      request.result.createObjectStore("cards", { keyPath: "id" });
    };
    database = await finish(request);
    for (const card of await finish(store("cards").getAll())) cards.set(card.id, card);
  } catch {
    database = null;
  }
  return database !== null;
}

/** Return a new item of an image file, not yet kept. */
export async function createItem(blob, { record = null, prompt = "", parents = [], card = null, request = 0, place = 0 } = {}) {
  const bitmap = await createImageBitmap(blob);
  const { width, height } = bitmap;
  bitmap.close();
  const about = { record, prompt, parents, card, request, place, width, height, starred: false, created: Date.now() };
  const item = { id: crypto.getRandomValues(new Uint32Array(4)).join("-"), blob, url: URL.createObjectURL(blob), ...about };
  items.set(item.id, item);
  return item;
}

async function put(name, value) {
  if (!database) return;
  try {
    await finish(store(name, "readwrite").put(value));
  } catch (error) {
    if (error?.name !== "QuotaExceededError") throw error;
    await trim(0.7);
  }
}

/** Keep an item. */
export function saveItem(item) {
  const { url, ...kept } = item;
  return put("items", kept);
}

/** Keep a card, and drop the oldest without a star beyond the bounds. */
export async function saveCard(card) {
  cards.set(card.id, card);
  await put("cards", card);
  await trim();
}

/** Return an item by its id; null if it is gone. */
export async function findItem(id) {
  if (items.has(id)) return items.get(id);
  const kept = database ? await finish(store("items").get(id)) : undefined;
  if (!kept) return null;
  // Another caller may have read it meanwhile
  if (!items.has(id)) items.set(id, { ...kept, url: URL.createObjectURL(kept.blob) });
  return items.get(id);
}

/** Return items by their ids, without those that are gone. */
export async function findItems(ids) {
  return (await Promise.all(ids.map(findItem))).filter(Boolean);
}

/** Return the cards before a moment, the newest first, and whether there are older ones. starred: only with a star. */
export async function readCards({ before = Infinity, starred = false, limit = PAGE_OF_CARDS } = {}) {
  const found = [];
  for (const card of sortCards().reverse()) {
    if (card.created >= before) continue;
    const drawn = await findItems(card.items);
    if (!drawn.length || (starred && !drawn.some((item) => item.starred))) continue;
    if (found.length === limit) return { cards: found, more: true };
    found.push(card);
  }
  return { cards: found, more: false };
}

const sortCards = () => [...cards.values()].sort((one, other) => one.created - other.created);

/** Return all images, the newest first. */
export async function readItems({ starred = false } = {}) {
  const found = await findItems(sortCards().flatMap((card) => card.items));
  return found.filter((item) => !starred || item.starred).reverse();
}

/** Return an item's ancestors, the oldest first: of several parents the first leads on. */
export async function findPath(item) {
  const path = [];
  for (let next = item; next?.parents.length && path.length < 50; ) {
    const parents = await findItems(next.parents);
    if (!parents.length || path.flat().includes(parents[0])) break;
    path.unshift(parents);
    next = parents[0];
  }
  return path;
}

/** Return the cards that were drawn from an item. */
export const findChildren = (item) => sortCards().filter((card) => card.parents.includes(item.id));

/** Return the card that drew an item. */
export const findCard = (item) => cards.get(item.card) ?? null;

/** Give an item a star, or take it. */
export function setStar(item, starred) {
  item.starred = starred;
  return saveItem(item);
}

/** Forget some images, and cards that have none left. */
export async function removeItems(ids) {
  const gone = new Set(ids);
  for (const id of gone) {
    // Others may still show it, as a parent: its address ends with the page
    items.delete(id);
    if (database) await finish(store("items", "readwrite").delete(id));
  }
  for (const card of [...cards.values()].filter((one) => one.items.some((id) => gone.has(id)))) {
    card.items = card.items.filter((id) => !gone.has(id));
    if (card.items.length) await put("cards", card);
    else {
      cards.delete(card.id);
      if (database) await finish(store("cards", "readwrite").delete(card.id));
    }
  }
}

/** Return how many images are kept, and their bytes. */
export async function measure() {
  const found = await readItems();
  return { images: found.length, bytes: found.reduce((sum, item) => sum + item.blob.size, 0), limit: MAX_IMAGES };
}

/** Drop the oldest images without a star beyond a part of the bounds. */
async function trim(part = 1) {
  const found = await readItems();
  let [count, bytes] = [found.length, found.reduce((sum, item) => sum + item.blob.size, 0)];
  const dropped = [];
  for (const item of found.reverse()) {
    if (count <= part * MAX_IMAGES && bytes <= part * MAX_BYTES) break;
    if (item.starred) continue;
    dropped.push(item.id);
    count -= 1;
    bytes -= item.blob.size;
  }
  if (dropped.length) await removeItems(dropped);
}
