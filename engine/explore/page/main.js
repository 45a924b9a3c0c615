// The page: what is fetched first, and what acts on what.

import { exported, imageAddress, json, points, similarToFile, values } from "./data.js";
import { counted, element, format } from "./dom.js";
import { Histograms, limits } from "./histograms.js";
import { EmbeddingMap } from "./map.js";
import { Model } from "./model.js";
import { codes, css, palette, rgb } from "./palette.js";
import { Pane } from "./pane.js";

const ANSWERS = 48;
const by = (id) => document.getElementById(id);

function dark() {
  const { theme } = document.documentElement.dataset;
  return theme ? theme === "dark" : !matchMedia("(prefers-color-scheme: light)").matches;
}

function failed(error) {
  told(error?.message ?? "", false);
}

/** Say something at the foot of the page; what is well is not in the colour of problems. */
function told(text, well = true) {
  by("problem").textContent = text;
  by("problem").classList.toggle("well", well);
}

/** Do something that asks the server, and say what went wrong; a former problem is forgotten. */
async function attempt(work) {
  failed(null);
  document.body.classList.add("busy");
  try {
    return await work();
  } catch (error) {
    failed(error);
    return undefined;
  } finally {
    document.body.classList.remove("busy");
  }
}

async function start() {
  setTheme(localStorage.getItem("armillary-theme"));
  const [about, places] = await Promise.all([json("api/about"), points()]);
  const model = new Model(about, places);
  const map = new EmbeddingMap(model, by("points"), by("overlay"));
  by("survey").textContent = about.survey;
  document.title = `${about.survey} · Armillary`;
  by("recipe").textContent = about.map;
  const parts = { details: by("details"), title: by("title"), grid: by("grid"), more: by("more") };
  const pane = new Pane(model, parts, (number) => similar(model, map, number), failed);
  const column = async (name) => {
    if (!model.columns.has(name)) model.columns.set(name, await values(model.labels.get(name)));
    return model.columns.get(name);
  };
  const histograms = new Histograms(model, by("histograms"), column, failed);
  const colour = wireColour(model, map, pane, column);
  wireModel(model, map);
  wireSearch(model, map, pane);
  wireTools(model, map);
  wireKeys(model, map);
  wireTheme(() => {
    colour();
    histograms.draw();
    map.draw();
  });
  status(model);
  await attempt(colour);
  await histograms.start(model.shownLabel);
  document.body.dataset.ready = "yes";
}

function wireColour(model, map, pane, column) {
  const choice = by("colour");
  const shown = [...model.labels.values()].filter((label) => label.kind !== "text");
  choice.append(new Option("nothing", ""), ...shown.map((label) => new Option(label.name)));
  choice.value = model.about.colour ?? "";
  const apply = async () => {
    const label = model.labels.get(choice.value);
    model.shownLabel = label?.name;
    const table = palette(label, dark());
    let bytes = new Uint8Array(model.count);
    let range = null;
    if (label) {
      const known = await column(label.name);
      if (model.shownLabel !== label.name) return; // another one was chosen meanwhile
      range = label.kind === "number" ? limits(known) : null;
      bytes = range ? codes(known, ...range) : known;
    }
    map.points.setColours(bytes, table, rgb(getComputedStyle(document.body).backgroundColor));
    legend(label, table, range);
    pane.fill();
  };
  choice.addEventListener("change", () => attempt(apply));
  return apply;
}

function legend(label, table, range) {
  const root = by("legend");
  root.replaceChildren();
  if (!label) return;
  root.append(element("b", { textContent: label.name, title: label.meaning }));
  if (range) {
    const bar = element("i");
    const stops = Array.from({ length: 9 }, (_, i) => css(table, Math.round((i * 254) / 8)));
    bar.style.background = `linear-gradient(90deg, ${stops.join(",")})`;
    root.append(format(range[0]), bar, format(range[1]));
    return;
  }
  for (const [code, word] of label.categories.slice(0, 12).entries()) {
    const mark = element("s");
    mark.style.background = css(table, code);
    root.append(mark, word);
  }
  if (label.categories.length > 12) root.append(`and ${label.categories.length - 12} more`);
}

function wireModel(model, map) {
  const update = () => {
    map.points.setState(model.state, model.selection ? Uint32Array.from(model.selection.numbers) : null);
    map.rings = model.selection?.captions ? model.shown() : [];
    map.draw();
    status(model);
  };
  model.addEventListener("selection", update);
  model.addEventListener("filters", update);
  model.addEventListener("current", () => {
    if (model.current !== null) map.show(model.current);
    map.draw();
  });
  map.addEventListener("pick", ({ detail }) => model.open(detail));
  map.addEventListener("lasso", ({ detail }) => {
    map.setLasso(false);
    by("lasso").setAttribute("aria-pressed", "false");
    model.select(detail);
  });
  map.addEventListener("hover", ({ detail }) => hover(model, map, detail));
}

