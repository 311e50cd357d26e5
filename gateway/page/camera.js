// The camera: a dialog with its live picture, from which one image is taken.

import { $ } from "./dom.js";

/** Open the camera's dialog and call `take(file)` with the image that the person takes. */
export async function openCamera(take) {
  const dialog = $("camera-dialog");
  const video = $("camera");
  let stream = null;
  $("camera-text").textContent = "Waiting for the camera: allow it if the browser asks.";
  $("camera-take").disabled = true;
  dialog.showModal();
  $("camera-close").onclick = () => dialog.close();
  dialog.onclose = () => {
    stream?.getTracks().forEach((track) => track.stop());
    video.srcObject = null;
  };
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch {
    const remedy = window.isSecureContext
      ? "Allow the camera in the browser's address bar, or connect one, then open this again."
      : "Browsers allow it only over https or on localhost: open the page there, or choose an image instead.";
    $("camera-text").textContent = `The camera cannot be used. ${remedy}`;
    return;
  }
  if (!dialog.open) {
    dialog.onclose();
    return;
  }
  video.srcObject = stream;
  await video.play();
  $("camera-text").textContent = "";
  $("camera-take").disabled = false;
  $("camera-take").onclick = () => {
    const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
    canvas.getContext("2d").drawImage(video, 0, 0);
    dialog.close();
    canvas.convertToBlob({ type: "image/png" }).then((blob) => take(new File([blob], "camera.png", { type: "image/png" })));
  };
}
