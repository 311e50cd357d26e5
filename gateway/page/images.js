// Images as the page works with them: canvases whose long side has at most 512 pixels, smaller images as they are.

const MOST_SIDE = 512;

/** Return an empty canvas with its context. */
export function canvasOf(width, height) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  return [canvas, context];
}

/** Return a file's image on a canvas, upright as its EXIF data say. */
export async function loadImage(file) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, MOST_SIDE / Math.max(bitmap.width, bitmap.height));
  const [canvas, context] = canvasOf(Math.max(1, Math.round(bitmap.width * scale)), Math.max(1, Math.round(bitmap.height * scale)));
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return canvas;
}

/** Return the image blurred about as strongly as a Gaussian of an eighth of its side. */
export function blurred(image) {
  const cells = 5;
  const [small, smallContext] = canvasOf(cells, cells);
  smallContext.drawImage(image, 0, 0, cells, cells);
  const [canvas, context] = canvasOf(image.width, image.height);
  context.drawImage(small, 0, 0, image.width, image.height);
  return canvas;
}
