// The eraser: what is painted is replaced by a strong blur, so that nothing new comes into the image.

import { hotFrom, mask } from "./heat.js";
import { blurred, canvasOf } from "./images.js";

const KEY_STEP = 0.04; // of the image's side

/** Paints on `stage`. Calls `changed` while something is painted, `ended` after a stroke, `redraw` to show it. */
export class Eraser {
  constructor(stage, { changed, ended, redraw }) {
    Object.assign(this, { stage, changed, ended, redraw, isOn: false, isBusy: false, isEdited: false, brush: 0.16 });
    this.at = null; // the brush's centre, as shares of the image's width and height
    stage.addEventListener("pointerdown", (event) => this.#down(event));
    stage.addEventListener("pointermove", (event) => this.#move(event));
    for (const name of ["pointerup", "pointercancel"]) stage.addEventListener(name, () => this.#up());
    stage.addEventListener("pointerleave", () => { if (!this.isBusy) this.#put(null); });
    stage.addEventListener("keydown", (event) => this.#key(event));
  }

  /** Begin with a whole image (a canvas), or with null if the browser cannot show it. */
  load(image) {
    this.isEdited = this.isBusy = false;
    this.view = image;
    if (!image) return;
    this.original = image;
    this.blur = blurred(image);
    [this.erased] = canvasOf(image.width, image.height);
  }

  setOn(isOn) {
    this.isOn = isOn;
    this.stage.classList.toggle("erasing", isOn);
    this.stage.tabIndex = isOn ? 0 : -1;
    this.stage.setAttribute("role", isOn ? "application" : "img");
    this.#put(isOn ? { x: 0.5, y: 0.5 } : null);
  }

  setBrush(share) {
    this.brush = share;
    this.redraw();
  }

  /** Return the edited image as a PNG. */
  blob() { return this.view.convertToBlob({ type: "image/png" }); }

  /** Blur the hottest quarter of the heatmap away. */
  hideHot(heat) {
    const from = hotFrom(heat);
    const context = this.erased.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(mask(heat, (value) => (value >= from ? 255 : 0)), 0, 0, this.erased.width, this.erased.height);
    this.#compose();
    this.redraw();
    Promise.resolve(this.changed()).then(() => this.ended());
  }

  drawBrush() {
    if (!this.isOn || !this.at) return;
    const { width, height } = this.stage;
    const context = this.stage.getContext("2d");
    context.beginPath();
    context.arc(this.at.x * width, this.at.y * height, (this.brush * Math.max(width, height)) / 2, 0, 2 * Math.PI);
    for (const [colour, line] of [["#000", 4], ["#fff", 2]]) {
      context.strokeStyle = colour;
      context.lineWidth = line;
      context.stroke();
    }
  }

  #down(event) {
    if (!this.isOn || !this.view) return;
    event.preventDefault();
    this.stage.setPointerCapture(event.pointerId);
    this.isBusy = true;
    this.#put(this.#place(event));
    this.#paint(this.at);
  }

  #move(event) {
    if (!this.isOn || !this.view) return;
    const from = this.at;
    this.#put(this.#place(event));
    if (this.isBusy) this.#paint(from ?? this.at);
  }

  #up() {
    if (!this.isBusy) return;
    this.isBusy = false;
    this.#finish();
  }

  #key(event) {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (!this.isOn || !this.view || !(event.key in steps || event.key === " ")) return;
    event.preventDefault();
    const at = this.at ?? { x: 0.5, y: 0.5 };
    if (event.key === " ") {
      this.#put(at);
      this.#paint(at);
      this.#finish();
      return;
    }
    const within = (value) => Math.min(1, Math.max(0, value));
    const [x, y] = steps[event.key];
    this.#put({ x: within(at.x + KEY_STEP * x), y: within(at.y + KEY_STEP * y) });
  }

  async #finish() {
    await this.changed();
    if (!this.isBusy) await this.ended();
  }

  #place(event) {
    const box = this.stage.getBoundingClientRect();
    return { x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height };
  }

  #put(at) {
    this.at = at;
    if (this.isOn || at === null) this.redraw();
  }

  /** Erase along the line from `from` to the brush's place. */
  #paint(from) {
    const { width, height } = this.erased;
    const context = this.erased.getContext("2d");
    context.lineCap = "round";
    context.lineWidth = this.brush * Math.max(width, height);
    context.beginPath();
    context.moveTo(from.x * width, from.y * height);
    context.lineTo(this.at.x * width + 0.01, this.at.y * height);
    context.stroke();
    this.#compose();
    this.redraw();
    this.changed();
  }

  #compose() {
    const { width, height } = this.original;
    const [patch, patchContext] = canvasOf(width, height);
    patchContext.drawImage(this.erased, 0, 0);
    patchContext.globalCompositeOperation = "source-in";
    patchContext.drawImage(this.blur, 0, 0);
    const [view, context] = canvasOf(width, height);
    context.drawImage(this.original, 0, 0);
    context.drawImage(patch, 0, 0);
    this.view = view;
    this.isEdited = true;
  }
}
