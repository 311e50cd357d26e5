"""The contract of a model version (`contract.json`): everything that training, archive, handler and gateway agree on.

Training writes it once; it travels in the archive, in MLflow and in the agent's status. Nobody else holds a label, a
mean or an input size. Contracts of schema 1, in which `accepted` was one flat object, and of schema 2, which has no
evidence, are read and written as they are: an archive keeps the contract that it was packed with. Whatever is packed
now gets `SCHEMA`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from contracts.evidence import Evidence, HeatmapFigures, NamedNumbers, parse_evidence, parse_heatmap_figures
from contracts.fields import DocumentError, Fields, as_json, read_json
from contracts.names import NAME, SHA256, VERSION

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SCHEMA = 3
READABLE = (1, 2, 3)
MAX_BYTES = 16_000_000
MAX_CLASSES = 100_000
MAX_ANCESTORS = 50
MAX_FIGURES = 100

Recipe: TypeAlias = dict[str, Any]
"""The hyper-parameters of a training as JSON; training/recipe.py dumps and parses them."""

Environment: TypeAlias = dict[str, str]
"""Environment of a training: versions, hardware, threads and the code's commit, each a text by its name."""


class ContractError(DocumentError):
    """A contract that cannot be used."""

    document = "contract"
    remedy = "pack the model again (`gradserve package`)"


@dataclass(frozen=True)
class Input:
    """Input of the network: `height` × `width` pixels, normalised by `mean` and `std` of channel values in 0..1."""

    height: int
    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Engine:
    """Engine that runs the network: `name` (`eager` or `openvino`), `precision` (`fp32`, `bf16`, `int8`).

    `temperature` divides the logits before the softmax; it is fitted for each engine on held-out images.
    Source: Guo et al. 2017, https://arxiv.org/abs/1706.04599
    """

    name: str = "eager"
    precision: str = "fp32"
    temperature: float = 1.0


@dataclass(frozen=True)
class Explanation:
    """Source of heatmaps: CAM layer, default method and the methods a caller may ask for.

    `layer` is a module path in the network, or several joined by `+`, whose heatmaps are averaged. `sharp_layer` is the
    one whose activations sharpen heatmaps made in the forward pass; None for a network that gives none. `forward` has
    the methods that the engine makes in the forward pass of a prediction: the gateway sends these to the entry that
    predicts, the others to the one that explains.
    """

    layer: str = "layer4"  # the most faithful of a well-trained network; docs/explanation/training.md
    method: str = "gradcam"
    methods: tuple[str, ...] = ("gradcam", "gradcam++", "layercam", "eigencam")
    sharp_layer: str | None = None
    forward: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measured:
    """Figures of one engine on the held-out images: shares of images, from 0 to 1.

    The expected calibration errors are in 15 bins, before and after the logits are divided by the temperature.
    """

    accuracy: float
    calibration_error_before: float
    calibration_error: float


@dataclass(frozen=True)
class Figures:
    """The figures with which a version was accepted; None for what was not measured.

    Attributes:
        validation_accuracy: share of the held-out images that the kept epoch got right while it trained.
        held_out_images: how many images were held out; they made every choice.
        held_out: full precision, with the weights as they are packed.
        served: the contract's engine, where it is another one.
        engine_agreement: share of the held-out images on which both name the same class.
        explainer_disagreement: share on which the network that explains names another class than the engine.
        explain_images: how many held-out images chose the heatmaps' layer and method; 0 where none did.
        explain_class_correlation: mean rank correlation of the heatmaps about an image's first and second class.
        explanations: the default heatmaps of the contract's engine.
        random_heat: random heat in their place.
        familiarity: area under the ROC curve of familiarity, by the images that it must tell from held-out ones.
        engine_heatmap_correlation: median rank correlation of the contract's engine's heatmaps with full precision's.
    """

    validation_accuracy: float | None = None
    held_out_images: int | None = None
    held_out: Measured | None = None
    served: Measured | None = None
    engine_agreement: float | None = None
    explainer_disagreement: float | None = None
    explain_images: int = 0
    explain_class_correlation: float | None = None
    explanations: HeatmapFigures | None = None
    random_heat: HeatmapFigures | None = None
    familiarity: NamedNumbers = ()
    engine_heatmap_correlation: float | None = None


