"""`gradserve prepare`, and the preparation of `up`: the archive and the plan, beside an operator who holds the lock."""

import json
from pathlib import Path

import pytest

from contracts.model import Contract, Input, save
from control.errors import AnotherOperator, StoreNotWritable
from control.release.plan_store import PlanStore
from control.stack.stack import pack, prepare_plan


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    contract = Contract("tiny", "1.2.3", ("cat", "dog"), Input(16, 16, (0.5,) * 3, (0.25,) * 3), "resnet18_small")
    save(contract, folder / "contract.json")
    (folder / "weights.safetensors").write_bytes(b"weights")
    reference = {"tolerance": 0.01, "images": ["YQ=="], "probabilities": [[0.5, 0.5]]}
    (folder / "reference.json").write_text(json.dumps(reference))
    return folder


def test_a_start_takes_the_lock_only_to_change_the_plan(source, tmp_path):
    store, lines = PlanStore(tmp_path / "home"), []
    prepare_plan(store, source, tmp_path / "models", lines.append)
    assert lines == ["serving tiny 1.2.3 from tiny-1.2.3.mar"]
    before = store.read()
    with store.lock("deploy 2.0.0"):  # it holds the lock for minutes while its version loads
        prepare_plan(store, source, tmp_path / "models", lines.append)
    assert store.read() == before
    (source / "weights.safetensors").write_bytes(b"others")
    with store.lock("deploy 2.0.0"), pytest.raises(AnotherOperator, match=r"deploy 2\.0\.0"):
        prepare_plan(store, source, tmp_path / "models", lines.append)
    prepare_plan(store, source, tmp_path / "models", lines.append)
    after = store.read()
    assert (after.revision, after.stable.version) == (2, "1.2.3")
    assert after.stable.sha256 != before.stable.sha256


def test_a_read_only_model_store_is_refused_with_the_remedy(source):
    # Not even root can create folders there.
    with pytest.raises(StoreNotWritable, match="set AGENT_MODEL_STORE"):
        pack(source, Path("/sys/model_store"))
