"""One image on its way through the served model; what goes wrong with it stays with it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from contracts import wire
from handlers.errors import HandlerFailed, RequestError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from handlers.preprocess import DecodedImage
    from handlers.wire import Row

logger = logging.getLogger(__name__)


@dataclass
class ImageJob:
    """One image: what is asked about it, what has been found, or the error that ended it.

    Attributes:
        row: the row of TorchServe's batch that brought it.
        data: its encoded bytes.
        asked: what is asked about it.
        decoded: the decoded image, kept for the overlay only.
        pixels: (H, W, 3), what the network sees.
        place: its index in the outputs of the forward pass.
        probabilities: (K,).
        familiarity: from 0 to 1; None if the archive cannot tell.
        target: the class to explain; -1 until the top class is known.
        method: the heatmap's method.
        heat: (H, W), the heatmap from 0 to 1.
        strength: the heatmap's maximum before scaling (by pytorch-grad-cam: that of `cam`); None if nothing tells.
        dimming: what the overlay's heat is multiplied by: the strength as a share of the answered class's, at most 1.
        evidence: the parts of its explanation's entry that the archive's evidence gives.
        error: the reason why it has no answer.
    """

    row: Row
    data: wire.Bytes
    asked: wire.ImageOptions
    decoded: DecodedImage | None = None
    pixels: NDArray[np.uint8] | None = None
    place: int = -1
    probabilities: NDArray[np.float32] | None = None
    familiarity: float | None = None
    target: int = -1
    method: str = ""
    heat: NDArray[np.float32] | None = None
    strength: float | None = None
    dimming: float = 1.0
    evidence: wire.Entry = field(default_factory=dict)
    error: RequestError | None = None


def jobs_of(row: Row) -> list[ImageJob]:
    """Return a job for each image of the row; one for a row whose images cannot be told apart."""
    images = row.images or [b""]
    asked = row.options.images
    if not asked or row.error is not None:  # which may be that there are not as many options as images
        asked = (wire.ImageOptions(explain=row.kind == "explain"),) * len(images)
    return [ImageJob(row, data, options, error=row.error) for data, options in zip(images, asked, strict=True)]


def guard(job: ImageJob, step: Callable[[ImageJob], None]) -> None:
    """Run one image's step; what goes wrong becomes the image's error."""
    if job.error is not None:
        return
    try:
        step(job)
    except RequestError as error:
        job.error = error
    except Exception:
        logger.exception("an image of request %r failed", job.row.options.id)
        job.error = HandlerFailed()


def guard_all(jobs: list[ImageJob], step: Callable[[], None]) -> None:
    """Run one step of many images, which share its failure."""
    try:
        step()
    except Exception:
        logger.exception("%d images failed together", len(jobs))
        for job in jobs:
            job.error = HandlerFailed()


def still_wanted(jobs: list[ImageJob]) -> list[ImageJob]:
    """Return the images without an error, after those whose deadline is over have got theirs."""
    for job in jobs:
        guard(job, lambda job: job.row.check_deadline())
    return [job for job in jobs if job.error is None]
