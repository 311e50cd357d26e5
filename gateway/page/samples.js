// The sample images in samples/: CIFAR-10's test images, two of them side by side, and a drawing of no class.

export const SAMPLES = [
  ["cat.png", "cat"],
  ["dog.png", "dog"],
  ["frog.png", "frog"],
  ["horse.png", "horse"],
  ["deer.png", "deer"],
  ["bird.png", "bird"],
  ["airplane.png", "airplane"],
  ["ship.png", "ship"],
  ["automobile.png", "automobile"],
  ["truck.png", "truck"],
  ["cat-and-ship.png", "a cat and a ship side by side"],
  ["clock.png", "a clock, which the model does not know"],
];