@dataclass(frozen=True)
class Provenance:
    """Origin of the weights: training images, epochs, processes and environments.

    Attributes:
        data_sha256: of the decoded training images, held-out ones included.
        training_images: images learnt from.
        held_out_images: images held out.
        epochs: epochs trained.
        duration_s: seconds of training.
        processes: processes that trained together.
        environments: each environment that trained a part.
    """

    data_sha256: str
    training_images: int
    held_out_images: int
    epochs: int
    duration_s: float
    processes: int
    environments: tuple[Environment, ...] = ()


@dataclass(frozen=True)
class Ancestor:
    """The model that a training began with, and with what that one was accepted."""

    name: str
    version: str
    accepted: Accepted
    weights_sha256: str | None = None


@dataclass(frozen=True)
class Accepted:
    """With what a version was accepted, and how it came about; None and empty texts for what is not known."""

    figures: Figures = field(default_factory=Figures)
    run_id: str = ""
    recipe: Recipe | None = None
    provenance: Provenance | None = None
    ancestor: Ancestor | None = None

    def lineage(self) -> tuple[Accepted, ...]:
        """Return this, then what the models were accepted with that it began with, the last one first."""
        before = () if self.ancestor is None else self.ancestor.accepted.lineage()
        return (self, *before)


@dataclass(frozen=True)
class Contract:
    """One model version's contract.

    `schema` is that of the document the version was packed with. It says which wire the archive's handler speaks
    (`contracts.wire.WIRES`).
    """

    name: str
    version: str
    classes: tuple[str, ...]
    input: Input
    architecture: str
    explain: Explanation = field(default_factory=Explanation)
    engine: Engine = field(default_factory=Engine)
    fallback: Engine | None = None
    accepted: Accepted = field(default_factory=Accepted)
    created: str = ""
    schema: int = SCHEMA
    evidence: Evidence | None = None

    def with_version(self, version: str) -> Contract:
        """Return the same contract under another version."""
        return replace(self, version=version)

    def public(self) -> Contract:
        """Return the contract without recipe, provenance and ancestors: they are long, and hold paths."""
        return replace(self, accepted=replace(self.accepted, recipe=None, provenance=None, ancestor=None))


def dump(contract: Contract) -> dict[str, Any]:
    """Return the contract as JSON-able data of its own schema, such that `parse(dump(contract)) == contract`."""
    data = as_json(contract)
    if contract.schema == 1:
        data["accepted"] = _dump_accepted_1(contract.accepted)
    if contract.schema == 2:
        _remove_figures_of_3(data["accepted"])
    if contract.schema < 3:
        del data["evidence"], data["explain"]["sharp_layer"], data["explain"]["forward"]
    return {"schema": data.pop("schema"), **data}


def parse(data: object) -> Contract:
    """Return the contract that `data` (parsed JSON) describes.

    Raises:
        ContractError: a field is missing, unknown or impossible, or the schema is unknown.
    """
    fields = Fields(data, "", ContractError)
    schema = fields.schema(READABLE)
    read_accepted = _accepted_1 if schema == 1 else _accepted
    contract = Contract(
        name=fields.text("name", pattern=NAME),
        version=fields.text("version", pattern=VERSION),
        classes=fields.texts("classes", most_items=MAX_CLASSES),
        input=_input(fields.inner("input")),
        architecture=fields.text("architecture"),
        explain=_explanation(fields.maybe("explain", fields.inner)),
        engine=_engine(fields.maybe("engine", fields.inner)) or Engine(),
        fallback=_engine(fields.maybe("fallback", fields.inner)),
        accepted=read_accepted(fields.inner("accepted"), MAX_ANCESTORS) if "accepted" in fields else Accepted(),
        created=fields.maybe("created", fields.text) or "",
        schema=schema,
        evidence=parse_evidence(fields.maybe("evidence", fields.inner)) if schema >= 3 else None,
    )
    fields.end()
    if len(contract.classes) < 2 or len(set(contract.classes)) != len(contract.classes):
        raise ContractError("classes", contract.classes, "two or more different names")
    return contract


