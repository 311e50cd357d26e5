"""Evidence through the real TorchServe: a version whose engine explains in the forward pass of a prediction."""

import asyncio
import base64
import io
import json
import shutil
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from contracts import model as model_contract

pytestmark = [pytest.mark.server, pytest.mark.long]

ROOT = Path(__file__).resolve().parents[2]
FORWARD = ("sharpcam", "cam", "contrastcam")
JSON = {"accept": "application/json"}
CLIENTS, ROUNDS = 12, 6
# Between two runs of one image, whatever batch it is in.
SAME = 0.002


@pytest.fixture(scope="module")
def explaining_source(model_source, tmp_path_factory):
    """The released weights in the eager engine, under a contract of schema 3 that explains in the forward pass."""
    folder = tmp_path_factory.mktemp("evidence") / "model"
    folder.mkdir()
    contract = json.loads((model_source / "contract.json").read_text())
    reference = json.loads((model_source / "reference.json").read_text())
    if contract.get("fallback"):
        contract |= {"engine": contract["fallback"], "fallback": None}
        reference |= reference.pop("fallback")
    contract["schema"] = 3
    methods = [*FORWARD, *(name for name in contract["explain"]["methods"] if name not in FORWARD)]
    contract["explain"] |= {"method": FORWARD[0], "methods": methods, "forward": FORWARD, "sharp_layer": "layer3"}
    model_contract.save(model_contract.parse(contract), folder / "contract.json")
    (folder / "reference.json").write_text(json.dumps(reference))
    shutil.copyfile(model_source / "weights.safetensors", folder / "weights.safetensors")
    return folder


@pytest.fixture(scope="module")
def stack(make_stack, explaining_source):
    """A stack of its own that serves it."""
    explaining = make_stack()
    explaining.start(explaining_source)
    explaining.wait_until_ready()
    return explaining


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


def test_the_heatmaps_of_two_classes_of_one_image_differ(client):
    image = (ROOT / "tests" / "samples" / "cat" / "0.png").read_bytes()
    cat, dog = (explain(client, image, target=name) for name in ("cat", "dog"))
    assert cat["strength"] > dog["strength"] >= 0
    heats = [np.array(document["heatmap"]) for document in (cat, dog)]
    assert heats[0].shape == heats[1].shape == (32, 32)
    assert heats[0].max() == 1
    assert np.abs(heats[0] - heats[1]).mean() > 0.05


def test_gradcam_comes_from_pytorch_grad_cam_and_is_named(client):
    image = (ROOT / "tests" / "samples" / "cat" / "0.png").read_bytes()
    document = explain(client, image, method="gradcam")
    assert document["method"] == "gradcam"
    overlay = client.post("/explain", params={"method": "gradcam", "size": 48}, content=image)
    assert (overlay.headers["x-method"], Image.open(io.BytesIO(overlay.content)).size) == ("gradcam", (48, 48))
    closed = np.array(explain(client, image, method="cam")["heatmap"])
    assert np.corrcoef(closed.ravel(), np.array(document["heatmap"]).ravel())[0, 1] > 0.99, "cam is its closed form"


def test_every_caller_of_mixed_traffic_gets_its_own_right_answer(client, stack, images):
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
    with log.open(encoding="utf-8") as lines:
        lines.seek(begins_at)
        shared = [line for line in map(json.loads, lines) if line.get("row")]
    assert {line["route"] for line in shared} == {"/predict", "/explain"}, "both kinds came in batches with others"


def test_many_images_are_explained_in_one_call(client, images):
    files = [("file", ("x.png", image)) for image in (*images[:9], b"no image")]
    results = client.post("/explain/batch", params={"heatmap": "none"}, files=files).json()["results"]
    assert [entry["method"] for entry in results[:9]] == ["sharpcam"] * 9
    assert results[9]["error"]["code"] == "image_unreadable"
