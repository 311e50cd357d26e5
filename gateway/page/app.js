// The playground: one image, its answer and its evidence.

import { $, confidence, fill, h, latest, percent, show } from "./dom.js";
import { Problem, apiKey, call, explain, predict } from "./api.js";
import { decode, draw, drawDifference } from "./heat.js";
import { Eraser } from "./eraser.js";
import { openCamera } from "./camera.js";
import { connectCode, showCode, showTimings } from "./code.js";
import { Compare } from "./compare.js";
import { showMissing, showSet, showSimilar, showTest } from "./evidence.js";
import { Gallery } from "./gallery.js";
import { connectKey } from "./key.js";
import { SAMPLES } from "./samples.js";
import { droppedFiles, fitting, loadImage } from "./images.js";

const SHOWN_CLASSES = 5;
const NAMED_CLASSES = 12;
const LEAST_STRENGTH = 1e-9; // so that two classes without any evidence can be compared
const LEAST_MARKED = 0.01; // a smaller change of a confidence gets no mark on its bar
let configuring = null;
let models = null; // the answer of /models; null if this key may not read it
let asking = new AbortController();
// `image` is the opened image, `whole` what is sent of it, `blob` what was sent last (the whole image, or the image with
// erased parts), `before` the answer for the whole image, `answer` and `evidence` those for `blob`.
let now = null;

const eraser = new Eraser($("stage"), { changed: latest(askEdited), ended: explainAgain, redraw });
const gallery = new Gallery({ open: openFromGallery, chosen });
const compare = new Compare({ fitted, now: () => ({ ...now, view: () => eraser.view }), query: evidenceQuery, failed: say });

// --- messages ---------------------------------------------------------------------------------------------------

function say(error, again = null) {
  if (error.name === "AbortError") return;
  const text = error instanceof Problem ? error.message : `The page failed: ${error.message}. Load it again.`;
  const isLasting = error.status >= 400 && error.status < 500 && ![401, 408, 429].includes(error.status); // the same call would fail again
  $("message").replaceChildren(text, again && !isLasting ? h("button", { type: "button", textContent: "Try again", onclick: again }) : "");
  show($("message"));
  reveal($("message"));
  if (!(error instanceof Problem)) throw error;
}

/** Scroll up to an element that is above what the person sees. */
function reveal(element) {
  if (element.getBoundingClientRect().top < 0) element.scrollIntoView();
}

const quiet = () => show($("message"), false);

// --- opening an image -------------------------------------------------------------------------------------------

/** Open what was chosen, dropped or pasted: one image is answered, several become a gallery. */
async function take(files) {
  const chosen = [...files];
  if (chosen.length === 0) return;
  if (chosen.length === 1) {
    await openFile(chosen[0]);
    reveal($("work"));
    return;
  }
  quiet();
  show($("gallery"));
  reveal($("gallery"));
  try {
    await gallery.add(chosen, await configured());
  } catch (error) {
    say(error, () => take(chosen));
  }
}

async function takeDropped(transfer) {
  const files = await droppedFiles(transfer).catch(() => []); // a folder that may not be read
  if (files.length) await take(files);
  else say(new Problem(0, "file", "Nothing of that is an image file. Drop images or a folder of images; save an image of another page first."));
}

async function openFromGallery(file) {
  await openFile(file);
  const shown = $("work").hidden ? $("message") : $("work");
  shown.scrollIntoView();
  shown.focus({ preventScroll: true });
}

async function openFile(file) {
  asking.abort();
  asking = new AbortController();
  const { signal } = asking;
  quiet();
  const opened = { file, name: file.name || "image.png", whole: file, blob: file, image: null, before: null, answer: null, evidence: null, heat: null, share: 1, target: "" };
  now = opened;
  try {
    now.image = await loadImage(file);
  } catch {
    now.image = null; // the browser cannot show it; the server says whether it can read it
  }
  document.body.classList.add("working");
  whyNot.isChosen = false;
  eraser.load(now.image);
  show($("work"), now.image !== null);
  show($("restore"), false);
  for (const part of ["dimmed", "why", "similar", "set", "missing", "test-result", "unfamiliar", "feedback", "shrunk"]) show($(part), false);
  for (const part of ["answer", "sure", "bars", "changed", "served", "why-text-a", "why-text-b", "why-text-both"]) $(part).replaceChildren();
  for (const part of ["hide-hot", "test"]) $(part).disabled = true;
  compare.clear();
  redraw();
  try {
    await askAll(signal);
  } catch (error) {
    if (now === opened) $("work").classList.toggle("unanswered", !opened.answer);
    say(error, () => openFile(file));
  }
}

