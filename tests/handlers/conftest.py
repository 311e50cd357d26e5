"""A small random model, whole: the handler's tests need right plumbing, not right answers."""

from __future__ import annotations

import io
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from contracts import model as model_contract
from contracts.evidence import AnswerSet, Evidence, Familiar, Similar
from contracts.model import Contract, Explanation, Input
from handlers.build import write_build
from handlers.engines import build_engine
from handlers.evidence.archive_evidence import ArchiveEvidence
from handlers.evidence.heatmaps import FORWARD_METHODS
from handlers.evidence.store import unit_vectors
from handlers.explain import METHODS, Explainer
from handlers.model import ServedModel
from handlers.network import build_network
from handlers.preprocess import decode_for_network, normalise, prepare
from training.package.export import write_reference

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from ts.context import Context

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    """Makes an image file of pixels or of a Pillow image."""

    def encode(pixels: np.ndarray | Image.Image, name: str = "PNG", **options: object) -> bytes:
        image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
        file = io.BytesIO()
        image.save(file, name, **options)
        return file.getvalue()

    return encode


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def contract() -> Contract:
    return Contract(
        name="tiny",
        version="0.0.1",
        classes=CLASSES,
        input=Input(16, 24, (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)),
        architecture="resnet18_small",
        explain=Explanation(layer="layer3", methods=(*METHODS, *FORWARD_METHODS), sharp_layer="layer3"),
    )


@pytest.fixture(scope="session")
def network(contract: Contract) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_network(contract.architecture, len(contract.classes)).eval()


@pytest.fixture(scope="session")
def model(contract: Contract, network: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    device = torch.device("cpu")
    folder: Path = tmp_path_factory.getbasetemp()
    return ServedModel(
        contract,
        build_engine(
            contract.engine, lambda: network, directory=folder, device=device, sharp_layer=contract.explain.sharp_layer
        ),
        lambda: Explainer(network, contract.explain, device=device),
        ArchiveEvidence(contract, None),
    )


@pytest.fixture(scope="session")
def evident(model: ServedModel) -> ServedModel:
    """The model with the evidence of 40 images; every image is less familiar than all held-out ones."""
    size = model.contract.input
    pixels = np.random.default_rng(7).integers(0, 256, (40, size.height, size.width, 3), dtype=np.uint8)
    features = model.engine.run(normalise(pixels, size)).features
    assert features is not None
    files = [io.BytesIO() for _ in pixels]
    for image, file in zip(pixels, files, strict=True):
        Image.fromarray(image).save(file, "WEBP")
    store = {
        "features": unit_vectors(features),
        "labels": np.repeat(np.arange(10), 4).astype(np.int32),
        "familiarity_scores": np.linspace(2, 3, 100, dtype=np.float32),
        "answer_set_scores": np.full(99, 0.5, dtype=np.float32),
        "thumbnails": np.frombuffer(b"".join(file.getvalue() for file in files), dtype=np.uint8),
        "thumbnail_ends": np.cumsum([len(file.getvalue()) for file in files]),
    }
    evidence = Evidence(Familiar("knn", 3, 100), Similar(40, thumbnails=True, accuracy_kept=1.0), AnswerSet(99))
    explain = replace(model.contract.explain, method="sharpcam")
    contract = replace(model.contract, evidence=evidence, explain=explain)
    return ServedModel(contract, model.engine, model.load_explainer, ArchiveEvidence(contract, store))


@pytest.fixture
def unpacked(
    tmp_path: Path, contract: Contract, network: torch.nn.Module, model: ServedModel, encode: Callable[..., bytes]
) -> Path:
    """An archive's folder as TorchServe unpacks it, without the handlers."""
    rng = np.random.default_rng(0)
    images = [encode(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)) for _ in range(32)]

    def predict(images: Sequence[bytes]) -> np.ndarray:
        size = contract.input
        pixels = [prepare(decode_for_network(image, size).image, size) for image in images]
        return model.engine.run(normalise(np.stack(pixels), size)).probabilities

    model_contract.save(contract, tmp_path / "contract.json")
    save_file({name: w.contiguous() for name, w in network.state_dict().items()}, tmp_path / "weights.safetensors")
    write_reference(tmp_path / "reference.json", images, predict, tolerance=1e-4, fallback=(predict, 1e-4))
    write_build(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def context() -> Callable[..., Context]:
    """Makes TorchServe's own context as it is while a batch of rows with the given headers is answered."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # its __init__ leaves version.txt open
        from ts.context import Context, RequestProcessor  # noqa: PLC0415

    def context(*headers: dict) -> Context:
        made = Context("tiny", ".", {}, len(headers), None, "0.12.0")
        made.request_processor = [RequestProcessor(dict(row)) for row in headers]
        return made

    return context


@pytest.fixture
def noise() -> np.ndarray:
    """(30, 40, 3) uint8."""
    return np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