def dump_ancestor(ancestor: Ancestor | None) -> dict[str, Any] | None:
    """Return the ancestor as JSON-able data with its schema, for a training's checkpoint."""
    return None if ancestor is None else {"schema": SCHEMA, **as_json(ancestor)}


def parse_ancestor(data: object) -> Ancestor | None:
    """Return the ancestor that `data` describes; None where a training began with none.

    Checkpoints of before schema 2 hold it without a schema, and an empty object for none.

    Raises:
        ContractError: it cannot be read.
    """
    if not data:
        return None
    fields = Fields(data, "ancestor", ContractError)
    schema = fields.schema(READABLE) if "schema" in fields else 1
    return _ancestor(fields, MAX_ANCESTORS, _accepted_1 if schema == 1 else _accepted)


def load(path: Path) -> Contract:
    """Return the contract in the file `path`.

    Raises:
        ContractError: the file is no JSON or no contract.
        OSError: the file cannot be read.
    """
    return parse(read_json(path.read_bytes(), ContractError, most_bytes=MAX_BYTES))


def save(contract: Contract, path: Path) -> None:
    """Write the contract to `path`, readable by people."""
    path.write_text(json.dumps(dump(contract), indent=2) + "\n", encoding="utf-8")


def _input(fields: Fields) -> Input:
    read = Input(
        height=fields.integer("height", least=1),
        width=fields.integer("width", least=1),
        mean=_triple(fields, "mean"),
        std=_triple(fields, "std", least=1e-9),
    )
    fields.end()
    return read


def _triple(fields: Fields, name: str, least: float = -1e6) -> tuple[float, float, float]:
    red, green, blue = fields.numbers(name, count=3, least=least, most=1e6)
    return red, green, blue


def _explanation(fields: Fields | None) -> Explanation:
    default = Explanation()
    if fields is None:
        return default
    read = Explanation(
        layer=fields.maybe("layer", fields.text) or default.layer,
        method=fields.maybe("method", fields.text) or default.method,
        methods=fields.maybe("methods", partial(fields.texts, most_items=100)) or default.methods,
        sharp_layer=fields.maybe("sharp_layer", fields.text),
        forward=fields.maybe("forward", partial(fields.texts, most_items=100)) or default.forward,
    )
    fields.end()
    return read


def _engine(fields: Fields | None) -> Engine | None:
    if fields is None:
        return None
    default = Engine()
    read = Engine(
        name=fields.maybe("name", fields.text) or default.name,
        precision=fields.maybe("precision", fields.text) or default.precision,
        temperature=fields.number("temperature", least=1e-9) if "temperature" in fields else default.temperature,
    )
    fields.end()
    return read


def _accepted(fields: Fields, ancestors: int) -> Accepted:
    read = Accepted(
        figures=_figures(fields.inner("figures")) if "figures" in fields else Figures(),
        run_id=fields.maybe("run_id", fields.text) or "",
        recipe=fields.maybe("recipe", fields.json),
        provenance=_provenance(fields.maybe("provenance", fields.inner)),
        ancestor=_ancestor(fields.maybe("ancestor", fields.inner), ancestors, _accepted),
    )
    fields.end()
    return read


def _figures(fields: Fields) -> Figures:
    share = partial(fields.number, least=0, most=1)
    correlation = partial(fields.number, least=-1, most=1)
    auroc = partial(fields.number_of, least=0, most=1)
    read = Figures(
        validation_accuracy=fields.maybe("validation_accuracy", share),
        held_out_images=fields.maybe("held_out_images", fields.integer),
        held_out=_measured(fields.maybe("held_out", fields.inner)),
        served=_measured(fields.maybe("served", fields.inner)),
        engine_agreement=fields.maybe("engine_agreement", share),
        explainer_disagreement=fields.maybe("explainer_disagreement", share),
        explain_images=fields.maybe("explain_images", fields.integer) or 0,
        explain_class_correlation=fields.maybe("explain_class_correlation", correlation),
        explanations=parse_heatmap_figures(fields.maybe("explanations", fields.inner)),
        random_heat=parse_heatmap_figures(fields.maybe("random_heat", fields.inner)),
        familiarity=fields.named("familiarity", auroc, most=MAX_FIGURES) if "familiarity" in fields else (),
        engine_heatmap_correlation=fields.maybe("engine_heatmap_correlation", correlation),
    )
    fields.end()
    return read


