import shutil

import pytest
import torch
from safetensors.torch import save_file

from handlers.build import digest
from training.errors import ModelError
from training.package.artifacts import find_model, read_model, weights_file, weights_sha256


def test_a_model_is_found_by_its_folder_or_by_its_weights(run_folder):
    assert find_model(str(run_folder)) == find_model(str(run_folder / "best.pth")) == run_folder


def test_a_missing_model_says_how_to_make_one(tmp_path):
    for source in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ModelError, match="gradserve train"):
            find_model(str(source))


@pytest.mark.parametrize("source", ["runs:/0123456789abcdef", "models:/nothing@champion"])
def test_a_model_that_mlflow_does_not_have_is_named_with_its_store(source):
    with pytest.raises(ModelError, match=f"{source} is not in MLflow"):
        find_model(source)


def test_both_forms_of_weights_give_the_same_network_and_safetensors_come_first(run_folder, tmp_path):
    contract, network = read_model(run_folder)
    assert not network.training
    shutil.copyfile(run_folder / "contract.json", tmp_path / "contract.json")
    (tmp_path / "best.pth").write_bytes(b"not looked at")
    save_file(
        {name: value.contiguous() for name, value in network.state_dict().items()}, tmp_path / "weights.safetensors"
    )
    assert weights_file(tmp_path).name == "weights.safetensors"
    assert weights_sha256(tmp_path) == digest(tmp_path / "weights.safetensors")
    again, other = read_model(tmp_path)
    assert again == contract
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("content", [b"", b"no weights", {"fc.bias": torch.zeros(3)}, [torch.zeros(3)]])
def test_weights_that_do_not_fit_their_contract_are_named(run_folder, tmp_path, content):
    shutil.copyfile(run_folder / "contract.json", tmp_path / "contract.json")
    if isinstance(content, bytes):
        (tmp_path / "best.pth").write_bytes(content)
    else:
        torch.save(content, tmp_path / "best.pth")
    with pytest.raises(ModelError, match=r"best\.pth does not fit its contract"):
        read_model(tmp_path)
