// What several parts of the page need to write on it.

/** An element with properties and children. */
export const element = (tag, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};

/** A number of things, as 1,234. */
export const counted = (number) => number.toLocaleString("en");

/** A value in four digits. */
export const format = (value) => {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
};

/** Device pixels for each pixel of the page; more than two cost time and are not seen. */
export const pixelRatio = () => Math.min(window.devicePixelRatio || 1, 2);
