// Which points lie inside a polygon, quickly for millions of them: the polygon is painted small, and a point looks up the pixel
// it falls on; only where the edge runs through that pixel is the polygon itself asked.

const SIDE = 512; // pixels of the painting

/** Numbers of the points ([2 N], on a grid) in a polygon on the same grid that also pass ([N] 0 or 1, or null). */
export function inside(points, polygon, passes) {
  const xs = polygon.map(([x]) => x);
  const ys = polygon.map(([, y]) => y);
  const [left, right, bottom, top] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const fx = (SIDE - 2) / Math.max(right - left, 1e-9);
  const fy = (SIDE - 2) / Math.max(top - bottom, 1e-9);
  const painting = paint(polygon.map(([x, y]) => [1 + (x - left) * fx, 1 + (y - bottom) * fy]));
  const found = new Uint32Array(points.length / 2);
  let count = 0;
  for (let i = 0; i < found.length; i += 1) {
    const x = points[2 * i];
    const y = points[2 * i + 1];
    if (x < left || x > right || y < bottom || y > top || (passes && !passes[i])) continue;
    const shade = painting[4 * (((1 + (y - bottom) * fy) | 0) * SIDE + ((1 + (x - left) * fx) | 0)) + 3];
    if (shade === 255 || (shade && contains(polygon, x, y))) found[count++] = i;
  }
  return found.slice(0, count);
}

/** Bytes of the painted polygon: opaque inside, half where its edge runs. */
function paint(polygon) {
  const context = new OffscreenCanvas(SIDE, SIDE).getContext("2d", { willReadFrequently: true });
  const path = new Path2D();
  polygon.forEach(([x, y], i) => (i ? path.lineTo(x, y) : path.moveTo(x, y)));
  path.closePath();
  context.fill(path, "evenodd");
  context.globalCompositeOperation = "destination-out";
  context.lineWidth = 3;
  context.stroke(path);
  context.globalCompositeOperation = "source-over";
  context.globalAlpha = 0.5;
  context.stroke(path);
  return context.getImageData(0, 0, SIDE, SIDE).data;
}

/** Whether a polygon contains a point, by the number of edges to its right (even-odd). */
export function contains(polygon, x, y) {
  let within = false;
  for (let i = 0, j = polygon.length - 1; i < polygon.length; j = i, i += 1) {
    const [xi, yi] = polygon[i];
    const [xj, yj] = polygon[j];
    if (yi > y !== yj > y && x < ((xj - xi) * (y - yi)) / (yj - yi) + xi) within = !within;
  }
  return within;
}
