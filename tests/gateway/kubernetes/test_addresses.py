"""Addresses of objects in Kubernetes, as settings write them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gateway.kubernetes import addresses
from gateway.kubernetes.addresses import (
    PlanObject,
    ServiceAddress,
    is_address,
    parse_plan,
    parse_service,
    pod_namespace,
)
from gateway.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

SERVICE = "kubernetes:default/agents:9100"


def test_a_plans_address_names_a_namespace_or_is_in_the_pods_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(addresses, "SERVICE_ACCOUNT", tmp_path)
    assert parse_plan("kubernetes:models/plan") == PlanObject("models", "plan")
    assert parse_plan("/srv/plan.json") is None
    assert not is_address("/srv/plan.json")
    with pytest.raises(ValueError, match="runs in no pod"):
        parse_plan("kubernetes:plan")
    (tmp_path / "namespace").write_text("here\n")
    assert str(parse_plan("kubernetes:plan")) == "kubernetes:here/plan"
    for wrong in ("kubernetes:", "kubernetes:a/b/c", "kubernetes:A/b", "kubernetes:a/../b"):
        with pytest.raises(ValueError, match="names no plan"):
            parse_plan(wrong)


def test_a_services_address_names_it_and_a_port(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(addresses, "SERVICE_ACCOUNT", tmp_path)
    assert str(parse_service(SERVICE)) == SERVICE
    with pytest.raises(ValueError, match="runs in no pod"):
        parse_service("kubernetes:agents:9100")
    (tmp_path / "namespace").write_text("here\n")
    assert parse_service("kubernetes:agents:9100") == ServiceAddress("here", "agents", 9100)
    for wrong in ("kubernetes:agents", "kubernetes:a/b/c:1", "kubernetes:A:1", "kubernetes:a:0", "kubernetes:a:x"):
        with pytest.raises(ValueError, match="write like kubernetes:NAMESPACE/SERVICE:9100"):
            Settings(agents=wrong)  # type: ignore[arg-type]
    assert Settings(agents=SERVICE).agents == (SERVICE,)  # type: ignore[arg-type]


def test_a_namespace_is_a_name_without_dots() -> None:
    assert parse_plan("kubernetes:models/plan.v2") == PlanObject("models", "plan.v2")
    for wrong in ("kubernetes:a.b/plan", f"kubernetes:{'a' * 64}/plan"):
        with pytest.raises(ValueError, match="names no plan"):
            parse_plan(wrong)


def test_outside_of_a_pod_there_is_no_namespace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(addresses, "SERVICE_ACCOUNT", tmp_path)
    assert pod_namespace() is None
