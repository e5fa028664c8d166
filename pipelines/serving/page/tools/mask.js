// The mask of an image: which of its pixels are to be painted anew, with undo and redo. No browser is needed.

const MAX_UNDO_BYTES = 64_000_000;

/** A part of an image, in whole pixels: `left` and `top` are inside, `right` and `bottom` are not. */
function joinBoxes(first, second) {
  return {
    left: Math.min(first.left, second.left),
    top: Math.min(first.top, second.top),
    right: Math.max(first.right, second.right),
    bottom: Math.max(first.bottom, second.bottom),
  };
}

/** Which pixels are painted: `data` has 1 for those, row by row from the top left. */
export class Mask {
  constructor(width, height) {
    this.width = width;
    this.height = height;
    this.data = new Uint8Array(width * height);
    this.painted = 0; // pixels
    this.undone = []; // changes that `redo` makes again
    this.done = []; // changes that `undo` takes back
    this.open = null; // the change that is being made
    this.fresh = { left: 0, top: 0, right: width, bottom: height }; // what has changed since `takeFresh`
  }

  /** Return the box of all that has changed since this was last asked; null if nothing has. */
  takeFresh() {
    const { fresh } = this;
    this.fresh = null;
    return fresh;
  }

  /** Begin a change, such as a stroke, which one `undo` takes back as a whole. */
  begin() {
    this.end();
    this.open = { before: this.data.slice(), box: null };
  }

  /** End a change. One that changed nothing is forgotten. */
  end() {
    const { open } = this;
    this.open = null;
    if (!open?.box) return;
    const bytes = this.cut(open.box, open.before);
    if (this.cut(open.box).every((value, place) => value === bytes[place])) return;
    this.done.push({ box: open.box, bytes });
    this.undone = [];
    let total = this.done.reduce((sum, change) => sum + change.bytes.length, 0);
    while (total > MAX_UNDO_BYTES && this.done.length > 1) total -= this.done.shift().bytes.length;
  }

  /** Take back the change that is being made, as when a finger turns out to be the first of two. */
  cancel() {
    const { open } = this;
    this.open = null;
    if (!open) return;
    this.data.set(open.before);
    if (open.box) this.touch(open.box);
    this.recount();
  }

  /** Take back the last change. Returns whether there was one. */
  undo() {
    this.end();
    return this.swap(this.done, this.undone);
  }

  /** Make the change again that was taken back last. Returns whether there was one. */
  redo() {
    this.end();
    return this.swap(this.undone, this.done);
  }

  /** Exchange the pixels of the last change in one list with those of the mask, and move it to the other list. */
  swap(from, to) {
    const change = from.pop();
    if (!change) return false;
    const bytes = this.cut(change.box);
    this.paste(change.box, change.bytes);
    this.touch(change.box);
    to.push({ box: change.box, bytes });
    this.recount();
    return true;
  }

  /** Paint, or erase, all pixels whose centres are within `radius` of the line between two points. */
  stroke(from, to, radius, value = 1) {
    const reach = Math.max(radius, Math.SQRT1_2); // the smallest brush marks the pixel that it is in
    const box = this.clip({
      left: Math.floor(Math.min(from.x, to.x) - reach),
      top: Math.floor(Math.min(from.y, to.y) - reach),
      right: Math.ceil(Math.max(from.x, to.x) + reach),
      bottom: Math.ceil(Math.max(from.y, to.y) + reach),
    });
    const [dx, dy] = [to.x - from.x, to.y - from.y];
    const length = dx * dx + dy * dy;
    this.fill(box, value, (column, row) => {
      // From the centre of the pixel to the nearest point of the line
      const [x, y] = [column + 0.5 - from.x, row + 0.5 - from.y];
      const along = length ? Math.min(1, Math.max(0, (x * dx + y * dy) / length)) : 0;
      return (x - along * dx) ** 2 + (y - along * dy) ** 2 <= reach * reach;
    });
  }

  /** Paint, or erase, a box. */
  fillBox(box, value = 1) {
    this.fill(this.clip(box), value, () => true);
  }

  /** Paint what is not painted, and the other way round. */
  invert() {
    this.change(() => this.data.forEach((value, place) => (this.data[place] = 1 - value)));
  }

