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

const store = (name) => database.transaction(name).objectStore(name);

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

/** Change both stores in one transaction. The browser may refuse it as late as at its end, for want of room. */
function change(act) {
  if (!database) return Promise.resolve();
  return new Promise((resolve, reject) => {
    const transaction = database.transaction(["items", "cards"], "readwrite");
    transaction.oncomplete = () => resolve();
    transaction.onabort = () => reject(transaction.error);
    act({ items: transaction.objectStore("items"), cards: transaction.objectStore("cards") });
  });
}

/** Run a write; while the browser has no room for it, make some and write again. Returns whether it was written. */
export async function writeWithRoom(write, makeRoom) {
  for (const share of [0.7, 0.4, null]) {
    try {
      await write();
      return true;
    } catch (error) {
      if (error?.name !== "QuotaExceededError") throw error;
      if (share === null || !(await makeRoom(share))) break;
    }
  }
  return false;
}

/** Keep items and cards, all or none. Returns false if the browser has no room for them: they last as long as the page. */
function keep(kept, changed = []) {
  const write = () =>
    change((stores) => {
      for (const { url, ...item } of kept) stores.items.put(item);
      for (const card of changed) stores.cards.put(card);
    });
  return writeWithRoom(write, (share) => makeRoom(share, kept));
}

/** Keep a card and the images that it drew, and drop the oldest without a star beyond the bounds. Returns as `keep`. */
export async function saveDrawing(card, drawn) {
  cards.set(card.id, card);
  const isKept = await keep(drawn, [card]);
  await dropOldest(await readItems(), { count: MAX_IMAGES, bytes: MAX_BYTES });
  return isKept;
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

/** Give an item a star, or take it. Returns as `keep`. */
export function setStar(item, starred) {
  item.starred = starred;
  return keep([item]);
}

/** Forget some images, and cards that have none left. Returns what `putBack` takes. */
export async function removeItems(ids) {
  const gone = new Set(ids);
  const touched = [...cards.values()].filter((card) => card.items.some((id) => gone.has(id)));
  const removed = { items: await findItems([...gone]), cards: touched.map((card) => ({ card, before: card.items })) };
  for (const card of touched) {
    card.items = card.items.filter((id) => !gone.has(id));
    if (!card.items.length) cards.delete(card.id);
  }
  await change((stores) => {
    for (const id of gone) stores.items.delete(id);
    for (const card of touched) {
      if (card.items.length) stores.cards.put(card);
      else stores.cards.delete(card.id);
    }
  });
  // Others may still show one, as a parent: its address ends with the page
  for (const id of gone) items.delete(id);
  return removed;
}

/** Bring back what `removeItems` took, to the places that it had. Returns as `keep`. */
export function putBack(removed) {
  const back = new Set(removed.items.map((item) => item.id));
  for (const item of removed.items) items.set(item.id, item);
  for (const { card, before } of removed.cards) {
    // Others of the card may have gone since
    card.items = before.filter((id) => back.has(id) || card.items.includes(id));
    cards.set(card.id, card);
  }
  return keep(removed.items, removed.cards.map(({ card }) => card));
}

/** Return how many images are kept, and their bytes. */
export async function measure() {
  const found = await readItems();
  return { images: found.length, bytes: sumBytes(found), limit: MAX_IMAGES };
}

const sumBytes = (found) => found.reduce((sum, item) => sum + item.blob.size, 0);

/** Return those of some images, the newest first, that go so that the others keep bounds: the oldest without a star. */
export function chooseOldest(found, { count, bytes }) {
  let [left, size] = [found.length, sumBytes(found)];
  const chosen = [];
  for (const item of [...found].reverse()) {
    if (left <= count && size <= bytes) break;
    if (item.starred) continue;
    chosen.push(item);
    left -= 1;
    size -= item.blob.size;
  }
  return chosen;
}

/** Drop the oldest of some images. Returns how many went. */
async function dropOldest(found, bounds) {
  let chosen = chooseOldest(found, bounds);
  while (await noteStars(chosen)) chosen = chooseOldest(found, bounds);
  if (chosen.length) await removeItems(chosen.map((item) => item.id));
  return chosen.length;
}

/** Give items the stars that another tab gave them since they were read. Returns whether one of them has a star. */
async function noteStars(chosen) {
  const kept = database ? await Promise.all(chosen.map(({ id }) => finish(store("items").get(id)))) : [];
  chosen.forEach((item, index) => (item.starred ||= kept[index]?.starred ?? false));
  return chosen.some((item) => item.starred);
}

/** Drop the oldest until a share of the bytes is left; what is just being kept stays. Returns how many went. */
async function makeRoom(share, kept) {
  const found = (await readItems()).filter((item) => !kept.includes(item));
  // A share of what there is: the browser's bound may lie far below this page's
  return dropOldest(found, { count: MAX_IMAGES, bytes: share * sumBytes(found) });
}