/** Ask for the answer, then for its evidence. */
async function askAll(signal) {
  const opened = now;
  opened.whole = opened.blob = await fitted(opened.file);
  const answered = await predict(opened.blob, { ...chosen(), signal });
  opened.before = answered.data;
  show($("shrunk"), opened.whole !== opened.file);
  show($("work"));
  $("work").classList.remove("unanswered");
  showTimings("predict", answered);
  showAnswer(answered.data);
  await askEvidence(signal);
}

async function askEvidence(signal = asking.signal) {
  const opened = now;
  const query = evidenceQuery(now.target, { coverage: coverage(), signal });
  const ofAnswer = evidenceQuery("", { heatmap: "none", similar: 0, signal });
  try {
    // The heatmap of another class is dimmed by its strength beside that of the class answered.
    const [explained, answered] = await Promise.all([query, ...(now.target ? [ofAnswer] : [])].map((one) => explain(now.blob, one)));
    if (now !== opened) return;
    showTimings("explain", explained);
    showEvidence(explained.data, (answered ?? explained).data);
  } catch (error) {
    now.heat = null;
    redraw();
    throw error;
  }
  showCode(now.name, { target: now.target, method: query.method, coverage: query.coverage, ...chosen() });
  await whyNot.ask(signal);
}

const coverage = () => Number(($("coverage").value / 100).toFixed(3));

/** Return the model and the version that the person chose; an empty name leaves the choice to the gateway. */
function chosen() {
  const [model, version = ""] = $("version").value.split("/");
  return { model, version };
}

/** Return the model and the version of an answer, so that its evidence comes from the same one. */
const asked = (answer) => ({ model: isSeveral(models) ? answer.model.name : "", version: answer.model.version });
const isSeveral = (answer) => new Set(answer?.versions.map(({ model }) => model)).size > 1;

/** Return the query of /explain about a class; an empty name is the class answered. */
function evidenceQuery(target, more = {}) {
  return { target, method: $("method").value, ...asked(now.answer), heatmap: "base64", ...more };
}

// --- the answer -------------------------------------------------------------------------------------------------

function showAnswer(answer) {
  now.answer = answer;
  const { top } = answer;
  $("answer").textContent = answer.class;
  $("sure").textContent = `${confidence(answer.confidence)} sure`;
  showUnfamiliar(answer.familiar);
  const before = new Map((now.before?.top ?? []).map((entry) => [entry.class, entry.confidence]));
  const isEdited = eraser.isEdited;
  $("bars").replaceChildren(...top.slice(0, SHOWN_CLASSES).map((entry) => bar(entry, isEdited ? before.get(entry.class) : entry.confidence)));
  $("changed").textContent = isEdited ? `The whole image: ${now.before.class}, ${confidence(now.before.confidence)}` : "";
  show($("changed"), isEdited);
  $("served").textContent = `${answer.model.name} ${answer.model.version}`;
  $("live").textContent = `${answer.class}, ${confidence(answer.confidence)} sure`;
  const names = top.map((entry) => [entry.class, entry.class]);
  offerFeedback(names.slice(1));
  if (now.target === answer.class) now.target = "";
  fill($("target"), [["", `${answer.class} (the answer)`], ...names.slice(1)], now.target);
  whyNot.offer(top);
  document.title = `${answer.class} · gradserve`;
}

function bar(entry, before) {
  const track = h("span", { className: "track" });
  const fillPart = h("span", { className: "fill" });
  fillPart.style.width = `${100 * entry.confidence}%`;
  track.append(fillPart);
  if (Math.abs(entry.confidence - before) > LEAST_MARKED) {
    const mark = h("span", { className: "mark", title: `whole image: ${confidence(before)}` });
    mark.style.left = `${100 * before}%`;
    track.append(mark);
  }
  const button = h(
    "button",
    { type: "button", className: "bar-row", title: `Where it saw ${entry.class}`, onclick: () => setTarget(entry.class) },
    h("span", { className: "name", textContent: entry.class }),
    track,
    h("span", { className: "value", textContent: confidence(entry.confidence) }),
  );
  return h("li", {}, button);
}

