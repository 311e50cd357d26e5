"""An archive that the first release packed, its contract of schema 1 and its own handler, beside one packed today.

schema_1_handlers.zip holds the handlers of the first release (commit 30fa1da), as its archives do.
"""

import asyncio
import hashlib
import json
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest

from contracts import model as model_contract
from handlers.build import BUILD, identity

pytestmark = [pytest.mark.server, pytest.mark.long]

ROOT = Path(__file__).resolve().parents[2]
OLD_HANDLERS = Path(__file__).with_name("schema_1_handlers.zip")
IMAGES = [path.read_bytes() for path in sorted((ROOT / "tests" / "samples").glob("*/*.png"))][::3]
CLIENTS, ROUNDS = 12, 15
# Between two runs of one image, whatever batch it is in: far less than between two images.
SAME = 0.002
# Between the first release's engine and today's, of one file: where the graph also gives what evidence is made of,
# OpenVINO fuses other operations in INT8 (0.011 at most for these images).
SAME_ENGINE_FILE = 0.03


@pytest.fixture
def old_archive(pack_again) -> Path:
    """The served model as version 0.1.0 of the first release."""
    archive = pack_again("0.1.0")
    old = archive.with_name(f"old-{archive.name}")
    with zipfile.ZipFile(archive) as packed, zipfile.ZipFile(OLD_HANDLERS) as handlers:
        members = {name: packed.read(name) for name in packed.namelist()}
        members = {name: data for name, data in members.items() if not name.startswith(("handlers/", "contracts/"))}
        members |= {name: handlers.read(name) for name in handlers.namelist()}
    members["image_handler.py"] = members["handlers/image_handler.py"]
    contract = model_contract.parse(json.loads(members["contract.json"]))
    explain = replace(contract.explain, method="gradcam", methods=("gradcam", "layercam"), sharp_layer=None)
    contract = replace(contract, schema=1, explain=explain, evidence=None)
    members["contract.json"] = json.dumps(model_contract.dump(contract)).encode()
    packed_by_archiver = ("MAR-INF/", BUILD)
    files = {
        name: hashlib.sha256(data).hexdigest()
        for name, data in members.items()
        if not name.startswith(packed_by_archiver) and not name.endswith("/")
    }
    members[BUILD] = json.dumps({"identity": identity(files), "files": files}).encode()
    with zipfile.ZipFile(old, "w") as written:
        for name, data in members.items():
            written.writestr(name, data)
    return old


