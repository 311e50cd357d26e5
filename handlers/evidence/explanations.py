"""Explain images that the engine has answered: heatmap, evidence, and the entry or overlay that tells them.

Heatmaps of `FORWARD_METHODS` come from the outputs of the forward pass that answered; the others from
pytorch-grad-cam on the full-precision network, which is loaded when it is first asked for.
"""

from __future__ import annotations

from collections import defaultdict
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np

from contracts import wire
from handlers.errors import UnknownMethod, UnknownTarget
from handlers.evidence.heatmaps import FORWARD_METHODS, heatmap
from handlers.evidence.occlusion import keep_and_remove, verdict
from handlers.jobs import guard, guard_all
from handlers.overlay import draw_overlay, overlay_size
from handlers.preprocess import decode_image, normalise

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from contracts.model import Contract
    from handlers.engines.base import Engine, Outputs
    from handlers.evidence.archive_evidence import ArchiveEvidence
    from handlers.explain import Explainer
    from handlers.jobs import ImageJob

STRENGTH_OF_OTHERS = "cam"
"""The closed form whose strength stands for the methods of pytorch-grad-cam, which scale their heatmaps."""
NO_STRENGTH = "pytorch-grad-cam scales its heatmaps, and this version has no class maps to compare classes by"
NO_SUPPORT = "nothing in the image supports this class, so there is no hot region to keep or to remove"


