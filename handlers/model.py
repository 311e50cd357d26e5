"""The served model: rows in, answers out, one forward pass for all good images of a batch.

It knows nothing of TorchServe; handlers/image_handler.py stands between the two.
"""

from __future__ import annotations

import io
import logging
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from heapq import nlargest
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from contracts import model as model_contract
from contracts import wire
from handlers.build import BrokenArchive, verify_files
from handlers.engines import MAX_BATCH, Engine, Outputs, build_engine, predict_all, run_all, thread_count
from handlers.errors import AnswerTooLarge, EngineError, HandlerFailed, RequestError
from handlers.evidence.archive_evidence import ArchiveEvidence, load_evidence
from handlers.evidence.explanations import Explanations
from handlers.evidence.heatmaps import FORWARD_METHODS
from handlers.jobs import ImageJob, guard, guard_all, jobs_of, still_wanted
from handlers.preprocess import decode_for_network, normalise, prepare
from handlers.reference import Reference, load_reference
from handlers.wire import Answer, Row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import torch
    from numpy.typing import NDArray
    from torch import nn

    from handlers.explain import Explainer

logger = logging.getLogger(__name__)

WARM_BATCHES = (1, 2, 4, 8, 16, 32)
"""Engines compile for each batch length they meet."""


@dataclass
class ServedModel:
    """A contract with the engine and the explainer that keep it; the explainer is loaded when it is first needed."""

    contract: model_contract.Contract
    engine: Engine
    load_explainer: Callable[[], Explainer]
    evidence: ArchiveEvidence
    facts: dict[str, Any] = field(default_factory=dict)
    _seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    @cached_property
    def explanations(self) -> Explanations:
        """Makes heatmaps and collects evidence."""
        return Explanations(self.contract, self.engine, self.evidence, self.load_explainer)

    def answer(self, rows: list[Row]) -> list[Answer]:
        """One answer per row, in order; what goes wrong with one image stays with it."""
        jobs = [jobs_of(row) for row in rows]
        images = [job for row in jobs for job in row if job.row.kind in {"predict", "explain"}]
        with self._timed("decode"):
            for job in images:
                guard(job, self._decode)
        with self._timed("predict"):
            outputs = self._predict(still_wanted(images))
        explained = [job for job in images if job.asked.explain]
        if explained and outputs is not None:
            with self._timed("explain"):
                self.explanations.explain(still_wanted(explained), outputs)
        with self._timed("write"):
            return [self._write(row, row_jobs) for row, row_jobs in zip(rows, jobs, strict=True)]

    def take_seconds(self) -> dict[str, float]:
        """Seconds spent in each stage (decode, predict, explain, write) since this was last asked."""
        taken = dict(self._seconds)
        self._seconds.clear()
        return taken

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[stage] += time.perf_counter() - started

    def warm_up(self, *, explains: bool) -> None:
        """Runs every path that requests take, so that the first caller waits no longer than the hundredth.

        Raises:
            BrokenArchive: a path fails.
            ContractError: the explainer cannot be built.
        """
        size = self.contract.input
        noise = np.random.default_rng(0).integers(0, 256, (size.height, size.width, 3), dtype=np.uint8)
        for length in WARM_BATCHES:
            predict_all(self.engine, normalise(np.stack([noise] * length), size))
        images: list[wire.Bytes] = [_encode(noise, name) for name in ("PNG", "JPEG", "WEBP", "BMP", "GIF")]
        rows = [Row("predict", images=images)]
        for method in self.contract.explain.methods:
            if explains or method in FORWARD_METHODS:
                asked = wire.ImageOptions(explain=True, method=method, coverage=0.9, test=True)
                rows += [
                    Row("predict", wire.Options(images=(asked,), format=form), [images[1]]) for form in ("json", "png")
                ]
        if any(HandlerFailed.code.encode() in answer.body for answer in self.answer(rows)):
            raise BrokenArchive("a warm-up request failed: the log says why")
        self.answer([Row("predict", images=[b"no image"])])  # Pillow loads all its formats on bad bytes

    def check_reference(self, reference: Reference) -> None:
        """Raise `BrokenArchive` unless the engine computes the same as when the version was packed.

        Raises:
            BrokenArchive: some probability is off by more than the reference's tolerance.
        """
        size = self.contract.input
        pixels = np.stack([prepare(decode_for_network(image, size).image, size) for image in reference.images])
        difference = np.abs(predict_all(self.engine, normalise(pixels, size)) - reference.probabilities).max()
        if not difference <= reference.tolerance:
            raise BrokenArchive(
                f"the reference inputs give probabilities that differ by {difference:.2g} from those of packing, "
                f"more than {reference.tolerance:.2g}"
            )

    def describe(self) -> dict[str, Any]:
        """The contract and what runs it here."""
        return {"contract": model_contract.dump(self.contract), **self.facts}

    def _decode(self, job: ImageJob) -> None:
        # For each image: a row of large ones takes seconds, and TorchServe kills a worker that is busy for too long.
        job.row.check_deadline()
        size = self.contract.input
        if job.asked.explain:
            self.explanations.choose(job)
        decoded = decode_for_network(job.data, size)
        job.pixels = prepare(decoded.image, size)
        if _wants_overlay(job.row, job):
            job.decoded = decoded

    def _predict(self, jobs: list[ImageJob]) -> Outputs | None:
        """Set the jobs' answers and return the outputs of their forward pass; None if there is none."""
        found: list[Outputs] = []

        def run() -> None:
            pixels = np.array([job.pixels for job in jobs if job.pixels is not None])
            # A batch that takes several forwards is put together elsewhere.
            room = self.engine.buffer(len(pixels)) if len(pixels) <= MAX_BATCH else None
            outputs = run_all(self.engine, normalise(pixels, self.contract.input, room))
            familiarity = self.evidence.familiarity(outputs)
            for place, (job, probabilities) in enumerate(zip(jobs, outputs.probabilities, strict=True)):
                job.place, job.probabilities = place, probabilities
                job.familiarity = None if familiarity is None else float(familiarity[place])
            found.append(outputs)

        if jobs:
            guard_all(jobs, run)
        return found[0] if found else None

    def _write(self, row: Row, jobs: list[ImageJob]) -> Answer:
        try:
            answer = self._write_row(row, jobs)
        except RequestError as error:
            return _refuse(error, len(jobs))
        except Exception:
            logger.exception("writing the answer to request %r failed", row.options.id)
            return _refuse(HandlerFailed(), len(jobs))
        if len(answer.body) > wire.MAX_ANSWER_BYTES:
            return _refuse(AnswerTooLarge(len(answer.body), wire.MAX_ANSWER_BYTES), len(jobs))
        return answer

    def _write_row(self, row: Row, jobs: list[ImageJob]) -> Answer:
        if row.kind == "describe":
            return Answer(wire.dump_json(self.describe()), wire.JSON_TYPE)
        if row.kind == "example" and row.error is None:
            return Answer(self.evidence.example(row.options.example or 0), wire.PNG_TYPE)
        if _wants_overlay(row, jobs[0]) and jobs[0].error is None:
            return Answer(self.explanations.overlay(jobs[0]), wire.PNG_TYPE)
        entries = [self._entry(job) for job in jobs]
        return Answer(wire.dump_results(entries), wire.JSON_TYPE)

    def _entry(self, job: ImageJob) -> wire.Entry:
        if job.error is not None:
            return job.error.entry()
        if job.asked.explain:
            return self.explanations.entry(job)
        if job.probabilities is None:
            raise RuntimeError("an image has neither probabilities nor an error")
        familiar = None if job.familiarity is None else self.evidence.is_familiar(job.familiarity)
        return wire.dump_prediction(self._top(job.probabilities.tolist(), job.row.options.top_k), familiar=familiar)

    def _top(self, probabilities: list[float], count: int) -> list[tuple[str, float]]:
        """Return the `count` best classes with their probabilities, best first."""
        if count == 1:
            best = [probabilities.index(max(probabilities))]
        else:
            best = nlargest(count, range(len(probabilities)), key=probabilities.__getitem__)
        return [(self.contract.classes[index], round(probabilities[index], 6)) for index in best]


