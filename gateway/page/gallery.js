// The gallery: many images at once, the least certain first.

import { $, confidence, h, show } from "./dom.js";
import { predictBatch, sentence } from "./api.js";
import { fitting } from "./images.js";

const IMAGES_PER_CALL = 32;

const ORDERS = {
  doubt: (a, b) => certainty(a) - certainty(b),
  certain: (a, b) => certainty(b) - certainty(a),
  class: (a, b) => (a.entry?.class ?? "").localeCompare(b.entry?.class ?? "") || certainty(a) - certainty(b),
  name: (a, b) => a.file.name.localeCompare(b.file.name),
};

/** Images without an answer come first, then unfamiliar ones, then by confidence. */
function certainty({ entry }) {
  if (entry?.confidence === undefined) return -2;
  return entry.confidence - (entry.familiar === false ? 1 : 0);
}

/** Shows images as tiles; `open(file)` opens one, `chosen()` is the model and the version to ask. */
export class Gallery {
  constructor({ open, chosen }) {
    Object.assign(this, { open, chosen, images: [] });
    $("gallery-sort").addEventListener("change", () => this.#show());
  }

  /** Ask about all files and show them as the answers come. */
  async add(files, config) {
    for (const image of this.images) URL.revokeObjectURL(image.url);
    this.images = files.map((file) => ({ file, url: URL.createObjectURL(file), entry: null }));
    show($("gallery"));
    this.#show();
    for (const image of this.images) image.sent = await fitting(image.file, config);
    for (const part of parts([...this.images], config)) await this.#ask(part); // a copy: showing them sorts the list
  }

  /** Ask about some images; about half of them at a time if the gateway says that they are too large together. */
  async #ask(part) {
    try {
      const { data } = await predictBatch(part.map(({ sent }) => sent), this.chosen());
      data.results.forEach((entry, index) => { part[index].entry = entry; });
    } catch (error) {
      if (error.status !== 413) throw error;
      if (part.length > 1) {
        const half = part.length >> 1;
        await this.#ask(part.slice(0, half));
        await this.#ask(part.slice(half));
        return;
      }
      part[0].entry = { error: { detail: error.message } };
    }
    this.#show();
  }

  #show() {
    const done = this.images.filter(({ entry }) => entry).length;
    const count = this.images.length;
    $("gallery-state").textContent = done < count ? `${done} of ${count} answered` : `${count} images`;
    this.images.sort(ORDERS[$("gallery-sort").value]);
    $("gallery-list").replaceChildren(...this.images.map((image) => this.#tile(image)));
  }

  #tile(image) {
    const { entry, file, url } = image;
    const isSure = entry?.confidence !== undefined;
    const text = isSure ? `${entry.class}, ${confidence(entry.confidence)}` : entry ? sentence(entry.error.detail) : "…";
    const caption = isSure
      ? [h("strong", { textContent: entry.class }), h("span", { textContent: confidence(entry.confidence) }), entry.familiar === false ? h("span", { className: "tag", textContent: "unfamiliar" }) : null]
      : [h("span", { className: entry ? "failed" : "", textContent: text })];
    return h("li", {}, h(
      "button",
      { type: "button", className: "tile", title: `${file.name}: ${text}`, onclick: () => this.open(file) },
      picture(url, file.name),
      h("span", { className: "caption" }, ...caption),
    ));
  }
}

/** Return the image, or the file's name if the browser cannot show it. */
function picture(url, name) {
  const image = h("img", { src: url, alt: name, loading: "lazy" });
  image.onerror = () => image.replaceWith(h("span", { className: "unseen", textContent: name }));
  return image;
}

/** Yield the images in calls that the gateway takes. */
function* parts(images, { max_batch_bytes: mostBytes, max_batch_images: mostImages }) {
  const most = Math.min(IMAGES_PER_CALL, mostImages);
  let part = [];
  let bytes = 0;
  for (const image of images) {
    const size = image.sent.size + 1024; // the multipart headers
    if (part.length && (part.length === most || bytes + size > mostBytes)) {
      yield part;
      part = [];
      bytes = 0;
    }
    part.push(image);
    bytes += size;
  }
  if (part.length) yield part;
}
