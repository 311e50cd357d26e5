"""Both clients send the same requests, read the same answers, and repeat only what no server has begun."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from gradserve import (
    AnswerUnreadable,
    AsyncClient,
    Client,
    Evidence,
    Failed,
    GatewayProblem,
    ModelVersion,
    Prediction,
    Similar,
)
from gradserve.calls import BATCH_BYTES, BATCH_IMAGES, read_image, split

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG fake image"
CAT = {
    "class": "cat",
    "confidence": 0.9,
    "top": [{"class": "cat", "confidence": 0.9}],
    "model": {"name": "cifar10", "version": "1.0.0"},
    "request_id": "r1",
}


def batch(entries: list[dict[str, Any]]) -> httpx.Response:
    return httpx.Response(200, json={"results": entries, "model": CAT["model"], "request_id": "r2"})


def refusing(times: int, status: int, **headers: str) -> tuple[Callable[..., httpx.Response], list[httpx.Request]]:
    calls: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        calls.append(request)
        if len(calls) <= times:
            return httpx.Response(status, json={"code": "saturated"}, headers=headers)
        return httpx.Response(200, json=CAT)

    return answer, calls


def test_async_client_has_the_methods_and_parameters_of_the_client() -> None:
    replaced = {"heatmap"}

    def methods(cls: type) -> dict[str, list[str]]:
        found = inspect.getmembers(cls, inspect.isfunction)
        return {name: list(inspect.signature(value).parameters) for name, value in found if not name.startswith("_")}

    assert methods(AsyncClient) == {name: value for name, value in methods(Client).items() if name not in replaced}


def test_prediction_is_typed_and_still_reads_like_the_document(asking) -> None:
    seen = []

    def gateway(request: httpx.Request) -> httpx.Response:
        seen.append((request.method, str(request.url), request.content))
        return httpx.Response(200, json=CAT)

    answer = asking(gateway)("predict", b"image", top_k=3, version="1.0.0")
    assert seen == [("POST", "http://gateway/predict?top_k=3&version=1.0.0", b"image")]
    assert (answer.class_name, answer.confidence, answer.familiar) == ("cat", 0.9, None)
    assert answer["class"] == "cat"
    assert answer.model == ModelVersion("cifar10", "1.0.0")
    assert "familiar" not in answer
    assert hash(answer) == hash(answer)


@pytest.mark.parametrize("kind", [str, Path, lambda path: Path(path).read_bytes()])
def test_an_image_is_a_path_or_the_bytes(tmp_path: Path, kind) -> None:
    path = tmp_path / "cat.png"
    path.write_bytes(PNG)
    assert read_image(kind(path)) == PNG


def test_a_long_batch_is_sent_in_several_calls_and_answered_in_order(asking) -> None:
    calls: list[int] = []

    def gateway(request: httpx.Request) -> httpx.Response:
        images = [part.split(b"\r\n--")[0] for part in request.read().split(b"\r\n\r\n")[1:]]
        calls.append(len(images))
        error = {"error": {"status": 422, "code": "image_unreadable", "detail": "no image"}}
        return batch([error if image == b"bad" else {**CAT, "class": image.decode()} for image in images])

    images = [f"image{number}".encode() for number in range(BATCH_IMAGES + 3)]
    images[-1] = b"bad"
    entries = asking(gateway)("predict_batch", images)
    assert calls == [BATCH_IMAGES, 3]
    assert [entry.class_name for entry in entries[:-1]] == [image.decode() for image in images[:-1]]
    assert {entry.request_id for entry in entries[:-1]} == {"r2"}
    assert isinstance(entries[0], Prediction)
    assert isinstance(entries[-1], Failed)
    assert (entries[-1].status, entries[-1].code, "error" in entries[-1]) == (422, "image_unreadable", True)


def test_a_batch_is_also_split_by_bytes() -> None:
    half = bytes(BATCH_BYTES // 2)
    assert [len(group) for group in split([half, half, b"x", half])] == [2, 2]
    assert [len(group) for group in split([bytes(BATCH_BYTES + 1), b"x"])] == [1, 1]


def test_an_empty_batch_asks_nobody(asking) -> None:
    assert asking(lambda _: pytest.fail("a call"))("predict_batch", []) == []


def test_evidence_asks_for_what_was_asked_for(asking, document) -> None:
    seen = []

    def gateway(request: httpx.Request) -> httpx.Response:
        seen.append((dict(request.url.params), request.headers["accept"]))
        return httpx.Response(200, json=document())

    ask = asking(gateway)
    ask("evidence", b"x")
    ask("evidence", b"x", target="dog", coverage=0.9, test=True, similar=0, heatmap=False)
    everything = {"target": "dog", "coverage": "0.9", "test": "true", "similar": "0", "heatmap": "none"}
    assert seen == [({"heatmap": "base64"}, "application/json"), (everything, "application/json")]


def test_explain_returns_the_png(asking) -> None:
    seen = []

    def gateway(request: httpx.Request) -> httpx.Response:
        seen.append((request.url.path, dict(request.url.params), request.headers["accept"]))
        return httpx.Response(200, content=PNG)

    assert asking(gateway)("explain", b"x", target="frog", alpha=0.3, size=64) == PNG
    assert seen == [("/explain", {"target": "frog", "alpha": "0.3", "size": "64"}, "image/png")]


def test_a_batch_of_explanations_is_read_entry_by_entry(asking, document) -> None:
    error = {"error": {"status": 400, "code": "unknown_target", "detail": "no such class"}}

    def gateway(request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/explain/batch"
        entry = {name: value for name, value in document().items() if name not in ("model", "request_id")}
        return batch([entry, error])

    explained, failed = asking(gateway)("explain_batch", [b"x", b"y"], coverage=0.9)
    assert isinstance(explained, Evidence)
    assert (explained.target.class_name, explained.request_id) == ("dog", "r2")
    assert isinstance(failed, Failed)


def test_example_reads_the_thumbnail_that_the_evidence_names(asking) -> None:
    similar = Similar(7, "cat", 0.9, "/models/cifar10/versions/1.0.0/examples/7.png")

    def gateway(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=PNG) if request.url.path == similar.url else httpx.Response(404)

    assert asking(gateway)("example", similar) == PNG
    with pytest.raises(ValueError, match="pack it again"):
        asking(gateway)("example", Similar(7, "cat", 0.9, ""))


def test_feedback_names_the_call_and_the_right_class(asking) -> None:
    seen = []

    def gateway(request: httpx.Request) -> httpx.Response:
        seen.append((request.url.path, json.loads(request.content)))
        return httpx.Response(204)

    ask = asking(gateway)
    ask("feedback", "r1", "dog")
    ask("feedback", "r1", "dog", note="a puppy")
    assert seen == [
        ("/feedback", {"request_id": "r1", "class": "dog"}),
        ("/feedback", {"request_id": "r1", "class": "dog", "note": "a puppy"}),
    ]


def test_health_is_read_from_a_503_too_and_asked_once(asking) -> None:
    calls = []

    def gateway(request: httpx.Request) -> httpx.Response:
        calls.append(request)
        return httpx.Response(503, json={"status": "unavailable"}, headers={"retry-after": "1"})

    assert asking(gateway)("health") == {"status": "unavailable"}
    assert len(calls) == 1


@pytest.mark.parametrize("status", [503, 429])
def test_a_refused_call_is_sent_again_after_retry_after(asking, status: int) -> None:
    answer, calls = refusing(2, status, **{"retry-after": "3"})
    pauses: list[float] = []
    assert asking(answer, pauses)("predict", b"x").class_name == "cat"
    assert len(calls) == 3
    assert all(3 <= pause <= 4.5 for pause in pauses)


@pytest.mark.parametrize("status", [400, 500, 502, 503, 504])
def test_a_call_on_which_work_may_have_begun_is_not_sent_again(asking, status: int) -> None:
    answer, calls = refusing(1, status)  # without Retry-After, a 503 may be a proxy's
    with pytest.raises(GatewayProblem):
        asking(answer)("predict", b"x")
    assert len(calls) == 1


def test_the_client_does_not_wait_for_a_daily_quota(asking) -> None:
    answer, calls = refusing(1, 429, **{"retry-after": "86000"})
    with pytest.raises(GatewayProblem, match="429 saturated"):
        asking(answer)("predict", b"x")
    assert len(calls) == 1


def test_an_html_page_of_a_proxy_raises_a_gateway_problem(asking) -> None:
    with pytest.raises(GatewayProblem, match="502 unknown"):
        asking(lambda _: httpx.Response(502, text="<html>"))("predict", b"x")


@pytest.mark.parametrize(
    ("method", "answer"),
    [
        ("predict", {"text": "<html>"}),
        ("predict", {"json": {"class": "cat"}}),
        ("evidence", {"json": []}),
        ("explain", {"text": "<html>"}),
        ("models", {"json": []}),
    ],
)
def test_an_answer_of_another_server_is_named(asking, method: str, answer: dict[str, Any]) -> None:
    arguments = () if method == "models" else (b"x",)
    with pytest.raises(AnswerUnreadable, match="check the address"):
        asking(lambda _: httpx.Response(200, **answer))(method, *arguments)


def test_a_batch_answer_of_another_length_is_refused(asking) -> None:
    with pytest.raises(AnswerUnreadable, match="1 entries for 2 images"):
        asking(lambda _: batch([CAT]))("predict_batch", [b"x", b"y"])


def test_the_key_is_sent(asking) -> None:
    seen: list[str] = []

    def note(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["authorization"])
        return httpx.Response(200, json={})

    asking(note, key="secret")("models")
    assert seen == ["Bearer secret"]


def test_the_former_method_heatmap_answers_and_names_the_new_one(document) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json=document()))
    with pytest.warns(DeprecationWarning, match="Client.evidence"):
        answer = Client("http://g", transport=transport).heatmap(b"x")
    assert answer.method == "contrastcam"


def test_package_needs_neither_numpy_nor_pillow_nor_the_rest_of_this_repository() -> None:
    code = (
        "import sys\n"
        "for name in ('numpy', 'PIL', 'contracts', 'gateway', 'control', 'pydantic'): sys.modules[name] = None\n"
        "from gradserve import Heatmap, MissingPackage\n"
        "for method in ('array', 'image'):\n"
        "    try: getattr(Heatmap(1, 1, (1.0,)), method)()\n"
        "    except MissingPackage as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "pip install numpy" in done.stdout
    assert "pip install pillow" in done.stdout
