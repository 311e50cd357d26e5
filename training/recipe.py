"""Every hyper-parameter of a training, its phases and its learning-rate curve."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from contracts.names import NAME
from training.errors import DataError, TrainingError


@dataclass(frozen=True)
class Augmentation:
    """How training images are varied.

    Every image is shifted by up to 4 pixels with mirrored borders, and flipped in every second epoch: in the odd or
    the even ones, by its index (Jordan 2024, https://arxiv.org/abs/2404.00498). RandAugment with `operations`
    operations of strength `magnitude` (0..30) follows (Cubuk et al. 2019, https://arxiv.org/abs/1909.13719), then
    random erasing with probability `erasing` (Zhong et al. 2017, https://arxiv.org/abs/1708.04896). With probability
    `cutmix`, a batch's images then get a rectangle of their neighbours and a share of their labels (Yun et al. 2019,
    https://arxiv.org/abs/1905.04899). With probability `pixmix`, an image is mixed with fractals and with augmented
    copies of itself before erasing (Hendrycks et al. 2021, https://arxiv.org/abs/2112.05135).
    """

    operations: int = 2
    magnitude: int = 9
    erasing: float = 0.0
    cutmix: float = 0.0
    pixmix: float = 0.0


# (share of the epochs from which it holds, image size; 0: the contract's): small images teach much for little.
# Source: progressive resizing, Howard 2018, https://www.fast.ai/posts/2018-04-30-dawnbench-fastai.html
Sizes = tuple[tuple[float, int], ...]
FULL_SIZE: Sizes = ((0.0, 0),)
LAYERS = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc", "all")  # what can be unfrozen
BLOCK = re.compile(r"layer[1-4]\.[01]")  # a part of a layer, which can be too
CHECKPOINT = "last.pt"  # in a run's folder
ARCHITECTURES = ("auto", "resnet18", "resnet18_small")
PRECISIONS = ("auto", "bf16", "fp32")
MAGNITUDES = 30  # torchvision's RandAugment has 31 strengths
EVERYTHING = ("",)  # the prefix of every parameter's name
KINDS = {"int": int, "float": int | float, "str": str, "bool": bool}


@dataclass(frozen=True)
class Cycle:
    """A warm restart: another cosine, from the averaged weights that the training had reached.

    Without an `augmentation` or a `warm_up` of its own it has the recipe's. With `blend`, it begins with that share of
    the weights that the phase before began with: two minima's mean is often better than either (Izmailov et al. 2018,
    https://arxiv.org/abs/1803.05407). Source: Loshchilov and Hutter 2016, https://arxiv.org/abs/1608.03983
    """

    epochs: int
    rate: float
    sizes: Sizes = FULL_SIZE
    augmentation: Augmentation | None = None
    blend: float = 0.0
    warm_up: float | None = None


@dataclass(frozen=True)
class Recipe:
    """Every hyper-parameter of a training; what is stored with the model is this."""

    # data
    data: str = "cifar10"
    validation: float = 0.2
    subset: int = 0
    # network
    name: str = "cifar10"
    architecture: str = "auto"
    pretrained: str = "none"
    # schedule: `head_epochs` with the backbone frozen, then `epochs` with `unfreeze` (layers, or `all`) trained too,
    # then the warm restarts
    head_epochs: int = 3
    head_rate: float = 0.1
    unfreeze: tuple[str, ...] = ("layer3", "layer4")
    epochs: int = 30
    rate: float = 0.1
    batch_size: int = 128
    warm_up: float = 0.15  # share of the steps
    sizes: Sizes = FULL_SIZE
    cycles: tuple[Cycle, ...] = ()
    # optimiser: SGD. Batch-norm weights and biases are not decayed (He et al. 2018, https://arxiv.org/abs/1812.01187)
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    average: float = 0.998  # decay per step of the averaged weights, which are what is kept; 0 keeps the last ones
    # From the share `sam_from` of a phase's epochs on, each step takes its gradient at the worst weights within
    # `sam_radius`, at twice the cost (Foret et al. 2020, https://arxiv.org/abs/2010.01412; late in training is enough:
    # Zhou et al. 2024, https://arxiv.org/abs/2410.10373); 0 never does.
    sam_radius: float = 0.0
    sam_from: float = 0.75
    augmentation: Augmentation = field(default_factory=Augmentation)
    seed: int = 0
    # machine
    precision: str = "auto"
    workers: int = 1

    def phases(self) -> tuple[Phase, ...]:
        """The phases that this recipe trains in; from scratch, and without `cycles`, there is one."""
        if self.pretrained == "none":
            first = [Phase("all", self.epochs, self.rate, EVERYTHING, self.sizes, self.augmentation, self.warm_up)]
        else:
            trained = EVERYTHING if "all" in self.unfreeze else (*self.unfreeze, "fc")
            first = [
                Phase("head", self.head_epochs, self.head_rate, ("fc",), self.sizes, self.augmentation, self.warm_up),
                Phase("top", self.epochs, self.rate, trained, self.sizes, self.augmentation, self.warm_up),
            ]
        again = [
            Phase(
                f"cycle {number}",
                cycle.epochs,
                cycle.rate,
                first[-1].trained,
                cycle.sizes,
                self.augmentation if cycle.augmentation is None else cycle.augmentation,
                self.warm_up if cycle.warm_up is None else cycle.warm_up,
                restarts=True,
                blend=cycle.blend,
            )
            for number, cycle in enumerate(self.cycles, start=2)
        ]
        return tuple(phase for phase in (*first, *again) if phase.epochs)


@dataclass(frozen=True)
class Phase:
    """A stretch of epochs with one cosine; `trained` are prefixes of the parameters' names, the rest stays frozen.

    One that `restarts` begins with the averaged weights.
    """

    name: str
    epochs: int
    rate: float
    trained: tuple[str, ...]
    sizes: Sizes
    augmentation: Augmentation
    warm_up: float  # share of its steps
    restarts: bool = False
    blend: float = 0.0

    def trains(self, parameter: str) -> bool:
        """Whether the parameter of that name is trained in this phase."""
        return parameter.startswith(self.trained)


def rate_factor(step: int, steps: int, warm_up: float) -> float:
    """The learning rate at `step` of `steps`, as a share of its peak: a linear rise, then half a cosine down to zero.

    Source: Loshchilov and Hutter 2016, https://arxiv.org/abs/1608.03983; warm-up: Goyal et al. 2017,
    https://arxiv.org/abs/1706.02677
    """
    rise = warm_up * steps
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1.0, steps - rise)))


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON-able data."""
    return asdict(recipe)


def recipe_from_dict(data: dict[str, Any]) -> Recipe:
    """The recipe that `data` (from `recipe_to_dict` or a TOML file) describes; what it leaves out has its default.

    Raises:
        TrainingError: a name is unknown, or a value has the wrong form.
    """
    known = {item.name for item in fields(Recipe)}
    if unknown := set(data) - known:
        raise TrainingError(f"unknown hyper-parameters {sorted(unknown)}: use some of {', '.join(sorted(known))}")
    values = dict(data)
    try:
        if "sizes" in values:
            values["sizes"] = _sizes(values["sizes"])
        if "cycles" in values:
            values["cycles"] = tuple(_cycle(cycle) for cycle in values["cycles"])
        if "unfreeze" in values:
            values["unfreeze"] = tuple(values["unfreeze"])
        if "augmentation" in values:
            values["augmentation"] = Augmentation(**values["augmentation"])
    except (TypeError, ValueError) as error:
        raise TrainingError(
            f"a hyper-parameter has the wrong form ({error}): training/released.toml shows the right ones"
        ) from error
    recipe = Recipe(**values)
    parts: list[Recipe | Augmentation] = [recipe, *_augmentations(recipe)]
    for part in parts:
        for item in fields(part):
            value = getattr(part, item.name)
            if not isinstance(value, KINDS.get(str(item.type), object)):
                raise TrainingError(f"{item.name} = {value!r} is no {item.type}")
    return recipe


def _sizes(pairs: Any) -> Sizes:  # noqa: ANN401 - from TOML or JSON
    return tuple((float(start), int(size)) for start, size in pairs)


def _cycle(data: dict[str, Any]) -> Cycle:
    known = {item.name for item in fields(Cycle)}
    if unknown := set(data) - known:
        raise TrainingError(f"unknown hyper-parameters of a cycle {sorted(unknown)}: use some of {sorted(known)}")
    if missing := {"epochs", "rate"} - set(data):
        raise TrainingError(f"a cycle needs epochs and rate; one has no {' and no '.join(sorted(missing))}")
    augmentation = data.get("augmentation")
    return Cycle(
        int(data["epochs"]),
        float(data["rate"]),
        _sizes(data.get("sizes", FULL_SIZE)),
        None if augmentation is None else Augmentation(**augmentation),
        float(data.get("blend", 0.0)),
        None if data.get("warm_up") is None else float(data["warm_up"]),
    )


def _augmentations(recipe: Recipe) -> list[Augmentation]:
    cycles = [cycle.augmentation for cycle in recipe.cycles if cycle.augmentation is not None]
    return [recipe.augmentation, *cycles]


def extended(begun: Recipe, wanted: Recipe) -> Recipe:
    """`wanted`, as the recipe that a training begun by `begun` can go on with.

    Raises:
        TrainingError: it differs in more than further cycles at the end and the number of loader processes.
    """
    same = replace(wanted, cycles=begun.cycles, workers=begun.workers)
    other = [item.name for item in fields(Recipe) if getattr(same, item.name) != getattr(begun, item.name)]
    if wanted.cycles[: len(begun.cycles)] != begun.cycles:
        other.append("cycles")
    if other:
        raise TrainingError(
            f"a training that has begun cannot change {', '.join(other)}: leave them out with --resume, which takes "
            "further [[cycles]] and --workers, or start anew with --output"
        )
    return wanted


def data_kind(data: str) -> tuple[str, str]:
    """Return the kind of data that `data` names, `cifar10` or `imagefolder`, and the path behind it.

    Raises:
        DataError: it names neither.
    """
    kind, _, path = data.partition(":")
    if kind not in {"cifar10", "imagefolder"} or (kind == "imagefolder" and not path):
        raise DataError(f"unknown data {data!r}: use cifar10, cifar10:PATH or imagefolder:PATH")
    return kind, path


def check_folder(folder: Path, *, resumes: bool) -> None:
    """Return if a training can begin in `folder`, or go on there.

    Raises:
        TrainingError: it holds a training already, or none.
    """
    has_checkpoint = (folder / CHECKPOINT).exists()
    if resumes and not has_checkpoint:
        raise TrainingError(f"{folder} holds no checkpoint ({CHECKPOINT}): start it with --output {folder}")
    if has_checkpoint and not resumes:
        raise TrainingError(
            f"{folder} holds a training already: continue it with --resume {folder}, or pass another --output"
        )


def check(recipe: Recipe) -> None:
    """Refuses what cannot be trained.

    Raises:
        TrainingError: a hyper-parameter is out of its range; the message says which.
        DataError: there is no such data.
    """
    _check_names(recipe)
    if not NAME.fullmatch(recipe.name):
        raise TrainingError(
            f"the model's name {recipe.name!r} will be part of files and addresses: use letters, digits, _ . - (--name)"
        )
    if min(recipe.epochs, *(cycle.epochs for cycle in recipe.cycles), recipe.batch_size) < 1:
        raise TrainingError("epochs, in each cycle too, and batch_size must be at least 1")
    for sizes in (recipe.sizes, *(cycle.sizes for cycle in recipe.cycles)):
        starts = [start for start, _ in sizes]
        if not sizes or starts[0] != 0 or starts != sorted(starts) or min(size for _, size in sizes) < 0:
            raise TrainingError("sizes must start at share 0 and go on in order, for example [[0.0, 24], [0.5, 32]]")
    _check_ranges(recipe)
    _check_blends(recipe)
    for augmentation in _augmentations(recipe):
        _check_augmentation(augmentation)
    unknown = [name for name in recipe.unfreeze if name not in LAYERS and not BLOCK.fullmatch(name)]
    if unknown:
        raise TrainingError(f"there is no layer {', '.join(map(repr, unknown))}: unfreeze some of {', '.join(LAYERS)}")
    if not 0 < recipe.validation < 1:
        raise TrainingError(f"validation is the share held out, between 0 and 1, not {recipe.validation}")


def _check_names(recipe: Recipe) -> None:
    kind, path = data_kind(recipe.data)
    if path and not Path(path).exists():
        raise DataError(f"{path} is not there: pass an existing {'folder' if kind == 'imagefolder' else 'archive'}")
    if recipe.architecture not in ARCHITECTURES:
        raise TrainingError(f"architecture is one of {', '.join(ARCHITECTURES)}, not {recipe.architecture!r}")
    if recipe.precision not in PRECISIONS:
        raise TrainingError(f"precision is one of {', '.join(PRECISIONS)}, not {recipe.precision!r}")


def _check_ranges(recipe: Recipe) -> None:
    if min(recipe.workers, recipe.subset, recipe.head_epochs) < 0:
        raise TrainingError("workers, subset and head_epochs are numbers from 0")
    rates = (recipe.rate, recipe.head_rate, *(cycle.rate for cycle in recipe.cycles))
    if not all(0 < rate < math.inf for rate in rates):
        raise TrainingError("each rate must be above 0")
    shares = {name: getattr(recipe, name) for name in ("momentum", "label_smoothing", "average", "warm_up", "sam_from")}
    shares |= {f"warm_up of {phase.name}": phase.warm_up for phase in recipe.phases()}
    if wrong := [name for name, share in shares.items() if not 0 <= share < 1]:
        raise TrainingError(f"{' and '.join(wrong)}: from 0, and below 1")
    if not (0 <= recipe.weight_decay < math.inf and 0 <= recipe.sam_radius < math.inf):
        raise TrainingError("weight_decay and sam_radius must be 0 or more")


def _check_blends(recipe: Recipe) -> None:
    blends = [cycle.blend for cycle in recipe.cycles]
    if any(not 0 <= blend < 1 for blend in blends):
        raise TrainingError("blend is a share, from 0 and below 1")
    begins_random = recipe.pretrained == "none" or (recipe.pretrained == "imagenet" and not recipe.head_epochs)
    if begins_random and any(blends[:1]):
        raise TrainingError("blend of the first cycle would mix in the random weights that the training began with")
    if any(blends) and not recipe.average:
        raise TrainingError("blend mixes averaged weights: set average above 0")


def _check_augmentation(augmentation: Augmentation) -> None:
    if not all(0 <= chance <= 1 for chance in (augmentation.erasing, augmentation.cutmix, augmentation.pixmix)):
        raise TrainingError("erasing, cutmix and pixmix are probabilities: between 0 and 1")
    if not (augmentation.operations >= 0 and 0 <= augmentation.magnitude <= MAGNITUDES):
        raise TrainingError(f"RandAugment takes operations from 0 and a magnitude of 0 to {MAGNITUDES}")