function showUnfamiliar(familiar, familiarity = null) {
  const isGuess = familiar === false;
  show($("unfamiliar"), isGuess);
  $("says").classList.toggle("guess", isGuess);
  $("answer-title").textContent = isGuess ? "Its best guess" : "The answer";
  const share = typeof familiarity === "number" ? ` Of the images this model was checked with, ${percent(1 - familiarity)} look more like its training images.` : "";
  $("unfamiliar-text").textContent = `It is unlike the images the model was trained on, so take the answer as a guess.${share}`;
}

// --- evidence ---------------------------------------------------------------------------------------------------

function showEvidence(evidence, answered) {
  now.evidence = evidence;
  now.heat = decode(evidence.heatmap);
  now.share = Math.min(1, strengthOf(evidence) / Math.max(strengthOf(answered), LEAST_STRENGTH));
  show($("dimmed"), now.share < 1);
  $("dimmed").textContent = dimmed(now.share, evidence.class);
  $("hide-hot").disabled = !now.heat || !now.image;
  if (typeof evidence.familiar === "boolean") showUnfamiliar(evidence.familiar, evidence.familiarity);
  show($("test-result"), false);
  $("test").disabled = !now.heat;
  showMissing(evidence);
  showSet(evidence.classes, coverage(), evidence.familiar);
  showSimilar(evidence.similar, asking.signal);
  compare.show();
  redraw();
}

/** Say that a heatmap is dimmed to this share, since its class has less evidence than another; nothing if it is not. */
function dimmed(share, other) {
  return share < 1 ? `Dimmed: its evidence is ${share < 0.01 ? "under 1\u00a0%" : percent(share)} of that for ${other}.` : "";
}

/** Return how much speaks for the class of a heatmap; 1 if the version does not tell. */
const strengthOf = ({ strength }) => (typeof strength === "number" ? strength : 1);
const targetOf = (evidence) => evidence?.target?.class ?? evidence?.target ?? "";

function redraw() {
  if (!now) return;
  const stage = $("stage");
  const opacity = $("opacity").value / 100;
  if (!now.image) {
    stage.getContext("2d").clearRect(0, 0, stage.width, stage.height);
    return;
  }
  draw(stage, eraser.view, eraser.isBusy ? null : now.heat, opacity, now.share);
  eraser.drawBrush();
  const target = targetOf(now.evidence);
  stage.setAttribute("aria-label", target ? `${now.name} with the heatmap of ${target}` : now.name);
}

async function setTarget(name) {
  now.target = name === now.answer.class ? "" : name;
  $("target").value = now.target;
  await explainAgain();
}

async function explainAgain() {
  quiet();
  try {
    await askEvidence();
  } catch (error) {
    say(error, explainAgain);
  }
}

/** Ask for the answer set with another coverage. */
const askSet = latest(async () => {
  try {
    const query = evidenceQuery("", { heatmap: "none", similar: 0, coverage: coverage(), signal: asking.signal });
    const { classes, familiar } = (await explain(now.blob, query)).data;
    showSet(classes, query.coverage, familiar);
  } catch (error) {
    say(error, askSet);
  }
});

/** Try the heatmap's claim: keep only the hottest quarter, then blur it away. */
async function testHeatmap() {
  $("test").disabled = true;
  try {
    const query = evidenceQuery(now.target, { heatmap: "none", similar: 0, test: true, signal: asking.signal });
    showTest((await explain(now.blob, query)).data.test, targetOf(now.evidence));
  } catch (error) {
    say(error, testHeatmap);
  } finally {
    $("test").disabled = false;
  }
}

async function offerFeedback(names) {
  const { takes_feedback: isTaken } = await configured();
  show($("feedback"), isTaken && !eraser.isEdited);
  fill($("feedback-class"), names, names[0]?.[0]);
  $("feedback-note").value = $("feedback-sent").textContent = "";
}