  /** Erase all. */
  clear() {
    this.change(() => this.data.fill(0));
  }

  /** Make a change of the whole mask. */
  change(make) {
    this.begin();
    make();
    this.touch(this.clip({ left: 0, top: 0, right: this.width, bottom: this.height }));
    this.recount();
    this.end();
  }

  /** The fraction of a box that is painted, 0 to 1. */
  measure(box) {
    const bytes = this.cut(this.clip(box));
    return bytes.length ? bytes.reduce((sum, value) => sum + value, 0) / bytes.length : 0;
  }

  /** The pixels of the API's mask, RGBA: transparent where it is to be painted, black elsewhere. */
  toPixels() {
    const pixels = new Uint8ClampedArray(4 * this.data.length);
    this.data.forEach((value, place) => (pixels[4 * place + 3] = value ? 0 : 255));
    return pixels;
  }

  /** How much of the neighbourhood of each pixel is painted, 0 to 255, for borders that look smooth. */
  soften() {
    const { width, height } = this;
    // A line of weights 1, 2, 1 in one direction, then in the other
    const blur = (values, count, stride, lines, step) => {
      const found = new Uint16Array(values.length);
      for (let line = 0; line < lines; line++) {
        for (let at = 0; at < count; at++) {
          const place = line * step + at * stride;
          const before = at > 0 ? place - stride : place;
          const after = at < count - 1 ? place + stride : place;
          found[place] = values[before] + 2 * values[place] + values[after];
        }
      }
      return found;
    };
    const rows = blur(this.data, width, 1, height, width);
    const both = blur(rows, height, width, width, 1);
    return Uint8ClampedArray.from(both, (value) => (255 * value) / 16);
  }

  fill(box, value, contains) {
    if (box.left >= box.right || box.top >= box.bottom) return;
    for (let row = box.top; row < box.bottom; row++) {
      for (let column = box.left; column < box.right; column++) {
        const place = row * this.width + column;
        if (this.data[place] === value || !contains(column, row)) continue;
        this.data[place] = value;
        this.painted += value ? 1 : -1;
      }
    }
    this.touch(box);
  }

  touch(box) {
    if (this.open) this.open.box = this.open.box ? joinBoxes(this.open.box, box) : box;
    this.fresh = this.fresh ? joinBoxes(this.fresh, box) : box;
  }

  clip(box) {
    return {
      left: Math.max(0, Math.round(box.left)),
      top: Math.max(0, Math.round(box.top)),
      right: Math.min(this.width, Math.round(box.right)),
      bottom: Math.min(this.height, Math.round(box.bottom)),
    };
  }

  cut(box, data = this.data) {
    const width = Math.max(0, box.right - box.left);
    const bytes = new Uint8Array(width * Math.max(0, box.bottom - box.top));
    for (let row = box.top; row < box.bottom; row++) {
      const start = row * this.width + box.left;
      bytes.set(data.subarray(start, start + width), (row - box.top) * width);
    }
    return bytes;
  }

  paste(box, bytes) {
    const width = box.right - box.left;
    for (let row = box.top; row < box.bottom; row++) {
      const start = (row - box.top) * width;
      this.data.set(bytes.subarray(start, start + width), row * this.width + box.left);
    }
  }

  recount() {
    this.painted = this.data.reduce((sum, value) => sum + value, 0);
  }
}

/** The nine areas of an image, for those who choose by name: 3 rows of 3, and their boxes. */
export function listAreas(width, height) {
  const columns = ["left", "", "right"];
  const rows = ["top", "", "bottom"];
  return rows.flatMap((vertical, row) =>
    columns.map((horizontal, column) => ({
      name: `${vertical} ${horizontal}`.trim() || "middle",
      left: Math.round((column * width) / 3),
      right: Math.round(((column + 1) * width) / 3),
      top: Math.round((row * height) / 3),
      bottom: Math.round(((row + 1) * height) / 3),
    })),
  );
}

/** What keeps a mask from being drawn, as a sentence; null if nothing does. */
export function explainMask(mask) {
  if (mask.painted === 0) return "Paint over what you want to change.";
  if (mask.painted === mask.data.length) return "Everything is selected. Leave a part of the image as it is.";
  return null;
}
