"""The plan's reader: what it takes, what it refuses and in which words."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from contracts import plan as traffic_plan

if TYPE_CHECKING:
    from pathlib import Path

DIGEST = "0" * 64


def release(version: str, **more: Any) -> dict[str, Any]:
    return {"version": version, "archive": f"cifar10-{version}.mar", "sha256": DIGEST, "workers": None, **more}


def plan(**changes: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "revision": 3,
        "model": "cifar10",
        "stable": release("1.0.0"),
        "canary": None,
        "shadow": None,
        "retained": [],
        "previous": [],
        **changes,
    }


def test_dump_and_parse_are_inverse() -> None:
    canary = release("1.1.0", share=10, salt="x1")
    data = plan(
        canary=canary, shadow=release("2.0.0"), retained=[release("0.9.0", workers=2)], previous=[release("0.8.0")]
    )
    assert traffic_plan.dump(traffic_plan.parse(data)) == data


def test_a_canary_without_salt_is_taken() -> None:
    canary = traffic_plan.parse(plan(canary=release("1.1.0", share=10))).canary
    assert canary is not None
    assert canary.salt == ""


def test_releases_names_every_version_stable_first() -> None:
    parsed = traffic_plan.parse(plan(canary=release("1.1.0", share=10), retained=[release("0.9.0")]))
    assert [item.version for item in parsed.releases()] == ["1.0.0", "1.1.0", "0.9.0"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"schema": 2}, "plan schema 2 is not 1"),
        ({"revision": -1}, "revision -1 is no whole number"),
        ({"revision": True}, "revision True is no whole number"),
        ({"model": "../etc"}, "model '../etc' does not match"),
        ({"stable": None}, "stable is an object, not NoneType"),
        ({"stable": release("1/2")}, "stable.version '1/2' does not match"),
        ({"stable": release("1.0.0", archive="../x.mar")}, "stable.archive '../x.mar' does not match"),
        ({"stable": release("1.0.0", sha256="abc")}, "stable.sha256 'abc' does not match"),
        ({"stable": release("1.0.0", workers=0)}, "stable.workers 0 is no whole number of at least 1"),
        ({"stable": release("1.0.0", worker=1)}, "stable has the unknown field 'worker'"),
        ({"canary": release("1.1.0")}, "canary.share None is no percentage"),
        ({"canary": release("1.1.0", share=101)}, "canary.share 101 is no percentage"),
        ({"canary": release("1.1.0", share=5, salt="a b")}, "canary.salt 'a b' does not match"),
        ({"canary": release("1.0.0", share=5)}, "version 1.0.0 has two roles"),
        ({"retained": {}}, "retained is a list, not dict"),
        ({"previous": ["1.0.0"]}, "previous[0] is an object, not str"),
        ({"stabel": 1}, "plan has the unknown field 'stabel'"),
    ],
)
def test_an_impossible_plan_is_refused_with_the_field_and_the_reason(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(traffic_plan.PlanError) as refusal:
        traffic_plan.parse(plan(**changes))
    assert sentence in str(refusal.value)


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(traffic_plan.PlanError, match=r"plan\.json is no JSON"):
        traffic_plan.load(path)


def test_a_plan_survives_the_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan()), encoding="utf-8")
    assert traffic_plan.load(path).stable.version == "1.0.0"
