"""The flags of `gradserve train` follow from the recipe's fields."""

from dataclasses import fields
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from control.cli.hyper_parameters import with_hyper_parameters
from training.recipe import Recipe, option_of, recipe_from_dict

TABLES = {"sizes", "cycles", "augmentation"}  # fields that only a TOML file can set
OTHERS: dict[str, Any] = {
    "data": "imagefolder:photos", "name": "photos", "architecture": "resnet18", "pretrained": "imagenet",
    "unfreeze": ("layer4", "fc"), "nesterov": False, "precision": "fp32",
    "cuda_graphs": True,
}  # fmt: skip


def passed(*arguments: str) -> dict[str, Any]:
    """Return the values that a command receives from these arguments."""
    received: dict[str, Any] = {}
    app = typer.Typer()

    @app.command()
    @with_hyper_parameters
    def train(output: str = "there", *, given: dict[str, Any]) -> None:
        received.update(given, output=output)

    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return received


@pytest.mark.parametrize(
    "item", [item for item in fields(Recipe) if item.name not in TABLES], ids=lambda item: item.name
)
def test_each_hyper_parameter_has_help_and_flags_whose_value_reaches_the_recipe(item):
    option = option_of(item)
    assert option.help
    value = OTHERS[item.name] if item.name in OTHERS else item.default + 1
    for flag in option.flags or (item.name.replace("_", "-"),):
        text = ",".join(value) if isinstance(value, tuple) else str(value)
        switch = {False: [f"--no-{flag}"], True: [f"--{flag}"]}
        received = passed(*(switch[value] if isinstance(value, bool) else [f"--{flag}", text]))
        assert received.keys() == {item.name, "output"}
        assert getattr(recipe_from_dict({item.name: received[item.name]}), item.name) == value


def test_flags_that_are_not_set_are_not_passed_and_other_options_are_unchanged():
    assert passed() == {"output": "there"}
    assert passed("--output", "here", "--lr", "0.3") == {"output": "here", "rate": 0.3}
