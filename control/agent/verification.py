"""Whether a loaded version computes what training computed: its own reference inputs, through the real server.

A third place that knows the private wire beside gateway and handler, and the smallest: framed rows of predictions, one
explanation.
"""

from __future__ import annotations

import contextlib
import json
import time
from typing import TYPE_CHECKING, Any

import httpx

from control.errors import VerificationError

if TYPE_CHECKING:
    from contracts.reference import Reference
    from control.archive import Archive

_FRAMES = "application/vnd.gradserve.images"
# Below TorchServe's body limit of 6.5 MB; 32 reference images of CIFAR's size are 80 kB.
_MAX_ROW_BYTES = 4_000_000
_TIMEOUT_S = 60.0


async def verify_predictions(inference_url: str, archive: Archive, name: str) -> bool:
    """Returns when the server at `inference_url` answers the archive's reference inputs within its tolerance.

    True: it computes what the contract's engine computes; False: what its fallback does.

    Raises:
        VerificationError: it answers otherwise, or not at all; the text says which image and by how much.
    """
    version = archive.version
    async with httpx.AsyncClient(base_url=inference_url, timeout=_TIMEOUT_S, trust_env=False) as client:
        answers: list[Any] = []
        for row in _rows(archive.reference.images):
            options = {"id": f"verify-{version}", "top_k": len(archive.classes)}
            answers += await _ask(client, "predictions", name, version, body=row, options=options)
    return _is_engine(archive, answers, name)


async def verify_explanation(inference_url: str, archive: Archive, entry: str) -> None:
    """Returns when the entry that explains predicts the reference inputs, and explains the class of the first.

    Raises:
        VerificationError: it does not: its workers may run other code or weights than those that predict.
    """
    await verify_predictions(inference_url, archive, entry)
    version = archive.version
    async with httpx.AsyncClient(base_url=inference_url, timeout=_TIMEOUT_S, trust_env=False) as client:
        single = archive.reference.images[0]
        options = {"id": f"verify-{version}", "format": "json"}
        (explanation,) = await _ask(client, "explanations", entry, version, body=single, options=options)
        if "heatmap" not in explanation:
            raise VerificationError(entry, version, f"it does not explain: {_error_code(explanation)}")
        references = [reference for reference in (archive.reference, archive.reference.fallback) if reference]
        if not any(_is_top(archive, reference, explanation) for reference in references):
            told = f"{explanation.get('class')} ({explanation.get('confidence')})"
            raise VerificationError(entry, version, f"it explains reference input 0 as {told}")


def frame(images: tuple[bytes, ...]) -> bytes:
    """The images as one row: each with its length before it, 4 bytes, big-endian."""
    return b"".join(len(image).to_bytes(4, "big") + image for image in images)


def _rows(images: tuple[bytes, ...]) -> list[bytes]:
    """The images as few framed rows, none larger than TorchServe takes (unless one image alone is)."""
    rows: list[bytes] = []
    for image in map(frame, ((image,) for image in images)):
        if rows and len(rows[-1]) + len(image) <= _MAX_ROW_BYTES:
            rows[-1] += image
        else:
            rows.append(image)
    return rows


async def _ask(
    client: httpx.AsyncClient, kind: str, entry: str, version: str, *, body: bytes, options: dict[str, Any]
) -> list[Any]:
    """The results that the server gives for one row; `kind` is the verb in TorchServe's path."""
    content_type = "application/octet-stream" if kind == "explanations" else _FRAMES
    header = json.dumps({**options, "deadline": int(1000 * (time.time() + _TIMEOUT_S))}, separators=(",", ":"))
    path = f"/{kind}/{entry}/{version}"
    try:
        response = await client.post(path, content=body, headers={"content-type": content_type, "x-gradserve": header})
        results = response.json()["results"] if response.status_code == 200 else None
    except httpx.HTTPError as error:
        raise VerificationError(entry, version, f"no answer to a reference input ({type(error).__name__})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise VerificationError(entry, version, "an unreadable answer to a reference input") from error
    if not isinstance(results, list) or not results:
        raise VerificationError(entry, version, f"status {response.status_code} to a reference input")
    return results


def _is_engine(archive: Archive, answers: list[Any], name: str) -> bool:
    """Whether the answers are the engine's; False when they are its fallback's.

    Both may be within their tolerances, because they compute the same network: then the nearer one it is.

    Raises:
        VerificationError: they are neither's.
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
    """By how much the worst of all classes of all reference images is off, which is at most the tolerance.

    Raises:
        VerificationError: one is missing or off by more than the tolerance.
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
            # Written so that NaN counts as wrong.
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
    # Two classes that are nearly as probable may change places.
    is_near_top = expected >= max(probabilities.values()) - 2 * reference.tolerance
    return is_near_top and isinstance(got, float) and abs(got - expected) <= reference.tolerance


def _error_code(answer: object) -> str:
    error = answer.get("error") if isinstance(answer, dict) else None
    return str(error.get("code", "an error")) if isinstance(error, dict) else "an unreadable answer"
