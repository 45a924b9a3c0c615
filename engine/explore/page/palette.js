// Colours of points: 256 places, the last for what is unknown.

import { interpolateViridis, schemeTableau10, schemeObservable10 } from "./vendor/libraries.js";

export const MISSING = 255;
const WORDS = [...schemeObservable10, ...schemeTableau10];

/** Red, green and blue, 0 to 255, of "#rrggbb" or "rgb(...)". */
export const rgb = (text) => {
  if (text.startsWith("#")) return [1, 3, 5].map((i) => parseInt(text.slice(i, i + 2), 16));
  return text.match(/[\d.]+/g).slice(0, 3).map(Number);
};

/** On paper the brightest colours would vanish; in the dark the darkest. */
const along = (t, dark) => interpolateViridis(dark ? 0.12 + 0.88 * t : 0.9 * t);

/** [256 * 4] bytes for a label, or for none. */
export function palette(label, dark) {
  const table = new Uint8Array(1024);
  for (let i = 0; i < 256; i += 1) {
    let colour = dark ? "#8fc1f2" : "#3b6ea8";
    if (i === MISSING) colour = dark ? "#48536a" : "#b9bcc4";
    else if (label?.kind === "number") colour = along(i / 254, dark);
    else if (label?.kind === "category") colour = WORDS[i % WORDS.length];
    table.set([...rgb(colour), 255], 4 * i);
  }
  return table;
}

/** Places in the palette of numbers between two limits, NaN where unknown. */
export function codes(numbers, low, high) {
  const found = new Uint8Array(numbers.length);
  const scale = high > low ? 254 / (high - low) : 0;
  for (let i = 0; i < numbers.length; i += 1) {
    const value = numbers[i];
    // Written so that NaN falls through both comparisons.
    found[i] = value >= high ? 254 : value > low ? (value - low) * scale : value <= low ? 0 : MISSING;
  }
  return found;
}

export const css = (table, code) => `rgb(${table[4 * code]} ${table[4 * code + 1]} ${table[4 * code + 2]})`;
