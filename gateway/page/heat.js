// Heatmaps: decode the numbers and draw them over an image, in the colours of the server's own overlays.

// matplotlib's inferno, 256 colours of 3 bytes, as in handlers/overlay.py.
const INFERNO = bytes("AAAEAQAFAQEGAQEIAgEKAgIMAgIOAwIQBAMSBAMUBQQXBgQZBwUbCAUdCQYfCgciCwckDAgmDQgpDgkrEAktEQowEgoyFAs0FQs3Fgs5GAw8GQw+GwxBHAxDHgxFHwxIIQxKIwxMJAxPJgxRKAtTKQtVKwtXLQtZLwpbMQpcMgpeNApfNglhOAliOQljOwlkPQllPglmQApnQgpoRApoRQppRwtqSQtqSgxrTAxrTQ1sTw1sUQ5sUg5tVA9tVQ9tVxBuWRBuWhFuXBJuXRJuXxNuYRNuYhRuZBVuZRVuZxZuaRZuahdubBhubRhubxlucRluchpudBpudRtudxxteBxteh1tfB1tfR5tfx5sgB9sgiBshCBrhSFrhyFriCJqiiJqjCNpjSNpjyRpkCVokiVokyZnlSZnlydmmCdmmihlmylknSlknypjoCpjoitioyxhpSxgpi1gqC5fqS5eqy9erTBdrjBcsDFbsTJaszJatDNZtjRYtzVXuTVWujZVvDdUvThTvzlSwDpRwTpQwztPxDxOxj1Nxz5MyD9LykBKy0FJzEJIzkNHz0RG0EVF0kZE00dD1EhC1UpB10s/2Ew+2U092k4821A73VE63lI431M34FU24VY14lc041kz5Fox5Vww5l0v514u6GAt6WEr6mMq62Qp62Yo7Gcm7Wkl7mok72wj724h8G8g8XEf8XMd8nQc83Yb83gZ9HkY9XsX9X0V9n4U9oAT94IS94QQ+IUP+IcO+IkM+YsL+YwK+Y4J+pAI+pIH+pQH+5YG+5cG+5kG+5sG+50H/J8H/KEI/KMJ/KUK/KYM/KgN/KoP/KwR/K4S/LAU/LIW/LQY+7Ya+7gd+7of+7wh+74j+sAm+sIo+sQq+sYt+ccv+cky+cs1+M03+M8699E999NA9tVD9tdG9dlJ9dtM9N1P9N9T9OFW8+Na8+Vd8uZh8uhl8upp8ext8e1x8e918fF58vJ98vSC8/WG8/aK9PiO9fmS9vqW+Pua+fyd+v2h/P+k");
const WARM = [252, 165, 10];
const COOL = [56, 132, 214];
const MOST_PIXELS = 640;

function bytes(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

/** Return {width, height, values (0 to 255)} of a heatmap as /explain writes it: rows of numbers, or base64. */
export function decode(heatmap) {
  if (!heatmap || heatmap.unavailable) return null;
  if (!Array.isArray(heatmap)) return { ...heatmap, values: bytes(heatmap.values) };
  const values = Uint8Array.from(heatmap.flat(), (value) => Math.round(value * 255));
  return { width: heatmap[0].length, height: heatmap.length, values };
}

/** Return the width and height at which an image of that size is drawn. */
export function fit(width, height, most = MOST_PIXELS) {
  const scale = most / Math.max(width, height);
  return [Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale))];
}

/** Return the smallest value of the hottest quarter of the pixels, from 1 to 255. */
export function hotFrom(heat) {
  const sorted = Uint8Array.from(heat.values).sort();
  return Math.max(1, sorted[Math.floor(sorted.length * 0.75)]);
}

/** Return a canvas whose alpha is the heatmap's value (through `level`), at the heatmap's own size. */
export function mask(heat, level = (value) => value) {
  const canvas = new OffscreenCanvas(heat.width, heat.height);
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(heat.width, heat.height);
  heat.values.forEach((value, index) => { pixels.data[4 * index + 3] = level(value); });
  context.putImageData(pixels, 0, 0);
  return canvas;
}

const stretched = new WeakMap();

/** Return the heatmap's values at another size, smooth between its pixels. */
function stretch(heat, width, height) {
  const known = stretched.get(heat);
  if (known?.width === width && known.height === height) return known.values;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.drawImage(mask(heat), 0, 0, width, height);
  const pixels = context.getImageData(0, 0, width, height).data;
  const values = new Uint8Array(width * height);
  for (let index = 0; index < values.length; index++) values[index] = pixels[4 * index + 3];
  stretched.set(heat, { width, height, values });
  return values;
}

/**
 * Draw an image with its heatmap: where nothing speaks for the class the image fades, where much does it glows. Each
 * heatmap is scaled to its own maximum; `strength` (0 to 1) dims one of a class that has less evidence than another.
 */
export function draw(canvas, image, heat, opacity, strength = 1) {
  blend(canvas, image, heat && opacity > 0, opacity, (width, height) => {
    const values = stretch(heat, width, height);
    return (index) => {
      const value = Math.round(values[index] * strength);
      return [INFERNO, 3 * value, 0.2 + 0.8 * (value / 255)];
    };
  });
}

/** Draw where the evidence for class a (warm) and for class b (cool) is stronger; `strengths` compare the heatmaps. */
export function drawDifference(canvas, image, [a, b], [strengthA, strengthB], opacity) {
  const most = Math.max(strengthA, strengthB, 1e-9);
  blend(canvas, image, true, opacity, (width, height) => {
    const [valuesA, valuesB] = [stretch(a, width, height), stretch(b, width, height)];
    return (index) => {
      const more = (valuesA[index] * strengthA - valuesB[index] * strengthB) / (255 * most);
      return [more > 0 ? WARM : COOL, 0, Math.min(1, 1.2 * Math.abs(more))];
    };
  });
}

/** Draw an image and, over it, colours: `colours(width, height)(index)` is [palette, its place, share] of a pixel. */
function blend(canvas, image, isColoured, opacity, colours) {
  const [width, height] = fit(image.width, image.height);
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.drawImage(image, 0, 0, width, height);
  if (!isColoured) return;
  const picture = context.getImageData(0, 0, width, height);
  const { data } = picture;
  const colour = colours(width, height);
  for (let index = 0, at = 0; at < data.length; index++, at += 4) {
    const [palette, place, share] = colour(index);
    const grey = 0.299 * data[at] + 0.587 * data[at + 1] + 0.114 * data[at + 2];
    for (let channel = 0; channel < 3; channel++) {
      const faded = data[at + channel] + opacity * 0.7 * (grey - data[at + channel]);
      data[at + channel] = faded + opacity * share * (palette[place + channel] - faded);
    }
  }
  context.putImageData(picture, 0, 0);
}
