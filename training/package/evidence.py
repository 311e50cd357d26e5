"""Make `evidence.safetensors`: the index of training images, the method of familiarity, the conformal scores.

Every choice is made on held-out images. What a data set is too small for is left out, with the reason in the contract.
"""

from __future__ import annotations

import io
import json
import logging
from dataclasses import asdict
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from PIL import Image
from safetensors.numpy import save_file
from torch import nn

from contracts.evidence import AnswerSet, Evidence, Familiar, Similar
from handlers.evidence.answer_set import conformal_scores
from handlers.evidence.familiar import TENSORS
from handlers.evidence.store import EVIDENCE, unit_vectors
from training.evaluate.familiarity import (
    Answers,
    Known,
    compare_methods,
    fit_methods,
    nearest_neighbour_accuracy,
    score,
)
from training.evaluate.unfamiliar import make_unfamiliar

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from contracts.evidence import NamedNumbers
    from handlers.evidence.store import Store
    from training.data.images import Images
    from training.evaluate.familiarity import Candidate

logger = logging.getLogger(__name__)

Head: TypeAlias = "tuple[NDArray[np.float32], NDArray[np.float32]]"
"""Weights (K, D) and biases (K,) of the last layer."""

Answer: TypeAlias = "Callable[[NDArray[np.uint8]], tuple[NDArray[np.float32], NDArray[np.float32] | None]]"
"""Probabilities (N, K) and pooled features (N, D) of images (N, H, W, 3)."""

FAMILIARITY = "familiarity.json"

MAX_BYTES = 4_000_000
"""The largest `evidence.safetensors`."""

MAX_INDEX = 2000
"""Images in the index: of CIFAR-10 a quarter of them keeps all of the accuracy, and each costs time in every answer."""

COMPARED = 10_000
"""Training images that the index is drawn from and the methods are fitted to; more change nothing."""

SCORES = 5000
"""Held-out images whose scores the archive keeps."""

UNFAMILIAR = 200
"""Images of each unfamiliar kind: the standard error of an area is then below 0.015."""

LEAST_HELD_OUT = 20
"""Held-out images without which 95 % of them is no number of images."""

THUMBNAIL_SIDES = (64, 48, 32)
"""Pixels of the longer side; the first that fits is taken."""

_QUALITY = 90  # of WebP; at 32 pixels 600 bytes
_RESERVED = 60_000  # bytes for both kinds of scores and the file's header


def write_evidence(
    folder: Path,
    answer: Answer,
    head: Head | None,
    training: Images,
    held_out: Images,
    *,
    thumbnails: bool = True,
) -> tuple[Evidence, NamedNumbers]:
    """Write `evidence.safetensors`, and `familiarity.json` with the methods' comparison, to `folder`.

    Args:
        folder: the version's.
        answer: the served engine, from images (N, H, W, 3) uint8 to probabilities (N, K) and pooled features (N, D).
        head: weight (K, D) and bias (K,) of the linear layer after the pooled features; None if there is none.
        training: images that the network learnt from.
        held_out: images that it did not learn from.
        thumbnails: whether small copies of the training images in the index are stored.

    Returns:
        The contract's settings, and the area under the ROC curve of the chosen method for each unfamiliar kind.
    """
    held_out = held_out.sample(SCORES)
    probabilities, features = answer(held_out.images)
    scores = conformal_scores(probabilities)[np.arange(len(held_out)), held_out.labels]
    store: Store = {"answer_set_scores": np.sort(scores)}
    answer_set = AnswerSet(len(held_out))
    figures: NamedNumbers = ()
    if features is None or head is None:
        reason = "the network does not end in a mean over places and one linear layer"
        evidence = Evidence(None, None, answer_set, (("familiar", reason), ("similar", reason)))
    else:
        absent: dict[str, str] = {}
        answers = Answers(probabilities, features)
        known, files = learn_training_images(answer, head, training, thumbnails=thumbnails)
        similar = _add_index(store, known, files, answers, held_out.labels)
        if similar is None:
            absent["similar"] = f"an image of each of {len(head[1])} classes takes more than {MAX_BYTES:,} bytes"
        if len(held_out) < LEAST_HELD_OUT:
            familiar = None
            absent["familiar"] = (
                f"{len(held_out)} images were held out, and {LEAST_HELD_OUT} are needed to know 95 % of them: train "
                "with more images"
            )
        else:
            candidates = choose_method(answer, known, answers, held_out)
            _write_comparison(folder, candidates, len(held_out))
            familiar, figures = _add_familiar(store, candidates[0], known, answers)
        evidence = Evidence(familiar, similar, answer_set, tuple(absent.items()))
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in store.items()}, folder / EVIDENCE)
    (folder / EVIDENCE).chmod(0o644)  # safetensors writes for its owner alone
    return evidence, figures


