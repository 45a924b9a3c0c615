// Histograms of labels below the map, which are filters as well: of numbers a range, of words a choice of them.

import { counted, element, format, pixelRatio } from "./dom.js";

const BINS = 60;
const SAMPLE = 200_000; // values that limits are taken from: the first ones, a fair sample
const FIRST = 4; // histograms that are shown at first

/** Limits of numbers without the rarest at both ends, [0, 1] where there are none. */
export function limits(column) {
  const known = column.subarray(0, SAMPLE).filter((value) => Number.isFinite(value)).sort();
  if (!known.length) return [0, 1];
  const at = (share) => known[Math.min(known.length - 1, Math.floor(share * known.length))];
  const [low, high] = [at(0.002), at(0.998)];
  return high > low ? [low, high] : [known[0], known.at(-1) > known[0] ? known.at(-1) : known[0] + 1];
}

/** A card with a histogram; `draw` counts anew. */
class Card {
  constructor(model, label, close) {
    Object.assign(this, { model, label });
    const remove = element("button", { textContent: "×", title: `Hide ${label.name}`, onclick: close });
    remove.setAttribute("aria-label", `Hide the histogram of ${label.name}`);
    this.root = element("article", { className: "card", title: label.meaning });
    this.root.append(element("h3", {}, label.name), remove);
  }

  get column() {
    return this.model.columns.get(this.label.name);
  }

  /** Counts of all objects by bin, and of those that are selected and pass; `bin` gives a bin, or -1. */
  tally(bins, bin) {
    const { passes, selection, count } = this.model;
    this.all ??= tallied(bins, bin, count);
    if (!selection && !passes) return [this.all, null];
    const numbers = selection?.numbers;
    return [this.all, tallied(bins, bin, numbers?.length ?? count, numbers, passes)];
  }
}

/** Counts by bin of `count` objects, or of those whose numbers are given, as far as they pass. */
function tallied(bins, bin, count, numbers, passes) {
  const counts = new Float64Array(bins);
  for (let i = 0; i < count; i += 1) {
    const number = numbers ? numbers[i] : i;
    const b = passes && !passes[number] ? -1 : bin(number);
    if (b >= 0) counts[b] += 1;
  }
  return counts;
}

class Numbers extends Card {
  constructor(model, label, close) {
    super(model, label, close);
    this.canvas = element("canvas");
    this.inputs = ["least", "greatest"].map((which) => {
      const input = element("input", { type: "number", step: "any", onchange: () => this.#typed() });
      input.setAttribute("aria-label", `${label.name}: ${which} value`);
      return input;
    });
    this.root.append(this.canvas, element("div", { className: "range" }, ...this.inputs));
    this.range = limits(this.column);
    this.inputs.forEach((input, i) => (input.placeholder = format(this.range[i])));
    this.#listen();
  }

  #value(event) {
    const share = Math.min(1, Math.max(0, event.offsetX / this.canvas.clientWidth));
    return this.range[0] + share * (this.range[1] - this.range[0]);
  }

  #listen() {
    let from = null;
    const dragged = (event) => {
      // At an edge of the picture a range is open: what lies beyond is meant, too.
      const [low, high] = [from, this.#value(event)].sort((a, b) => a - b);
      const open = [low <= this.range[0] ? -Infinity : low, high >= this.range[1] ? Infinity : high];
      this.model.filter(this.label.name, high - low > (this.range[1] - this.range[0]) / 150 ? open : null);
    };
    this.canvas.addEventListener("pointerdown", (event) => {
      this.canvas.setPointerCapture(event.pointerId);
      from = this.#value(event);
    });
    this.canvas.addEventListener("pointermove", (event) => {
      if (from === null) return;
      this.waiting = event;
      this.asked ||= requestAnimationFrame(() => {
        this.asked = 0;
        if (from !== null) dragged(this.waiting);
      });
    });
    this.canvas.addEventListener("pointerup", (event) => {
      if (from !== null) dragged(event);
      from = null;
    });
  }

  #typed() {
    const [low, high] = this.inputs.map((input) => (input.value === "" ? null : Number(input.value)));
    this.model.filter(this.label.name, low === null && high === null ? null : [low ?? -Infinity, high ?? Infinity]);
  }