class Explanations:
    """Makes the explanations of one served model."""

    def __init__(
        self, contract: Contract, engine: Engine, evidence: ArchiveEvidence, load_explainer: Callable[[], Explainer]
    ) -> None:
        self._contract = contract
        self._engine = engine
        self._evidence = evidence
        self._load_explainer = load_explainer
        self._size = (contract.input.height, contract.input.width)

    @cached_property
    def explainer(self) -> Explainer:
        """Computes the heatmaps of the methods that need a backward pass."""
        return self._load_explainer()

    def choose(self, job: ImageJob) -> None:
        """Set the job's target and method, if it is to be explained.

        Raises:
            UnknownMethod: the contract does not offer the method.
            UnknownTarget: there is no such class.
        """
        classes, methods = self._contract.classes, self._contract.explain.methods
        options = job.row.options
        job.method = job.asked.method or options.method or self._contract.explain.method
        if job.method not in methods:
            raise UnknownMethod(job.method, methods)
        if job.asked.target is not None:
            if job.asked.target >= len(classes):
                raise UnknownTarget(str(job.asked.target), classes)
            job.target = job.asked.target
        elif options.target is not None:
            if options.target not in classes:
                raise UnknownTarget(options.target, classes)
            job.target = classes.index(options.target)

    def explain(self, jobs: list[ImageJob], outputs: Outputs) -> None:
        """Set heatmap and evidence of jobs that the engine has answered with `outputs`, those of the whole batch."""
        groups: dict[str, list[ImageJob]] = defaultdict(list)
        for job in jobs:
            if job.target < 0 and job.probabilities is not None:
                job.target = int(job.probabilities.argmax())
            groups[job.method].append(job)
        for method, group in groups.items():
            guard_all(group, partial(self._draw, group, method, outputs))
            drawn = [job for job in group if job.error is None]
            guard_all(drawn, partial(self._dim, drawn, method, outputs))
        tested = [job for job in jobs if job.asked.test and job.error is None and job.strength != 0]
        if tested:
            guard_all(tested, partial(self._test, tested))
        for job in jobs:
            guard(job, partial(self._collect, outputs=outputs))

    def entry(self, job: ImageJob) -> wire.Entry:
        """Return the entry of an explained image."""
        if job.heat is None or job.probabilities is None:
            raise RuntimeError("an explanation has neither a heatmap nor an error")
        best = self._class(job.probabilities, int(job.probabilities.argmax()))
        height, width = job.heat.shape
        strength = wire.unavailable(NO_STRENGTH) if job.strength is None else round(job.strength, 4)
        return wire.dump_evidence(
            best,
            target=self._class(job.probabilities, job.target),
            method=job.method,
            strength=strength,
            heatmap=wire.dump_heatmap(height, width, np.rint(job.heat * 255).astype(np.uint8).tobytes()),
            **job.evidence,
        )

    def overlay(self, job: ImageJob) -> bytes:
        """Return the PNG file of an explained image with its heatmap, its facts in the text."""
        if job.heat is None or job.decoded is None:
            raise RuntimeError("an explanation has neither a heatmap nor an error")
        options, image = job.row.options, job.decoded.image
        size = overlay_size(job.decoded.size, options.size)
        if image.size != job.decoded.size and (image.width < size[0] or image.height < size[1]):
            # The draft that was enough for the network is too coarse for people.
            image = decode_image(job.data, at_least=size).image
        entry = self.entry(job)
        caption = self._caption(job, str(entry["class"]))
        facts = {**entry, "caption": caption}
        about = wire.dump_about(facts, self._contract.name, self._contract.version)
        return draw_overlay(image, job.heat * job.dimming, size=size, alpha=options.alpha, about=about, caption=caption)

    def _draw(self, jobs: list[ImageJob], method: str, outputs: Outputs) -> None:
        targets = np.array([job.target for job in jobs])
        chosen = outputs.take([job.place for job in jobs])
        strengths = None
        if method in FORWARD_METHODS:
            heat, strengths = heatmap(chosen, targets, method, self._size)
        else:
            heat = self.explainer.heatmaps(self._images(jobs), targets.tolist(), method)
            if chosen.maps is not None:
                _, strengths = heatmap(chosen, targets, STRENGTH_OF_OTHERS, self._size)
        for place, (job, own) in enumerate(zip(jobs, heat, strict=True)):
            job.heat = own
            job.strength = None if strengths is None else float(strengths[place])
            if not own.any():
                job.strength = 0.0

    def _dim(self, jobs: list[ImageJob], method: str, outputs: Outputs) -> None:
        """Set how far the overlays of classes with less evidence than the answered one are dimmed."""
        best = outputs.probabilities.argmax(axis=1)
        # JSON leaves it to the caller to compare strengths.
        others = [job for job in jobs if job.decoded is not None and job.target != best[job.place]]
        if not others or outputs.maps is None:
            return
        places = [job.place for job in others]
        shown = method if method in FORWARD_METHODS else STRENGTH_OF_OTHERS
        _, strengths = heatmap(outputs.take(places), best[places], shown, self._size)
        for job, answered in zip(others, strengths.tolist(), strict=True):
            if answered > 0 and job.strength is not None:
                job.dimming = min(1.0, job.strength / answered)

    def _test(self, jobs: list[ImageJob]) -> None:
        heat = np.stack([job.heat for job in jobs if job.heat is not None])
        targets = np.array([job.target for job in jobs])
        found = keep_and_remove(self._engine, self._images(jobs), heat, targets)
        for job, kept, removed in zip(jobs, *(confidence.tolist() for confidence in found), strict=True):
            whole = 0.0 if job.probabilities is None else float(job.probabilities[job.target])
            job.evidence["test"] = {
                "kept": round(kept, 6),
                "removed": round(removed, 6),
                "verdict": verdict(self._contract.classes[job.target], whole, kept, removed),
            }

    def _collect(self, job: ImageJob, outputs: Outputs) -> None:
        test = job.evidence.pop("test", None)
        if job.familiarity is None:
            job.evidence["familiar"] = job.evidence["familiarity"] = self._evidence.why_absent("familiar")
        else:
            job.evidence["familiar"] = self._evidence.is_familiar(job.familiarity)
            job.evidence["familiarity"] = round(job.familiarity, 4)
        job.evidence["similar"] = self._evidence.similar(outputs, job.place, job.asked.similar)
        if job.asked.coverage is not None:
            probabilities = outputs.probabilities[job.place]
            job.evidence["classes"] = self._evidence.answer_set(probabilities, job.asked.coverage)
        if job.asked.test:
            job.evidence["test"] = test or wire.unavailable(NO_SUPPORT)

    def _images(self, jobs: list[ImageJob]) -> NDArray[np.float32]:
        """Return the jobs' images as the network takes them, (N, 3, H, W)."""
        return normalise(np.stack([job.pixels for job in jobs if job.pixels is not None]), self._contract.input)

    def _class(self, probabilities: NDArray[np.float32], index: int) -> tuple[str, float]:
        return self._contract.classes[index], round(float(probabilities[index]), 6)

    def _caption(self, job: ImageJob, answer: str) -> str:
        """Return a line that says what the overlay shows; `answer` is the class that the model named."""
        target = self._contract.classes[job.target]
        caption = f"{target} by {job.method}"
        if job.dimming < 1:
            caption += f", dimmed: {job.dimming:.0%} of the evidence for {answer}"
        elif job.strength is None and target != answer:
            caption += ", scaled to its own maximum"
        is_unfamiliar = job.familiarity is not None and not self._evidence.is_familiar(job.familiarity)
        return caption + "; unfamiliar image" * is_unfamiliar
