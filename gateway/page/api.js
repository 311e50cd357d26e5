// Calls of the gateway's API. Every failure becomes a `Problem` whose message is a sentence that says what to do.

const KEY = "gradserve-key";
const RETRY_AFTER_AT_MOST_S = 5;
const RETRIES = 3;
let askForKey = async () => false;

/** A refused or failed call. */
export class Problem extends Error {
  constructor(status, code, detail) {
    super(detail);
    this.status = status;
    this.code = code;
  }
}

/** Let `ask(reason)` get a key from the person; it resolves to true if there is a new one. */
export function onKeyNeeded(ask) { askForKey = ask; }
export const apiKey = () => sessionStorage.getItem(KEY) ?? "";
export function setApiKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

/**
 * Return {data, ms, stages} of one call; `stages` are [name, ms] from Server-Timing. `also` are statuses besides 2xx
 * whose body is an answer.
 */
export async function call(path, { query = {}, body = null, type = "", signal = null, as = "json", also = [] } = {}) {
  const given = Object.entries(query).filter(([, value]) => value !== null && value !== undefined && value !== "");
  const address = given.length ? `${path}?${new URLSearchParams(given)}` : path;
  for (let tries = 1; ; tries++) {
    const began = performance.now();
    const response = await send(address, body, type, signal, as);
    if (response.ok || also.includes(response.status)) {
      const data = as === "json" ? await response.json() : as === "text" ? await response.text() : await response.blob();
      return { data, ms: performance.now() - began, stages: stages(response.headers.get("server-timing")) };
    }
    const problem = await problemOf(response);
    if (response.status === 401 && (await askForKey(problem.message))) continue;
    const pause = Number(response.headers.get("retry-after") ?? Infinity);
    if (response.status !== 503 || tries > RETRIES || pause > RETRY_AFTER_AT_MOST_S) throw problem;
    await new Promise((done) => { setTimeout(done, pause * 1000); });
  }
}

async function send(address, body, type, signal, as) {
  const headers = { accept: as === "json" ? "application/json" : "*/*" };
  if (apiKey()) headers["x-api-key"] = apiKey();
  if (type) headers["content-type"] = type;
  try {
    return await fetch(address, { method: body ? "POST" : "GET", headers, body, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (!(await isReadable(body))) throw new Problem(0, "file", "The file cannot be read. See that it is still there and not open elsewhere, then choose it again.");
    throw new Problem(0, "no_answer", "The server does not answer. See that gradserve runs (make up) and that this machine reaches it, then try again.");
  }
}

/** Return false if the browser cannot read a file of the body, which fails the call as if there were no server. */
async function isReadable(body) {
  const parts = body instanceof FormData ? [...body.values()] : body instanceof Blob ? [body] : [];
  return (await Promise.allSettled(parts.map((part) => part.slice(0, 1).arrayBuffer()))).every(({ status }) => status === "fulfilled");
}

async function problemOf(response) {
  let told = {};
  try { told = await response.json(); } catch { /* a proxy's own page is no problem document */ }
  const detail = sentence(told.detail ?? `The server answered ${response.status}. Try again; if it stays, look into the gateway's log`);
  return new Problem(response.status, told.code ?? "", detail);
}

/** Return a text with a capital letter and a full stop. */
export function sentence(text) {
  const trimmed = text.trim();
  return trimmed.charAt(0).toUpperCase() + trimmed.slice(1) + (/[.!?]$/.test(trimmed) ? "" : ".");
}

function stages(header) {
  return (header ?? "").split(",").map((part) => /^\s*([\w-]+);dur=([\d.]+)/.exec(part)).filter(Boolean)
    .map(([, name, ms]) => [name, Number(ms)]);
}

// Sent for every image: the gateway looks at the bytes, and a wrong type (a text file, an SVG) would get a sentence about headers.
const BYTES = "application/octet-stream";

/** Ask for all classes of one image, best first. */
export const predict = (blob, { model, version, signal } = {}) =>
  call("predict", { query: { top_k: 1000, model, version }, body: blob, type: BYTES, signal });

/** Ask for the evidence about one class of an image. */
export const explain = (blob, { signal, ...query } = {}) =>
  call("explain", { query, body: blob, type: BYTES, signal });

/**
 * Ask about many images; the answer has one entry for each, in order, which is an error for a file that is no image.
 */
export function predictBatch(files, { model, version } = {}) {
  const form = new FormData();
  for (const file of files) form.append("file", file.slice(0, file.size, BYTES), file.name || "image");
  return call("predict/batch", { query: { top_k: 2, model, version }, body: form });
}
