"""Initial weights of a training: random, ImageNet's, or those of one of our own runs."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import pad

from contracts import model as model_contract
from contracts.model import Ancestor
from handlers.build import digest
from handlers.network import ARCHITECTURES, build_network
from training.errors import TrainingError
from training.package.artifacts import find_model, weights_file

if TYPE_CHECKING:
    from contracts.model import Contract, Input
    from training.data.training_data import TrainingData
    from training.recipe import Recipe

# After handlers.network, which declares what torchvision's import needs.
from torchvision.models.resnet import BasicBlock  # isort: skip

logger = logging.getLogger(__name__)


def choose_architecture(name: str, size: Input) -> str:
    """The architecture's name; `auto` takes the one with the fine stem for images of up to 64 pixels.

    Raises:
        TrainingError: there is none of that name.
    """
    if name != "auto":
        if name not in ARCHITECTURES:
            raise TrainingError(f"architecture is auto, {' or '.join(ARCHITECTURES)}, not {name!r}")
        return name
    return "resnet18_small" if max(size.height, size.width) <= 64 else "resnet18"


def first_network(recipe: Recipe, architecture: str, data: TrainingData) -> tuple[nn.Module, Ancestor | None]:
    """Return the network that a training begins with, and the model of ours whose weights it has.

    Random weights are drawn from the recipe's seed.

    Raises:
        TrainingError: as in `pretrained_network` and `check_split`.
        ModelError: as in `located`.
    """
    torch.manual_seed(recipe.seed)
    recipe = located(recipe)
    check_split(recipe, data.sha256)
    return pretrained_network(recipe, architecture, data.classes), ancestor(recipe)


def pretrained_network(recipe: Recipe, architecture: str, classes: tuple[str, ...]) -> nn.Module:
    """The recipe's network: random, with ImageNet's weights, or with those of one of our own runs.

    ImageNet's come from torchvision's own loader. The small architecture has a 3×3 stem where theirs is 7×7: it gets
    the centre 3×3 of each 7×7 kernel, which keeps the orientation and colour that the kernel responds to; the other
    way round, ours stands in the middle of a 7×7 kernel of zeros. Batch-norm statistics are kept; the head is new,
    unless the contract beside a file of ours names the same `classes`.

    Raises:
        TrainingError: the weights cannot be fetched or read, or have learnt images that this training holds out.
    """
    network: nn.Module = build_network(architecture, len(classes))
    if recipe.pretrained == "none":
        for module in network.modules():
            if isinstance(module, BasicBlock):  # each block starts as the identity (Goyal et al. 2017, section 5.1)
                nn.init.zeros_(module.bn2.weight)
        return network
    state = _imagenet_state() if recipe.pretrained == "imagenet" else _own_state(Path(recipe.pretrained))
    wanted = network.state_dict()
    if "conv1.weight" in state:
        border = (wanted["conv1.weight"].shape[-1] - state["conv1.weight"].shape[-1]) // 2
        state["conv1.weight"] = pad(state["conv1.weight"], (border,) * 4)  # a negative one cuts
    keeps_head = recipe.pretrained != "imagenet" and _classes_of(Path(recipe.pretrained)) == classes
    fitting = {
        key: value
        for key, value in state.items()
        if key in wanted and value.shape == wanted[key].shape and (keeps_head or not key.startswith("fc."))
    }
    if len(fitting) < len(wanted) // 2:
        raise TrainingError(f"{recipe.pretrained} holds no weights of {architecture}: pass another file")
    network.load_state_dict(fitting, strict=False)
    new = ", ".join(sorted({key.split(".")[0] for key in wanted.keys() - fitting.keys()}))
    logger.info("began with %s; new: %s", recipe.pretrained, new or "nothing")
    return network


def located(recipe: Recipe) -> Recipe:
    """The recipe with the file of the weights where it names a model of ours otherwise: a folder, or one in MLflow.

    Raises:
        ModelError: there is no such model.
    """
    source = recipe.pretrained
    if source.startswith(("runs:/", "models:/")) or Path(source).is_dir():
        return replace(recipe, pretrained=str(weights_file(find_model(source))))
    return recipe


def _classes_of(weights: Path) -> tuple[str, ...]:
    """The classes that the contract beside the weights names; none where there is no contract."""
    contract = _contract_of(weights)
    return contract.classes if contract else ()


def _contract_of(weights: Path) -> Contract | None:
    try:
        return model_contract.load(weights.with_name("contract.json"))
    except (OSError, model_contract.ContractError):
        return None


def check_split(recipe: Recipe, data_sha256: str) -> None:
    """Refuses weights that have learnt from the same images by another division.

    What is held out decides about epoch, temperature and engine: it would have been learnt.

    Raises:
        TrainingError: they have.
    """
    begun = ancestor(recipe)
    for accepted in begun.accepted.lineage() if begun is not None else ():
        before = accepted.recipe or {}
        names = ("subset", "validation", "seed")
        is_same = accepted.provenance is not None and accepted.provenance.data_sha256 == data_sha256
        if is_same and any(before.get(name) != getattr(recipe, name) for name in names):
            same = " ".join(f"--{name} {before.get(name)}" for name in names)
            raise TrainingError(
                f"{recipe.pretrained} has learnt from some of the images that this training would hold out: divide "
                f"them as it did ({same}), or begin with other weights"
            )
        if not is_same and before.get("data") == recipe.data:
            logger.warning(
                "%s has changed since %s learnt from it, and is divided again: what is held out was partly learnt, so "
                "held-out figures will flatter", recipe.data, recipe.pretrained,
            )  # fmt: skip


def ancestor(recipe: Recipe) -> Ancestor | None:
    """Return the model of ours that the recipe begins with; None where it begins with none."""
    weights = Path(recipe.pretrained)
    contract = None if recipe.pretrained in {"none", "imagenet"} else _contract_of(weights)
    if contract is None:
        return None
    return Ancestor(contract.name, contract.version, contract.accepted, weights_sha256=digest(weights))


def _imagenet_state() -> dict[str, Tensor]:
    from torchvision.models import ResNet18_Weights  # noqa: PLC0415 - after handlers.network

    try:
        state: dict[str, Tensor] = ResNet18_Weights.IMAGENET1K_V1.get_state_dict(
            progress=True, check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError, UnpicklingError) as error:
        raise TrainingError(
            f"the ImageNet weights could not be fetched ({error}): put {ResNet18_Weights.IMAGENET1K_V1.url} into "
            f"{torch.hub.get_dir()}/checkpoints, or train with --pretrained none"
        ) from error
    return state


def _own_state(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return {key: value.float() for key, value in load_file(path).items()}
        state: object = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, UnpicklingError, SafetensorError) as error:
        raise TrainingError(f"{path} cannot be read as weights: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise TrainingError(f"{path} holds no weights: pass a run's folder, its best.pth, or weights.safetensors")
    return state
