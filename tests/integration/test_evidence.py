"""Evidence of the released version through the real TorchServe, in the forward pass of predictions."""

import asyncio
import base64
import io
import json
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from contracts.wire import parse_about

pytestmark = pytest.mark.server

ROOT = Path(__file__).resolve().parents[2]
CAT = (ROOT / "tests" / "samples" / "cat" / "0.png").read_bytes()
SHIP = (ROOT / "tests" / "samples" / "ship" / "0.png").read_bytes()
CLOCK = (ROOT / "gateway" / "page" / "samples" / "clock.png").read_bytes()
JSON = {"accept": "application/json"}
CLIENTS, ROUNDS = 12, 6
# Between two runs of one image, whatever batch it is in.
SAME = 0.002


@pytest.fixture(scope="module")
def client(stack):
    with httpx.Client(base_url=stack.gateway, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    """Sample images of every class."""
    return [path.read_bytes() for path in sorted((ROOT / "tests" / "samples").glob("*/[01].png"))]


def levels(heatmap: dict) -> np.ndarray:
    """The levels of a compact heatmap, 0 to 255."""
    return np.frombuffer(base64.b64decode(heatmap["values"]), np.uint8).astype(int)


def explain(client, image, **query) -> dict:
    answer = client.post("/explain", params=query, content=image, headers=JSON)
    assert answer.status_code == 200, answer.text
    return answer.json()


def overlay(client, image, **query) -> httpx.Response:
    answer = client.post("/explain", params=query, content=image)
    assert answer.headers["content-type"] == "image/png", answer.text
    return answer


def colour(file: bytes) -> np.ndarray:
    """The colourfulness of each pixel, 0 to 255."""
    pixels = np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(int)
    return pixels.max(axis=2) - pixels.min(axis=2)


def test_the_heatmaps_of_two_classes_of_one_image_differ(client):
    cat, dog = (explain(client, CAT, target=name) for name in ("cat", "dog"))
    assert cat["strength"] > dog["strength"] >= 0
    heats = [np.array(document["heatmap"]) for document in (cat, dog)]
    assert heats[0].shape == heats[1].shape == (32, 32)
    assert heats[0].max() == 1
    assert np.abs(heats[0] - heats[1]).mean() > 0.05


@pytest.mark.parametrize("method", ["contrastcam", "gradcam"])
def test_the_overlay_of_a_class_that_is_not_there_is_grey_and_says_so(client, method):
    """An overlay that glows where nothing speaks for the class misleads the eye."""
    there, absent = (overlay(client, SHIP, target=name, method=method, alpha=0.9) for name in ("ship", "horse"))
    assert np.percentile(colour(there.content), 95) > 100 > 30 > np.percentile(colour(absent.content), 95)
    assert parse_about(there.content)["caption"] == f"ship by {method}"
    assert parse_about(absent.content)["caption"] == f"horse by {method}, dimmed: 0% of the evidence for ship"


def test_gradcam_comes_from_pytorch_grad_cam_and_is_named(client):
    document = explain(client, CAT, method="gradcam")
    assert document["method"] == "gradcam"
    drawn = overlay(client, CAT, method="gradcam", size=48)
    assert (drawn.headers["x-method"], Image.open(io.BytesIO(drawn.content)).size) == ("gradcam", (48, 48))
    assert parse_about(drawn.content)["caption"] == "cat by gradcam"
    closed = np.array(explain(client, CAT, method="cam")["heatmap"])
    # Not exactly: the closed form is that of the INT8 engine.
    assert np.corrcoef(closed.ravel(), np.array(document["heatmap"]).ravel())[0, 1] > 0.97, "cam is its closed form"


def test_an_image_of_something_else_is_said_to_be_unfamiliar_everywhere(client):
    for image, is_familiar in ((CAT, True), (CLOCK, False)):
        assert client.post("/predict", content=image).json()["familiar"] is is_familiar
        document = explain(client, image, heatmap="none")
        assert (document["familiar"], document["familiarity"] >= 0.05) == (is_familiar, is_familiar)
        drawn = overlay(client, image)
        assert drawn.headers["x-familiar"] == str(is_familiar).lower()
        assert parse_about(drawn.content)["caption"].endswith("unfamiliar image") is not is_familiar


def test_similar_images_are_of_the_first_two_classes_and_have_thumbnails(client):
    top = client.post("/predict", params={"top_k": 2}, content=CAT).json()["top"]
    similar = explain(client, CAT, similar=2, heatmap="none")["similar"]
    assert sorted(found["class"] for found in similar) == sorted([entry["class"] for entry in top] * 2)
    assert [found["similarity"] for found in similar] == sorted((f["similarity"] for f in similar), reverse=True)
    assert similar[0]["class"] == "cat"
    for found in similar:
        thumbnail = client.get(found["image"])
        assert thumbnail.headers["content-type"] == "image/png"
        assert Image.open(io.BytesIO(thumbnail.content)).size == (32, 32)
    folder = similar[0]["image"].rpartition("/")[0]
    unknown = client.get(f"{folder}/999999.png")
    assert (unknown.status_code, unknown.json()["code"]) == (404, "unknown_example")
    assert explain(client, CAT, similar=0, heatmap="none")["similar"] == []


def test_a_larger_coverage_gives_a_larger_set_that_begins_with_the_answer(client):
    sets = [explain(client, CLOCK, coverage=coverage, heatmap="none") for coverage in (0.5, 0.95, 0.999)]
    names = [[entry["class"] for entry in found["classes"]] for found in sets]
    assert [found[0] for found in names] == [found["class"] for found in sets]
    assert len(names[0]) <= len(names[1]) <= len(names[2])
    assert len(names[0]) < len(names[2])
    assert "classes" not in explain(client, CLOCK, heatmap="none")
    refused = client.post("/explain", params={"coverage": 1}, content=CLOCK, headers=JSON)
    assert (refused.status_code, refused.json()["code"]) == (400, "bad_parameter")


def test_the_heatmap_is_tried_on_its_image_when_asked(client):
    document = explain(client, SHIP, test="true", heatmap="none")
    assert 0 <= document["test"]["removed"] <= 1
    assert 0 <= document["test"]["kept"] <= 1
    assert "quarter" in document["test"]["verdict"]
    hardly = explain(client, SHIP, target="horse", test="true", heatmap="none")["test"]
    assert "unavailable" in hardly or "cannot be tested" in hardly["verdict"]
    assert "test" not in explain(client, SHIP, heatmap="none")


def test_v2_gives_familiarity_and_answer_sets_as_outputs(client):
    data = [base64.b64encode(image).decode() for image in (CAT, CLOCK)]
    outputs = [{"name": name} for name in ("class", "familiar", "familiarity", "classes")]
    body = {
        "inputs": [{"name": "image", "datatype": "BYTES", "shape": [2], "data": data}],
        "outputs": outputs,
        "parameters": {"coverage": 0.99},
    }
    answer = client.post("/v2/models/cifar10/infer", json=body)
    assert answer.status_code == 200, answer.text
    found = {output["name"]: output["data"] for output in answer.json()["outputs"]}
    documents = [explain(client, image, coverage=0.99, heatmap="none") for image in (CAT, CLOCK)]
    assert found["class"] == [document["class"] for document in documents]
    assert found["familiar"] == [True, False]
    assert found["familiarity"] == pytest.approx([document["familiarity"] for document in documents], abs=0.02)
    sets = [[entry["class"] for entry in document["classes"]] for document in documents]
    assert [json.loads(members) for members in found["classes"]] == sets


def test_every_caller_of_mixed_traffic_gets_its_own_right_answer(client, stack, images, until):
    alone = [client.post("/predict", content=image).json() for image in images]
    heatmaps = [explain(client, image, target="dog", heatmap="base64")["heatmap"] for image in images]

    async def caller(http: httpx.AsyncClient, number: int) -> None:
        for turn in range(ROUNDS):
            index, kind = (number * ROUNDS + turn) % len(images), (number + turn) % 4
            if kind == 0:
                answer = await http.post("/explain", params={"size": 40 + number}, content=images[index])
                assert Image.open(io.BytesIO(answer.content)).size == (40 + number, 40 + number)
                assert answer.headers["x-class"] == alone[index]["class"]
                continue
            path, query = ("/explain", {"target": "dog", "heatmap": "base64"}) if kind == 1 else ("/predict", {})
            answer = await http.post(path, params=query, content=images[index], headers=JSON)
            body = answer.json()
            assert answer.status_code == 200, body
            assert body["class"] == alone[index]["class"]
            assert abs(body["confidence"] - alone[index]["confidence"]) < SAME
            if kind == 1:
                assert body["target"]["class"] == "dog"
                assert np.abs(levels(body["heatmap"]) - levels(heatmaps[index])).max() <= 3

    async def crowd() -> None:
        async with httpx.AsyncClient(base_url=stack.gateway, timeout=60) as http:
            await asyncio.gather(*(caller(http, number) for number in range(CLIENTS)))

    log = stack.home / "logs" / "gateway.log"
    begins_at = log.stat().st_size
    asyncio.run(crowd())

    def in_batches_with_others() -> set[str]:
        with log.open(encoding="utf-8") as lines:
            lines.seek(begins_at)
            return {line["route"] for line in map(json.loads, lines) if line.get("row")}

    until(lambda: in_batches_with_others() == {"/predict", "/explain"}, 20)  # answers are sent before they are logged


def test_many_images_are_explained_in_one_call(client, images):
    files = [("file", ("x.png", image)) for image in (*images[:9], b"no image")]
    results = client.post("/explain/batch", params={"heatmap": "none"}, files=files).json()["results"]
    assert [entry["method"] for entry in results[:9]] == ["contrastcam"] * 9
    assert results[9]["error"]["code"] == "image_unreadable"
