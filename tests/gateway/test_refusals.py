"""Refusals: a 4xx with one sentence that names the remedy, whatever the caller sent."""

from __future__ import annotations

import orjson
import pytest

from gateway import refusals
from gateway.errors import GatewayError

LONG = "x\r\n\0é" * 10_000
REFUSALS: tuple[GatewayError, ...] = (
    refusals.EmptyBody(),
    refusals.BadMultipart("its closing boundary is missing"),
    refusals.MissingFile(),
    refusals.UnexpectedField(LONG),
    refusals.TooManyFiles(1),
    refusals.TooManyFiles(256),
    refusals.BadParameter("x" * 10_000, LONG, "a whole number"),
    refusals.UnknownParameter(LONG, ("top_k", "version")),
    refusals.BadJson("it cannot be parsed"),
    refusals.ClassUnknown(LONG, tuple(f"class {number}" for number in range(1000))),
    refusals.BadHttp(),
    refusals.KeyMissing(),
    refusals.KeyUnknown(),
    refusals.KeyExpired("2026-01-31T00:00:00+00:00"),
    refusals.ScopeMissing("predict"),
    refusals.ModelForbidden(LONG, tuple(f"{number}{'m' * 63}" for number in range(9))),
    refusals.RouteUnknown(),
    refusals.RequestUnknown(LONG, 30),
    refusals.VersionUnknown("9.9.9"),
    refusals.ModelUnknown(LONG),
    refusals.ExampleUnknown(9, "1.0.0", 8),
    refusals.ExampleUnknown(0, "1.0.0", 0),
    refusals.HeatmapsTooLarge(5_000_000, 4_000_000),
    refusals.MethodNotAllowed("POST"),
    refusals.BodyTooSlow(10),
    refusals.BodyTooLarge(100),
    refusals.ImageTooLarge(10_000, 10_000, max_pixels=25_000_000, max_side=16_384, max_aspect=2_000),
    refusals.TooManyPixels(2, 1),
    refusals.CallerHasTooManyPixels(1),
    refusals.MediaTypeUnsupported(LONG, "http://gateway/predict"),
    refusals.FileTypeUnsupported(255, LONG, LONG),
    refusals.FormExpected(LONG, "http://gateway/predict/batch"),
    refusals.QuotaExceeded("600 per 1 minute", 12),
    refusals.HeadersTooLarge(16_384, 100),
)


def test_every_refusal_is_tested_here() -> None:
    defined = {
        kind for kind in vars(refusals).values() if isinstance(kind, type) and kind.__module__ == refusals.__name__
    }
    assert defined - {refusals.BadRequest} == {type(refusal) for refusal in REFUSALS}


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: type(refusal).__name__)
def test_a_refusal_is_a_4xx_with_one_printable_sentence_of_bounded_length(refusal: GatewayError) -> None:
    assert 400 <= refusal.status < 500
    assert refusal.code != GatewayError.code
    assert refusal.detail.isprintable()
    assert len(refusal.detail) < 700
    assert refusal.detail.endswith(".") or ": curl -F file=@" in refusal.detail


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: type(refusal).__name__)
def test_a_refusals_facts_and_headers_can_be_sent(refusal: GatewayError) -> None:
    problem = orjson.loads(orjson.dumps(refusal.problem()))
    assert (problem["status"], problem["code"], problem["detail"]) == (refusal.status, refusal.code, refusal.detail)
    assert all(f"{name}: {value}".isprintable() for name, value in refusal.headers.items())
    assert len(orjson.dumps({**problem, "classes": []})) < 1500


def test_an_unknown_class_is_told_all_classes_as_facts_and_some_in_the_sentence() -> None:
    classes = tuple(f"class {number}" for number in range(1000))
    refusal = refusals.ClassUnknown("unicorn", classes)
    assert refusal.facts == {"classes": classes}
    assert "class 19, …" in refusal.detail
    assert "class 20" not in refusal.detail
