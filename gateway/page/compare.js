// The opened image beside another image, or the same image as another version answers it.

import { $, confidence, h, show } from "./dom.js";
import { explain, predict } from "./api.js";
import { decode, draw } from "./heat.js";
import { loadImage } from "./images.js";

const SHOWN_CLASSES = 3;

/** `now()` is what the page shows; `query(target, more)` is the query of /explain; `failed(error, again)` shows an error;
 * `fitted(file)` is what is sent of a file. */
export class Compare {
  constructor({ now, query, failed, fitted }) {
    Object.assign(this, { now, query, failed, fitted, other: null, asking: null });
    $("compare-version").addEventListener("change", () => this.withVersion($("compare-version").value));
    $("compare-file").addEventListener("change", (event) => {
      const [file] = event.target.files;
      event.target.value = "";
      if (file) this.withImage(file);
    });
  }

  /** Forget the second side. */
  clear() {
    this.other = this.asking = null;
    $("compare-version").value = "";
    show($("compare-pair"), false);
  }

  async withVersion(chosen) {
    if (!chosen) {
      this.clear();
      return;
    }
    const [model, version] = chosen.split("/");
    const { blob, name, view } = this.now();
    await this.#ask({ blob, name, model, version, view: view() }, () => this.withVersion(chosen));
  }

  async withImage(file) {
    $("compare-version").value = "";
    const view = await loadImage(file).catch(() => null);
    const { name: model, version } = this.now().answer.model;
    await this.#ask({ blob: file, name: file.name || "image", model, version, view }, () => this.withImage(file));
  }

  async #ask(side, again) {
    this.asking = side;
    try {
      const { model, version } = side;
      side.blob = await this.fitted(side.blob);
      side.answer = (await predict(side.blob, { model, version })).data;
      side.evidence = (await explain(side.blob, this.query("", { model, version }))).data;
      if (this.asking !== side) return; // another image was opened meanwhile
      this.other = side;
      this.show();
    } catch (error) {
      this.failed(error, again);
    }
  }

  /** Draw both sides. */
  show() {
    show($("compare-pair"), this.other !== null);
    if (!this.other) return;
    const { name, answer, evidence, share, view } = this.now();
    $("compare-pair").replaceChildren(card({ name, answer, evidence, share, view: view() }), card(this.other));
  }
}

function card({ name, answer, evidence, share = 1, view }) {
  const canvas = h("canvas", { width: 320, height: 320, role: "img", "aria-label": `${name} with the heatmap of ${answer.class}` });
  if (view) draw(canvas, view, decode(evidence?.heatmap), $("opacity").value / 100, share);
  const lines = answer.top.slice(0, SHOWN_CLASSES).map((entry) => h("li", { textContent: `${entry.class} ${confidence(entry.confidence)}` }));
  return h("figure", {}, canvas, h("figcaption", {}, h("strong", { className: "said", textContent: answer.class }), h("span", { className: "muted", textContent: `${name} · ${answer.model.version}` }), h("ol", { className: "plain" }, ...lines)));
}
