"""The model card: what a version is, how it was made, how well it does, and what it must not be used for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from handlers.contract import Contract

_CIFAR10 = """\
CIFAR-10 (Krizhevsky 2009): 60,000 colour pictures of 32×32 pixels in ten classes. Its authors ask whoever uses it to
cite [Learning Multiple Layers of Features from Tiny
Images](https://www.cs.toronto.edu/~kriz/learning-features-2009-TR.pdf). It was drawn from 80 Million Tiny Images, which
its makers withdrew in 2020 for offensive content and labels; CIFAR-10's labels were checked by hand."""

_LIMITS = """\
- It always answers one of its classes, also for a picture of something else.
- It has seen pictures of the training data's size only; larger ones are squashed to it, whatever their proportions.
- Confidence is calibrated on pictures like the training data's, not on others.
- Do not use it where a wrong answer harms anybody. It is a demonstration and a baseline."""


def write_card(contract: Contract, report: dict[str, Any]) -> str:
    """The card as Markdown, from the contract and the report that `evaluate` wrote about the same weights."""
    accepted = contract.accepted
    parts = [
        f"# {contract.name} {contract.version}",
        _summary(contract),
        "## Figures",
        _test_figures(report),
        *([_held_out_figures(accepted)] if "held_out_images" in accepted else []),
        "## Recipe",
        "\n".join(f"- {key}: `{value}`" for key, value in accepted.get("recipe", {}).items()),
        f"Measured with torch {report['environment']['version_torch']} on {report['environment']['processor']}.",
        "## Data",
        f"{report['data']['name']}; SHA-256 of the decoded test part: `{report['data']['sha256']}`.",
        *([_CIFAR10] if report["data"]["name"] == "cifar10" else []),
        "## Limits",
        _LIMITS,
    ]
    return "\n\n".join(parts) + "\n"


def _summary(contract: Contract) -> str:
    size, engine = contract.input, contract.engine
    return (
        f"{contract.architecture}, {len(contract.classes)} classes, {size.width}×{size.height} pixels; served by the "
        f"{engine.name} engine in {engine.precision}, temperature {engine.temperature}. Made {contract.created}."
    )


def _test_figures(report: dict[str, Any]) -> str:
    rows = (
        f"| {name} | {row['precision']:.3f} | {row['recall']:.3f} | {row['f1']:.3f} |"
        for name, row in report["per_class"].items()
    )
    return (
        f"On the {report['data']['images']:,} test pictures, which decided nothing: accuracy "
        f"**{report['accuracy']:.2%}**, macro F1 {report['macro']['f1']:.4f}, expected calibration error "
        f"{report['expected_calibration_error']:.4f} (15 bins).\n\n"
        "| class | precision | recall | F1 |\n|---|---|---|---|\n" + "\n".join(rows)
    )


def _held_out_figures(accepted: dict[str, Any]) -> str:
    figures = (
        f"On the {accepted['held_out_images']:,} held-out pictures, which chose the epoch and the temperature, in full "
        f"precision: accuracy {accepted['held_out_accuracy']:.2%}, calibration error "
        f"{accepted['held_out_calibration_error']:.4f} ({accepted['held_out_calibration_error_before']:.4f} before the "
        "temperature)."
    )
    if "engine_held_out_accuracy" not in accepted:
        return figures
    figures += (
        f" As served: accuracy {accepted['engine_held_out_accuracy']:.2%}, calibration error "
        f"{accepted['engine_held_out_calibration_error']:.4f}, agreement {accepted['engine_agreement']:.2%} "
        "(more in gate.json)."
    )
    return f"{figures}\n\n{_explained_otherwise(accepted)}"


def _explained_otherwise(accepted: dict[str, Any]) -> str:
    share = accepted["explainer_disagreement"]
    return (
        "Class and confidence are the serving engine's, heatmaps those of the full-precision network for that class. "
        f"The two name different classes for {share:.2%} of these pictures "
        f"({round(share * accepted['held_out_images']):,})."
    )