  draw() {
    const { canvas, column, range: [low, high] } = this;
    const scale = BINS / (high - low);
    const bin = (i) => {
      const at = Math.floor((column[i] - low) * scale);
      return at >= 0 && at < BINS ? at : column[i] === high ? BINS - 1 : -1;
    };
    const [all, part] = this.tally(BINS, bin);
    const ratio = pixelRatio();
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (!width) return;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    const style = getComputedStyle(canvas);
    const bars = (counts, colour) => {
      const most = Math.max(1, ...counts);
      context.fillStyle = colour;
      for (let b = 0; b < BINS; b += 1) {
        const tall = counts[b] ? Math.max(1, (height - 2) * (counts[b] / most)) : 0;
        context.fillRect((b * width) / BINS, height - tall, width / BINS - 0.6, tall);
      }
    };
    bars(all, style.borderTopColor);
    if (part) {
      context.globalAlpha = 0.85;
      bars(part, style.accentColor);
      context.globalAlpha = 1;
    }
    const filter = this.model.filters.get(this.label.name);
    if (filter) {
      const [from, to] = filter.map((value) => Math.min(1, Math.max(0, (value - low) / (high - low))) * width);
      context.globalAlpha = 0.6;
      context.fillStyle = style.backgroundColor;
      context.fillRect(0, 0, from, height);
      context.fillRect(to, 0, width - to, height);
    }
    this.inputs.forEach((input, i) => {
      if (document.activeElement !== input) input.value = filter && Number.isFinite(filter[i]) ? format(filter[i]) : "";
    });
  }
}

class Words extends Card {
  constructor(model, label, close) {
    super(model, label, close);
    this.list = element("div", { className: "words" });
    this.buttons = label.categories.map((word, code) => {
      const button = element("button", { onclick: () => this.#toggle(code) });
      button.append(element("i"), element("span", { textContent: word, title: word }), element("b"));
      return button;
    });
    this.list.append(...this.buttons);
    this.root.append(this.list);
  }

  #toggle(code) {
    const chosen = new Set(this.model.filters.get(this.label.name) ?? []);
    if (!chosen.delete(code)) chosen.add(code);
    this.model.filter(this.label.name, chosen.size ? chosen : null);
  }

  draw() {
    const { column } = this;
    const words = this.label.categories.length;
    const bin = (i) => (column[i] < words ? column[i] : -1);
    const [all, part] = this.tally(words, bin);
    const most = Math.max(1, ...all);
    const filter = this.model.filters.get(this.label.name);
    this.buttons.forEach((button, code) => {
      button.setAttribute("aria-pressed", Boolean(filter?.has(code)));
      const [bar, , number] = button.children;
      bar.style.width = `${(100 * (part ?? all)[code]) / most}%`;
      number.textContent = counted((part ?? all)[code]);
    });
  }
}

/** Puts histograms into a section; `fetchColumn` brings a label's values. */
export class Histograms {
  constructor(model, root, fetchColumn, failed) {
    Object.assign(this, { model, root, fetchColumn, failed, cards: new Map() });
    this.add = element("select", { onchange: () => this.show(this.add.value) });
    this.add.setAttribute("aria-label", "Show the histogram of another label");
    root.append(this.add);
    this.#options();
    for (const name of ["selection", "filters"]) model.addEventListener(name, () => this.draw());
    new ResizeObserver(() => this.draw()).observe(root);
  }

  /** The first histograms: that of the label which points are coloured by, and others. */
  async start(coloured) {
    const others = [...this.model.labels.values()].filter((label) => label.kind !== "text").map((label) => label.name);
    for (const name of [...new Set([coloured, ...others])].slice(0, FIRST)) await this.show(name);
  }

  #options() {
    const hidden = [...this.model.labels.values()].filter((label) => label.kind !== "text" && !this.cards.has(label.name));
    this.add.replaceChildren(new Option("+ histogram", ""), ...hidden.map((label) => new Option(label.name)));
    this.add.hidden = !hidden.length;
  }

  async show(name) {
    const label = this.model.labels.get(name);
    if (!label || this.cards.has(name)) return;
    try {
      await this.fetchColumn(name);
    } catch (error) {
      this.failed(error);
      return;
    }
    const card = new (label.kind === "number" ? Numbers : Words)(this.model, label, () => this.hide(name));
    this.cards.set(name, card);
    this.add.before(card.root);
    this.#options();
    card.draw();
  }

  hide(name) {
    this.cards.get(name).root.remove();
    this.cards.delete(name);
    this.#options();
    if (this.model.filters.has(name)) this.model.filter(name, null);
  }

  draw() {
    for (const card of this.cards.values()) card.draw();
  }
}