async function sendFeedback(event) {
  event.preventDefault();
  const told = { request_id: now.before.request_id, class: $("feedback-class").value, note: $("feedback-note").value || undefined };
  try {
    await call("feedback", { body: JSON.stringify(told), type: "application/json", as: "text" });
    $("feedback-sent").textContent = `Thank you: noted as ${told.class}.`;
  } catch (error) {
    say(error);
  }
}

// --- the eraser -------------------------------------------------------------------------------------------------

/** Ask about the image with its erased parts, while the person paints. */
async function askEdited() {
  const opened = now;
  if (!opened.before) return; // painted before there is an answer to compare with
  const blob = await eraser.blob();
  try {
    const answered = await predict(blob, { ...asked(opened.before), signal: asking.signal });
    if (now !== opened) return;
    now.blob = blob;
    showAnswer(answered.data);
    show($("restore"), eraser.isEdited);
  } catch (error) {
    say(error, askEdited);
  }
}

// --- why a and not b --------------------------------------------------------------------------------------------

const whyNot = {
  answers: {},
  isChosen: false, // the person chose a class: it stays while the image is edited
  offer(top) {
    show($("why"), top.length > 1);
    if (top.length < 2) return;
    const names = top.map((entry) => [entry.class, entry.class]);
    ["a", "b"].forEach((side, rank) => fill($(`why-${side}`), names, this.isChosen ? $(`why-${side}`).value : top[rank].class));
    this.answers = {};
  },
  async ask(signal = asking.signal) {
    if ($("why").hidden || !now.image) return;
    for (const side of ["a", "b"]) await this.askOne(side, signal);
  },
  async choose(side) {
    this.isChosen = true;
    quiet();
    try {
      await this.askOne(side, asking.signal);
    } catch (error) {
      say(error, () => this.choose(side));
    }
  },
  async askOne(side, signal) {
    const name = $(`why-${side}`).value;
    const known = targetOf(now.evidence) === name ? now.evidence : null;
    this.answers[side] = known ?? (await explain(now.blob, evidenceQuery(name, { similar: 0, signal }))).data;
    this.redraw();
  },
  redraw() {
    const { a, b } = this.answers;
    if ($("why").hidden || !a || !b) return;
    const opacity = $("opacity").value / 100;
    const strengths = [a, b].map(strengthOf);
    const most = Math.max(...strengths, LEAST_STRENGTH);
    const heats = [a, b].map((answer) => decode(answer.heatmap));
    const names = [a, b].map(targetOf);
    ["a", "b"].forEach((side, index) => {
      const share = strengths[index] / most;
      draw($(`why-canvas-${side}`), eraser.view, heats[index], opacity, share);
      $(`why-canvas-${side}`).setAttribute("aria-label", `Heatmap of ${names[index]}`);
      const entry = now.answer.top.find((found) => found.class === names[index]);
      $(`why-text-${side}`).textContent = `What speaks for ${names[index]} (${confidence(entry?.confidence ?? 0)}). ${dimmed(share, names[1 - index])}`;
    });
    if (heats.includes(null)) return;
    drawDifference($("why-canvas-both"), eraser.view, heats, strengths, opacity);
    $("why-canvas-both").setAttribute("aria-label", `Where ${names[0]} or ${names[1]} has more evidence`);
    if (heats[0].values.every((value, index) => value === heats[1].values[index])) {
      $("why-text-both").textContent = `${a.method} shows the same for both: it does not tell classes apart.`;
      return;
    }
    $("why-text-both").replaceChildren(
      h("span", { className: "warm", textContent: `more for ${names[0]}` }), " ",
      h("span", { className: "cool", textContent: `more for ${names[1]}` }),
    );
  },
};

// --- the page around it -----------------------------------------------------------------------------------------

