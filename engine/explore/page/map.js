// The map: points, what moves them, and what is drawn above them: lasso, rings, the galaxy under the pointer.

import { select, zoom, zoomIdentity } from "./vendor/libraries.js";
import { pixelRatio } from "./dom.js";
import { inside } from "./lasso.js";
import { Points } from "./points.js";

const MARGIN = 0.9; // share of the height, or of the width, that the whole map takes
const NEAR = 12; // pixels from the pointer to a point that is meant
const GRID = 65535;
const HOVERED = 1_000_000; // points that are searched at every movement of the pointer; a click searches all
const STEP = 60; // pixels that an arrow key moves

/** Width and height of the points, in the middle of their square, as shares of its side. */
function extent(points) {
  let [left, right, bottom, top] = [GRID, 0, GRID, 0];
  for (let i = 0; i < points.length; i += 2) {
    left = Math.min(left, points[i]);
    right = Math.max(right, points[i]);
    bottom = Math.min(bottom, points[i + 1]);
    top = Math.max(top, points[i + 1]);
  }
  return [right - left, top - bottom].map((size) => Math.max(size / GRID, 0.05));
}

export class EmbeddingMap extends EventTarget {
  /** `model` holds points and selection; listens to the canvas above, dispatches "pick", "lasso" and "hover". */
  constructor(model, canvas, overlay) {
    super();
    this.model = model;
    this.overlay = overlay;
    this.points = new Points(canvas);
    this.points.setPoints(model.points);
    this.transform = zoomIdentity;
    this.extent = extent(model.points);
    this.drawing = null; // lasso under way, in pixels
    this.lassoing = false; // the next drag is a lasso
    this.rings = []; // [{ number, accent }]
    this.zoom = zoom()
      .scaleExtent([0.7, 2000])
      .filter((event) => !event.button && (event.type === "wheel" || !(this.lassoing || event.shiftKey)))
      .on("zoom", ({ transform, sourceEvent }) => this.#moved(transform, sourceEvent !== null));
    this.area = select(overlay).call(this.zoom).on("dblclick.zoom", null);
    new ResizeObserver(() => this.#resized()).observe(overlay);
    this.#listen();
  }

  #resized() {
    const { clientWidth: width, clientHeight: height } = this.overlay;
    const ratio = pixelRatio();
    Object.assign(this, { width, height, ratio });
    this.side = MARGIN * Math.min(width / this.extent[0], height / this.extent[1]);
    this.overlay.width = width * ratio;
    this.overlay.height = height * ratio;
    this.points.resize(width, height, ratio);
    this.#moved(this.transform, false);
  }

  #moved(transform, moving) {
    this.transform = transform;
    const { k, x, y } = transform;
    const { width, height, side } = this;
    const left = k * (width - side) / 2 + x;
    const top = k * (height - side) / 2 + y;
    this.origin = [left, top + k * side, k * side]; // of the map's lower left corner, in pixels, and its side
    const scale = [(2 * k * side) / width, (2 * k * side) / height];
    const offset = [(2 * left) / width - 1, 1 - (2 * (top + k * side)) / height];
    this.points.setView({ scale, offset, zoom: Math.max(k, 0.7) }, moving);
    this.draw();
  }

  /** Pixels of a point. */
  place(number) {
    const [left, bottom, side] = this.origin;
    return [left + (this.model.points[2 * number] / GRID) * side, bottom - (this.model.points[2 * number + 1] / GRID) * side];
  }

