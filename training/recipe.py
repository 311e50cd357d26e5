"""Every hyper-parameter of a training, its phases and its learning-rate curve.

A hyper-parameter is declared once: as a field with its default, its help and the values it may have. `check`, the flags
of `gradserve train` and what is stored with the model follow from the declaration.
"""

from __future__ import annotations

import math
import re
from dataclasses import Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from contracts.names import NAME
from training.errors import DataError, TrainingError

T = TypeVar("T")


@dataclass(frozen=True)
class Option:
    """Help and allowed values of a hyper-parameter."""

    help: str
    flags: tuple[str, ...] = ()  # of `gradserve train`; empty: the field's name
    shown_default: str = ""  # empty: the default
    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf
    choices: tuple[str, ...] = ()

    def allows(self, value: Any) -> bool:  # noqa: ANN401 - a number or a name, as the field says
        """Return True if the hyper-parameter may have this value."""
        if self.choices:
            return value in self.choices
        is_number = isinstance(value, int | float)
        return not is_number or (self.least <= value <= self.most and self.above < value < self.below)

    @property
    def allowed(self) -> str:
        """The allowed values in words, such as `from 0, below 1`."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        words = {"from": self.least, "above": self.above, "up to": self.most, "below": self.below}
        return ", ".join(f"{word} {bound:g}" for word, bound in words.items() if math.isfinite(bound)) or "finite"


def hyper_parameter(default: T, description: str, **options: Any) -> T:  # noqa: ANN401 - the fields of `Option`
    """Return a dataclass field with this default and an `Option`."""
    declared: T = field(default=default, metadata={"option": Option(description, **options)})
    return declared


def option_of(item: Field[Any]) -> Option | None:
    """Return the field's `Option`; None for what only a TOML file can say: sizes, cycles, augmentation."""
    declared: Option | None = item.metadata.get("option")
    return declared


