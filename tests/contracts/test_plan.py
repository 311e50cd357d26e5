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
        "schema": 2,
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
        ({"schema": 3}, "plan field schema is 3, expected 1 or 2"),
        ({"revision": -1}, "plan field revision is -1, expected a whole number"),
        ({"revision": True}, "revision is True"),
        ({"model": "../etc"}, "model is '../etc', expected a text that matches"),
        ({"stable": None}, "stable is None, expected a JSON object"),
        ({"stable": release("1/2")}, "stable.version is '1/2'"),
        ({"stable": release("1.0.0", archive="../x.mar")}, "stable.archive is '../x.mar'"),
        ({"stable": release("1.0.0", sha256="abc")}, "stable.sha256 is 'abc'"),
        ({"stable": release("1.0.0", workers=0)}, "stable.workers is 0, expected a whole number of at least 1"),
        ({"stable": release("1.0.0", worker=1)}, "stable.worker is 1, expected no such field"),
        ({"canary": release("1.1.0")}, "canary.share is None, expected a number"),
        (
            {"canary": release("1.1.0", share=101)},
            "share is 101, expected a number of at least 0 and at most 100",
        ),
        ({"canary": release("1.1.0", share=5, salt="a b")}, "canary.salt is 'a b'"),
        ({"canary": release("1.0.0", share=5)}, "version 1.0.0 in two roles"),
        ({"retained": {}}, "retained is {}, expected a list"),
        ({"retained": [release("1.1.0", sha256="x")]}, "retained[0].sha256 is 'x'"),
        ({"stabel": 1}, "stabel is 1, expected no such field"),
    ],
)
def test_an_impossible_plan_is_refused_with_the_field_and_the_reason(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(traffic_plan.PlanError) as refusal:
        traffic_plan.parse(plan(**changes))
    assert sentence in str(refusal.value)
    assert str(refusal.value).endswith("from the folder history/")


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(traffic_plan.PlanError, match="plan is no JSON"):
        traffic_plan.load(path)


def test_a_plan_survives_the_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan()), encoding="utf-8")
    assert traffic_plan.load(path).stable.version == "1.0.0"


def test_a_plan_of_the_first_release_is_read() -> None:
    first = {name: value for name, value in plan(schema=1).items() if name != "previous"}
    assert traffic_plan.parse(first) == traffic_plan.parse(plan())


def test_a_deeply_nested_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(traffic_plan.PlanError, match="plan is no JSON"):
        traffic_plan.load(path)