def command(stack, *arguments: str) -> None:
    done = stack.command(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_archive_of_the_first_release_serves_as_stable_beside_a_new_canary_under_batching(
    stack, stable, old_archive, pack_again, until
):
    command(stack, "deploy", str(old_archive), "--stable", "--yes")  # it explains by fewer methods
    command(stack, "deploy", str(pack_again("9.1.0")), "--canary", "50")
    until(lambda: len(stack.health().json()["versions"]) == 3, 10)
    with httpx.Client(base_url=stack.gateway, timeout=30) as client:
        until(lambda: client.post("/predict", params={"version": "9.1.0"}, content=IMAGES[0]).status_code == 200, 10)
        told = {found["version"]: found["contract"] for found in client.get("/models").json()["versions"]}
        alone = {
            version: [predict(client, image, version) for image in IMAGES] for version in ("0.1.0", "9.1.0", stable)
        }
        overlays = {version: explain(client, version) for version in ("0.1.0", "9.1.0")}
    assert (told["0.1.0"]["schema"], told["9.1.0"]["schema"]) == (1, 3)
    assert "held_out_accuracy" in told["0.1.0"]["accepted"]
    assert "figures" in told["9.1.0"]["accepted"]
    for version in ("9.1.0", stable):  # one model, one engine
        assert all(is_same(*pair, SAME_ENGINE_FILE) for pair in zip(alone["0.1.0"], alone[version], strict=True))
    (old_class, old_heat), (new_class, new_heat) = overlays["0.1.0"], overlays["9.1.0"]
    assert old_class == new_class
    np.testing.assert_allclose(old_heat, new_heat, atol=0.01)  # wire 2 has 8 bits for a value

    with httpx.Client(base_url=stack.gateway, timeout=30) as client:
        old, new = (evidence(client, version) for version in ("0.1.0", "9.1.0"))
    parts = ("strength", "familiar", "familiarity", "similar", "classes", "test")
    for part in parts:
        assert "packed without evidence" in old[part]["unavailable"]
        assert not (isinstance(new[part], dict) and "unavailable" in new[part])

    log = stack.home / "logs" / "gateway.log"
    begins_at = log.stat().st_size
    served = asyncio.run(crowd(stack.gateway, alone))
    assert set(served) == {"0.1.0", "9.1.0"}
    assert min(served.values()) > CLIENTS * ROUNDS // 10

    def said() -> list[dict]:
        with log.open(encoding="utf-8") as lines:
            lines.seek(begins_at)
            return [json.loads(line) for line in lines if '"mixed-' in line]

    until(lambda: len(said()) == CLIENTS * ROUNDS, 20)  # answers are sent before they are logged
    for version in served:
        rows = Counter(line.get("row", line["request_id"]) for line in said() if line["version"] == version)
        assert max(rows.values()) > 1, f"no two callers' images went to {version} together"


async def crowd(url: str, alone: dict[str, list[dict]]) -> Counter:
    """How many calls each version answered; every answer is the one that its image gets alone."""
    served: Counter = Counter()

    async def client(http: httpx.AsyncClient, number: int) -> None:
        for turn in range(ROUNDS):
            index, is_bad = (number * ROUNDS + turn) % len(IMAGES), (number + turn) % 7 == 0
            answer = await http.post(
                "/predict",
                params={"top_k": 10},
                content=IMAGES[index][:200] if is_bad else IMAGES[index],
                headers={"x-request-id": f"mixed-{number}-{turn}"},
            )
            body = answer.json()
            if is_bad:
                assert (answer.status_code, body["code"]) == (422, "image_unreadable"), body
                continue
            assert answer.status_code == 200, body
            version = body["model"]["version"]
            served[version] += 1
            assert is_same(body, alone[version][index]), (version, index)

    async with httpx.AsyncClient(base_url=url, timeout=30) as http:
        await asyncio.gather(*(client(http, number) for number in range(CLIENTS)))
        files = [("file", ("image.png", image)) for image in (*IMAGES[:5], b"no image")]
        for version in alone:
            results = (await http.post("/predict/batch", params={"version": version}, files=files)).json()["results"]
            assert [entry.get("class") for entry in results] == [
                *(answer["class"] for answer in alone[version][:5]), None
            ]  # fmt: skip
            assert results[5]["error"]["code"] == "image_unreadable"
    return served


def predict(client: httpx.Client, image: bytes, version: str) -> dict:
    answer = client.post("/predict", params={"top_k": 10, "version": version}, content=image)
    assert answer.status_code == 200, answer.text
    return answer.json()


def explain(client: httpx.Client, version: str) -> tuple[str, np.ndarray]:
    """The class and the heatmap of the first image; and an overlay of the size that was asked for."""
    asked = {"version": version, "method": "gradcam"}  # the first release's default
    overlay = client.post("/explain", params={**asked, "size": 48}, content=IMAGES[0])
    assert overlay.headers["content-type"] == "image/png", overlay.text
    told = client.post("/explain", params=asked, content=IMAGES[0], headers={"accept": "application/json"}).json()
    return told["class"], np.array(told["heatmap"])


def evidence(client: httpx.Client, version: str) -> dict:
    asked = {"version": version, "coverage": 0.9, "test": "true", "heatmap": "none"}
    return client.post("/explain", params=asked, content=IMAGES[0], headers={"accept": "application/json"}).json()


def is_same(one: dict, other: dict, within: float = SAME) -> bool:
    expected = {entry["class"]: entry["confidence"] for entry in other["top"]}
    return all(abs(entry["confidence"] - expected[entry["class"]]) < within for entry in one["top"])