function hover(model, map, number) {
  const root = by("hover");
  root.hidden = number === null || !model.about.modalities.includes("image");
  if (root.hidden) return;
  const [x, y] = map.place(number);
  root.style.left = `${Math.min(x + 16, map.width - 130)}px`;
  root.style.top = `${y + 150 > map.height ? y - 140 : y + 16}px`;
  const value = model.value(number);
  const name = value && model.labels.get(model.shownLabel).kind === "number" ? `${model.shownLabel} ` : "";
  root.querySelector("figcaption").textContent = name + value;
  const image = root.querySelector("img");
  image.onerror = () => (root.hidden = true);
  image.src = imageAddress(number, model.about.session);
}

function status(model) {
  const { passing, selected } = model.counts();
  const said = [`${counted(model.count)} galaxies`];
  if (model.passes) said.push(`${counted(passing)} pass the filters`);
  if (model.selection) said.push(`${counted(selected)} selected`);
  if (model.about.run) said.push(`embedded by ${model.about.run}`);
  by("status").textContent = said.join("  ·  ");
}

function answersOf(model, { answers }, title) {
  const captions = new Map(answers.map(([number, cosine]) => [number, cosine.toFixed(3)]));
  model.select(answers.map(([number]) => number), title, captions);
}

async function similar(model, map, number) {
  const found = await attempt(() => json(`api/similar/${number}?k=${ANSWERS}`));
  if (!found) return;
  if (model.current !== number) model.open(number);
  answersOf(model, found, `Most similar to ${found.key}`);
}

function wireSearch(model, map, pane) {
  by("search").addEventListener("submit", async (event) => {
    event.preventDefault();
    const text = by("query").value.trim();
    if (!text) return;
    const found = await attempt(() => json(`api/find?q=${encodeURIComponent(text)}`));
    if (!found) return;
    model.open(found.number);
    await similar(model, map, found.number);
    if (found.arcsec !== undefined) told(`Nearest to ${text}: ${found.key}, ${distance(found.arcsec)} away.`);
  });
  const take = (file) => attempt(async () => {
    const { takesFiles, largestUpload } = model.about;
    if (!takesFiles) throw new Error("A file has to be embedded first: start `armillary explore` with --run RUN.");
    if (file.size > largestUpload) throw new Error(`${file.name} is larger than ${largestUpload >> 20} MiB.`);
    const found = await similarToFile(file);
    model.open(null);
    answersOf(model, found, `Most similar to ${file.name}`);
    pane.showFile(file.name, found);
  });
  by("open").addEventListener("click", () => by("file").click());
  by("file").addEventListener("change", () => {
    if (by("file").files.length) take(by("file").files[0]);
    by("file").value = "";
  });
  let inside = 0; // elements that a dragged file is in; they nest
  const drop = by("drop");
  window.addEventListener("dragenter", () => (drop.hidden = !(inside += 1)));
  window.addEventListener("dragleave", () => (drop.hidden = !(inside -= 1)));
  window.addEventListener("dragover", (event) => event.preventDefault());
  window.addEventListener("drop", (event) => {
    event.preventDefault();
    inside = 0;
    drop.hidden = true;
    if (event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
  });
}

function distance(arcsec) {
  if (arcsec < 60) return `${arcsec.toFixed(1)}″`;
  return arcsec < 3600 ? `${(arcsec / 60).toFixed(1)}′` : `${(arcsec / 3600).toFixed(1)}°`;
}

function wireTools(model, map) {
  by("lasso").addEventListener("click", () => {
    map.setLasso(!map.lassoing);
    by("lasso").setAttribute("aria-pressed", map.lassoing);
  });
  by("view").addEventListener("click", () => model.select(map.inView()));
  by("clear").addEventListener("click", () => clear(model));
  for (const form of ["csv", "fits"]) {
    by(form).addEventListener("click", () => attempt(async () => {
      const numbers = model.shown();
      if (!numbers.length) throw new Error("No galaxy is selected and passes the filters.");
      const { blob, name } = await exported(Uint32Array.from(numbers), form);
      const link = element("a", { href: URL.createObjectURL(blob), download: name });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
    }));
  }
  by("help").addEventListener("click", () => by("dialog").showModal());
}

function clear(model) {
  failed(null);
  model.open(null);
  model.clear();
}

function wireKeys(model, map) {
  window.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || by("dialog").open) return;
    const typing = event.target.matches("input, select, textarea");
    if (typing && event.key === "Escape") event.target.blur();
    if (typing) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (key === "/") by("query").focus();
    else if (key === "?") by("dialog").showModal();
    else if (key === "l") by("lasso").click();
    else if (key === "a") by("view").click();
    else if (key === "s" && model.current !== null) similar(model, map, model.current);
    else if (key === "Escape") clear(model);
    else return;
    event.preventDefault();
  });
}

function setTheme(theme) {
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
}

function wireTheme(changed) {
  by("theme").addEventListener("click", () => {
    const theme = dark() ? "light" : "dark";
    localStorage.setItem("armillary-theme", theme);
    setTheme(theme);
    changed();
  });
  matchMedia("(prefers-color-scheme: light)").addEventListener("change", changed);
}

start().catch(failed);