  /** Place on the points' grid of pixels. */
  #grid(x, y) {
    const [left, bottom, side] = this.origin;
    return [((x - left) / side) * GRID, ((bottom - y) / side) * GRID];
  }

  /** The visible point nearest to a pixel, within `most` pixels; null where there is none. */
  nearest(x, y, most = NEAR, searched = Infinity) {
    const { points, passes, count } = this.model;
    const [px, py] = this.#grid(x, y);
    let best = ((most / this.origin[2]) * GRID) ** 2;
    let found = null;
    const end = Math.min(count, searched);
    for (let i = 0; i < end; i += 1) {
      const dx = points[2 * i] - px;
      const dy = points[2 * i + 1] - py;
      const square = dx * dx + dy * dy;
      if (square < best && (!passes || passes[i])) {
        best = square;
        found = i;
      }
    }
    return found;
  }

  /** Points inside a polygon of pixels, as numbers. */
  within(polygon) {
    return inside(this.model.points, polygon.map(([x, y]) => this.#grid(x, y)), this.model.passes);
  }

  inView() {
    const { width, height } = this;
    return this.within([[0, 0], [width, 0], [width, height], [0, height]]);
  }

  move(dx, dy) {
    this.zoom.translateBy(this.area, dx / this.transform.k, dy / this.transform.k);
  }

  scale(factor) {
    this.zoom.scaleBy(this.area, factor);
  }

  whole() {
    this.zoom.transform(this.area, zoomIdentity);
  }

  /** Bring a point into view, if it is out of it. */
  show(number) {
    const [x, y] = this.place(number);
    if (x < 20 || y < 20 || x > this.width - 20 || y > this.height - 20) this.move(this.width / 2 - x, this.height / 2 - y);
  }

  setLasso(on) {
    this.lassoing = on;
    this.overlay.classList.toggle("lassoing", on);
  }

  #listen() {
    const { overlay } = this;
    let down = null;
    overlay.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      down = [event.offsetX, event.offsetY];
      if (!(this.lassoing || event.shiftKey)) return;
      overlay.setPointerCapture(event.pointerId);
      this.drawing = [down];
    });
    overlay.addEventListener("pointermove", (event) => {
      const at = [event.offsetX, event.offsetY];
      if (this.drawing) {
        const [x, y] = this.drawing.at(-1);
        if (Math.hypot(at[0] - x, at[1] - y) > 2) this.drawing.push(at);
        this.draw();
      } else if (!event.buttons) this.#hover(at);
    });
    overlay.addEventListener("pointerup", (event) => {
      const at = [event.offsetX, event.offsetY];
      const polygon = this.drawing;
      this.drawing = null;
      if (polygon?.length > 2) this.dispatchEvent(new CustomEvent("lasso", { detail: this.within(polygon) }));
      else if (down && Math.hypot(at[0] - down[0], at[1] - down[1]) < 4) this.#pick(at);
      down = null;
      this.draw();
    });
    overlay.addEventListener("pointercancel", () => {
      this.drawing = down = null;
      this.draw();
    });
    overlay.addEventListener("pointerleave", () => this.#hover(null));
    overlay.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [STEP, 0], ArrowRight: [-STEP, 0], ArrowUp: [0, STEP], ArrowDown: [0, -STEP] }[event.key];
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (step) this.move(...step);
      else if (event.key === "+" || event.key === "=") this.scale(1.4);
      else if (event.key === "-") this.scale(1 / 1.4);
      else if (event.key === "0") this.whole();
      else if (event.key === "Enter") this.#pick([this.width / 2, this.height / 2], Infinity);
      else return;
      event.preventDefault();
    });
    overlay.addEventListener("focus", () => this.draw());
    overlay.addEventListener("blur", () => this.draw());
  }

  #pick(at, most) {
    this.dispatchEvent(new CustomEvent("pick", { detail: this.nearest(...at, most) }));
  }

  #hover(at) {
    this.pointer = at;
    this.asked ||= requestAnimationFrame(() => {
      this.asked = 0;
      const number = this.pointer && this.nearest(...this.pointer, NEAR, HOVERED);
      if (number === this.hovered) return;
      this.hovered = number;
      this.draw();
      this.dispatchEvent(new CustomEvent("hover", { detail: number }));
    });
  }

  /** What lies above the points. */
  draw() {
    const { overlay, ratio } = this;
    if (!ratio) return;
    const context = overlay.getContext("2d");
    const style = getComputedStyle(overlay);
    const [ink, accent] = [style.color, style.accentColor];
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, this.width, this.height);
    const ring = (number, radius, colour) => {
      context.beginPath();
      context.arc(...this.place(number), radius, 0, 2 * Math.PI);
      context.strokeStyle = colour;
      context.stroke();
    };
    context.lineWidth = 1;
    for (const number of this.rings) ring(number, 5, accent);
    context.lineWidth = 1.5;
    if (this.hovered != null) ring(this.hovered, 7, ink);
    if (this.model.current !== null) {
      context.lineWidth = 2;
      ring(this.model.current, 10, accent);
      ring(this.model.current, 13, ink);
    }
    if (document.activeElement === overlay && overlay.matches(":focus-visible")) this.#cross(context, ink);
    if (this.drawing) {
      context.beginPath();
      this.drawing.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
      context.closePath();
      context.globalAlpha = 0.12;
      context.fillStyle = accent;
      context.fill();
      context.globalAlpha = 1;
      context.lineWidth = 1.5;
      context.strokeStyle = accent;
      context.stroke();
    }
  }

  /** Where Enter picks. */
  #cross(context, colour) {
    const [x, y] = [this.width / 2, this.height / 2];
    context.beginPath();
    for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
      context.moveTo(x + 4 * dx, y + 4 * dy);
      context.lineTo(x + 11 * dx, y + 11 * dy);
    }
    context.lineWidth = 1;
    context.strokeStyle = colour;
    context.stroke();
  }
}
