"""The flags of `gradserve train` for hyper-parameters: one for each field of the recipe that declares an `Option`.

training/recipe.py does not import torch, so `--help` and the refusal of a wrong flag are fast.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import fields
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any

import typer

from training.recipe import Recipe, option_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from dataclasses import Field

    from training.recipe import Option

PANEL = "Hyper-parameters"
_TYPES: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool, "tuple[str, ...]": str}
_OPTIONS = {item.name: (item, option) for item in fields(Recipe) if (option := option_of(item)) is not None}


def with_hyper_parameters(command: Callable[..., None]) -> Callable[..., None]:
    """Return the Typer command with a flag for each hyper-parameter.

    `command` gets the flags that were set as the keyword argument `given`, a dict by the recipe's names.
    """
    signature = inspect.signature(command, eval_str=True)
    own = [parameter for parameter in signature.parameters.values() if parameter.name != "given"]
    flags = [_flag(item, option) for item, option in _OPTIONS.values()]

    @wraps(command)
    def run(**arguments: Any) -> None:  # noqa: ANN401 - each option has its own type
        passed = {name: arguments.pop(name, None) for name in _OPTIONS}
        command(**arguments, given={name: _parsed(name, value) for name, value in passed.items() if value is not None})

    parameters = [*own, *flags]
    vars(run)["__signature__"] = signature.replace(parameters=parameters)  # Typer reads it
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _flag(item: Field[Any], option: Option) -> inspect.Parameter:
    names = [f"--{name}" for name in option.flags or (item.name.replace("_", "-"),)]
    kind = _TYPES[str(item.type)]
    if kind is bool:
        names = [f"{name}/--no-{name.removeprefix('--')}" for name in names]
    has_range = kind in {int, float}
    declared = typer.Option(
        *names,
        help=option.help,
        show_default=option.shown_default or _shown(item.default),
        min=option.least if has_range and option.least > -math.inf else None,
        max=option.most if has_range and option.most < math.inf else None,
        rich_help_panel=PANEL,
    )
    return inspect.Parameter(
        item.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, declared]
    )


def _shown(default: Any) -> str:  # noqa: ANN401 - the default of any field
    return ",".join(default) if isinstance(default, tuple) else str(default)


def _parsed(name: str, value: Any) -> Any:  # noqa: ANN401 - the value of any option
    if isinstance(_OPTIONS[name][0].default, tuple):
        return [part.strip() for part in value.split(",")]
    return value