VIEWS = 3  # of an image, where the loss wants equal answers to them
MAGNITUDES = 30  # torchvision's RandAugment has 31 strengths


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of the training images.

    Every image is shifted by up to 4 pixels with mirrored borders, and flipped in every second epoch: in the odd or
    the even ones, by its index (Jordan 2024, https://arxiv.org/abs/2404.00498). RandAugment with `operations`
    operations of strength `magnitude` (0..30) follows (Cubuk et al. 2019, https://arxiv.org/abs/1909.13719), then
    random erasing with probability `erasing` (Zhong et al. 2017, https://arxiv.org/abs/1708.04896). With probability
    `cutmix`, a batch's images then get a rectangle of their neighbours and a share of their labels (Yun et al. 2019,
    https://arxiv.org/abs/1905.04899). With probability `pixmix`, an image is mixed with fractals and with augmented
    copies of itself before erasing (Hendrycks et al. 2021, https://arxiv.org/abs/2112.05135). With `bilinear`,
    RandAugment's rotations and shears interpolate, as AugMix's and PixMix's do; without, they take the nearest pixel.
    """

    operations: int = hyper_parameter(2, "RandAugment's operations on an image.", least=0)
    magnitude: int = hyper_parameter(9, "Strength of RandAugment's operations.", least=0, most=MAGNITUDES)
    erasing: float = hyper_parameter(0.0, "Share of the images of which a rectangle is erased.", least=0, most=1)
    cutmix: float = hyper_parameter(0.0, "Share of the batches that CutMix mixes.", least=0, most=1)
    pixmix: float = hyper_parameter(0.0, "Share of the images that PixMix mixes.", least=0, most=1)
    bilinear: bool = hyper_parameter(False, "Interpolate where RandAugment turns or shears, else the nearest pixel.")  # noqa: FBT003 - the default


# (share of the epochs from which it holds, image size; 0: the contract's): small images teach much for little.
# Source: progressive resizing, Howard 2018, https://www.fast.ai/posts/2018-04-30-dawnbench-fastai.html
Sizes = tuple[tuple[float, int], ...]
FULL_SIZE: Sizes = ((0.0, 0),)
LAYERS = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc", "all")  # what can be unfrozen
BLOCK = re.compile(r"layer[1-4]\.[01]")  # a part of a layer, which can be too
CHECKPOINT = "last.pt"  # in a run's folder
ARCHITECTURES = ("auto", "resnet18", "resnet18_small")
PRECISIONS = ("auto", "bf16", "fp32")
EVERYTHING = ("",)  # the prefix of every parameter's name
KINDS = {"int": int, "float": int | float, "str": str, "bool": bool}


@dataclass(frozen=True)
class Cycle:
    """A warm restart: another cosine, from the averaged weights that the training had reached.

    Without an `augmentation` or a `warm_up` of its own it has the recipe's. With `blend`, it begins with that share of
    the weights that the phase before began with: two minima's mean is often better than either (Izmailov et al. 2018,
    https://arxiv.org/abs/1803.05407). Source: Loshchilov and Hutter 2016, https://arxiv.org/abs/1608.03983
    """

    epochs: int = field(metadata={"option": Option("Epochs of the cycle.", least=1)})
    rate: float = field(metadata={"option": Option("Peak learning rate.", above=0, below=math.inf)})
    sizes: Sizes = FULL_SIZE
    augmentation: Augmentation | None = None
    blend: float = hyper_parameter(0.0, "Share of the weights that the phase before began with.", least=0, below=1)
    warm_up: float | None = hyper_parameter(None, "Share of the steps in which the rate rises.", least=0, below=1)


@dataclass(frozen=True)
class Recipe:
    """Every hyper-parameter of a training; what is stored with the model is this."""

    # data
    data: str = hyper_parameter("cifar10", "cifar10, cifar10:PATH of its archive or folder, or imagefolder:PATH.")
    validation: float = hyper_parameter(0.2, "Share of the images held out, 0 to 1.", above=0, below=1)
    subset: int = hyper_parameter(0, "Number of training images to use; 0: all.", least=0)
    # network
    name: str = hyper_parameter("cifar10", "The model's name.", shown_default="cifar10, or the folder's name")
    architecture: str = hyper_parameter(
        "auto", "resnet18, resnet18_small (3×3 stem), or auto, by the image size.", choices=ARCHITECTURES
    )
    pretrained: str = hyper_parameter(
        "none", "none (from scratch), imagenet, or your own model: PATH of a run, runs:/ID or models:/NAME@alias."
    )
    # schedule: `head_epochs` with the backbone frozen, then `epochs` with `unfreeze` (layers, or `all`) trained too,
    # then the warm restarts
    head_epochs: int = hyper_parameter(3, "Epochs with the backbone frozen, before the top layers.", least=0)
    head_rate: float = hyper_parameter(
        0.1, "Peak learning rate of the head's phase.", flags=("head-lr", "head-rate"), above=0, below=math.inf
    )
    unfreeze: tuple[str, ...] = hyper_parameter(
        ("layer3", "layer4"), "Layers that the last phase of a transfer trains, separated by commas; or all."
    )
    epochs: int = hyper_parameter(
        30,
        "Epochs of the last phase (from scratch: of the only one); the recipe's cycles are left out.",
        least=1,
    )
    rate: float = hyper_parameter(0.1, "Peak learning rate.", flags=("lr", "rate"), above=0, below=math.inf)
    batch_size: int = hyper_parameter(128, "Images per step.", least=1)
    warm_up: float = hyper_parameter(0.15, "Share of a phase's steps in which the rate rises.", least=0, below=1)
    sizes: Sizes = FULL_SIZE
    cycles: tuple[Cycle, ...] = ()
    # optimiser: SGD. Batch-norm weights and biases are not decayed (He et al. 2018, https://arxiv.org/abs/1812.01187)
    momentum: float = hyper_parameter(0.9, "Momentum of SGD.", least=0, below=1)
    nesterov: bool = hyper_parameter(True, "Use Nesterov's momentum.")  # noqa: FBT003 - the default
    weight_decay: float = hyper_parameter(5e-4, "Weight decay (L2).", least=0, below=math.inf)
    label_smoothing: float = hyper_parameter(0.1, "Share of a label given to all classes.", least=0, below=1)
    average: float = hyper_parameter(
        0.998, "Decay per step of the averaged weights, which are kept; 0 keeps the last ones.", least=0, below=1
    )
    # From the share `sam_from` of a phase's epochs on, each step takes its gradient at the worst weights within
    # `sam_radius`, at twice the cost (Foret et al. 2020, https://arxiv.org/abs/2010.01412; late in training is enough:
    # Zhou et al. 2024, https://arxiv.org/abs/2410.10373); 0 never does.
    sam_radius: float = hyper_parameter(
        0.0, "Radius of sharpness-aware steps, which take twice the time; 0: none.", least=0, below=math.inf
    )
    sam_from: float = hyper_parameter(
        0.75, "Share of a phase's epochs before its sharpness-aware steps.", least=0, below=1
    )
    # With `consistency`, the network sees each image once plain (only shifted and flipped) and twice augmented. It
    # learns the label from the plain one, and to give all three the same answer: the loss gets this weight times the
    # Jensen-Shannon divergence of the three (Hendrycks et al. 2019, section 3, https://arxiv.org/abs/1912.02781).
    consistency: float = hyper_parameter(
        0.0, "Weight of equal answers to three views of an image, which take three times the time; 0: none.",
        least=0, below=math.inf,
    )  # fmt: skip
    augmentation: Augmentation = field(default_factory=Augmentation)
    seed: int = hyper_parameter(0, "Seed of split, weights, order and augmentation.", least=0)
    # machine
    precision: str = hyper_parameter("auto", "auto, bf16 or fp32.", choices=PRECISIONS)
    workers: int = hyper_parameter(1, "Number of loader processes.", flags=("num-workers", "workers"), least=0)
    cuda_graphs: bool = hyper_parameter(
        False,  # noqa: FBT003 - the default
        "Record training steps as CUDA graphs, on one GPU. Not run on a GPU yet.",
    )

    @property
    def views(self) -> int:
        """Number of views in which the network sees each image."""
        return VIEWS if self.consistency else 1

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
        """Return True if this phase trains the parameter of that name."""
        return parameter.startswith(self.trained)

    def image_size(self, epoch: int) -> int:
        """Return the height and width in pixels that the network trains on in `epoch`; 0: the contract's."""
        done = epoch / self.epochs
        return next(size for start, size in reversed(self.sizes) if done >= start)


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
        TrainingError: it differs in more than further cycles at the end and the use of the machine.
    """
    same = replace(wanted, cycles=begun.cycles, workers=begun.workers, cuda_graphs=begun.cuda_graphs)
    other = [item.name for item in fields(Recipe) if getattr(same, item.name) != getattr(begun, item.name)]
    if wanted.cycles[: len(begun.cycles)] != begun.cycles:
        other.append("cycles")
    if other:
        raise TrainingError(
            f"a training that has begun cannot change {', '.join(other)}: leave them out with --resume, which takes "
            "further [[cycles]], --workers and --cuda-graphs, or start again with --output"
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
    _check_values(recipe, "")
    _check_values(recipe.augmentation, " of the augmentation")
    for number, cycle in enumerate(recipe.cycles, start=2):
        _check_values(cycle, f" of cycle {number}")
        if cycle.augmentation is not None:
            _check_values(cycle.augmentation, f" of cycle {number}'s augmentation")
    _check_names(recipe)
    for sizes in (recipe.sizes, *(cycle.sizes for cycle in recipe.cycles)):
        starts = [start for start, _ in sizes]
        if not sizes or starts[0] != 0 or starts != sorted(starts) or min(size for _, size in sizes) < 0:
            raise TrainingError("sizes must start at share 0 and go on in order, for example [[0.0, 24], [0.5, 32]]")
    _check_blends(recipe)


def _check_values(part: Recipe | Cycle | Augmentation, where: str) -> None:
    for item in fields(part):
        option, value = option_of(item), getattr(part, item.name)
        if option is not None and not option.allows(value):
            raise TrainingError(f"{item.name}{where} is {option.allowed}, not {value!r}")


def _check_names(recipe: Recipe) -> None:
    kind, path = data_kind(recipe.data)
    if path and not Path(path).exists():
        raise DataError(f"{path} is not there: pass an existing {'folder' if kind == 'imagefolder' else 'archive'}")
    if not NAME.fullmatch(recipe.name):
        raise TrainingError(
            f"the model's name {recipe.name!r} will be part of files and addresses: use letters, digits, _ . - (--name)"
        )
    unknown = [name for name in recipe.unfreeze if name not in LAYERS and not BLOCK.fullmatch(name)]
    if unknown:
        raise TrainingError(f"there is no layer {', '.join(map(repr, unknown))}: unfreeze some of {', '.join(LAYERS)}")


def _check_blends(recipe: Recipe) -> None:
    blends = [cycle.blend for cycle in recipe.cycles]
    begins_random = recipe.pretrained == "none" or (recipe.pretrained == "imagenet" and not recipe.head_epochs)
    if begins_random and any(blends[:1]):
        raise TrainingError("blend of the first cycle would mix in the random weights that the training began with")
    if any(blends) and not recipe.average:
        raise TrainingError("blend mixes averaged weights: set average above 0")