async function readModels() {
  try {
    models = (await call("models")).data;
  } catch {
    models = null; // the key lacks the scope `read`: the choices of version and method stay hidden
  }
  const versions = (models?.versions ?? []).filter((version) => version.routable);
  const label = ({ model, version, role }) => `${isSeveral(models) ? `${model} ` : ""}${version} (${role})`;
  showKnown(versions.find(({ model, role }) => role === "stable" && model === models.name)?.contract.classes ?? []);
  const options = versions.map((entry) => [`${entry.model}/${entry.version}`, label(entry)]);
  const others = isSeveral(models) ? [...new Set(versions.map(({ model }) => model))].filter((model) => model !== models.name) : [];
  fill($("version"), [["", "as the gateway chooses"], ...others.map((model) => [model, `${model}, as the gateway chooses`]), ...options]);
  show($("version-label"), versions.length > 0);
  fill($("compare-version"), [["", "none"], ...options]);
  show($("compare-version-label"), versions.length > 1);
  const explained = versions.find(({ model, role }) => role === "stable" && model === models.name)?.contract.explain;
  fill($("method"), [["", explained?.method ?? ""], ...(explained?.methods ?? []).filter((name) => name !== explained.method).map((name) => [name, name])]);
  show($("method-label"), (explained?.methods ?? []).length > 1);
}

/** Say on the first page which classes the model knows. */
function showKnown(classes) {
  show($("knows"), classes.length > 0);
  const named = classes.slice(0, NAMED_CLASSES).join(", ");
  const more = classes.length - NAMED_CLASSES;
  $("knows").textContent = `${models?.name} knows ${named}${more > 0 ? ` and ${more} more classes` : ""}.`;
  if (classes.length && !SAMPLES.some(([, text]) => classes.includes(text))) $("samples-hint").textContent = "Or images of none of its classes, to see whether it notices:";
}

function watchOutput(input, changed) {
  const output = input.parentElement.querySelector("output");
  input.addEventListener("input", () => {
    output.textContent = `${input.value} %`;
    changed();
  });
}

function connect() {
  $("file").addEventListener("change", (event) => {
    const files = [...event.target.files];
    event.target.value = ""; // so that the same file can be chosen again
    take(files);
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("dragging");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dragging");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dragging");
    takeDropped(event.dataTransfer);
  });
  document.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) take(event.clipboardData.files);
    else if (event.target.tagName !== "INPUT") say(new Problem(0, "file", "The clipboard holds no image. Copy an image, not its address, and paste again."));
  });
  watchOutput($("opacity"), () => { redraw(); whyNot.redraw(); compare.show(); });
  watchOutput($("coverage"), askSet);
  watchOutput($("brush"), () => eraser.setBrush($("brush").value / 100));
  $("target").addEventListener("change", () => setTarget($("target").value));
  $("method").addEventListener("change", explainAgain);
  $("version").addEventListener("change", () => now && openFile(now.file));
  for (const side of ["a", "b"]) $(`why-${side}`).addEventListener("change", () => whyNot.choose(side));
  $("erase").addEventListener("click", () => {
    const on = $("erase").getAttribute("aria-pressed") !== "true";
    $("erase").setAttribute("aria-pressed", on);
    show($("brush-label"), on);
    show($("erase-hint"), on);
    eraser.setOn(on);
  });
  $("hide-hot").addEventListener("click", () => eraser.hideHot(now.heat));
  $("restore").addEventListener("click", async () => {
    eraser.load(now.image);
    now.blob = now.whole;
    showAnswer(now.before);
    show($("restore"), false);
    await explainAgain();
  });
  $("test").addEventListener("click", testHeatmap);
  $("feedback").addEventListener("submit", sendFeedback);
  $("camera-open").addEventListener("click", () => openCamera(openFile));
  connectCode();
  connectKey(readModels);
  $("samples").replaceChildren(...SAMPLES.map(([file, text]) => h(
    "button",
    { type: "button", className: "sample", title: text, onclick: () => openSample(file) },
    h("img", { src: `page/samples/${file}`, alt: text, width: 56, height: 56, loading: "lazy" }),
  )));
}

async function openSample(name) {
  try {
    const { data } = await call(`page/samples/${name}`, { as: "blob" });
    await openFile(new File([data], name, { type: data.type }));
  } catch (error) {
    say(error, () => openSample(name));
  }
}

/** Return what the gateway offers; it is asked once. */
function configured() {
  configuring ??= call("page/config.json").then(({ data }) => data, (error) => {
    configuring = null;
    throw error;
  });
  return configuring;
}

async function fitted(file) {
  return fitting(file, await configured());
}

async function start() {
  connect();
  try {
    const config = await configured();
    show($("key-open"), config.asks_for_keys);
    if (!config.asks_for_keys || apiKey()) await readModels();
  } catch (error) {
    say(error, () => location.reload());
  }
}

start();
