"""The question that a caller asks about each image of a call, and its options on the wire of the version that answers.

The contract in the agent's status says which wire the version's handler speaks, which classes and methods it has, and
which of the methods run in the forward pass of a prediction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from contracts import wire
from gateway.errors import ImageRefused
from gateway.refusals import BadParameter, list_some

if TYPE_CHECKING:
    from contracts.model import Contract

Kind = Literal["predict", "explain"]
"""A kind of call, and the TorchServe entry with the workers that answer it."""

# Facts about classes in an error: as many as the handler gives.
MOST_CLASSES_TOLD = 100
# Bytes of the options of an explanation in a request's header, without the method's name: the longest are
# `{"explain":true,"target":99999,"method":"","coverage":0.999,"test":true,"similar":10},`.
OPTIONS_BYTES = 96
# Estimated bytes of an explanation in a handler's answer: without heatmap and sets, of a similar image, of a class.
EXPLANATION_BYTES, SIMILAR_BYTES, CLASS_BYTES = 1000, 100, 60
# Forward passes of one image whose heatmap is tested: the image, the hot quarter kept, and the hot quarter blurred.
PASSES_OF_TEST = 3


@dataclass(frozen=True, slots=True)
class Overlay:
    """A PNG with the heatmap over the image: the heatmap's opacity, and the pixels of the longer side."""

    alpha: float
    size: int | None


@dataclass(frozen=True, slots=True)
class Question:
    """A question about each image of a call: the evidence that the caller wants.

    Attributes:
        target: the class that the heatmap is about; None for the predicted one.
        method: the heatmap method; None for the version's default.
        coverage: share of images in which the set of classes holds the right one; None for no set.
        test: the heatmap is tested on this image.
        similar: number of nearest training images, of the predicted class and of the second best each.
        overlay: the PNG that is wanted; None for an entry.
    """

    target: str | None = None
    method: str | None = None
    coverage: float | None = None
    test: bool = False
    similar: int = 0
    overlay: Overlay | None = None


def wire_of(contract: Contract | None) -> int:
    """Return the wire that the handler of a version speaks; 1 if its contract is not known."""
    return 1 if contract is None else wire.WIRES[contract.schema]


def forward_methods(contract: Contract | None) -> tuple[str, ...]:
    """Return the heatmap methods that the version's prediction workers offer."""
    return () if contract is None or wire_of(contract) < 2 else contract.explain.forward


def explaining_entry(method: str | None, contract: Contract | None) -> Kind:
    """Return the entry that explains by `method` (None: the default): predict for those in the forward pass."""
    if contract is None:
        return "explain"
    return "predict" if (method or contract.explain.method) in forward_methods(contract) else "explain"


def check_question(question: Question, contract: Contract | None) -> None:
    """Refuse a class or a method that the version does not have, before an image is sent.

    Raises:
        ImageRefused: `unknown_target` or `unknown_method`.
    """
    if contract is None:
        return
    if question.target is not None and question.target not in contract.classes:
        raise ImageRefused(
            "unknown_target",
            f"there is no class {question.target[:100]!r}: use one of {list_some(contract.classes)}",
            {"classes": list(contract.classes[:MOST_CLASSES_TOLD])},
        )
    methods = contract.explain.methods
    if question.method is not None and question.method not in methods:
        detail = f"there is no method {question.method[:100]!r}: use {', '.join(methods)}"
        raise ImageRefused("unknown_method", detail, {"methods": list(methods)})


def wire_options(question: Question, contract: Contract | None) -> wire.Options:
    """Return the options of an explanation of one image, on the wire of the version."""
    overlay = question.overlay
    shown = wire.Options(format="json") if overlay is None else wire.Options(alpha=overlay.alpha, size=overlay.size)
    if contract is None or wire_of(contract) < 2:
        return shown._replace(target=question.target, method=question.method)
    return shown._replace(images=(image_options(question, contract),))


def wire_options_in_forward(question: Question, contract: Contract | None) -> wire.Options:
    """Return the options of an explanation by a method of the forward pass.

    Raises:
        BadParameter: the version has no such method.
    """
    methods = forward_methods(contract)
    if contract is None or not methods:
        raise BadParameter("outputs", "familiarity or classes", "given by this version, which was packed without them")
    default = contract.explain.method
    return wire_options(replace(question, method=None if default in methods else methods[0]), contract)


def wants_overlay(options: wire.Options) -> bool:
    """Return True if the options of an image ask for a PNG."""
    return bool(options.images) and options.format == "png"


def image_options(question: Question, contract: Contract) -> wire.ImageOptions:
    """Return the question as the options of one image on wire 2."""
    return wire.ImageOptions(
        explain=True,
        target=None if question.target is None else contract.classes.index(question.target),
        method=question.method,
        coverage=question.coverage,
        test=question.test,
        similar=question.similar,
    )


class Share(NamedTuple):
    """The share of an upstream batch that one image takes: bytes of its options and of its entry, forward passes."""

    header_bytes: int
    answer_bytes: int
    passes: int


PREDICTION_SHARE = Share(header_bytes=len("{},"), answer_bytes=0, passes=1)


def share_of(options: wire.ImageOptions, contract: Contract | None) -> Share:
    """Return the share of an upstream batch that an image with these options takes; the bytes are upper estimates."""
    if not options.explain or contract is None:
        return PREDICTION_SHARE
    heatmap = contract.input.height * contract.input.width * 4 // 3
    sets = CLASS_BYTES * len(contract.classes) if options.coverage is not None else 0
    return Share(
        header_bytes=OPTIONS_BYTES + len(options.method or ""),
        answer_bytes=EXPLANATION_BYTES + heatmap + 2 * SIMILAR_BYTES * options.similar + sets,
        passes=PASSES_OF_TEST if options.test else 1,
    )
