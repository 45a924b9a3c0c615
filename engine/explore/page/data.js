// What the server answers, as typed arrays and objects; a request that fails throws an Error with the server's sentence.

async function fetched(path, options) {
  let reply;
  try {
    reply = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer. Is `armillary explore` still running?");
  }
  if (reply.ok) return reply;
  let problem = `The server answered ${reply.status}.`;
  try {
    problem = (await reply.json()).problem || problem;
  } catch { /* not from this server */ }
  throw Object.assign(new Error(sentence(problem)), { status: reply.status });
}

/** With a full stop, and a capital where it begins with a word, not with the name of a file or a field. */
const sentence = (text) => text.replace(/^[a-z]+(?= )/, (word) => word[0].toUpperCase() + word.slice(1)) + (/[.?!]$/.test(text) ? "" : ".");

export const json = async (path, options) => (await fetched(path, options)).json();

export const points = async () => new Uint16Array(await (await fetched("api/points")).arrayBuffer());

/** Values of a label by number of the object: Float32Array, or Uint8Array of codes of words (255: none). */
export async function values(label) {
  const bytes = await (await fetched(`api/labels/${encodeURIComponent(label.name)}`)).arrayBuffer();
  return label.kind === "number" ? new Float32Array(bytes) : new Uint8Array(bytes);
}

export const imageAddress = (number, session) => `api/images/${number}?of=${session}`;

/** Objects similar to that of a file. */
export const similarToFile = (file) =>
  json("api/similar?k=48", { method: "POST", body: file, headers: { "X-File-Name": encodeURIComponent(file.name) } });

/** The table of some objects, as a Blob and the name of its file. */
export async function exported(numbers, format) {
  const reply = await fetched(`api/export?format=${format}`, { method: "POST", body: numbers });
  const name = /filename="([^"]+)"/.exec(reply.headers.get("Content-Disposition") || "");
  return { blob: await reply.blob(), name: name ? name[1] : `selection.${format}` };
}
