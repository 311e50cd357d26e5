"""Find labels that are likely wrong, in a folder of images or in feedback, by confident learning (cleanlab).

Source: Northcutt et al. 2021, "Confident Learning", https://arxiv.org/abs/1911.00068
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from control.errors import ControlError, FeedbackUnusable, MissingExtra
from control.feedback.export import open_store, reading
from control.images.files import find_images
from gradserve import Failed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from control.images.sources import Source

_AT_ONCE = 32
_EVERY_CLASS = 100_000


@dataclass(frozen=True)
class LabelledImage:
    """An image with its label; `name` is its path or its request id."""

    name: str
    content: Callable[[], bytes]
    label: str


@dataclass(frozen=True)
class Suspect:
    """A label that is likely wrong; `quality` is the model's probability of the label, 0 to 1."""

    name: str
    label: str
    likely: str
    quality: float


@dataclass(frozen=True)
class Labels:
    """The result: the images that were looked at, files that are no images, and the suspects, worst first."""

    images: int
    unreadable: tuple[str, ...]
    suspects: tuple[Suspect, ...]


def in_folder(folder: Path) -> list[LabelledImage]:
    """Return the images in a folder with one folder for each class.

    Raises:
        ControlError: there is no such folder with images.
    """
    found = [
        LabelledImage(image.name, image.read, image.relative.parts[0])
        for image in find_images([str(folder)])
        if len(image.relative.parts) > 1
    ]
    if not found:
        raise ControlError(f"{folder} has no images: it needs one folder of images for each class")
    return found


def in_feedback(path: Path) -> list[LabelledImage]:
    """Return the images with feedback in the store at `path`, labelled by it.

    Raises:
        FeedbackUnusable: the store cannot be read, or has no image with feedback.
    """
    store = open_store(path)
    with reading(store):
        found = [
            LabelledImage(call.request_id, partial(_same, call.image), said.class_name)
            for call, said in store.labelled()
            if call.image is not None
        ]
    if not found:
        raise FeedbackUnusable(path, "it has no image with feedback")
    return found


def _same(image: bytes) -> bytes:
    return image


def find_wrong_labels(
    images: Sequence[LabelledImage], classes: Sequence[str], model: Source, count: Callable[[], None]
) -> Labels:
    """Return the labels that are likely wrong, by the answers of a model that did not learn from these images.

    `count` is called for each image.

    Raises:
        ControlError: a label is no class of the model, or no image can be read.
        MissingExtra: cleanlab is not installed.
    """
    try:
        import numpy as np  # noqa: PLC0415 - optional
        from cleanlab.filter import find_label_issues  # noqa: PLC0415 - optional, seconds
    except ImportError as error:
        raise MissingExtra("cleanlab", "gradserve labels", "feedback") from error
    if unknown := sorted({image.label for image in images} - set(classes)):
        raise ControlError(f"the model has no class {', '.join(unknown[:5])}: its classes are {', '.join(classes)}")
    kept, unreadable, rows = [], [], []
    for start in range(0, len(images), _AT_ONCE):
        group = images[start : start + _AT_ONCE]
        for image, answer in zip(group, model.predict([item.content() for item in group], _EVERY_CLASS), strict=True):
            count()
            if isinstance(answer, Failed):
                unreadable.append(image.name)
                continue
            found = {entry.class_name: entry.confidence for entry in answer.top}
            kept.append(image)
            rows.append([found.get(name, 0.0) for name in classes])
    if not kept:
        raise ControlError("there is no image with a label that the model can read")
    probabilities: NDArray[np.float64] = np.array(rows)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    labels = np.array([list(classes).index(image.label) for image in kept])
    worst = find_label_issues(labels, probabilities, return_indices_ranked_by="self_confidence", n_jobs=1)
    suspects = [
        Suspect(
            kept[index].name,
            kept[index].label,
            classes[int(probabilities[index].argmax())],
            float(probabilities[index, labels[index]]),
        )
        for index in worst
    ]
    return Labels(len(kept), tuple(unreadable), tuple(suspects))
