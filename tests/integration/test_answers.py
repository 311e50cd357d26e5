"""What callers get from the whole system: real images, odd images, bad requests, mixed batches."""

import io
import json
import re
import struct
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.server

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "tests" / "samples"
CAT = SAMPLES / "cat" / "0.png"


@pytest.fixture(scope="module")
def client(stack):
    with httpx.Client(base_url=stack.gateway, timeout=30) as client:
        yield client


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_at_least_70_of_the_100_sample_images_are_right(client):
    right = 0
    for path in sorted(SAMPLES.glob("*/*.png")):
        answer = client.post("/predict", files={"file": path.read_bytes()})
        assert answer.status_code == 200, answer.text
        right += answer.json()["class"] == path.parent.name
    assert right >= 70


def test_answer_says_class_confidence_model_and_request_id(client):
    answer = client.post("/predict", params={"top_k": 3}, content=CAT.read_bytes(), headers={"x-request-id": "abc-1"})
    body = answer.json()
    assert body["class"] == body["top"][0]["class"]
    assert body["confidence"] == body["top"][0]["confidence"] >= body["top"][1]["confidence"]
    assert len(body["top"]) == 3
    assert body["model"]["name"] == "cifar10"
    assert body["request_id"] == answer.headers["x-request-id"] == "abc-1"


def test_explanation_is_a_png_of_the_images_proportions_with_a_visible_heatmap(client):
    image = Image.open(CAT).convert("RGB").resize((90, 60))
    answer = client.post("/explain", content=encode(image))
    assert answer.headers["content-type"] == "image/png"
    overlay = Image.open(io.BytesIO(answer.content)).convert("RGB")
    assert overlay.size == (90, 60)
    difference = np.abs(np.asarray(overlay, np.int16) - np.asarray(image, np.int16)).max(axis=2)
    assert np.median(difference) > 20
    numbers = client.post("/explain", content=encode(image), headers={"accept": "application/json"})
    assert numbers.headers["content-encoding"] == "gzip"
    told = [answer.headers[f"x-{name}"] for name in ("class", "target", "method", "model-version")]
    entry = numbers.json()
    assert told == [entry["class"], entry["target"]["class"], entry["method"], entry["model"]["version"]]
    assert float(answer.headers["x-confidence"]) == pytest.approx(entry["confidence"], abs=1e-3)


def test_explanation_in_numbers_names_target_and_method(client):
    answer = client.post(
        "/explain", params={"target": "dog"}, content=CAT.read_bytes(), headers={"accept": "application/json"}
    )
    body = answer.json()
    assert body["target"]["class"] == "dog"
    assert {"class", "confidence", "method", "strength", "familiar", "similar"} <= set(body)
    heatmap = np.array(body["heatmap"])
    assert heatmap.shape == (32, 32)
    assert 0 <= heatmap.min() <= heatmap.max() <= 1


def odd_images() -> dict[str, bytes]:
    colours = Image.open(CAT).convert("RGB").resize((64, 48))
    with_alpha = colours.convert("RGBA")
    with_alpha.putalpha(128)
    palette = colours.convert("P")
    palette.info["transparency"] = 0
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "grey": encode(colours.convert("L")),
        "alpha": encode(with_alpha),
        "palette with alpha": encode(palette, transparency=0),
        "CMYK": encode(colours.convert("CMYK"), "JPEG"),
        "16-bit": encode(Image.fromarray(np.full((20, 20), 40_000, np.uint16))),
        "1-bit": encode(colours.convert("1")),
        "EXIF-rotated": encode(colours, "JPEG", exif=exif.tobytes()),
        "animated GIF": encode(colours, "GIF", save_all=True, append_images=[colours.rotate(90)]),
        "WebP": encode(colours, "WEBP"),
        "BMP": encode(colours, "BMP"),
        "one pixel": encode(Image.new("RGB", (1, 1))),
        "4000x3": encode(Image.new("RGB", (4000, 3))),
    }


@pytest.mark.parametrize("kind", sorted(odd_images()))
def test_odd_images_are_answered_and_explained(client, kind):
    image = odd_images()[kind]
    assert client.post("/predict", content=image).status_code == 200
    assert client.post("/explain", content=image).status_code == 200


BAD = {
    "empty": (b"", {}, "/predict", 400),
    "text declared": (b"hello", {"content-type": "text/plain"}, "/predict", 415),
    "text undeclared": (b"hello", {}, "/predict", 422),
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), {}, "/predict", 422),
    "truncated": (CAT.read_bytes()[:700], {}, "/predict", 422),
    "unknown version": (CAT.read_bytes(), {}, "/predict?version=9.9.9", 404),
    "top_k of zero": (CAT.read_bytes(), {}, "/predict?top_k=0", 400),
    "unknown target": (CAT.read_bytes(), {}, "/explain?target=unicorn", 400),
    "unknown method": (CAT.read_bytes(), {}, "/explain?method=guess", 400),
    "60 megapixels by the header": (encode(Image.new("1", (10_000, 6_000))), {}, "/predict", 413),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_requests_get_their_status_and_leave_the_service_answering(client, case):
    body, headers, path, status = BAD[case]
    answer = client.post(path, content=body, headers=headers)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == status
    assert client.post("/predict", content=CAT.read_bytes()).status_code == 200


