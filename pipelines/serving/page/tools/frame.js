// The frame around an image that is to be painted larger: its margins and their limits. No browser is needed.

export const SIDES = ["left", "right", "top", "bottom"];
export const NO_MARGINS = { left: 0, right: 0, top: 0, bottom: 0 };

const MIN_COST = 2.5; // images, below which a cost is not worth a word

function isHorizontal(side) {
  return side === "left" || side === "right";
}

/** The size of an image with its margins. */
export function measureFrame(image, margins) {
  return {
    width: image.width + margins.left + margins.right,
    height: image.height + margins.top + margins.bottom,
  };
}

/** The most pixels that a margin may have, beside the other ones. `limits`: maxMargin, maxSide and maxPixels. */
export function limitMargin(image, margins, side, limits) {
  const { width, height } = measureFrame(image, { ...margins, [side]: 0 });
  const [along, across] = isHorizontal(side) ? [width, height] : [height, width];
  const room = Math.min(limits.maxSide, Math.floor(limits.maxPixels / across)) - along;
  return Math.max(0, Math.min(limits.maxMargin, room));
}

/** Margins with one of them set to a number of pixels, kept within the limits and in multiples of `step`. */
export function setMargin(image, margins, side, pixels, limits, step = 1) {
  const wanted = Math.round((Number.isFinite(pixels) ? pixels : 0) / step) * step;
  return { ...margins, [side]: Math.min(limitMargin(image, margins, side, limits), Math.max(0, wanted)) };
}

/** Margins after some sides were dragged: outwards by as many pixels of the image as the pointer went. */
export function dragSides(image, margins, sides, moved, limits, step = 1) {
  const outwards = { left: -moved.x, right: moved.x, top: -moved.y, bottom: moved.y };
  return sides.reduce(
    (changed, side) => setMargin(image, changed, side, margins[side] + outwards[side], limits, step),
    margins,
  );
}

/** Margins that add the same number of pixels on some sides. */
export function growSides(image, margins, sides, pixels, limits) {
  return sides.reduce((changed, side) => setMargin(image, changed, side, changed[side] + pixels, limits), margins);
}

/** Margins, equal on opposite sides, that give an image a ratio of width to height without cutting it. */
export function fitRatio(image, ratio, limits) {
  const wide = image.width < image.height * ratio;
  const added = wide ? Math.round(image.height * ratio) - image.width : Math.round(image.width / ratio) - image.height;
  const [first, second] = wide ? ["left", "right"] : ["top", "bottom"];
  const start = setMargin(image, NO_MARGINS, first, Math.floor(added / 2), limits);
  return setMargin(image, start, second, added - Math.floor(added / 2), limits);
}

/** What keeps a frame from being drawn, as a sentence; null if nothing does. */
export function explainFrame(image, margins, limits) {
  if (SIDES.every((side) => margins[side] === 0)) return "Drag the frame outwards, or give a number of pixels.";
  const { width, height } = measureFrame(image, margins);
  if (width * height < limits.minPixels) {
    return `This model paints images of about ${limits.side} × ${limits.side} pixels or more. Drag the frame further.`;
  }
  return null;
}

/** What an image beyond the model's square costs, in words; null for one of about its size. side: 0 is unknown. */
export function describeCost({ width, height }, side) {
  // Larger images are drawn in squares, each of which overlaps its neighbours by half
  const count = side ? [width, height].reduce((product, length) => product * Math.max(1, (2 * length) / side - 1), 1) : 1;
  return count >= MIN_COST ? `as long as about ${Math.round(count)} images` : null;
}

/** The part of the plane that is shown: the frame, with room to drag it further, in pixels of the image. */
export function chooseView(image, margins, limits) {
  const { width, height } = measureFrame(image, margins);
  const room = Math.round(0.3 * Math.max(width, height, limits.side));
  const view = { left: -margins.left - room, top: -margins.top - room, width: width + 2 * room, height: height + 2 * room };
  // The view is a square, so that the stage keeps its shape
  const side = Math.max(view.width, view.height);
  return {
    left: view.left - (side - view.width) / 2,
    top: view.top - (side - view.height) / 2,
    side,
  };
}
