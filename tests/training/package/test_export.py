from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from contracts import model as model_contract
from contracts.model import Contract, ContractError, Input
from handlers.engines import build_engine
from handlers.network import build_network
from handlers.preprocess import decode_for_network, normalise, prepare
from training.package.export import ExportError, package_directory, write_reference

# Loads an archive as a worker does, with nothing but the archive and the installed packages to import from.
LOADER = """
import json, os, sys, warnings
folder, body, *names = sys.argv[1:]
sys.path.insert(0, folder)
from ts.context import RequestProcessor
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
from ts.model_loader import ModelLoaderFactory
for name in names:
    service = ModelLoaderFactory.get_model_loader().load(name, folder, "image_handler.py", None, 4)
    import handlers
    assert os.path.dirname(os.path.dirname(handlers.__file__)) == folder, handlers.__file__
    context = service.context
    context.request_processor = [RequestProcessor({}), RequestProcessor({"explain": "True"})]
    image = open(body, "rb").read()
    answers = service._entry_point([{"body": image}, {"body": image}], context)
    print(json.dumps({"prediction": answers[0].decode(), "png": answers[1][:4].hex(), "nice": os.nice(0)}))
"""


@pytest.fixture(scope="module")
def image() -> bytes:
    return png(0)


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("source")
    contract = Contract("tiny", "1.2.3", ("cat", "dog"), Input(16, 16, (0.5,) * 3, (0.25,) * 3), "resnet18_small")
    torch.manual_seed(0)
    network = build_network(contract.architecture, 2).eval()
    engine = build_engine(contract.engine, lambda: network, directory=folder, device=torch.device("cpu"))

    def predict(images):
        pixels = [prepare(decode_for_network(image, contract.input).image, contract.input) for image in images]
        return engine.run(normalise(np.stack(pixels), contract.input)).probabilities

    model_contract.save(contract, folder / "contract.json")
    save_file({name: w.contiguous() for name, w in network.state_dict().items()}, folder / "weights.safetensors")
    write_reference(folder / "reference.json", [png(i) for i in range(32)], predict, tolerance=1e-3)
    (folder / "card.md").write_text("A model card travels along.\n")
    return folder


@pytest.fixture(scope="module")
def archive(source, tmp_path_factory):
    return package_directory(source, tmp_path_factory.mktemp("store"))


@pytest.mark.long
def test_the_archive_works_alone_through_torchserves_own_loader(archive, image, tmp_path):
    """As an entry that predicts, and as one for explanations, whose worker has less priority."""
    zipfile.ZipFile(archive).extractall(tmp_path / "model")
    (tmp_path / "image.png").write_bytes(image)
    files = [str(tmp_path / "model"), str(tmp_path / "image.png")]
    command = [sys.executable, "-c", LOADER, *files, "tiny", "tiny-explain"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    answers = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"prediction"')]
    for answer, niceness in zip(answers, (0, 10), strict=True):
        assert json.loads(answer["prediction"])["results"][0]["class"] in {"cat", "dog"}
        assert answer["png"] == "89504e47"
        assert answer["nice"] - os.nice(0) == niceness


def test_foreign_handlers_before_the_archives_own_are_refused(archive, tmp_path):
    """A PYTHONPATH in the server's environment comes before the archive."""
    zipfile.ZipFile(archive).extractall(tmp_path)
    repository = str(Path(__file__).parents[3])
    code = LOADER.replace("sys.path.insert(0, folder)", f"sys.path[:0] = [{repository!r}, folder]")
    command = [sys.executable, "-c", code, str(tmp_path), "tiny", ""]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "not from the archive: clear PYTHONPATH" in result.stderr


def test_the_archive_holds_everything_that_serving_needs(archive):
    with zipfile.ZipFile(archive) as members:
        names = set(members.namelist())
        build = json.loads(members.read("build.json"))
        manifest = json.loads(members.read("MAR-INF/MANIFEST.json"))
        for name, checksum in build["files"].items():
            assert hashlib.sha256(members.read(name)).hexdigest() == checksum
    assert names == set(build["files"]) | {"build.json", "MAR-INF/MANIFEST.json"}
    wanted = {"contract.json", "weights.safetensors", "reference.json", "card.md", "image_handler.py"}
    assert wanted | {"handlers/network.py", "model-config.yaml"} <= names
    assert manifest["model"]["modelVersion"] == "1.2.3"
    assert manifest["model"]["configFile"] == "model-config.yaml"


def test_the_checksum_lies_beside_the_archive(archive):
    assert archive.name == "tiny-1.2.3.mar"
    checksum, name = archive.with_name(f"{archive.name}.sha256").read_text().split()
    assert (checksum, name) == (hashlib.sha256(archive.read_bytes()).hexdigest(), archive.name)


def test_packing_the_same_files_again_leaves_the_archive_alone(source, archive):
    before = archive.stat().st_mtime_ns
    assert package_directory(source, archive.parent) == archive
    assert archive.stat().st_mtime_ns == before


def test_any_changed_byte_is_a_new_build(source, archive):
    before = archive.read_bytes()
    (source / "card.md").write_text("Changed.\n")
    assert package_directory(source, archive.parent).read_bytes() != before


def test_exports_of_one_name_at_once_do_not_collide(source, tmp_path):
    stores = [tmp_path / "a", tmp_path / "b", tmp_path / "b"]
    with ThreadPoolExecutor(3) as threads:
        archives = list(threads.map(lambda store: package_directory(source, store), stores))
    for packed in archives:
        checksum = packed.with_name(f"{packed.name}.sha256").read_text().split()[0]
        assert checksum == hashlib.sha256(packed.read_bytes()).hexdigest()
    assert not list(tmp_path.glob("*/.packing-*"))


def test_a_store_inside_the_models_folder_is_not_packed_into_the_archive(source, tmp_path):
    for path in source.iterdir():
        (tmp_path / path.name).symlink_to(path)
    archive = package_directory(tmp_path, tmp_path / "store")
    first = archive.stat().st_mtime_ns
    assert package_directory(tmp_path, tmp_path / "store").stat().st_mtime_ns == first
    assert not [name for name in zipfile.ZipFile(archive).namelist() if name.startswith("store")]
    with pytest.raises(ExportError, match="own folder"):
        package_directory(tmp_path, tmp_path)


def test_missing_files_are_named(source, tmp_path):
    (tmp_path / "contract.json").write_bytes((source / "contract.json").read_bytes())
    with pytest.raises(ExportError, match=r"no weights\.safetensors and no reference\.json"):
        package_directory(tmp_path, tmp_path / "store")


@pytest.mark.parametrize("name", ["build.json", "image_handler.py"])
def test_names_that_the_archive_needs_are_refused(source, tmp_path, name):
    for path in source.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / name).write_text("{}")
    with pytest.raises(ExportError, match=name):
        package_directory(tmp_path, tmp_path / "store")


def test_a_contract_that_cannot_be_used_is_refused(source, tmp_path):
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "contract.json").write_text('{"schema": 99}')
    with pytest.raises(ContractError, match="schema"):
        package_directory(tmp_path, tmp_path / "store")


def test_a_reference_holds_32_images(tmp_path):
    with pytest.raises(ExportError, match="32"):
        write_reference(tmp_path / "reference.json", [b""], lambda images: np.zeros((1, 2)), tolerance=0.1)