def linear_head(network: nn.Module) -> Head | None:
    """Return weight (K, D) and bias (K,) of the network's last layer; None if that is not a linear one."""
    last = [*network.children()][-1]
    if not isinstance(last, nn.Linear):
        return None
    weight = last.weight.detach().float().cpu().numpy()
    bias = np.zeros(len(weight), np.float32) if last.bias is None else last.bias.detach().float().cpu().numpy()
    return weight, bias


def balanced_sample(labels: NDArray[np.int64], count: int) -> NDArray[np.intp]:
    """Return at most `count` indices, as many of each class as there are, always the same ones."""
    order = np.random.default_rng(0).permutation(len(labels))
    turn = np.empty(len(labels), np.intp)  # the first, second, … image of its class
    for label in np.unique(labels):
        of_class = order[labels[order] == label]
        turn[of_class] = np.arange(len(of_class))
    chosen: NDArray[np.intp] = np.sort(order[np.argsort(turn[order], kind="stable")[:count]])
    return chosen


def herd(vectors: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """Return at most `count` indices of `vectors` (N, D) whose mean follows that of all; each prefix is as good.

    Source: Welling 2009, https://doi.org/10.1145/1553374.1553517
    """
    mean, total = vectors.mean(axis=0), np.zeros(vectors.shape[1], np.float32)
    left = np.ones(len(vectors), bool)
    chosen = []
    for number in range(1, min(count, len(vectors)) + 1):
        best = int(np.where(left, vectors @ (number * mean - total), -np.inf).argmax())
        left[best] = False
        total += vectors[best]
        chosen.append(best)
    return np.array(chosen, np.intp)


def learn_training_images(
    answer: Answer, head: Head, training: Images, *, thumbnails: bool
) -> tuple[Known, list[bytes]]:
    """Return what the methods may know of the training images, its index sorted by class, and the thumbnails of that.

    The index is the largest coreset by herding that fits into the file; it is empty if not one image of each class
    does.

    Raises:
        ValueError: the engine gives no pooled features.
    """
    images = training.pick(balanced_sample(training.labels, COMPARED))
    logger.info("comparing with %d training images", len(images))
    features = answer(images.images)[1]
    if features is None:
        raise ValueError("the engine gives no pooled features")
    weight, bias = head
    size = features.shape[1]
    # The method of familiarity is chosen later; the largest one's tensors must have room too.
    room = MAX_BYTES - _RESERVED - 2 * size * (size + len(bias))
    vectors = unit_vectors(features)
    rows, files = _draw_index(vectors, images, room, thumbnails=thumbnails)
    index = vectors[rows].astype(np.float16).astype(np.float32)
    return Known(features, images.labels, index, images.labels[rows].astype(np.int32), weight, bias), files


def _add_index(
    store: Store, known: Known, files: list[bytes], held_out: Answers, labels: NDArray[np.int64]
) -> Similar | None:
    """Add the index to `store` and return the settings of `similar`; None if the index is empty."""
    if not len(known.index):
        return None
    store |= {"features": _half(known.index), "labels": known.index_labels}
    if files:
        store["thumbnails"] = np.frombuffer(b"".join(files), np.uint8)
        store["thumbnail_ends"] = np.cumsum([len(file) for file in files], dtype=np.int64)
    return Similar(len(known.index), bool(files), _accuracy_kept(known, held_out, labels))


def _draw_index(
    vectors: NDArray[np.float32], images: Images, room: int, *, thumbnails: bool
) -> tuple[NDArray[np.intp], list[bytes]]:
    """Return rows of `images`, sorted by class, as many of each as fit into `room` bytes, with their thumbnails.

    Thumbnails are as large as they can be for one image of each class, and left out if the smallest do not fit.
    """
    by_class = [np.flatnonzero(images.labels == label) for label in np.unique(images.labels)]
    each = max(1, MAX_INDEX // len(images.classes))
    herds = [rows[herd(vectors[rows], each)] for rows in by_class]
    for side in (*THUMBNAIL_SIDES, 0) if thumbnails else (0,):
        files = {row: _thumbnail(images.images[row], side) for rows in herds for row in rows} if side else {}
        for count in range(each, 0, -1):
            rows = np.concatenate([chosen[:count] for chosen in herds])
            kept = [files[row] for row in rows] if side else []
            if len(rows) * (2 * vectors.shape[1] + 12) + sum(map(len, kept)) <= room:
                return rows, kept
    return np.array([], np.intp), []


def _thumbnail(pixels: NDArray[np.uint8], side: int) -> bytes:
    """Return a WebP file of the image (H, W, 3), at most `side` pixels wide and high."""
    image, file = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((side, side))
    image.save(file, "WEBP", quality=_QUALITY)
    return file.getvalue()


def _accuracy_kept(known: Known, held_out: Answers, labels: NDArray[np.int64]) -> float:
    """Return the nearest-neighbour accuracy of the index as a share of that of all images that it was drawn from."""
    kept = nearest_neighbour_accuracy(known.index, known.index_labels, held_out.features, labels)
    whole = nearest_neighbour_accuracy(unit_vectors(known.features), known.labels, held_out.features, labels)
    logger.info("the index of %d images keeps %.4f of %.4f nearest-neighbour accuracy", len(known.index), kept, whole)
    return round(kept / whole, 4) if whole else 0.0


def choose_method(answer: Answer, known: Known, answers: Answers, held_out: Images) -> list[Candidate]:
    """Return all candidates for familiarity, the best one first, by `answers` of the engine to the held-out images."""
    far = {}
    for kind, pixels in make_unfamiliar(held_out.sample(UNFAMILIAR).images).items():
        probabilities, features = answer(pixels)
        far[kind] = Answers(probabilities, np.asarray(features))
    return compare_methods(known, answers, held_out.labels, far)


def _write_comparison(folder: Path, candidates: list[Candidate], held_out_images: int) -> None:
    report = {
        "held_out_images": held_out_images,
        "images_of_each_kind": min(held_out_images, UNFAMILIAR),
        "candidates": [{**asdict(candidate), "score": candidate.score} for candidate in candidates],
    }
    (folder / FAMILIARITY).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _add_familiar(store: Store, best: Candidate, known: Known, answers: Answers) -> tuple[Familiar, NamedNumbers]:
    """Add the chosen method's tensors and held-out scores to `store`; return its settings and figures."""
    logger.info("familiarity by %s: mean area %.4f", best.method, best.score)
    kept = {name: _half(tensor) for name, tensor in fit_methods(known).items() if name in TENSORS[best.method]}
    scores = score(best.method, best.neighbours, {name: _read(tensor) for name, tensor in kept.items()}, answers)
    store |= kept
    store["familiarity_scores"] = np.sort(scores)
    return Familiar(best.method, best.neighbours, len(scores)), tuple((best.far | best.near).items())


def _half(tensor: NDArray[np.float32]) -> NDArray[np.floating]:
    """Return matrices in half precision, which is all that scores need; vectors are small and stay."""
    return tensor.astype(np.float16) if tensor.ndim == 2 else tensor


def _read(tensor: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return the tensor as handlers/evidence/store.py reads it."""
    return tensor.astype(np.float32)
