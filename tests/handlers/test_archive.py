from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from contracts import model as model_contract
from contracts.model import Engine
from handlers.archive import load_network
from handlers.build import BrokenArchive, verify_files, write_build
from handlers.model import load_model
from handlers.preprocess import decode_for_network, normalise, prepare
from handlers.reference import load_reference
from training.package.export import write_reference


@pytest.fixture
def unpacked(tmp_path, contract, network, model, encode):
    """An archive's folder as TorchServe unpacks it, without the handlers."""
    rng = np.random.default_rng(0)
    images = [encode(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)) for _ in range(32)]

    def predict(images):
        size = contract.input
        pixels = [prepare(decode_for_network(image, size).image, size) for image in images]
        return model.engine.run(normalise(np.stack(pixels), size)).probabilities

    model_contract.save(contract, tmp_path / "contract.json")
    save_file({name: w.contiguous() for name, w in network.state_dict().items()}, tmp_path / "weights.safetensors")
    write_reference(tmp_path / "reference.json", images, predict, tolerance=1e-4, fallback=(predict, 1e-4))
    write_build(tmp_path)
    return tmp_path


def load(folder):
    return load_model(folder, device=torch.device("cpu"), explains=False)


def test_an_unpacked_archive_becomes_a_served_model(unpacked, contract):
    served = load(unpacked)
    assert served.contract == contract
    description = json.loads(json.dumps(served.describe()))
    assert description["identity"] == verify_files(unpacked)
    assert description["engine"] == {"name": "eager", "precision": "fp32", "temperature": 1.0}
    assert description["is_fallback"] is False


@pytest.mark.parametrize("name", ["contract.json", "weights.safetensors", "reference.json"])
def test_a_changed_file_is_refused_and_named(unpacked, name):
    with (unpacked / name).open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"x")
    with pytest.raises(BrokenArchive, match=name):
        load(unpacked)


def test_a_missing_file_is_refused_and_named(unpacked):
    (unpacked / "weights.safetensors").unlink()
    with pytest.raises(BrokenArchive, match=r"weights\.safetensors is missing"):
        load(unpacked)


def test_an_edited_list_of_hashes_is_refused(unpacked):
    build = json.loads((unpacked / "build.json").read_text())
    build["files"].pop("weights.safetensors")
    (unpacked / "build.json").write_text(json.dumps(build))
    with pytest.raises(BrokenArchive, match="identity"):
        verify_files(unpacked)


def test_an_archive_that_computes_something_else_is_refused(unpacked):
    reference = json.loads((unpacked / "reference.json").read_text())
    row = reference["probabilities"][5]
    row[0], row[1] = row[0] + 0.01, row[1] - 0.01
    (unpacked / "reference.json").write_text(json.dumps(reference))
    write_build(unpacked)
    with pytest.raises(BrokenArchive, match=r"differ by 0\.01"):
        load(unpacked)


def test_a_reference_of_another_shape_is_refused(unpacked, contract):
    other = replace(contract, classes=("a", "b"))
    with pytest.raises(BrokenArchive, match="expected 32 lists of 2 numbers"):
        load_reference(unpacked, other)


def test_weights_of_another_architecture_are_refused(unpacked, contract):
    with pytest.raises(BrokenArchive, match="does not load into resnet18:"):
        load_network(unpacked, replace(contract, architecture="resnet18"))


def test_half_precision_weights_are_loaded_as_float32(unpacked, contract, network):
    save_file(
        {name: (w.half() if w.is_floating_point() else w).contiguous() for name, w in network.state_dict().items()},
        unpacked / "weights.safetensors",
    )
    loaded = load_network(unpacked, contract)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert not loaded.training


def test_the_fallback_is_used_loudly_and_checked_against_its_own_outputs(unpacked, contract, caplog):
    model_contract.save(
        replace(contract, engine=Engine("missing", "int8"), fallback=Engine()), unpacked / "contract.json"
    )
    write_build(unpacked)
    assert load(unpacked).describe()["is_fallback"] is True
    assert "falling back to eager fp32" in caplog.text


def test_without_a_fallback_an_engine_that_cannot_run_is_refused(unpacked, contract):
    model_contract.save(replace(contract, engine=Engine("missing", "int8")), unpacked / "contract.json")
    write_build(unpacked)
    with pytest.raises(RuntimeError, match="missing"):
        load(unpacked)
