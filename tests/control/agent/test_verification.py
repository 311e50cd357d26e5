import asyncio
from pathlib import Path

import pytest

from contracts import wire
from contracts.model import Contract, Input
from contracts.reference import Reference
from control.agent.verification import verify_explanation, verify_predictions
from control.archive import Archive
from control.errors import VerificationError

CONTRACT = Contract("cifar10", "1.0.0", ("cat", "dog"), Input(1, 1, (0.0,) * 3, (1.0,) * 3), "resnet18")
IMAGES = (b"one", b"two")
ENGINE = ((0.30, 0.70), (0.90, 0.10))
FALLBACK = ((0.35, 0.65), (0.86, 0.14))


def archive(*, tolerance, has_fallback=True):
    fallback = Reference(0.02, IMAGES, FALLBACK) if has_fallback else None
    return Archive(Path("cifar10-1.0.0.mar"), "0" * 64, CONTRACT, Reference(tolerance, IMAGES, ENGINE, fallback))


def entries(probabilities):
    return [wire.dump_prediction(list(zip(CONTRACT.classes, row, strict=True))) for row in probabilities]


@pytest.fixture
def verify(serve):
    """`verify(archive, probabilities)`: the verification of a server that answers with these probabilities."""

    def verify(archive, probabilities):
        url = serve(lambda _: (200, wire.dump_results(entries(probabilities))))
        return asyncio.run(verify_predictions(url, archive, "cifar10"))

    return verify


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ((200, b"{}"), "an unreadable answer"),
        ((200, wire.dump_results(entries(ENGINE)[:1])), "does not hold 2 entries"),
        ((200, wire.dump_results([wire.dump_error("handler_failed", "", {})] * 2)), "input 0: handler_failed"),
        ((503, b""), "status 503"),
    ],
)
def test_a_server_that_does_not_answer_each_input_is_refused(serve, answer, problem):
    with pytest.raises(VerificationError, match=problem):
        asyncio.run(verify_predictions(serve(lambda _: answer), archive(tolerance=0.1), "cifar10"))


def near(probabilities):
    return [[value + 0.004 for value in row] for row in probabilities]


@pytest.mark.parametrize("tolerance", [0.02, 0.1])
def test_the_engine_and_its_fallback_pass_and_are_distinguished(verify, tolerance):
    """0.1 is the tolerance of int8; the full-precision fallback often is within it too."""
    assert verify(archive(tolerance=tolerance), near(ENGINE)) is True
    assert verify(archive(tolerance=tolerance), near(FALLBACK)) is False


def test_answers_of_neither_engine_are_refused_with_image_and_class(verify):
    with pytest.raises(VerificationError, match=r"reference input 1, class cat: 0\.5000 instead of 0\.9000"):
        verify(archive(tolerance=0.1), [ENGINE[0], (0.5, 0.5)])


def test_a_fallback_without_reference_outputs_is_refused(verify):
    with pytest.raises(VerificationError):
        verify(archive(tolerance=0.02, has_fallback=False), FALLBACK)


@pytest.fixture
def verify_explainer(serve):
    """`verify(predictions, label, confidence)`: verify an entry with these predictions and this explanation."""

    def verify(predictions, label, confidence):
        explanation = {"class": label, "confidence": confidence, "target": label, "heatmap": [[1.0]]}

        def answer(headers):
            explains = wire.parse_options(headers[wire.OPTIONS_HEADER]).format == "json"
            return 200, wire.dump_results([explanation] if explains else entries(predictions))

        asyncio.run(verify_explanation(serve(answer), archive(tolerance=0.02), "cifar10-explain"))

    return verify


@pytest.mark.parametrize(("predictions", "confidence"), [(ENGINE, 0.705), (FALLBACK, 0.655)])
def test_an_explainer_of_the_right_class_passes_on_either_engine(verify_explainer, predictions, confidence):
    verify_explainer(predictions, "dog", confidence)


@pytest.mark.parametrize(
    ("predictions", "label", "confidence", "problem"),
    [
        (ENGINE, "cat", 0.3, "explains reference input 0 as cat"),
        (ENGINE, "dog", 0.9, r"as dog \(0\.9\)"),
        (ENGINE, "frog", 0.7, "as frog"),
        (((0.9, 0.1), (0.9, 0.1)), "dog", 0.7, "reference input 0, class"),
    ],
)
def test_an_explainer_that_runs_other_code_is_refused(verify_explainer, predictions, label, confidence, problem):
    with pytest.raises(VerificationError, match=problem):
        verify_explainer(predictions, label, confidence)
