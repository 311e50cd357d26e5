"""The contract's evidence settings, and the figures of heatmaps and familiarity with which a version was accepted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from contracts.fields import Fields

FAMILIARITY_METHODS = ("knn", "max_probability", "energy", "mahalanobis", "vim")
MAX_LAYERS = 1000
MAX_PARTS = 100

NamedNumbers: TypeAlias = tuple[tuple[str, float], ...]
"""Numbers with their names, in an order that has a meaning."""


@dataclass(frozen=True)
class Familiar:
    """Settings of `familiar`: the familiarity of an image is the share of held-out images that score below it.

    Attributes:
        method: one of `FAMILIARITY_METHODS`; gives an image's score, higher for what training saw.
        neighbours: k of `knn`; 0 for the other methods.
        images: the held-out images whose scores the archive holds.
        familiar_share: share of the held-out images that count as familiar; an image does if its familiarity is at
            least 1 less this share.
    """

    method: str
    neighbours: int
    images: int
    familiar_share: float = 0.95


@dataclass(frozen=True)
class Similar:
    """The index of training images by which similar ones are found.

    Attributes:
        images: training images in the index, a coreset.
        thumbnails: True if the archive holds their thumbnails.
        accuracy_kept: accuracy of a kNN classifier on the coreset divided by its accuracy on all training images.
    """

    images: int
    thumbnails: bool
    accuracy_kept: float


@dataclass(frozen=True)
class AnswerSet:
    """Conformal answer sets, calibrated on `images` held-out images.

    Source: Angelopoulos & Bates 2021, section 1, https://arxiv.org/abs/2107.07511
    """

    images: int


@dataclass(frozen=True)
class Evidence:
    """The evidence that a version's `evidence.safetensors` holds; None for a part that it lacks.

    `absent` has the reason for each part that could not be made, as pairs of the part's name and a sentence.
    """

    familiar: Familiar | None = None
    similar: Similar | None = None
    answer_set: AnswerSet | None = None
    absent: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class HeatmapFigures:
    """Figures of a heatmap method on held-out images; None for what could not be measured.

    Attributes:
        quarter: share of the heat in the class's quarter of a 2×2 mosaic; chance 0.25.
        quarter_peak: share of the mosaics whose hottest pixel is in the class's quarter; chance 0.25.
        half: share of the heat in the class's half of an image made of two halves; chance 0.5.
        half_peak: share of those images whose hottest pixel is in the class's half; chance 0.5.
        class_correlation: mean rank correlation of the heatmaps for the first and the second class.
        random_head_correlation: mean rank correlation with the heatmaps of the network with a random head.
        randomised: the same with networks that are random from the head down to the layer named.
        insertion: area under the confidence as pixels come back from the hottest on.
        deletion: area under the confidence as pixels go from the hottest on.
        road: loss of confidence as pixels are replaced by their neighbours' values, hottest first, less coldest first.
    """

    quarter: float | None = None
    quarter_peak: float | None = None
    half: float | None = None
    half_peak: float | None = None
    class_correlation: float | None = None
    random_head_correlation: float | None = None
    randomised: NamedNumbers = ()
    insertion: float | None = None
    deletion: float | None = None
    road: float | None = None


def parse_evidence(fields: Fields | None) -> Evidence | None:
    """Return the evidence settings in `fields`; None where there are none.

    Raises:
        DocumentError: the document's own error; a field is missing, unknown or impossible.
    """
    if fields is None:
        return None
    read = Evidence(
        familiar=_familiar(fields.maybe("familiar", fields.inner)),
        similar=_similar(fields.maybe("similar", fields.inner)),
        answer_set=_answer_set(fields.maybe("answer_set", fields.inner)),
        absent=fields.named("absent", fields.text_of, most=MAX_PARTS) if "absent" in fields else (),
    )
    fields.end()
    return read


def parse_heatmap_figures(fields: Fields | None) -> HeatmapFigures | None:
    """Return the figures of heatmaps in `fields`; None where there are none.

    Raises:
        DocumentError: the document's own error; a field is unknown or impossible.
    """
    if fields is None:
        return None
    share = partial(fields.number, least=0, most=1)
    change = partial(fields.number, least=-1, most=1)
    correlation = partial(fields.number_of, least=-1, most=1)
    read = HeatmapFigures(
        quarter=fields.maybe("quarter", share),
        quarter_peak=fields.maybe("quarter_peak", share),
        half=fields.maybe("half", share),
        half_peak=fields.maybe("half_peak", share),
        class_correlation=fields.maybe("class_correlation", change),
        random_head_correlation=fields.maybe("random_head_correlation", change),
        randomised=fields.named("randomised", correlation, most=MAX_LAYERS) if "randomised" in fields else (),
        insertion=fields.maybe("insertion", share),
        deletion=fields.maybe("deletion", share),
        road=fields.maybe("road", change),
    )
    fields.end()
    return read


def _familiar(fields: Fields | None) -> Familiar | None:
    if fields is None:
        return None
    read = Familiar(
        method=fields.choice("method", FAMILIARITY_METHODS),
        neighbours=fields.integer("neighbours"),
        images=fields.integer("images", least=1),
        familiar_share=fields.number("familiar_share", least=0, most=1),
    )
    fields.end()
    return read


def _similar(fields: Fields | None) -> Similar | None:
    if fields is None:
        return None
    read = Similar(
        images=fields.integer("images", least=1),
        thumbnails=fields.flag("thumbnails"),
        accuracy_kept=fields.number("accuracy_kept", least=0),
    )
    fields.end()
    return read


def _answer_set(fields: Fields | None) -> AnswerSet | None:
    if fields is None:
        return None
    read = AnswerSet(images=fields.integer("images", least=1))
    fields.end()
    return read
