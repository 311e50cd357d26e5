"""The application as it is put together: who may read its answers, and what stops its start."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gateway.app import create_app
from gateway.settings import Settings, SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Stand

IMAGE = b"image-of-dog"


def test_a_page_of_another_origin_may_read_request_id_and_times(make_stand: Callable[..., Stand]) -> None:
    client = make_stand(cors_origins=("https://page",)).client
    answer = client.post("/explain", content=IMAGE, headers={"origin": "https://page"})
    exposed = set(answer.headers["access-control-expose-headers"].split(", "))
    assert {"x-request-id", "server-timing", "x-class", "x-model-version", "retry-after"} <= exposed
    assert {"x-request-id", "server-timing", "x-class", "x-model-version"} <= set(answer.headers)


def test_a_plan_in_kubernetes_needs_a_known_api(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRADSERVE_KUBERNETES_API", raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(SettingsError, match=r"GATEWAY_PLAN: no Kubernetes API is known.*GRADSERVE_KUBERNETES_API"):
        create_app(Settings(plan=Path("kubernetes:models/plan")))


def test_a_gateway_does_not_start_with_a_store_that_it_cannot_use(
    make_stand: Callable[..., Stand], tmp_path: Path
) -> None:
    path = tmp_path / "feedback.db"
    path.write_text("no database, but a text that is long enough to be one" * 100)
    with pytest.raises(SettingsError, match="GATEWAY_FEEDBACK_FILE: the feedback store"):
        make_stand(feedback_file=path)
