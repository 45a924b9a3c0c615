// A spectrum as SVG, with the lines of galaxies where the redshift is known.

const [WIDTH, HEIGHT, LEFT, BOTTOM, TOP] = [420, 190, 6, 22, 30];
const NAMESPACE = "http://www.w3.org/2000/svg";

const shape = (tag, attributes, text) => {
  const made = document.createElementNS(NAMESPACE, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text) made.textContent = text;
  return made;
};

/** `curve` { wavelength, flux, unit } in angstrom; `lines` wavelengths at rest by name; `redshift` or null. */
export function drawSpectrum({ wavelength, flux, unit }, lines, redshift) {
  const svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", class: "spectrum", role: "img" });
  const [first, last] = [wavelength[0], wavelength.at(-1)];
  svg.setAttribute("aria-label", wavelength.length ? `Spectrum from ${first.toFixed(0)} to ${last.toFixed(0)} angstrom` : "No data");
  if (wavelength.length < 2) return svg;
  const sorted = [...flux].sort((a, b) => a - b);
  const low = Math.min(0, sorted[Math.floor(0.02 * sorted.length)]);
  const high = sorted[Math.floor(0.997 * (sorted.length - 1))];
  const x = (wave) => LEFT + ((wave - first) / (last - first)) * (WIDTH - 2 * LEFT);
  const y = (value) => HEIGHT - BOTTOM - Math.min(1.08, Math.max(-0.05, (value - low) / (high - low || 1))) * (HEIGHT - BOTTOM - TOP);
  if (redshift !== null) addLines(svg, lines, redshift, first, last, x);
  svg.append(shape("path", { class: "zero", d: `M${LEFT} ${y(0)}H${WIDTH - LEFT}` }));
  const steps = flux.map((value, i) => `${x(wavelength[i]).toFixed(1)},${y(value).toFixed(1)}`);
  svg.append(shape("polyline", { class: "flux", points: steps.join(" ") }));
  for (let wave = Math.ceil(first / 1000) * 1000; wave <= last; wave += 1000) {
    if (wave % 2000 && last - first > 5000) continue;
    svg.append(shape("text", { x: x(wave), y: HEIGHT - 8, class: "tick" }, `${wave}${wave + 2000 > last ? " Å" : ""}`));
  }
  svg.append(shape("text", { x: WIDTH - LEFT, y: 10, class: "unit" }, unit));
  return svg;
}

function addLines(svg, lines, redshift, first, last, x) {
  let free = -Infinity; // labels must not lie on each other
  for (const [name, rest] of Object.entries(lines).sort((a, b) => a[1] - b[1])) {
    const wave = rest * (1 + redshift);
    if (wave < first || wave > last) continue;
    svg.append(shape("path", { class: "line", d: `M${x(wave)} ${TOP - 4}V${HEIGHT - BOTTOM}` }));
    if (x(wave) < free) continue;
    svg.append(shape("text", { x: x(wave), y: TOP - 8, class: "name" }, name));
    free = x(wave) + 5.5 * name.length + 4;
  }
}
