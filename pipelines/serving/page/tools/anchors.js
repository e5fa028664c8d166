// What is mixed: images and texts, as the API takes them. No browser is needed.

const MAX_IMAGES = 16; // of the API
const MAX_TEXTS = 1; // the prompt

function isText(anchor) {
  return anchor.text !== undefined;
}

/** Whether one more image, or one more text, may be added: {image, text}. */
export function limitAnchors(anchors) {
  const texts = anchors.filter(isText).length;
  return { image: anchors.length - texts < MAX_IMAGES, text: texts < MAX_TEXTS };
}

/** What keeps anchors from being mixed, as a sentence; null if nothing does. count: images of a strip; 1 is a mix. */
export function explainMix(anchors, count, maxCount) {
  if (anchors.length < 2) return "Add something to mix with.";
  if (anchors.some((anchor) => isText(anchor) && !anchor.text.trim())) return "Write the text to mix in.";
  if (anchors.every(isText)) return "Add an image.";
  if (count === 1 && anchors.every((anchor) => anchor.weight === 0)) return "Give something a share above 0.";
  if (count > maxCount) return `${count} images are too many; at most ${maxCount} are drawn at once.`;
  return null;
}

/** The request of one mix: shares of the anchors, in the order in which the API has them. */
export function buildMixRequest(anchors, shares, fields) {
  const pairs = chooseNeeded(anchors.map((anchor, place) => ({ anchor, share: shares[place] })));
  const images = pairs.filter(({ anchor }) => !isText(anchor));
  const texts = pairs.filter(({ anchor }) => isText(anchor));
  const weights = [...images, ...texts].map(({ share }) => Math.round(share * 10_000) / 10_000);
  const prompt = texts.length ? { prompt: texts[0].anchor.text.trim() } : {};
  return { route: "edits", fields: { ...fields, ...prompt, weights }, images: images.map(({ anchor }) => anchor.item) };
}

/** Leave out what has no share, which would be computed in vain, but for what makes it a mix: an image, and two things. */
function chooseNeeded(pairs) {
  const needed = new Set(pairs.filter(({ share }) => share > 0));
  const images = pairs.filter(({ anchor }) => !isText(anchor));
  if (!images.some((pair) => needed.has(pair))) needed.add(images[0]);
  for (const pair of pairs) if (needed.size < 2) needed.add(pair);
  return pairs.filter((pair) => needed.has(pair));
}

/** A title for a mix. */
export function describeMix(anchors) {
  const names = anchors.map((anchor) => (isText(anchor) ? anchor.text : anchor.item.prompt || "").trim());
  if (anchors.length > 3 || names.some((name) => !name || name.length > 24)) return `Mix of ${anchors.length}`;
  return names.join(" + ");
}
