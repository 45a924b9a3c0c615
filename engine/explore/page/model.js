// What is shown: columns, filters, selection, the open object. Others listen for "selection", "filters" and "current".

import { format } from "./dom.js";

const HIDDEN = 1;
const SELECTED = 2;

export class Model extends EventTarget {
  /** `about` is the server's; `points` [2 N] places in the map. */
  constructor(about, points) {
    super();
    this.about = about;
    this.points = points;
    this.count = about.count;
    this.labels = new Map(about.labels.map((label) => [label.name, label]));
    this.columns = new Map(); // values by label, those that were fetched
    this.filters = new Map(); // by label [low, high], or the set of codes that pass
    this.passes = null; // [N] 0 or 1; null where there are no filters
    this.selection = null; // { numbers, title, captions }
    this.current = null;
    this.shownLabel = undefined; // name of the label that points are coloured by
    this.state = new Uint8Array(this.count); // of each point, for the map
  }

  /** Select objects, or nothing; `captions` by number where there is more to say than a label. */
  select(numbers, title = "", captions = null) {
    this.selection = numbers && { numbers, title, captions };
    this.#mark();
    this.dispatchEvent(new Event("selection"));
  }

  open(number) {
    this.current = number;
    this.dispatchEvent(new Event("current"));
  }

  /** Keep a range, or a set of codes, of a label; null for all. */
  filter(name, range) {
    if (range) this.filters.set(name, range);
    else this.filters.delete(name);
    this.#pass();
    this.#mark();
    this.dispatchEvent(new Event("filters"));
  }

  clear() {
    this.filters.clear();
    this.passes = null;
    this.select(null);
    this.dispatchEvent(new Event("filters"));
  }

  #pass() {
    if (!this.filters.size) {
      this.passes = null;
      return;
    }
    const passes = new Uint8Array(this.count).fill(1);
    for (const [name, range] of this.filters) {
      const column = this.columns.get(name);
      if (range instanceof Set) {
        const kept = new Uint8Array(256);
        for (const code of range) kept[code] = 1;
        for (let i = 0; i < passes.length; i += 1) passes[i] &= kept[column[i]];
      } else {
        const [low, high] = range;
        for (let i = 0; i < passes.length; i += 1) if (!(column[i] >= low && column[i] <= high)) passes[i] = 0;
      }
    }
    this.passes = passes;
  }

  #mark() {
    const { state, passes } = this;
    if (passes) for (let i = 0; i < state.length; i += 1) state[i] = passes[i] ? 0 : HIDDEN;
    else state.fill(0);
    if (this.selection) for (const number of this.selection.numbers) if (!state[number]) state[number] = SELECTED;
  }

  /** Value of the shown label of an object, as text; empty where it is unknown. */
  value(number) {
    const label = this.labels.get(this.shownLabel);
    const value = this.columns.get(this.shownLabel)?.[number];
    if (!label || value === undefined || Number.isNaN(value)) return "";
    return label.kind === "number" ? format(value) : label.categories[value] ?? "";
  }

  /** How many objects pass the filters, and how many of them are selected. */
  counts() {
    let passing = this.count;
    if (this.passes) {
      passing = 0;
      for (let i = 0; i < this.count; i += 1) passing += this.passes[i];
    }
    let selected = this.selection?.numbers.length ?? 0;
    if (this.selection && this.passes) {
      selected = 0;
      for (const number of this.selection.numbers) selected += this.passes[number];
    }
    return { passing, selected };
  }

  /** Up to `most` objects that are selected (all where none is) and pass, in order; the first are a fair sample. */
  shown(most = Infinity) {
    const { passes, selection } = this;
    const from = selection?.numbers;
    const found = [];
    const length = from ? from.length : this.count;
    for (let i = 0; i < length && found.length < most; i += 1) {
      const number = from ? from[i] : i;
      if (!passes || passes[number]) found.push(number);
    }
    return found;
  }
}
