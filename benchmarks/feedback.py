"""Measure `gradserve drift` and `gradserve labels` with planted drift and planted wrong labels.

All images are of those that the released model's training held out. Drift: a stream of calls is judged every 50 calls
by its last 500, against 1,500 other held-out images; the figures are the share of false alarms without any change, and
the number of changed calls until the first verdict. Labels: 5 % of 2,000 labels are replaced by another class.

    python benchmarks/feedback.py [--streams 40] [--images 3500]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageEnhance

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from this folder, `gateway` would be gateway.py

from control.feedback.drift import Answers, answers_of, compare
from control.feedback.labels import LabelledImage, find_wrong_labels
from control.images.archive_source import ArchiveSource
from control.stack.stack import pack
from training.data.images import divide, encode_png, load_training_images
from training.recipe import recipe_from_dict

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gradserve import Prediction

RELEASED = Path("model_store/released")
RESULT = Path(__file__).parent / "results" / "feedback.json"
CACHE = Path(os.environ.get("GRADSERVE_DATA", Path.home() / ".cache" / "gradserve"))
REFERENCE, WINDOW, STEP, LONGEST = 1500, 500, 50, 1500
LABELS, WRONG = 2000, 0.05
ALPHAS = (0.01, 0.05)


class Answered:
    """Answers images from a table that the model has filled, so that each image is computed once."""

    def __init__(self, table: dict[bytes, Prediction]) -> None:
        self._table = table

    def predict(self, images: Sequence[bytes], _top_k: int) -> list[Prediction]:
        """Return the model's answers, with all classes."""
        return [self._table[image] for image in images]


def main() -> None:
    """Measure, print and write the figures."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--streams", type=int, default=40, help="streams of calls for each kind of drift")
    options.add_argument("--images", type=int, default=3500, help="held-out images")
    given = options.parse_args()
    images, labels, classes = held_out(given.images)
    with tempfile.TemporaryDirectory() as store, closing(ArchiveSource(pack(RELEASED, Path(store)))) as model:
        table = answer_all(model, images, len(classes))
        changed = {
            "darker": answer_all(model, [darken(image) for image in images[REFERENCE : REFERENCE + 600]], 1),
            "noise": answer_all(model, [add_noise(image) for image in images[REFERENCE : REFERENCE + 600]], 1),
        }
    stable = [table[image] for image in images]
    reference, rest = answers_of(stable[:REFERENCE]), stable[REFERENCE:]
    report = {
        "reference": REFERENCE,
        "window": WINDOW,
        "step": STEP,
        "streams": given.streams,
        "draws": given.streams * 10,
        "false_alarms": {f"alpha {alpha}": false_alarms(stable, given.streams * 10, alpha) for alpha in ALPHAS},
        "delay": {
            **{name: delays(reference, rest, list(found.values()), given.streams) for name, found in changed.items()},
            "half of them cats": delays(reference, rest, mixed(rest, "cat", 0.5), given.streams),
        },
        "wrong_labels": [wrong_labels(images[:LABELS], labels[:LABELS], classes, table, seed) for seed in range(5)],
    }
    print(json.dumps(report, indent=2))
    RESULT.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def held_out(count: int) -> tuple[list[bytes], list[str], tuple[str, ...]]:
    """Return held-out images as PNG files, their labels and the classes."""
    contract = json.loads((RELEASED / "contract.json").read_text(encoding="utf-8"))
    recipe = recipe_from_dict(contract["accepted"]["recipe"])
    images, _ = load_training_images(recipe.data, CACHE)
    _, kept = divide(images, subset=recipe.subset, validation=recipe.validation, seed=recipe.seed)
    kept = kept.sample(count)
    return [encode_png(pixels) for pixels in kept.images], [kept.classes[label] for label in kept.labels], kept.classes


def answer_all(model: ArchiveSource, images: list[bytes], top_k: int) -> dict[bytes, Prediction]:
    """Return the model's answer to each image."""
    return dict(zip(images, model.predict(images, top_k), strict=True))


def false_alarms(stable: list[Prediction], draws: int, alpha: float) -> float:
    """Return the share of draws called drift, each of a reference and a window of the same images without repeats."""
    chance = np.random.default_rng(0)
    alarms = 0
    for _ in range(draws):
        drawn = [stable[index] for index in chance.permutation(len(stable))[: REFERENCE + WINDOW]]
        alarms += compare(answers_of(drawn[:REFERENCE]), answers_of(drawn[REFERENCE:]), alpha=alpha).decision == "drift"
    return alarms / draws


def delays(
    reference: Answers, rest: list[Prediction], changed: list[Prediction], streams: int
) -> dict[str, float | int | None]:
    """Return how many changed calls came before the first verdict: median, least, most, and streams without one."""
    found = [delay(reference, rest, changed, np.random.default_rng(seed)) for seed in range(streams)]
    known = [value for value in found if value is not None]
    if not known:
        return {"median": None, "least": None, "most": None, "missed": len(found)}
    least, most = min(known), max(known)
    return {"median": statistics.median(known), "least": least, "most": most, "missed": len(found) - len(known)}


def delay(
    reference: Answers, rest: list[Prediction], changed: list[Prediction], chance: np.random.Generator
) -> int | None:
    """Return the number of changed calls at the first verdict of one stream; None if there was none."""
    stream = [rest[index] for index in chance.choice(len(rest), WINDOW)]
    stream += [changed[index] for index in chance.choice(len(changed), LONGEST)]
    for seen in range(STEP, LONGEST + 1, STEP):
        if compare(reference, answers_of(stream[seen : seen + WINDOW])).decision == "drift":
            return seen
    return None


def mixed(rest: list[Prediction], name: str, share: float) -> list[Prediction]:
    """Return answers of which `share` are of one class."""
    of_class = [answer for answer in rest if answer.class_name == name]
    others = [answer for answer in rest if answer.class_name != name][: round(len(of_class) * (1 - share) / share)]
    return of_class + others


def wrong_labels(
    images: list[bytes], labels: list[str], classes: tuple[str, ...], table: dict[bytes, Prediction], seed: int
) -> dict[str, float]:
    """Return precision and recall with wrong labels planted by `seed`."""
    chance = np.random.default_rng(seed)
    planted = set(chance.choice(len(labels), round(WRONG * len(labels)), replace=False).tolist())
    given = [
        str(chance.choice([name for name in classes if name != label])) if index in planted else label
        for index, label in enumerate(labels)
    ]
    labelled = [
        LabelledImage(str(index), content(image), label)
        for index, (image, label) in enumerate(zip(images, given, strict=True))
    ]
    found = {
        int(suspect.name) for suspect in find_wrong_labels(labelled, classes, Answered(table), lambda: None).suspects
    }
    right = len(found & planted)
    return {"found": len(found), "precision": round(right / len(found), 4), "recall": round(right / len(planted), 4)}


def content(image: bytes) -> Callable[[], bytes]:
    """Return a function that returns the image."""
    return lambda: image


def darken(image: bytes) -> bytes:
    """Return the image at 40 % of its brightness: a lamp that failed."""
    return encode_png(np.asarray(ImageEnhance.Brightness(Image.open(io.BytesIO(image))).enhance(0.4)))


def add_noise(image: bytes) -> bytes:
    """Return the image with Gaussian noise of 20 grey levels: a worn sensor."""
    pixels = np.asarray(Image.open(io.BytesIO(image)), np.float32)
    noise = np.random.default_rng(len(image)).normal(0, 20, pixels.shape)
    return encode_png(np.clip(pixels + noise, 0, 255).astype(np.uint8))


if __name__ == "__main__":
    main()
