// The evidence beside the heatmap: answer set, similar training images, the test of the heatmap.

import { $, confidence, h, percent, show } from "./dom.js";
import { call, sentence } from "./api.js";

const isMissing = (part) => part === undefined || part === null || part.unavailable !== undefined;
const NAMES = { familiar: "familiarity", classes: "the answer set", similar: "similar images" };

/** Say once for each reason which parts of the evidence this version does not have. */
export function showMissing(evidence) {
  const byReason = {};
  for (const [part, name] of Object.entries(NAMES)) {
    const reason = evidence[part]?.unavailable;
    if (reason) (byReason[reason] ??= []).push(name);
  }
  const sentences = Object.entries(byReason).map(([reason, names]) => `Not available: ${names.join(", ")}. ${sentence(reason)}`);
  $("missing").replaceChildren(...sentences.map((text) => h("p", { textContent: text })));
  show($("missing"), sentences.length > 0);
}

/** Show the answer set, the smallest set of classes that holds the right one with the chosen coverage. */
export function showSet(classes, coverage, isFamiliar) {
  show($("set"), !isMissing(classes));
  if (isMissing(classes)) return;
  const names = classes.map((entry) => h("span", { className: "chip", title: confidence(entry.confidence), textContent: entry.class }));
  $("set-list").replaceChildren("Answer set: ", ...names);
  const share = percent(coverage, Number.isInteger(coverage * 100) ? 0 : 1);
  const limit = isFamiliar === false ? " It promises nothing for this image, which is unlike them." : "";
  $("set-text").textContent = `Over many images like those of the training, such a set holds the right class in at least ${share} of the cases.${limit}`;
}

/** Show the nearest training images, those of each class together. */
export async function showSimilar(similar, signal) {
  show($("similar"), !isMissing(similar) && similar.length > 0);
  if ($("similar").hidden) return;
  const byClass = new Map();
  for (const entry of similar) byClass.set(entry.class, [...(byClass.get(entry.class) ?? []), entry]);
  $("similar-list").replaceChildren(...[...byClass].map(([name, entries]) => h(
    "figure",
    {},
    h("figcaption", { textContent: name }),
    h("ul", { className: "near" }, ...entries.map((entry) => near(entry, signal))),
  )));
}

function near(entry, signal) {
  const image = h("img", { alt: `A training image of ${entry.class}`, width: 84, height: 84, hidden: !entry.image });
  if (entry.image) loadThumbnail(image, entry.image, signal);
  return h("li", {}, image, h("span", { className: "muted", textContent: percent(entry.similarity) }));
}

/** Load a thumbnail with the caller's key, which an <img> by itself would not send. */
async function loadThumbnail(image, path, signal) {
  try {
    const { data } = await call(path.replace(/^\//, ""), { as: "blob", signal });
    image.src = URL.createObjectURL(data);
    image.onload = () => URL.revokeObjectURL(image.src);
  } catch {
    image.hidden = true; // its class and similarity stay
  }
}

/** Show what happened when the heatmap's claim was tried on the image. */
export function showTest(test, target) {
  show($("test-result"));
  if (isMissing(test)) {
    $("test-result").textContent = sentence(test?.unavailable ?? "this version cannot test its heatmaps");
    return;
  }
  $("test-result").replaceChildren(
    h("strong", { textContent: sentence(test.verdict) }),
    ` With only the hottest quarter, ${target} has ${confidence(test.kept)}; without it, ${confidence(test.removed)}.`,
  );
}
