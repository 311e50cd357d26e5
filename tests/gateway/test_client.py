"""The Python client against the real application."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

import httpx
import pytest

from gradserve import Client, Evidence, Failed, GatewayProblem

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Stand


@pytest.fixture
def gateway(stand: Stand) -> Client:
    def forward(request: httpx.Request) -> httpx.Response:
        answer = stand.client.request(
            request.method, str(request.url), content=request.read(), headers=dict(request.headers)
        )
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)

    return Client("http://gateway", transport=httpx.MockTransport(forward))


def test_the_client_reaches_every_route(gateway: Client, tmp_path: Path) -> None:
    image = tmp_path / "dog.png"
    image.write_bytes(b"image-of-dog")
    with gateway:
        assert gateway.predict(image, top_k=2).class_name == "dog"
        prediction, failed = gateway.predict_batch([image, b"bad:image_unreadable"])
        assert (prediction.class_name, failed.status) == ("dog", 422)
        assert gateway.explain(b"x", target="frog", alpha=0.3).startswith(b"\x89PNG")
        assert gateway.health()["status"] == "ok"
        assert gateway.models()["name"] == "cifar10"


def test_the_client_reads_the_evidence_that_the_gateway_writes(gateway: Client) -> None:
    evidence = gateway.evidence(b"image-of-cat", target="dog", coverage=0.9, test=True)
    assert (evidence.class_name, evidence.target.class_name, evidence.request_id != "") == ("cat", "dog", True)
    assert evidence.heatmap is not None
    explained, failed = gateway.explain_batch([b"image-of-cat", b"bad:image_unreadable"], heatmap=False)
    assert isinstance(explained, Evidence)
    assert (explained.heatmap, isinstance(failed, Failed)) == (None, True)


def test_a_refusal_carries_its_problem(gateway: Client) -> None:
    with pytest.raises(GatewayProblem, match="404 version_unknown") as refusal:
        gateway.predict(b"x", version="9.9.9")
    assert refusal.value.problem["version"] == "9.9.9"


def test_the_former_import_path_still_works_and_names_the_new_one() -> None:
    sys.modules.pop("gateway.client", None)
    with pytest.warns(DeprecationWarning, match="from gradserve import Client"):
        former = importlib.import_module("gateway.client")
    assert former.Gateway is Client
