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

/** Return a file, or a smaller copy of its image if it has more bytes than the gateway takes. */
export async function fitting(file, { max_image_bytes: most }) {
  if (file.size <= most) return file;
  const image = await loadImage(file).catch(() => null);
  if (image === null) return file; // the server says what is wrong with it
  return new File([await image.convertToBlob({ type: "image/png" })], file.name, { type: "image/png" });
}

/** Return the files that were dropped, and the images in dropped folders. */
export async function droppedFiles({ items, files }) {
  const entries = [...items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.some(({ isDirectory }) => isDirectory)) return [...files];
  return (await Promise.all(entries.map(filesOf))).flat();
}

async function filesOf(entry) {
  if (entry.isFile) return [await new Promise((done, failed) => { entry.file(done, failed); })];
  const reader = entry.createReader();
  const found = [];
  for (;;) {
    const some = await new Promise((done, failed) => { reader.readEntries(done, failed); }); // 100 at most
    if (some.length === 0) return found.filter(({ type }) => type.startsWith("image/"));
    found.push(...(await Promise.all(some.map(filesOf))).flat());
  }
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
