// The image that a brush paints a mask on: by mouse, finger, pen and keys.

import { h, newId } from "../dom.js";

const HELP =
  "Arrow keys move the brush, with Shift by one pixel. Space puts it down and lifts it. " +
  "Square brackets change its size. E erases, B selects, Control Z takes back.";
const PEN_ERASER = 32; // of a pointer event's buttons
const MAX_SMOOTH_PIXELS = 2_000_000; // of a screen, whose borders are computed for each frame
const LINE_GAP = 7; // pixels between the lines of the pattern over what is selected

/** Build the stage.
 *
 * brush: {radius, maxRadius, erases}, which others may change, then call `repaint`. onchange(): the mask has changed.
 * onresize(radius): the wheel asks for another size. Returns {element, repaint, enable, close}.
 */
export function buildStage({ image, mask, brush, onchange, onresize }) {
  const id = newId("stage");
  const picture = h("img", { class: "board-image", src: image.url, alt: image.prompt || "the image", draggable: "false" });
  const overlay = h("canvas", { class: "board-overlay" });
  const box = h("div", { class: "board-box" }, picture, overlay);
  const element = h(
    "div",
    {
      class: "board",
      tabindex: "0",
      role: "application",
      "aria-label": "Brush over the image",
      "aria-describedby": id,
    },
    box,
    h("p", { class: "unseen", id }, HELP),
  );
  box.style.aspectRatio = `${image.width} / ${image.height}`;
  box.style.setProperty("--ratio", String(image.width / image.height));

  const cursor = { x: image.width / 2, y: image.height / 2, shown: false, down: false };
  const painter = buildPainter({ overlay, mask, brush, cursor });
  const observer = new ResizeObserver(painter.request);
  observer.observe(overlay);
  let enabled = true;

  const startStroke = (point, erases) => {
    mask.begin();
    mask.stroke(point, point, brush.radius, erases ? 0 : 1);
  };
  listenForPointers({ element, box, image, mask, brush, cursor, startStroke, onchange, repaint: painter.request, isEnabled: () => enabled });
  listenForKeys({ element, image, mask, brush, cursor, startStroke, onchange, repaint: painter.request, isEnabled: () => enabled });
  element.addEventListener(
    "wheel",
    (event) => {
      if (!enabled || !event.deltaY) return;
      event.preventDefault();
      onresize(brush.radius * (event.deltaY < 0 ? 1.12 : 1 / 1.12) + (event.deltaY < 0 ? 0.5 : -0.5));
    },
    { passive: false },
  );

  return {
    element,
    repaint: painter.request,
    enable(value) {
      enabled = value;
      overlay.hidden = !value;
      element.tabIndex = value ? 0 : -1;
      element.classList.toggle("idle", !value);
    },
    close() {
      observer.disconnect();
      painter.close();
    },
  };
}

/** Strokes of a pointer, which may begin and end beyond the image. */
function listenForPointers({ element, box, image, mask, brush, cursor, startStroke, onchange, repaint, isEnabled }) {
  let stroke = null; // {pointer, last, erases}

  const locate = (event) => {
    const area = box.getBoundingClientRect();
    return {
      x: ((event.clientX - area.left) * image.width) / area.width,
      y: ((event.clientY - area.top) * image.height) / area.height,
    };
  };
  const cancel = () => {
    stroke = null;
    mask.cancel();
    onchange();
  };

  element.addEventListener("pointerdown", (event) => {
    if (!isEnabled()) return;
    // A second finger means to zoom
    if (stroke && event.pointerId !== stroke.pointer) return cancel();
    if (event.button !== 0 && !(event.buttons & PEN_ERASER)) return;
    event.preventDefault();
    element.focus({ preventScroll: true, focusVisible: false });
    element.setPointerCapture(event.pointerId);
    const point = locate(event);
    const erases = brush.erases || (event.buttons & PEN_ERASER) !== 0;
    stroke = { pointer: event.pointerId, last: point, erases };
    cursor.down = false;
    startStroke(point, erases);
    show(event, point);
    onchange();
  });

  element.addEventListener("pointermove", (event) => {
    if (!isEnabled()) return;
    if (stroke?.pointer === event.pointerId) {
      // Between two frames a pointer moves several times
      const moves = event.getCoalescedEvents?.() ?? [];
      for (const move of moves.length ? moves : [event]) {
        const point = locate(move);
        mask.stroke(stroke.last, point, brush.radius, stroke.erases ? 0 : 1);
        stroke.last = point;
      }
    }
    show(event, locate(event));
  });

  element.addEventListener("pointerup", (event) => {
    if (stroke?.pointer !== event.pointerId) return;
    stroke = null;
    mask.end();
    if (event.pointerType === "touch") cursor.shown = false;
    onchange();
  });
  element.addEventListener("pointercancel", (event) => stroke?.pointer === event.pointerId && cancel());
  element.addEventListener("pointerleave", () => {
    cursor.shown = document.activeElement === element && element.matches(":focus-visible");
    repaint();
  });

  function show(event, point) {
    Object.assign(cursor, point, { shown: true });
    repaint();
  }
}

