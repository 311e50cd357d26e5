"""POST /feedback through the application: known calls and known classes only, and the last word counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from gateway.auth.keys import make_key
from gateway.feedback.store import FeedbackStore

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import httpx
    from conftest import Stand

SECRET, KEY = make_key("alice", ["predict", "feedback"])

READER, READER_KEY = make_key("bob", ["predict", "explain", "read"])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "feedback.db"


@pytest.fixture
def store(path: Path) -> FeedbackStore:
    return FeedbackStore(path)


@pytest.fixture
def make(make_stand: Callable[..., Stand], path: Path) -> Callable[..., Stand]:
    return lambda **settings: make_stand(feedback_file=path, **settings)


def say(stand: Stand, request_id: str, name: str = "dog", **more: Any) -> httpx.Response:
    return stand.client.post("/feedback", json={"request_id": request_id, "class": name, **more})


def test_the_right_class_of_an_earlier_call_is_kept_and_a_repeat_replaces_it(
    make: Callable[..., Stand], store: FeedbackStore
) -> None:
    stand = make()
    request_id = stand.client.post("/predict", content=b"image-of-cat").json()["request_id"]
    assert say(stand, request_id, "frog").status_code == 200
    answer = say(stand, request_id, "dog", note="a puppy")
    assert answer.json() == {"request_id": request_id, "class": "dog"}
    ((call, feedback),) = store.labelled()
    assert (call.class_name, call.confidence, call.version, call.image) == ("cat", 0.9, "1.0.0", None)
    assert (feedback.class_name, feedback.note) == ("dog", "a puppy")


@pytest.mark.parametrize("accept", ["application/json", "image/png"])
def test_an_explanation_can_be_corrected_too(make: Callable[..., Stand], store: FeedbackStore, accept: str) -> None:
    stand = make(feedback_sample=1.0)
    answer = stand.client.post("/explain", content=b"image-of-cat", headers={"accept": accept})
    assert say(stand, answer.headers["x-request-id"]).status_code == 200
    ((call, _),) = store.labelled()
    assert (call.class_name, call.image) == ("cat", b"image-of-cat")


def test_the_feedback_of_one_process_is_about_the_calls_of_another(make: Callable[..., Stand]) -> None:
    one, other = make(), make()
    request_id = one.client.post("/predict", content=b"image-of-cat").json()["request_id"]
    assert say(other, request_id).status_code == 200


def test_an_unknown_request_is_404_and_an_unknown_class_400(make: Callable[..., Stand]) -> None:
    stand = make()
    answer = say(stand, "never-answered")
    assert (answer.status_code, answer.json()["code"]) == (404, "request_unknown")
    request_id = stand.client.post("/predict", content=b"image-of-cat").json()["request_id"]
    answer = say(stand, request_id, "unicorn")
    assert (answer.status_code, answer.json()["code"]) == (400, "unknown_class")
    assert "use one of cat, dog, frog" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "empty_body"),
        (b"{", 400, "bad_json"),
        (b"[]", 400, "bad_json"),
        (b'{"request_id": "x"}', 400, "bad_json"),
        (b'{"request_id": "x", "class": "cat", "colour": "red"}', 400, "bad_json"),
        (b'{"request_id": "x", "class": 7}', 400, "bad_json"),
        (b" " * 9000, 413, "body_too_large"),
    ],
)
def test_a_body_that_is_no_feedback_is_refused(make: Callable[..., Stand], body: bytes, status: int, code: str) -> None:
    answer = make().client.post("/feedback", content=body)
    assert (answer.status_code, answer.json()["code"]) == (status, code)


def test_feedback_needs_its_own_scope_and_names_the_caller(make: Callable[..., Stand], store: FeedbackStore) -> None:
    entries = tuple(f"{key.name}:{key.sha256}:{'+'.join(key.scopes)}" for key in (KEY, READER_KEY))
    stand = make(keys=entries)
    own, others = {"x-api-key": SECRET}, {"x-api-key": READER}
    request_id = stand.client.post("/predict", content=b"image-of-cat", headers=own).json()["request_id"]
    said = {"request_id": request_id, "class": "dog"}
    assert stand.client.post("/feedback", json=said, headers=others).json()["code"] == "scope_missing"
    assert stand.client.post("/feedback", json=said, headers=own).status_code == 200
    ((call, feedback),) = store.labelled()
    assert feedback.caller == "alice"
    assert "x-api-key" not in call.headers


def test_a_key_that_is_limited_to_other_models_corrects_no_call(make: Callable[..., Stand]) -> None:
    entries = tuple(f"{key.name}:{key.sha256}:predict+feedback" for key in (KEY, READER_KEY))
    stand = make(keys=(entries[0], f"{entries[1]}:photos"))
    call = stand.client.post("/predict", content=b"image-of-cat", headers={"x-api-key": SECRET})
    said = {"request_id": call.json()["request_id"], "class": "dog"}
    refused = stand.client.post("/feedback", json=said, headers={"x-api-key": READER})
    assert (refused.status_code, refused.json()["code"]) == (403, "model_forbidden")


def test_a_sampled_call_keeps_its_image_and_only_harmless_headers(
    make: Callable[..., Stand], store: FeedbackStore
) -> None:
    stand = make(feedback_sample=1.0)
    headers = {"user-agent": "camera", "content-type": "image/png", "cookie": "secret", "authorization": "Bearer x"}
    request_id = stand.client.post("/predict", content=b"image-of-cat", headers=headers).json()["request_id"]
    say(stand, request_id)
    ((call, _),) = store.labelled()
    assert (call.image, call.headers) == (b"image-of-cat", {"user-agent": "camera", "content-type": "image/png"})


def test_without_a_store_there_is_no_route_and_nothing_in_the_document(stand: Stand) -> None:
    answer = say(stand, "x")
    assert (answer.status_code, answer.json()["code"]) == (404, "route_unknown")
    assert "/feedback" not in stand.client.get("/openapi.json").json()["paths"]


def test_the_document_describes_the_route_where_it_is(make: Callable[..., Stand]) -> None:
    document = make().client.get("/openapi.json").json()
    operation = document["paths"]["/feedback"]["post"]
    assert {"200", "400", "404", "413", "503"} <= set(operation["responses"])
    assert "FeedbackCall" in document["components"]["schemas"]


def test_predictions_go_on_and_feedback_is_503_when_the_store_breaks(make: Callable[..., Stand], path: Path) -> None:
    stand = make()
    path.unlink()
    for log in path.parent.glob("feedback.db-*"):
        log.unlink()
    assert stand.client.post("/predict", content=b"image-of-cat").status_code == 200
    answer = say(stand, "x")
    assert (answer.status_code, answer.json()["code"]) == (503, "feedback_store")
