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
from functools import cached_property
from heapq import nlargest
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from contracts import model as model_contract
from contracts import wire
from handlers.build import BrokenArchive, verify_files
from handlers.engines import MAX_BATCH, Engine, build_engine, predict_all
from handlers.errors import AnswerTooLarge, EngineError, HandlerFailed, RequestError, UnknownMethod, UnknownTarget
from handlers.preprocess import DecodedImage, decode_for_network, decode_image, normalise, prepare
from handlers.reference import Reference, load_reference
from handlers.wire import Answer, Row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

    from handlers.explain import Explainer

logger = logging.getLogger(__name__)

WARM_BATCHES = (1, 2, 4, 8, 16, 32)
"""Engines compile for each batch length they meet."""


@dataclass
class _Job:
    """One image on its way: its pixels, then its probabilities, or the error that ended it."""

    row: Row
    data: wire.Bytes
    decoded: DecodedImage | None = None
    pixels: NDArray[np.uint8] | None = None
    probabilities: NDArray[np.float32] | None = None
    heatmap: NDArray[np.float32] | None = None
    target: int = -1  # the top class, until it is known
    method: str = ""
    error: RequestError | None = None


@dataclass
class ServedModel:
    """A contract with the engine and the explainer that keep it; the explainer is loaded when it is first needed."""

    contract: model_contract.Contract
    engine: Engine
    load_explainer: Callable[[], Explainer]
    facts: dict[str, Any] = field(default_factory=dict)
    _seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    @cached_property
    def explainer(self) -> Explainer:
        """Computes the heatmaps."""
        return self.load_explainer()

    def answer(self, rows: list[Row]) -> list[Answer]:
        """One answer per row, in order; what goes wrong with one image stays with it."""
        jobs = [[_Job(row, data, error=row.error) for data in row.images or [b""]] for row in rows]
        images = [job for row in jobs for job in row if job.row.kind != "describe"]
        with self._timed("decode"):
            for job in images:
                _guard(job, self._decode)
        with self._timed("predict"):
            self._predict(_still_wanted(images))
        if explained := [job for job in images if job.row.kind == "explain"]:
            with self._timed("explain"):
                self._explain(_still_wanted(explained))
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
        if explains:
            _ = self.explainer
            rows += [
                Row("explain", wire.Options(method=method), [images[1]]) for method in self.contract.explain.methods
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

    def _decode(self, job: _Job) -> None:
        # For each image: a row of large ones takes seconds, and TorchServe kills a worker that is busy for too long.
        job.row.check_deadline()
        size = self.contract.input
        if job.row.kind == "explain":
            job.target, job.method = self._choices(job.row.options)
        decoded = decode_for_network(job.data, size)
        job.pixels = prepare(decoded.image, size)
        if job.row.kind == "explain":
            job.decoded = decoded  # kept for the overlay only

    def _choices(self, options: wire.Options) -> tuple[int, str]:
        """The target's index, or -1 for the top class, and the method."""
        method = options.method or self.contract.explain.method
        if method not in self.contract.explain.methods:
            raise UnknownMethod(method, self.contract.explain.methods)
        if options.target is None:
            return -1, method
        if options.target not in self.contract.classes:
            raise UnknownTarget(options.target, self.contract.classes)
        return self.contract.classes.index(options.target), method

    def _predict(self, jobs: list[_Job]) -> None:
        def run() -> None:
            pixels = np.array([job.pixels for job in jobs if job.pixels is not None])
            # A batch that takes several forwards is put together elsewhere.
            room = self.engine.buffer(len(pixels)) if len(pixels) <= MAX_BATCH else None
            images = normalise(pixels, self.contract.input, room)
            for job, probabilities in zip(jobs, predict_all(self.engine, images), strict=True):
                job.probabilities = probabilities

        if jobs:
            _guard_all(jobs, run)

    def _explain(self, jobs: list[_Job]) -> None:
        groups: dict[str, list[_Job]] = defaultdict(list)
        for job in jobs:
            if job.target < 0 and job.probabilities is not None:
                job.target = int(job.probabilities.argmax())
            groups[job.method].append(job)
        for method, group in groups.items():

            def run(method: str = method, group: list[_Job] = group) -> None:
                pixels = np.stack([job.pixels for job in group if job.pixels is not None])
                targets = [job.target for job in group]
                heatmaps = self.explainer.heatmaps(normalise(pixels, self.contract.input), targets, method)
                for job, heatmap in zip(group, heatmaps, strict=True):
                    job.heatmap = heatmap

            _guard_all(group, run)

    def _write(self, row: Row, jobs: list[_Job]) -> Answer:
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

    def _write_row(self, row: Row, jobs: list[_Job]) -> Answer:
        if row.kind == "describe":
            return Answer(wire.dump_json(self.describe()), wire.JSON_TYPE)
        if row.kind == "predict" or jobs[0].error is not None:
            entries = [self._entry(job) for job in jobs]
            return Answer(wire.dump_results(entries), wire.JSON_TYPE)
        return self._write_explanation(jobs[0])

    def _entry(self, job: _Job) -> wire.Entry:
        if job.error is not None:
            return job.error.entry()
        if job.probabilities is None:
            raise RuntimeError("an image has neither probabilities nor an error")
        return wire.dump_prediction(self._top(job.probabilities.tolist(), job.row.options.top_k))

    def _top(self, probabilities: list[float], count: int) -> list[tuple[str, float]]:
        """Return the `count` best classes with their probabilities, best first."""
        if count == 1:
            best = [probabilities.index(max(probabilities))]
        else:
            best = nlargest(count, range(len(probabilities)), key=probabilities.__getitem__)
        return [(self.contract.classes[index], round(probabilities[index], 6)) for index in best]

    def _write_explanation(self, job: _Job) -> Answer:
        from handlers.overlay import draw_overlay, overlay_size  # noqa: PLC0415 - matplotlib

        if job.heatmap is None or job.decoded is None or job.probabilities is None:
            raise RuntimeError("an explanation has neither a heatmap nor an error")
        options = job.row.options
        (best,) = self._top(job.probabilities.tolist(), 1)
        entry = wire.dump_explanation(
            best,
            target=self.contract.classes[job.target],
            method=job.method,
            layer=self.contract.explain.layer,
            heatmap=[[round(float(value), 4) for value in line] for line in job.heatmap],
        )
        if options.format == "json":
            return Answer(wire.dump_results([entry]), wire.JSON_TYPE)
        size = overlay_size(job.decoded.size, options.size)
        image = job.decoded.image
        if image.size != job.decoded.size and (image.width < size[0] or image.height < size[1]):
            # The draft that was enough for the network is too coarse for people.
            image = decode_image(job.data, at_least=size).image
        about = wire.dump_about(entry, self.contract.name, self.contract.version)
        overlay = draw_overlay(image, job.heatmap, size=size, alpha=options.alpha, about=about)
        return Answer(overlay, wire.PNG_TYPE)


def load_model(directory: Path, *, device: torch.device, explains: bool) -> ServedModel:
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
        facts={"identity": identity, "engine": asdict(choice), "is_fallback": is_fallback, "device": str(device)},
    )
    model.check_reference(load_reference(directory, contract, of_fallback=is_fallback))
    model.warm_up(explains=explains)
    return model