/** The same strokes by keys. */
function listenForKeys({ element, image, mask, brush, cursor, startStroke, onchange, repaint, isEnabled }) {
  element.addEventListener("keydown", (event) => {
    if (!isEnabled() || event.ctrlKey || event.metaKey || event.altKey) return;
    const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [0, 0];
    if (event.key === " " || event.key === "Enter") {
      if (!event.repeat) toggle();
    } else if (dx || dy) {
      const step = event.shiftKey ? 1 : Math.max(1, Math.round(brush.radius / 2));
      const before = { x: cursor.x, y: cursor.y };
      cursor.x = Math.min(image.width, Math.max(0, cursor.x + dx * step));
      cursor.y = Math.min(image.height, Math.max(0, cursor.y + dy * step));
      if (cursor.down) mask.stroke(before, cursor, brush.radius, brush.erases ? 0 : 1);
    } else return;
    event.preventDefault();
    cursor.shown = true;
    repaint();
  });
  element.addEventListener("blur", () => {
    lift();
    cursor.shown = false;
    repaint();
  });
  element.addEventListener("focus", () => {
    cursor.shown = element.matches(":focus-visible");
    repaint();
  });

  function toggle() {
    if (cursor.down) return lift();
    cursor.down = true;
    startStroke(cursor, brush.erases);
  }

  function lift() {
    if (!cursor.down) return;
    cursor.down = false;
    mask.end();
    onchange();
  }
}

/** Drawing of what is selected, and of the brush, once a frame at most. */
function buildPainter({ overlay, mask, brush, cursor }) {
  const shape = new OffscreenCanvas(1, 1);
  let frame = 0;

  function paint() {
    frame = 0;
    const scale = window.devicePixelRatio || 1;
    const [width, height] = [Math.round(overlay.clientWidth * scale), Math.round(overlay.clientHeight * scale)];
    if (!width || !height) return;
    if (overlay.width !== width || overlay.height !== height) Object.assign(overlay, { width, height });
    const context = overlay.getContext("2d");
    context.clearRect(0, 0, width, height);
    // What is selected, in the page's colour, with lines that show on that colour too
    paintShape(shape, mask, width, height);
    context.drawImage(shape, 0, 0, width, height);
    context.globalCompositeOperation = "source-in";
    context.fillStyle = buildPattern(context, getComputedStyle(overlay).color, scale);
    context.fillRect(0, 0, width, height);
    context.globalCompositeOperation = "source-over";
    if (cursor.shown) paintCursor(context, width / mask.width, scale);
  }

  function paintCursor(context, zoom, scale) {
    const radius = Math.max(brush.radius, Math.SQRT1_2) * zoom;
    for (const [color, width] of [["rgb(0 0 0 / 0.65)", 3.5], ["white", 1.5]]) {
      context.strokeStyle = color;
      context.lineWidth = width * scale;
      context.setLineDash(brush.erases ? [5 * scale, 4 * scale] : []);
      context.beginPath();
      context.arc(cursor.x * zoom, cursor.y * zoom, radius, 0, 2 * Math.PI);
      context.stroke();
    }
  }

  return {
    request: () => (frame ||= requestAnimationFrame(paint)),
    close: () => cancelAnimationFrame(frame),
  };
}

/** Paint a mask on a canvas of its size, where it has changed; smoothed on one of the screen's size if that is larger. */
function paintShape(canvas, mask, width, height) {
  const isEnlarged = width > 1.5 * mask.width && width * height <= MAX_SMOOTH_PIXELS;
  const size = isEnlarged ? { width, height } : { width: mask.width, height: mask.height };
  const isNew = canvas.width !== size.width || canvas.height !== size.height;
  if (isNew) Object.assign(canvas, size);
  const fresh = mask.takeFresh();
  const box = isNew ? { left: 0, top: 0, right: mask.width, bottom: mask.height } : fresh;
  if (box === null || box.left >= box.right || box.top >= box.bottom) return;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  if (isEnlarged) return paintSmoothly(context, mask, width, height);
  const pixels = new ImageData(box.right - box.left, box.bottom - box.top);
  mask.cut(box).forEach((value, place) => (pixels.data[4 * place + 3] = 255 * value));
  context.putImageData(pixels, box.left, box.top);
}

/** Paint a small mask large, with smooth borders. */
function paintSmoothly(context, mask, width, height) {
  const small = new OffscreenCanvas(mask.width, mask.height);
  const pixels = new ImageData(mask.width, mask.height);
  mask.soften().forEach((value, place) => (pixels.data[4 * place + 3] = value));
  small.getContext("2d").putImageData(pixels, 0, 0);
  context.clearRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(small, 0, 0, width, height);
  // Half of the softened value is the border of what is selected
  const found = context.getImageData(0, 0, width, height);
  const steepness = Math.min(8, width / mask.width + 1);
  for (let place = 3; place < found.data.length; place += 4) {
    found.data[place] = 127.5 + steepness * (found.data[place] - 127.5);
  }
  context.putImageData(found, 0, 0);
}

/** A see-through pattern of slanted lines in a colour. */
function buildPattern(context, color, scale) {
  const side = Math.round(LINE_GAP * scale);
  const tile = new OffscreenCanvas(side, side);
  const brush = tile.getContext("2d");
  brush.globalAlpha = 0.55;
  brush.fillStyle = color;
  brush.fillRect(0, 0, side, side);
  brush.globalAlpha = 0.5;
  brush.strokeStyle = "white";
  brush.lineWidth = scale;
  brush.beginPath();
  // Three lines, so that the pattern has no seams
  for (const shift of [-side, 0, side]) {
    brush.moveTo(shift - 1, side + 1);
    brush.lineTo(shift + side + 1, -1);
  }
  brush.stroke();
  return context.createPattern(tile, "repeat");
}
