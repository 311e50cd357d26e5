import asyncio
import json
from pathlib import Path

import pytest

from control.agent.verification import verify_predictions
from control.archive import Archive, Reference
from control.errors import VerificationError

CONTRACT = {"name": "cifar10", "version": "1.0.0", "classes": ["cat", "dog"]}
IMAGES = (b"one", b"two")
ENGINE = ((0.30, 0.70), (0.90, 0.10))
FALLBACK = ((0.35, 0.65), (0.86, 0.14))


def archive(*, tolerance, has_fallback=True):
    fallback = Reference(0.02, IMAGES, FALLBACK) if has_fallback else None
    return Archive(Path("cifar10-1.0.0.mar"), "0" * 64, CONTRACT, Reference(tolerance, IMAGES, ENGINE, fallback))


@pytest.fixture
def verify(serve):
    """Whether a server that answers with these probabilities is held for the engine."""

    def verify(archive, probabilities):
        results = [
            {"top": [{"class": name, "confidence": p} for name, p in zip(CONTRACT["classes"], row, strict=True)]}
            for row in probabilities
        ]
        url = serve(lambda _: (200, json.dumps({"results": results}).encode()))
        return asyncio.run(verify_predictions(url, archive, "cifar10"))

    return verify


def near(probabilities):
    return [[value + 0.004 for value in row] for row in probabilities]


@pytest.mark.parametrize("tolerance", [0.02, 0.1])
def test_a_worker_on_its_fallback_is_right_and_told_from_one_on_its_engine(verify, tolerance):
    """0.1 is int8's tolerance, within which the full-precision fallback often lies too."""
    assert verify(archive(tolerance=tolerance), near(ENGINE)) is True
    assert verify(archive(tolerance=tolerance), near(FALLBACK)) is False


def test_answers_of_neither_engine_are_refused_with_image_and_class(verify):
    with pytest.raises(VerificationError, match=r"reference input 1, class cat: 0\.5000 instead of 0\.9000"):
        verify(archive(tolerance=0.1), [ENGINE[0], (0.5, 0.5)])


def test_a_fallback_without_reference_outputs_is_refused(verify):
    with pytest.raises(VerificationError):
        verify(archive(tolerance=0.02, has_fallback=False), FALLBACK)