def _measured(fields: Fields | None) -> Measured | None:
    if fields is None:
        return None
    names = ("accuracy", "calibration_error_before", "calibration_error")
    read = Measured(*(fields.number(name, least=0, most=1) for name in names))
    fields.end()
    return read


def _provenance(fields: Fields | None) -> Provenance | None:
    if fields is None:
        return None
    read = Provenance(
        data_sha256=fields.text("data_sha256", pattern=SHA256),
        training_images=fields.integer("training_images"),
        held_out_images=fields.integer("held_out_images"),
        epochs=fields.integer("epochs"),
        duration_s=fields.number("duration_s", least=0),
        processes=fields.integer("processes"),
        environments=tuple(item.all_texts() for item in fields.inners("environments", most=1000)),
    )
    fields.end()
    return read


def _ancestor(fields: Fields | None, left: int, read_accepted: Callable[[Fields, int], Accepted]) -> Ancestor | None:
    if fields is None:
        return None
    if not left:
        raise fields.refuse("accepted", "another ancestor", f"at most {MAX_ANCESTORS} of them")
    read = Ancestor(
        name=fields.text("name", pattern=NAME),
        version=fields.text("version", pattern=VERSION),
        accepted=read_accepted(fields.inner("accepted"), left - 1),
        weights_sha256=fields.maybe("weights_sha256", partial(fields.text, pattern=SHA256)),
    )
    fields.end()
    return read


# Schema 2: the figures of what schema 3 brought do not exist.

_FIGURES_OF_3 = ("explanations", "random_heat", "familiarity", "engine_heatmap_correlation")


def _remove_figures_of_3(accepted: dict[str, Any]) -> None:
    """Remove the figures that a reader of schema 2 does not know, from those of the ancestors too."""
    for name in _FIGURES_OF_3:
        del accepted["figures"][name]
    if accepted["ancestor"] is not None:
        _remove_figures_of_3(accepted["ancestor"]["accepted"])


# Schema 1: the figures stood beside run, recipe, provenance and ancestor, those of the two engines under long names.

_MEASURED_1 = ("accuracy", "calibration_error_before", "calibration_error")
_SERVED_1, _HELD_OUT_1 = "engine_held_out_", "held_out_"
_PLAIN_1 = (
    "validation_accuracy",
    "held_out_images",
    "engine_agreement",
    "explainer_disagreement",
    "explain_images",
    "explain_class_correlation",
)


def _accepted_1(fields: Fields, ancestors: int) -> Accepted:
    flat = {name: fields.take(name) for name in _PLAIN_1 if name in fields}
    for name, prefix in (("held_out", _HELD_OUT_1), ("served", _SERVED_1)):
        if f"{prefix}accuracy" in fields:
            flat[name] = {figure: fields.take(prefix + figure) for figure in _MEASURED_1}
    return Accepted(
        figures=_figures(Fields(flat, "accepted", ContractError)),
        run_id=fields.maybe("run_id", fields.text) or "",
        recipe=fields.maybe("recipe", fields.json),
        provenance=_provenance(fields.maybe("provenance", fields.inner)),
        ancestor=_ancestor(fields.maybe("ancestor", fields.inner), ancestors, _accepted_1),
    )


def _dump_accepted_1(accepted: Accepted) -> dict[str, Any]:
    figures = accepted.figures
    data: dict[str, Any] = {name: value for name in _PLAIN_1 if (value := getattr(figures, name)) is not None}
    if not figures.explain_images:
        data.pop("explain_images")
    for measured, prefix in ((figures.held_out, _HELD_OUT_1), (figures.served, _SERVED_1)):
        if measured is not None:
            data |= {prefix + name: value for name, value in as_json(measured).items()}
    if accepted.run_id:
        data["run_id"] = accepted.run_id
    if accepted.recipe is not None:
        data["recipe"] = as_json(accepted.recipe)
    if accepted.provenance is not None:
        data["provenance"] = as_json(accepted.provenance)
    if (ancestor := accepted.ancestor) is not None:
        data["ancestor"] = as_json(ancestor) | {"accepted": _dump_accepted_1(ancestor.accepted)}
    return data
