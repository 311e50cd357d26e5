"""Verify that a loaded version computes what training computed: send its reference inputs to the real server."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import httpx

from contracts import wire
from contracts.wire import Options
from control.errors import VerificationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from contracts.reference import Reference
    from contracts.wire import Entry
    from control.archive import Archive

# Below TorchServe's body limit of 6.5 MB; 32 reference images of CIFAR's size are 80 kB.
_MAX_BATCH_BYTES = 4_000_000
_TIMEOUT_S = 60.0


async def verify_predictions(inference_url: str, archive: Archive, name: str) -> bool:
    """Verify that the server at `inference_url` answers the archive's reference inputs within its tolerance.

    Return True if the answers are those of the contract's engine, False if they are those of its fallback.

    Raises:
        VerificationError: the answers differ or are missing; the text names the image and the difference.
    """
    version = archive.version
    async with httpx.AsyncClient(base_url=inference_url, timeout=_TIMEOUT_S, trust_env=False) as client:
        answers: list[Any] = []
        options = Options(f"verify-{version}", top_k=len(archive.classes))
        for batch in _batches(archive.reference.images):
            answers += await _ask(client, "predictions", name, version, images=batch, options=options)
    return _is_engine(archive, answers, name)


async def verify_explanation(inference_url: str, archive: Archive, entry: str) -> None:
    """Verify that the explain entry predicts the reference inputs and explains the first one's class.

    Raises:
        VerificationError: it does not; its workers may run other code or weights than the predict workers.
    """
    await verify_predictions(inference_url, archive, entry)
    version = archive.version
    async with httpx.AsyncClient(base_url=inference_url, timeout=_TIMEOUT_S, trust_env=False) as client:
        options = Options(f"verify-{version}", format="json")
        images = archive.reference.images[:1]
        (explanation,) = await _ask(client, "explanations", entry, version, images=images, options=options)
        if "heatmap" not in explanation:
            raise VerificationError(entry, version, f"it does not explain: {_error_code(explanation)}")
        references = [reference for reference in (archive.reference, archive.reference.fallback) if reference]
        if not any(_is_top(archive, reference, explanation) for reference in references):
            found = f"{explanation.get('class')} ({explanation.get('confidence')})"
            raise VerificationError(entry, version, f"it explains reference input 0 as {found}")


def _batches(images: Sequence[bytes]) -> list[list[bytes]]:
    """Return the images in upstream batches, none larger than TorchServe accepts (unless one image alone is)."""
    batches: list[list[bytes]] = []
    size = 0
    for image in images:
        size += len(image) + wire.FRAME_HEAD_BYTES
        if not batches or size > _MAX_BATCH_BYTES:
            batches.append([])
            size = len(image) + wire.FRAME_HEAD_BYTES
        batches[-1].append(image)
    return batches


async def _ask(
    client: httpx.AsyncClient, kind: str, entry: str, version: str, *, images: Sequence[bytes], options: Options
) -> list[Entry]:
    """Return the server's entries for one upstream batch; `kind` is `predictions` or `explanations`.

    Raises:
        VerificationError: there is no readable answer.
    """
    request = wire.dump_request(images, options._replace(deadline=int(1000 * (time.time() + _TIMEOUT_S))))
    headers = {"content-type": request.content_type, wire.OPTIONS_HEADER: request.options}
    try:
        response = await client.post(f"/{kind}/{entry}/{version}", content=request.body, headers=headers)
    except httpx.HTTPError as error:
        raise VerificationError(entry, version, f"no answer to a reference input ({type(error).__name__})") from error
    if response.status_code != 200:
        raise VerificationError(entry, version, f"status {response.status_code} to a reference input")
    try:
        return wire.parse_results(response.content, len(images))
    except wire.BadAnswer as error:
        raise VerificationError(entry, version, f"an unreadable answer to a reference input: {error}") from error


def _is_engine(archive: Archive, answers: list[Any], name: str) -> bool:
    """Return True if the answers are the engine's, False if they are its fallback's.

    They may be within both tolerances, because both engines compute the same network: then the nearer one counts.

    Raises:
        VerificationError: the answers are neither's.
    """
    fallback = archive.reference.fallback
    try:
        off = _compare(archive, archive.reference, answers, name)
    except VerificationError:
        if fallback is None:
            raise
        with contextlib.suppress(VerificationError):
            _compare(archive, fallback, answers, name)
            return False
        raise
    if fallback is None:
        return True
    with contextlib.suppress(VerificationError):
        return off <= _compare(archive, fallback, answers, name)
    return True


def _compare(archive: Archive, reference: Reference, answers: list[Any], name: str) -> float:
    """Return the largest difference of a probability over all classes and reference inputs.

    Raises:
        VerificationError: an answer is missing, or a difference is above the tolerance.
    """
    if len(answers) != len(reference.images):
        problem = f"{len(answers)} answers to {len(reference.images)} reference inputs"
        raise VerificationError(name, archive.version, problem)
    worst, where = 0.0, ""
    for index, (answer, expected) in enumerate(zip(answers, reference.probabilities, strict=True)):
        if "top" not in answer:
            raise VerificationError(name, archive.version, f"reference input {index}: {_error_code(answer)}")
        got = {entry["class"]: float(entry["confidence"]) for entry in answer["top"]}
        if set(got) != set(archive.classes):
            raise VerificationError(
                name, archive.version, f"reference input {index}: other classes than the contract's"
            )
        for label, probability in zip(archive.classes, expected, strict=True):
            off = abs(got[label] - probability)
            # Negated, so that NaN counts as a difference.
            if not off <= worst:
                worst, where = (
                    off,
                    f"reference input {index}, class {label}: {got[label]:.4f} instead of {probability:.4f}",
                )
    if not worst <= reference.tolerance:
        problem = f"{where}, off by {worst:.4f} with a tolerance of {reference.tolerance:.4f}"
        raise VerificationError(name, archive.version, problem)
    return worst


def _is_top(archive: Archive, reference: Reference, answer: dict[str, Any]) -> bool:
    """Return True if the answer's class is the first reference input's top class, with about its probability."""
    probabilities = dict(zip(archive.classes, reference.probabilities[0], strict=True))
    expected, got = probabilities.get(answer.get("class", ""), -1.0), answer.get("confidence")
    # Two classes of nearly equal probability may change places.
    is_near_top = expected >= max(probabilities.values()) - 2 * reference.tolerance
    return is_near_top and isinstance(got, float) and abs(got - expected) <= reference.tolerance


def _error_code(answer: Entry) -> str:
    return wire.parse_error(answer)[0] or "an unreadable answer"
