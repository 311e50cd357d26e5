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
    """Return a plan of schema 2, which holds one model."""
    return {"schema": 2, "revision": 3, **model(**changes)}


def model(**changes: Any) -> dict[str, Any]:
    return {
        "model": "cifar10",
        "stable": release("1.0.0"),
        "canary": None,
        "shadow": None,
        "retained": [],
        "previous": [],
        **changes,
    }


def plans(*models: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"schema": 3, "revision": 3, "default": "cifar10", "models": list(models or (model(),)), **changes}


def test_dump_and_parse_are_inverse() -> None:
    canary = release("1.1.0", share=10, salt="x1")
    first = model(canary=canary, shadow=release("2.0.0"), retained=[release("0.9.0", workers=2)])
    data = plans(first, model(model="photos", previous=[release("0.8.0")]))
    assert traffic_plan.dump(traffic_plan.parse(data)) == data


def test_a_canary_without_salt_is_taken() -> None:
    parsed = traffic_plan.parse(plan(canary=release("1.1.0", share=10))).plan()
    assert parsed is not None
    assert parsed.canary is not None
    assert parsed.canary.salt == ""


def test_releases_names_every_version_stable_first() -> None:
    parsed = traffic_plan.parse(plan(canary=release("1.1.0", share=10), retained=[release("0.9.0")])).plan()
    assert parsed is not None
    assert [item.version for item in parsed.releases()] == ["1.0.0", "1.1.0", "0.9.0"]


def test_shares_are_those_of_the_stable_version_and_its_canary() -> None:
    tried = plan(canary=release("1.1.0", share=12.5, salt="x"), shadow=release("0.9.0"))
    (parsed,) = traffic_plan.parse(tried).models
    assert [parsed.share_of(item.version) for item in parsed.releases()] == [87.5, 12.5, 0]
    (alone,) = traffic_plan.parse(plan()).models
    assert alone.share_of("1.0.0") == 100


def test_each_model_has_its_own_plan_and_the_default_one_is_that_of_callers_who_name_none() -> None:
    read = traffic_plan.parse(plans(model(), model(model="photos", stable=release("2.0.0")), default="photos"))
    assert read.names() == ("cifar10", "photos")
    assert [found and found.stable.version for found in map(read.plan, (None, "photos", "cifar10", "dogs"))] == [
        "2.0.0",
        "2.0.0",
        "1.0.0",
        None,
    ]
    assert {found.revision for found in read.models} == {3}


def test_a_model_may_be_kept_unloaded() -> None:
    read = traffic_plan.parse(plan(stable=release("1.0.0", workers=0))).plan()
    assert read is not None
    assert read.stable.workers == 0


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (plans(default="dogs"), "default is 'dogs', expected one of the models (cifar10)"),
        (plans(model(), model()), "models is 'cifar10 twice', expected one plan for each model"),
        (plans(models=[]), "default is 'cifar10', expected one of the models (there are none)"),
        (plans(model(), model(model="cifar10-explain")), "models is 'cifar10-explain', expected no name that ends in"),
        (plans(model(stable=None)), "models[0].stable is None, expected a JSON object"),
        (plans(more=1), "more is 1, expected no such field"),
    ],
)
def test_impossible_plans_of_several_models_are_refused(data: dict[str, Any], sentence: str) -> None:
    with pytest.raises(traffic_plan.PlanError) as refusal:
        traffic_plan.parse(data)
    assert sentence in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"schema": 4}, "plan field schema is 4, expected 1 or 2 or 3"),
        ({"revision": -1}, "plan field revision is -1, expected a whole number"),
        ({"revision": True}, "revision is True"),
        ({"model": "../etc"}, "model is '../etc', expected a text that matches"),
        ({"stable": None}, "stable is None, expected a JSON object"),
        ({"stable": release("1/2")}, "stable.version is '1/2'"),
        ({"stable": release("1.0.0", archive="../x.mar")}, "stable.archive is '../x.mar'"),
        ({"stable": release("1.0.0", sha256="abc")}, "stable.sha256 is 'abc'"),
        ({"stable": release("1.0.0", workers=-1)}, "stable.workers is -1, expected a whole number"),
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
    assert traffic_plan.load(path).models[0].stable.version == "1.0.0"


def test_a_plan_of_the_first_release_is_read() -> None:
    first = {name: value for name, value in plan(schema=1).items() if name != "previous"}
    assert traffic_plan.parse(first) == traffic_plan.parse(plan())


def test_a_deeply_nested_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(traffic_plan.PlanError, match="plan is no JSON"):
        traffic_plan.load(path)


def test_a_source_is_kept_and_left_out_of_plans_without_one() -> None:
    plain = traffic_plan.Release("1.0", "m-1.0.mar", DIGEST)
    fetched = traffic_plan.Release("2.0", "m-2.0.mar", DIGEST, source="https://models.example/m-2.0.mar")
    plans = traffic_plan.Plans(1, "m", (traffic_plan.Plan(1, "m", plain, retained=(fetched,)),))
    assert traffic_plan.parse(traffic_plan.dump(plans)) == plans
    (found,) = traffic_plan.dump(plans)["models"]
    assert "source" not in found["stable"]
    for wrong in ("m-2.0.mar", "https://a b", "/srv/m.mar", 3):
        found["stable"]["source"] = wrong
        with pytest.raises(traffic_plan.PlanError, match="source"):
            traffic_plan.parse({"schema": 3, "revision": 1, "default": "m", "models": [found]})
