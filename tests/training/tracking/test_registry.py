from importlib import metadata

import mlflow
from mlflow import MlflowClient

from contracts.model import load as load_contract
from training.package.artifacts import find_model
from training.tracking.store import tracking_uri


def test_the_best_model_is_a_version_of_its_run(registered):
    version = MlflowClient(tracking_uri()).get_model_version("cifar10", registered.number)
    assert version.run_id == registered.run_id


def test_a_registered_model_has_no_pickle_and_is_a_models_folder(registered):
    folder = find_model(f"models:/cifar10/{registered.number}")
    assert not [path for path in folder.parents[1].rglob("*") if path.suffix in {".pkl", ".pth", ".pt"}]
    assert load_contract(folder / "contract.json") == load_contract(registered.folder / "contract.json")


def test_a_registered_model_tells_its_input_its_output_and_its_packages(registered):
    mlflow.set_tracking_uri(tracking_uri())
    found = mlflow.models.get_model_info(f"models:/cifar10/{registered.number}")
    (images,), (probabilities,) = found.signature.inputs.inputs, found.signature.outputs.inputs
    assert (images.type.name, images.shape) == ("uint8", (-1, 32, 32, 3))
    assert (probabilities.type.name, probabilities.shape) == ("float32", (-1, 10))
    folder = find_model(f"models:/cifar10/{registered.number}").parents[1]
    wanted = (folder / "requirements.txt").read_text().split()
    assert f"torch=={metadata.version('torch').partition('+')[0]}" in wanted
