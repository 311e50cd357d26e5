"""The agent's status: what is dumped is parsed again; bounded, and nothing but its own error comes out."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts import model, status
from contracts.model import Accepted, Contract, Figures, Input
from contracts.report import Report
from contracts.status import AgentStatus, GatewayStatus, Pool, ServerStatus, StatusError, VersionStatus

CONTRACT = Contract(
    "m", "1.0.0", ("cat", "dog"), Input(32, 32, (0.5,) * 3, (0.5,) * 3), "resnet18", accepted=Accepted(Figures(0.9))
)
STABLE = VersionStatus(
    "m", "1.0.0", "stable", "ready", routable=True, predict=Pool(2, 2, 1, 100), explain=Pool(1, 1, 0, 100, 1),
    verified=True, signed="by ops.pub", reason=None, contract=CONTRACT,
)  # fmt: skip
LOADING = VersionStatus("m", "2.0.0", "canary", "loading", routable=False, predict=Pool(0, 1), explain=Pool(0, 1))
STATUS = AgentStatus(
    observed_at=1.76e9, draining=False, torchserve=ServerStatus("running", 2, "http://ts:8080", 7, ("x 1",)),
    versions=(STABLE, LOADING), told_at=1.76e9 + 1, plan_revision=7, plan_error="broken",
    gateways=(GatewayStatus(Report("g", 7, {"1.0.0": 2}), 0.4),),
)  # fmt: skip
SMALLEST = AgentStatus(0.0, draining=True, torchserve=ServerStatus("stopped", 0, "http://[::1]:1"), versions=())
OF_SCHEMA_1 = {
    "schema": 1,
    "observed_at": 1.76e9,
    "draining": False,
    "plan_revision": 1,
    "plan_error": None,
    "torchserve": {"state": "running", "pid": 7, "restarts": 0, "inference_url": "http://torchserve:8080/"},
    "gateways": [{"id": "g", "revision": None, "in_flight": {}, "heard_s": 0.1}],
    "versions": [
        {
            "model": "m",
            "version": "1.0.0",
            "role": "stable",
            "state": "ready",
            "routable": True,
            "predict": {"ready": 2, "wanted": 2, "pending": 0, "capacity": 100},
            "explain": {"ready": 0, "wanted": 1, "pending": None, "capacity": None},
            "verified": True,
            "reason": None,
            "contract": {},
        }
    ],
}


def text(**changes: Any) -> str:
    return json.dumps(status.dump(STATUS) | changes)


def version(**changes: Any) -> dict[str, Any]:
    return {"versions": [status.dump(STATUS)["versions"][0] | changes]}


@pytest.mark.parametrize("made", [STATUS, SMALLEST])
def test_a_status_that_is_dumped_is_parsed_again(made):
    assert status.parse(json.dumps(status.dump(made))) == made


def test_a_status_of_the_first_release_is_parsed():
    read = status.parse(json.dumps(OF_SCHEMA_1))
    assert read.torchserve.inference_url == "http://torchserve:8080"
    assert read.told_at is None
    assert read.serves()
    assert read.version("m", "1.0.0") == VersionStatus(
        "m", "1.0.0", "stable", "ready", routable=True, predict=Pool(2, 2, 0, 100), explain=Pool(0, 1), verified=True
    )
    assert read.version("m", "2.0.0") is None


def test_a_contract_of_schema_1_in_a_status_keeps_its_schema():
    first = model.dump(replace(CONTRACT, schema=1))
    (read,) = status.parse(text(**version(contract=first))).versions
    assert read.contract == replace(CONTRACT, schema=1)


def test_a_version_whose_contract_is_of_a_later_release_is_not_called_and_says_why():
    read = status.parse(text(**version(contract={"schema": 99})))
    assert not read.serves()
    assert "contract field schema is 99, expected 1 or 2" in (read.versions[0].reason or "")


def test_where_a_model_was_made_does_not_reach_the_gateways():
    contract = replace(CONTRACT, accepted=replace(CONTRACT.accepted, recipe={"data": "imagefolder:/home/alice"}))
    (read,) = status.parse(text(**version(contract=model.dump(contract)))).versions
    assert read.contract == CONTRACT


def test_fields_of_a_later_release_are_ignored():
    later = version(temperature=7) | {"weather": "fine"}
    assert status.parse(text(**later)).versions == (STABLE,)


def test_a_reason_of_any_length_is_told_as_far_as_readers_take_it():
    long = replace(STATUS, plan_error="x" * 100_000, versions=(replace(STABLE, reason="y" * 100_000),))
    read = status.parse(json.dumps(status.dump(long)))
    assert len(read.plan_error or "") == len(read.versions[0].reason or "") == status.MAX_REASON


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"schema": 3}, "agent status field schema is 3, expected 1 or 2"),
        ({"observed_at": "now"}, "observed_at is 'now', expected a number"),
        ({"observed_at": float("nan")}, "observed_at is nan"),
        ({"observed_at": 10**400}, "observed_at is 1000"),
        ({"time": -1}, "time is -1"),
        ({"draining": 1}, "draining is 1, expected true or false"),
        ({"torchserve": None}, "torchserve is None, expected a JSON object"),
        (
            {"torchserve": {"state": "running", "restarts": 0, "inference_url": "file:///etc"}},
            "inference_url is 'file:///etc'",
        ),
        (
            {"torchserve": {"state": "running", "restarts": 0, "inference_url": "http://x\r\ny"}},
            "inference_url is 'http://x\\r\\ny'",
        ),
        ({"versions": {}}, "versions is {}, expected a list"),
        ({"versions": [1]}, "versions[0] is 1, expected a JSON object"),
        ({"versions": [{}] * 257}, "versions is '257 items', expected a list of at most 256"),
        (version(version="../../models"), "versions[0].version is '../../models'"),
        (version(model="a b"), "versions[0].model is 'a b'"),
        (version(predict={"ready": -1, "wanted": 1}), "versions[0].predict.ready is -1"),
        (version(reason=7), "versions[0].reason is 7"),
        ({"gateways": [{"id": "g"}]}, "gateways[0].revision is None"),
    ],
)
def test_what_is_no_status_is_refused_with_field_finding_and_remedy(changes, sentence):
    with pytest.raises(StatusError) as refusal:
        status.parse(text(**changes))
    assert sentence in str(refusal.value)
    assert "of the same release" in str(refusal.value)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"no json", b"\xff\xfe", b"[" * 100_000, b"[" * 900 + b"]" * 900]
)
def test_what_is_no_json_object_is_refused(content):
    with pytest.raises(StatusError):
        status.parse(content)


def test_a_status_above_the_bound_is_refused_before_it_is_read():
    with pytest.raises(StatusError, match="at most 16000000"):
        status.parse(b" " * (status.MAX_BYTES + 1))


PATHS = [(), ("torchserve",), ("versions", 0), ("versions", 0, "predict"), ("versions", 0, "contract"), ("gateways", 0)]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(PATHS), st.data())
def test_no_value_in_any_field_raises_anything_else(path, data):
    changed = json.loads(text())
    target: Any = changed
    for step in path:
        target = target[step]
    target[data.draw(st.sampled_from(sorted(target)))] = data.draw(VALUES)
    try:
        read = status.parse(json.dumps(changed))
    except StatusError:
        return
    assert status.parse(json.dumps(status.dump(read))) == read