def load_model(directory: Path, *, device: torch.device | str, explains: bool) -> ServedModel:
    """The model in an unpacked archive, verified, warm and checked against its reference outputs.

    Args:
        directory: the archive's files.
        device: where the eager engine and the explainer compute.
        explains: whether explanations are to be ready now, or only when the first is asked for.

    Raises:
        BrokenArchive: files changed, weights that do not fit, or reference outputs that are not reached.
        ContractError: the contract cannot be used.
        EngineError: the engine cannot run here, nor its fallback.
    """
    identity = verify_files(directory)
    contract = model_contract.load(directory / "contract.json")
    engine, choice = _first_engine(contract, directory, device)
    is_fallback = choice is not contract.engine
    model = ServedModel(
        contract=contract,
        engine=engine,
        load_explainer=lambda: _load_explainer(contract, directory, device),
        evidence=load_evidence(directory, contract),
        facts={"identity": identity, "engine": asdict(choice), "is_fallback": is_fallback, "device": str(device)},
    )
    model.check_reference(load_reference(directory, contract, of_fallback=is_fallback))
    model.warm_up(explains=explains)
    return model


def _first_engine(
    contract: model_contract.Contract, directory: Path, device: torch.device | str
) -> tuple[Engine, model_contract.Engine]:
    """The contract's engine, or with an error in the log its fallback, and which of them it is."""
    build = partial(
        build_engine,
        load_network=partial(_load_network, directory, contract),
        directory=directory,
        device=device,
        sharp_layer=contract.explain.sharp_layer,
    )
    try:
        return build(contract.engine), contract.engine
    except EngineError:
        if contract.fallback is None:
            raise
        name = f"{contract.fallback.name} {contract.fallback.precision}"
        logger.exception("the engine cannot run here, falling back to %s", name)
        return build(contract.fallback), contract.fallback


def _load_explainer(contract: model_contract.Contract, directory: Path, device: torch.device | str) -> Explainer:
    network = _load_network(directory, contract)
    from handlers.explain import Explainer  # noqa: PLC0415 - pytorch_grad_cam: 1.6 s, 190 MB

    return Explainer(network, contract.explain, device=device)


def _load_network(directory: Path, contract: model_contract.Contract) -> nn.Module:
    """Return the network for a worker that needs torch, which then takes no more than its share of the cores."""
    import torch  # noqa: PLC0415 - a worker that predicts by OpenVINO does without

    from handlers.archive import load_network  # noqa: PLC0415 - torchvision: 1.7 s, 85 MB

    torch.set_num_threads(thread_count())
    return load_network(directory, contract)


def _wants_overlay(row: Row, job: ImageJob) -> bool:
    """Return True if the row, whose first image is `job`, asks for one image's overlay."""
    return len(row.images) == 1 and job.asked.explain and row.options.format == "png"


def _refuse(error: RequestError, images: int) -> Answer:
    return Answer(wire.dump_results([error.entry()] * images), wire.JSON_TYPE)


def _encode(pixels: NDArray[np.uint8], name: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, name)
    return file.getvalue()