def test_bad_image_does_not_fail_its_batch_neighbours(stack):
    """Sent to TorchServe together, so that good and bad rows share its batches; a batch needs a full queue."""
    version = stack.versions()[0]["version"]
    url = f"{stack.inference}/predictions/cifar10/{version}"
    images = [(path.parent.name, path.read_bytes()) for path in sorted(SAMPLES.glob("*/[0-2].png"))]
    rows = [images[number % len(images)][1] if number % 3 else b"no image" for number in range(96)]
    with httpx.Client(limits=httpx.Limits(max_connections=48), timeout=60) as client:
        alone = {row: predict(client, url, row) for row in set(rows)}
        with ThreadPoolExecutor(48) as threads:
            together = list(threads.map(lambda row: predict(client, url, row), rows))
    for row, entry in zip(rows, together, strict=True):
        if row == b"no image":
            assert entry["error"]["code"] == "image_unreadable"
        else:
            assert entry["class"] == alone[row]["class"]
            assert entry["confidence"] == pytest.approx(alone[row]["confidence"], abs=0.02)


def predict(client: httpx.Client, url: str, row: bytes) -> dict:
    answer = client.post(url, content=row, headers={"content-type": "application/octet-stream"})
    assert answer.status_code == 200, answer.text
    (entry,) = answer.json()["results"]
    return entry


def test_predictions_and_explanations_in_one_batch_get_their_own_kind_of_answer(stack):
    """Both kinds sent to one TorchServe entry, which mixes them in its batches; the gateway itself keeps them apart."""
    version = stack.versions()[0]["version"]
    image = CAT.read_bytes()

    def send(number: int) -> httpx.Response:
        route = "explanations" if number % 2 else "predictions"
        return client.post(
            f"{stack.inference}/{route}/cifar10/{version}",
            content=image,
            headers={"content-type": "application/octet-stream", "x-gradserve": json.dumps({"size": 32 + number})},
        )

    with httpx.Client(limits=httpx.Limits(max_connections=32), timeout=60) as client, ThreadPoolExecutor(32) as threads:
        answers = list(threads.map(send, range(64)))
    for number, answer in enumerate(answers):
        assert answer.status_code == 200
        if number % 2:
            assert Image.open(io.BytesIO(answer.content)).size == (32 + number, 32 + number)
        else:
            assert "class" in answer.json()["results"][0]


def test_many_images_in_one_row_are_answered_in_order(stack):
    version = stack.versions()[0]["version"]
    paths = sorted(SAMPLES.glob("*/0.png"))
    images = [path.read_bytes() for path in paths]
    images.insert(3, b"no image")
    body = b"".join(struct.pack(">I", len(image)) + image for image in images)
    answer = httpx.post(
        f"{stack.inference}/predictions/cifar10/{version}",
        content=body,
        headers={"content-type": "application/vnd.gradserve.images"},
        timeout=60,
    )
    results = answer.json()["results"]
    assert len(results) == 11
    assert "error" in results.pop(3)
    right = [entry["class"] == path.parent.name for entry, path in zip(results, paths, strict=True)]
    assert sum(right) >= 6


def test_commands_of_the_readme_work_as_written(stack, tmp_path):
    """The README's curl lines, with this stack's address in place of the default one."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^\$ (curl .*?)(?:\s+#.*)?$", readme, re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        address = stack.gateway.removeprefix("http://")
        here = re.sub(r"-o (\S+)", rf"-o {tmp_path}/\1", command.replace("localhost:8000", address))
        subprocess.run(f"{here} --fail --silent --show-error --output {tmp_path}/out", shell=True, cwd=ROOT, check=True)


def test_readme_shows_the_first_answer_before_line_25():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert any("curl -f -F file=@" in line for line in lines[:25])


def test_service_answers_while_images_keep_coming_in_bad_shape(client):
    image = CAT.read_bytes()
    for cut in range(0, len(image), 200):
        assert client.post("/predict", content=image[:cut] or b"x").status_code in {200, 422}
    assert client.post("/predict", content=image).status_code == 200


def test_torchserves_metrics_tell_the_handlers_seconds_by_stage(client, stack):
    metrics = f"http://127.0.0.1:{stack.environment['AGENT_METRICS_PORT']}/metrics"
    told = re.compile(r'handler_seconds_total\{stage="(\w+)",model_version="[^"]+",ModelName="(cifar10(?:-explain)?)"')
    wanted = {("decode", "cifar10"), ("predict", "cifar10"), ("write", "cifar10"), ("explain", "cifar10-explain")}

    def are_told() -> bool:
        client.post("/predict", content=CAT.read_bytes())
        client.post("/explain", content=CAT.read_bytes())
        return wanted <= set(told.findall(httpx.get(metrics).text))

    deadline = time.monotonic() + 60
    while not are_told():
        assert time.monotonic() < deadline, httpx.get(metrics).text
        time.sleep(0.5)
