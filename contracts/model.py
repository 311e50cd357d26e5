"""The contract of a model version: everything that training, archive, handler and gateway must agree on.

Training writes it once, as `contract.json`; it travels in the archive and in MLflow. Nobody else holds a label, a mean
or an input size.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA = 1


class ContractError(ValueError):
    """A contract that cannot be used; the message says which field and why."""


@dataclass(frozen=True)
class Input:
    """What the network takes: `height` × `width` pixels, normalised by `mean` and `std` of channel values in 0..1."""

    height: int
    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Engine:
    """How the network is run: `name` (`eager` or `openvino`), `precision` (`fp32`, `bf16`, `int8`).

    `temperature` divides the logits before the softmax; it is fitted for each engine on held-out images.
    Source: Guo et al. 2017, https://arxiv.org/abs/1706.04599
    """

    name: str = "eager"
    precision: str = "fp32"
    temperature: float = 1.0


@dataclass(frozen=True)
class Explanation:
    """Where heatmaps come from: CAM layer, default method and the methods a caller may ask for.

    `layer` is a module path in the network, or several joined by `+`, whose heatmaps are averaged.
    """

    layer: str = "layer4"  # the most faithful of a well-trained network; docs/training.md
    method: str = "gradcam"
    methods: tuple[str, ...] = ("gradcam", "gradcam++", "layercam", "eigencam")


@dataclass(frozen=True)
class Contract:
    """One model version's contract; `accepted` holds the figures with which the version was accepted."""

    name: str
    version: str
    classes: tuple[str, ...]
    input: Input
    architecture: str
    explain: Explanation = field(default_factory=Explanation)
    engine: Engine = field(default_factory=Engine)
    fallback: Engine | None = None
    accepted: dict[str, Any] = field(default_factory=dict)
    created: str = ""

    def with_version(self, version: str) -> Contract:
        """The same contract under another version."""
        return replace(self, version=version)


def to_dict(contract: Contract) -> dict[str, Any]:
    """The contract as JSON-able data, `schema` first."""
    return {"schema": SCHEMA, **asdict(contract)}


def parse(data: object) -> Contract:
    """The contract that `data` (parsed JSON) describes.

    Raises:
        ContractError: a field is missing, has the wrong type or an impossible value, or the schema is unknown.
    """
    if not isinstance(data, dict):
        raise ContractError(f"a contract is a JSON object, not {type(data).__name__}")
    if data.get("schema") != SCHEMA:
        raise ContractError(f"contract schema {data.get('schema')!r} is not {SCHEMA}: pack the model again")
    fields = {key: value for key, value in data.items() if key != "schema"}
    try:
        size = fields["input"]
        fields["input"] = Input(
            height=int(size["height"]), width=int(size["width"]), mean=_triple(size["mean"]), std=_triple(size["std"])
        )
        fields["classes"] = tuple(str(name) for name in fields["classes"])
        explain = dict(fields.get("explain") or {})
        if "methods" in explain:
            explain["methods"] = tuple(explain["methods"])
        fields["explain"] = Explanation(**explain)
        fields["engine"] = Engine(**(fields.get("engine") or {}))
        fields["fallback"] = Engine(**fields["fallback"]) if fields.get("fallback") else None
        contract = Contract(**fields)
    except KeyError as error:
        raise ContractError(f"contract field {error} is missing") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ContractError(f"contract field has the wrong form: {error}") from error
    _check(contract)
    return contract


def load(path: Path) -> Contract:
    """The contract in the file `path`.

    Raises:
        ContractError: the file is no JSON or no contract.
        OSError: the file cannot be read.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ContractError(f"{path.name} is no JSON: {error}") from error
    return parse(data)


def save(contract: Contract, path: Path) -> None:
    """Writes the contract to `path`, readable by people."""
    path.write_text(json.dumps(to_dict(contract), indent=2) + "\n", encoding="utf-8")


def _triple(values: object) -> tuple[float, float, float]:
    if not isinstance(values, list | tuple) or len(values) != 3:
        raise ContractError(f"mean and std hold three numbers, not {values!r}")
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _check(contract: Contract) -> None:
    if len(contract.classes) < 2 or len(set(contract.classes)) != len(contract.classes):
        raise ContractError("classes must be two or more different names")
    if contract.input.height < 1 or contract.input.width < 1:
        raise ContractError(f"input size {contract.input.height}x{contract.input.width} must be positive")
    if min(contract.input.std) <= 0:
        raise ContractError("every std must be above zero")
    for engine in filter(None, (contract.engine, contract.fallback)):
        if not engine.temperature > 0:
            raise ContractError(f"temperature {engine.temperature} must be above zero")
