"""The application as it is put together: who may read its answers, and what stops its start."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gateway.app import create_app
from gateway.inference.admission import for_all
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


def test_agents_in_kubernetes_need_a_known_api(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRADSERVE_KUBERNETES_API", raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(SettingsError, match=r"GATEWAY_AGENTS: no Kubernetes API is known.*GRADSERVE_KUBERNETES_API"):
        create_app(Settings(agents=("kubernetes:models/agents:9100",)))


def test_a_gateway_does_not_start_with_a_store_that_it_cannot_use(
    make_stand: Callable[..., Stand], tmp_path: Path
) -> None:
    path = tmp_path / "feedback.db"
    path.write_text("no database, but a text that is long enough to be one" * 100)
    with pytest.raises(SettingsError, match="GATEWAY_FEEDBACK_FILE: the feedback store"):
        make_stand(feedback_file=path)


def test_places_follow_the_number_of_ready_workers(stand: Stand) -> None:
    limits, settings = stand.app.state.gateway.admission.of("cifar10"), stand.app.state.gateway.settings
    stand.wait_until(lambda: limits.predict.limit == for_all(settings.places_predict(2)))
    stand.agent.versions[0]["predict"] = {"ready": 20, "wanted": 20, "pending": 0, "capacity": 100}
    stand.wait_until(lambda: limits.predict.limit == for_all(settings.places_predict(20)))
    assert limits.explain.limit == for_all(settings.places_explain(20))
    assert settings.places_predict(20) > settings.places_predict(2)


def test_all_callers_together_have_a_quarter_more_places_than_one() -> None:
    assert [for_all(places) for places in (1, 4, 5, 100)] == [2, 5, 7, 125]


def test_refused_calls_are_logged_together_and_once(stand: Stand, caplog: pytest.LogCaptureFixture) -> None:
    stand.app.state.gateway.saturated = 7
    stand.wait_until(lambda: bool(caplog.records))
    stand.wait_until(lambda: stand.app.state.gateway.saturated == 0)
    assert [(record.getMessage(), record.refused) for record in caplog.records] == [("saturated", 7)]


def test_every_operation_is_named_after_its_route(stand: Stand) -> None:
    paths = stand.client.get("/openapi.json").json()["paths"]
    assert paths["/predict"]["post"]["operationId"] == "predict"
    assert paths["/v2/models/{model}/infer"]["post"]["operationId"] == "v2_infer"
