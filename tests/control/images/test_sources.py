"""A gateway as the source of answers, asked through a transport that answers as a gateway does."""

import json

import httpx
import pytest

from control.errors import ControlError, NoGateway
from control.images.sources import Explained, GatewaySource, Question
from gradserve import Failed

URL = "http://gateway"
MODEL = {"model": {"name": "pets", "version": "1.0.0"}, "request_id": "r1"}
CAT = {"class": "cat", "confidence": 0.9, "top": [{"class": "cat", "confidence": 0.9}]}
EVIDENCE = CAT | {"target": CAT["top"][0], "method": "cam", "strength": 1.0, "familiar": True, "familiarity": 0.5,
                  "similar": []}  # fmt: skip


def problem(status, code):
    return httpx.Response(status, json={"code": code, "status": status, "detail": "no more than that"})


def source(answer, **options):
    """Return the source, and the calls that it makes: path and query."""
    calls = []

    def transport(request):
        calls.append((request.url.path, dict(request.url.params)))
        answered = answer(request)
        if isinstance(answered, Exception):
            raise answered
        return answered

    return GatewaySource(URL, None, transport=httpx.MockTransport(transport), **options), calls


def results(request):
    """Answer a cat for each image, but refuse a call with several of which one is `large`."""
    images = [part.split(b"\r\n--")[0] for part in request.content.split(b"\r\n\r\n")[1:]]
    if len(images) > 1 and b"large" in images:
        return problem(413, "body_too_large")
    if b"large" in images:
        return problem(413, "image_too_large")
    return httpx.Response(200, json={"results": [CAT] * len(images), **MODEL})


def test_version_and_model_are_asked_for():
    asked, calls = source(results, version="2.0.0", model="pets")
    asked.predict([b"a"], 3)
    assert calls == [("/predict/batch", {"top_k": "3", "version": "2.0.0", "model": "pets"})]


def test_no_image_is_no_call():
    asked, calls = source(results)
    assert (asked.predict([], 1), calls) == ([], [])


def test_the_image_for_which_a_whole_call_is_refused_fails_alone():
    asked, calls = source(results)
    first, large, last = asked.predict([b"a", b"large", b"c"], 1)
    assert (first.class_name, last.class_name) == ("cat", "cat")
    assert isinstance(large, Failed)
    assert large.code == "image_too_large"
    assert len(calls) == 4


def test_the_overlay_is_of_the_class_and_version_that_the_evidence_is_of():
    def answer(request):
        if "json" in request.headers["accept"]:
            return httpx.Response(200, json=EVIDENCE | MODEL)
        return httpx.Response(200, content=b"\x89PNG overlay", headers={"content-type": "image/png"})

    asked, calls = source(answer, model="pets")
    found = asked.explain(b"a", Question(method="cam", coverage=0.9, alpha=0.3, size=64))
    assert isinstance(found, Explained)
    assert (found.evidence.class_name, found.overlay) == ("cat", b"\x89PNG overlay")
    (_, evidence), (_, overlay) = calls
    assert evidence == {"method": "cam", "coverage": "0.9", "heatmap": "none", "model": "pets"}
    assert overlay == {
        "target": "cat",
        "method": "cam",
        "alpha": "0.3",
        "size": "64",
        "version": "1.0.0",
        "model": "pets",
    }


@pytest.mark.parametrize(
    ("status", "code", "sentence"),
    [
        (401, "key_missing", "set GRADSERVE_KEY, or name a file with the key by --key-file"),
        (403, "scope_missing", "set GRADSERVE_KEY"),
        (404, "unknown_model", "no more than that"),
        (400, "unknown_target", "no more than that"),
    ],
)
def test_what_would_fail_for_every_image_ends_the_command(status, code, sentence):
    asked, calls = source(lambda _: problem(status, code))
    with pytest.raises(ControlError, match=sentence):
        asked.predict([b"a", b"b"], 1)
    assert len(calls) == 1


def test_an_image_that_is_refused_or_takes_too_long_fails_alone():
    refused, _ = source(lambda _: problem(422, "image_unreadable"))
    found = refused.explain(b"a", Question())
    assert (found.status, found.code, found.detail) == (422, "image_unreadable", "no more than that")
    assert json.dumps(found.document)
    late, _ = source(lambda request: httpx.ReadTimeout("late", request=request))
    assert late.explain(b"a", Question()).code == "no_answer"


def test_a_gateway_that_cannot_be_reached_is_named():
    away, _ = source(lambda request: httpx.ConnectError("refused", request=request))
    with pytest.raises(NoGateway, match=URL):
        away.predict([b"a"], 1)