def _first_engine(
    contract: model_contract.Contract, directory: Path, device: torch.device
) -> tuple[Engine, model_contract.Engine]:
    """The contract's engine, or with an error in the log its fallback, and which of them it is."""
    try:
        return _load_engine(contract.engine, contract, directory, device), contract.engine
    except EngineError:
        if contract.fallback is None:
            raise
        name = f"{contract.fallback.name} {contract.fallback.precision}"
        logger.exception("the engine cannot run here, falling back to %s", name)
        return _load_engine(contract.fallback, contract, directory, device), contract.fallback


def _load_engine(
    choice: model_contract.Engine, contract: model_contract.Contract, directory: Path, device: torch.device
) -> Engine:
    network = None
    if choice.name == "eager":
        from handlers.archive import load_network  # noqa: PLC0415 - torchvision: 1.7 s, 85 MB

        network = load_network(directory, contract)
    return build_engine(choice, network, directory=directory, device=device)


def _load_explainer(contract: model_contract.Contract, directory: Path, device: torch.device) -> Explainer:
    from handlers.archive import load_network  # noqa: PLC0415 - see above
    from handlers.explain import Explainer  # noqa: PLC0415 - pytorch_grad_cam: 1.6 s, 190 MB

    return Explainer(load_network(directory, contract), contract.explain, device=device)


def _guard(job: _Job, step: Callable[[_Job], None]) -> None:
    """Runs one image's step; what goes wrong becomes the image's error."""
    if job.error is not None:
        return
    try:
        step(job)
    except RequestError as error:
        job.error = error
    except Exception:
        logger.exception("an image of request %r failed", job.row.options.id)
        job.error = HandlerFailed()


def _still_wanted(jobs: list[_Job]) -> list[_Job]:
    """The images without an error, after those whose deadline is over have got theirs."""
    for job in jobs:
        _guard(job, lambda job: job.row.check_deadline())
    return [job for job in jobs if job.error is None]


def _guard_all(jobs: list[_Job], step: Callable[[], None]) -> None:
    """Runs one step of many images, which share its failure."""
    try:
        step()
    except Exception:
        logger.exception("%d images failed together", len(jobs))
        for job in jobs:
            job.error = HandlerFailed()


def _refuse(error: RequestError, images: int) -> Answer:
    return Answer(wire.dump_results([error.entry()] * images), wire.JSON_TYPE)


def _encode(pixels: NDArray[np.uint8], name: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, name)
    return file.getvalue()
