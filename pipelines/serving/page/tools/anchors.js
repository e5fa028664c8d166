// What is mixed: images and texts, as the API takes them. No browser is needed.

import { splitEvenly } from "./blend.js";

const MAX_IMAGES = 16; // of the API
const MAX_TEXTS = 16;

const isText = (anchor) => anchor.text !== undefined;
const round = (share) => Math.round(share * 10_000) / 10_000;

/** Whether one more image, or one more text, may be added: {image, text}. */
export function limitAnchors(anchors) {
  const texts = anchors.filter(isText).length;
  return { image: anchors.length - texts < MAX_IMAGES, text: texts < MAX_TEXTS };
}

/** What keeps anchors from being mixed, as a sentence; null if nothing does. count: images of a strip; 1 is a mix. */
export function explainMix(anchors, count, maxCount) {
  if (anchors.length < 2) return "Add something to mix with.";
  if (anchors.some((anchor) => isText(anchor) && !anchor.text.trim())) return "Write the text to mix in.";
  if (count === 1 && anchors.every((anchor) => anchor.weight === 0)) return "Give something a share above 0.";
  if (count > maxCount) return `${count} images are too many; at most ${maxCount} are drawn at once.`;
  return null;
}

/** The request of one mix. shares: of the anchors. */
export function buildMixRequest(anchors, shares, fields) {
  // What has no share would be computed in vain, but two things make a mix
  const used = new Set(anchors.keys());
  for (const place of anchors.keys()) if (shares[place] === 0 && used.size > 2) used.delete(place);
  const places = [...used];
  const { request, order } = buildRequest(places.map((place) => anchors[place]), fields);
  request.fields.weights = order.map((place) => round(shares[places[place]]));
  return request;
}

/** The requests of a strip, with its images in order. rows: the shares of each image. limit: images of a request. */
export function buildStripRequests(anchors, rows, fields, limit) {
  return splitEvenly(rows, limit).map((part) => {
    // What has no share in any image would be computed in vain
    const used = anchors.map((_, place) => place).filter((place) => part.some((row) => row[place] > 0));
    const { request, order } = buildRequest(used.map((place) => anchors[place]), fields);
    request.fields.weights = part.map((row) => order.map((place) => round(row[used[place]])));
    return { ...request, count: part.length };
  });
}

/** A request without weights, and the order of the anchors in it: images first. */
function buildRequest(anchors, fields) {
  const places = anchors.map((_, place) => place);
  const order = [...places.filter((place) => !isText(anchors[place])), ...places.filter((place) => isText(anchors[place]))];
  const images = anchors.filter((anchor) => !isText(anchor)).map((anchor) => anchor.item);
  const texts = anchors.filter(isText).map((anchor) => anchor.text.trim());
  const given = texts.length ? { ...fields, texts } : { ...fields };
  return { request: { route: images.length ? "edits" : "generations", fields: given, images }, order };
}

/** A title for a mix. */
export function describeMix(anchors) {
  const names = anchors.map((anchor) => (isText(anchor) ? anchor.text : anchor.item.prompt || "").trim());
  if (anchors.length > 3 || names.some((name) => !name || name.length > 24)) return `Mix of ${anchors.length}`;
  return names.join(" + ");
}
