// The pane on the right: cutouts of what is selected, and the galaxy that is open, with its spectrum and labels.

import { imageAddress, json } from "./data.js";
import { counted, element, format } from "./dom.js";
import { drawSpectrum } from "./spectrum.js";

const PAGE = 48; // cutouts that are shown at a time

const mark = (tile, current) => (current ? tile.setAttribute("aria-current", "true") : tile.removeAttribute("aria-current"));

export class Pane {
  /** Shows cutouts in `grid`, the open object in `details`; `similar(number)` is called by its button. */
  constructor(model, { details, title, grid, more }, similar, failed) {
    Object.assign(this, { model, details, title, grid, more, similar, failed });
    this.most = PAGE;
    this.images = model.about.modalities.includes("image");
    this.spectra = model.about.modalities.includes("spectrum");
    grid.classList.toggle("plain", !this.images && !this.spectra);
    model.addEventListener("selection", () => this.restart());
    model.addEventListener("filters", () => this.restart());
    model.addEventListener("current", () => this.open());
    more.addEventListener("click", () => {
      this.most += PAGE;
      this.fill();
    });
    grid.addEventListener("click", (event) => this.#opened(event.target.closest("button")));
    grid.addEventListener("keydown", (event) => this.#step(event));
  }

  restart() {
    this.most = PAGE;
    this.asked ||= requestAnimationFrame(() => {
      this.asked = 0;
      this.fill();
    });
  }

  /** Cutouts of what is selected and passes; of a sample of all where nothing is. */
  fill() {
    const { model } = this;
    const numbers = model.shown(this.most + 1);
    this.more.hidden = numbers.length <= this.most;
    const { passing, selected } = model.counts();
    const sample = model.passes ? `A sample of the ${counted(passing)} that pass` : `A sample of all ${counted(passing)}`;
    this.title.textContent = model.selection ? model.selection.title || `${counted(selected)} selected` : sample;
    const old = new Map([...this.grid.children].map((tile) => [Number(tile.dataset.number), tile]));
    const tiles = numbers.slice(0, this.most).map((number) => old.get(number) ?? this.#tile(number));
    tiles.forEach((tile, i) => {
      const caption = this.#caption(Number(tile.dataset.number));
      tile.querySelector("span").textContent = caption;
      tile.setAttribute("aria-label", `Galaxy ${i + 1}${caption && `, ${model.selection?.captions ? "similarity" : model.shownLabel} ${caption}`}`);
    });
    this.grid.replaceChildren(...tiles);
    if (!tiles.length) this.grid.append(element("p", { className: "quiet", textContent: "No galaxy is selected and passes the filters." }));
  }

  #tile(number) {
    const tile = element("button", { type: "button" }, element("span"));
    tile.dataset.number = number;
    if (this.images) {
      const image = element("img", { loading: "lazy", alt: "", src: imageAddress(number, this.model.about.session) });
      image.onerror = () => image.replaceWith(element("em", { textContent: "no image" }));
      tile.prepend(image);
    } else if (this.spectra) {
      json(`api/spectra/${number}`).then((curve) => tile.prepend(drawSpectrum(curve, {}, null)), () => {}); // it has none
    }
    return tile;
  }

  /** What is said of an object: its similarity, or the label that points are coloured by. */
  #caption(number) {
    return this.model.selection?.captions?.get(number) || this.model.value(number);
  }

  #opened(tile) {
    if (tile) this.model.open(Number(tile.dataset.number));
  }

  /** Arrow keys go through the grid. */
  #step(event) {
    const tiles = [...this.grid.children];
    const at = tiles.indexOf(document.activeElement);
    if (at < 0) return;
    const columns = tiles.filter((tile) => tile.offsetTop === tiles[0].offsetTop).length;
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
    if (!step || !tiles[at + step]) return;
    event.preventDefault();
    tiles[at + step].focus();
  }

  /** Fill the details of the open object. */
  async open() {
    const number = this.model.current;
    this.details.hidden = number === null;
    for (const tile of this.grid.children) mark(tile, Number(tile.dataset.number) === number);
    if (number === null) return;
    let about;
    try {
      about = await json(`api/objects/${number}`);
    } catch (error) {
      this.failed(error);
      return;
    }
    if (number !== this.model.current) return; // another one was opened meanwhile
    const { key, split, ra, dec, ...labels } = about;
    const head = element("h2", { textContent: key, title: key });
    const buttons = { "Similar (S)": () => this.similar(number), "Copy key": () => navigator.clipboard.writeText(key), Close: () => this.model.open(null) };
    if (!navigator.clipboard) delete buttons["Copy key"]; // browsers have none on pages that come from another machine without TLS
    const tools = element("div", { className: "tools" });
    for (const [textContent, onclick] of Object.entries(buttons)) tools.append(element("button", { textContent, onclick }));
    const position = ra === null || dec === null ? "no position" : `ra ${ra.toFixed(5)}°  dec ${dec.toFixed(5)}°`;
    const place = element("p", { className: "quiet", textContent: `${position}  ·  ${split}` });
    const list = element("dl");
    for (const [name, value] of Object.entries(labels)) {
      if (value === null) continue;
      const meaning = this.model.labels.get(name)?.meaning ?? "";
      list.append(element("dt", { textContent: name, title: `${name}: ${meaning}` }),
        element("dd", { textContent: typeof value === "number" ? format(value) : value }));
    }
    const body = element("div", { className: "facts" }, list);
    this.details.replaceChildren(head, place, tools, body);
    if (this.images) {
      const image = element("img", { alt: `Cutout of ${key}`, src: imageAddress(number, this.model.about.session) });
      image.onerror = () => image.remove();
      body.prepend(image);
    }
    if (this.spectra) this.#spectrum(number, labels.redshift ?? null);
  }

  async #spectrum(number, redshift) {
    try {
      const curve = await json(`api/spectra/${number}`);
      if (number === this.model.current) this.details.append(drawSpectrum(curve, this.model.about.lines, redshift));
    } catch (error) {
      if (error.status !== 404) this.failed(error); // 404: it has none
    }
  }

  /** What was in a file, above its answers. */
  showFile(name, { picture, spectrum }) {
    const parts = [element("h2", { textContent: name, title: name }), element("p", { className: "quiet", textContent: "from a file" })];
    if (picture) parts.push(element("div", { className: "facts" }, element("img", { alt: `Picture of ${name}`, src: picture })));
    if (spectrum) parts.push(drawSpectrum(spectrum, {}, null));
    this.details.replaceChildren(...parts);
    this.details.hidden = false;
  }
}
