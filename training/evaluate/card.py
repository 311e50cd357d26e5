"""The model card: what a version is, how it was made, how well it does, and what it must not be used for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contracts.model import Accepted, Contract, Figures, Measured, Provenance

_CIFAR10 = """\
CIFAR-10 (Krizhevsky 2009): 60,000 colour images of 32×32 pixels in ten classes. Its authors ask whoever uses it to
cite [Learning Multiple Layers of Features from Tiny
Images](https://www.cs.toronto.edu/~kriz/learning-features-2009-TR.pdf). It was drawn from 80 Million Tiny Images, which
its makers withdrew in 2020 for offensive content and labels; CIFAR-10's labels were checked by hand."""

_LIMITS = """\
- It always answers one of its classes, also for an image of something else.
- It has seen images of the training data's size only; larger ones are squashed to it, whatever their proportions.
- Confidence is calibrated on images like the training data's, not on others.
- Do not use it where a wrong answer harms anybody. It is a demonstration and a baseline."""


def write_card(contract: Contract, report: dict[str, Any]) -> str:
    """The card as Markdown, from the contract and the report that `evaluate` made about the same weights."""
    accepted = contract.accepted
    parts = [
        f"# {contract.name} {contract.version}",
        _summary(contract),
        "## Figures",
        _test_figures(report),
        _corrupted(report),
        "## Calibration",
        _calibration(contract, report),
        "## Explanations",
        _explanations(contract, report),
        "## Training",
        *_trainings(accepted),
        "## Data",
        _data(report, accepted.figures),
        "## Limits",
        _LIMITS,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


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
    environment, data = report["environment"], report["data"]
    which = {
        "test": "test images, which decided nothing",
        "held-out": "held-out images, which made the model's choices",
        "training": "images that it learnt from",
    }[data["part"]]
    return (
        f"On the {data['images']:,} {which}, as served: accuracy "
        f"**{report['accuracy']:.2%}**, macro F1 {report['macro']['f1']:.4f}. Measured {report['created'][:10]} with "
        f"torch {environment['version_torch']} on {environment['processor']}.\n\n"
        "| class | precision | recall | F1 |\n|---|---:|---:|---:|\n" + "\n".join(rows)
    )


def _corrupted(report: dict[str, Any]) -> str:
    if "corrupted" not in report:
        return ""
    measured = report["corrupted"]
    rows = "\n".join(
        f"| {kind.replace('_', ' ')} | {row['accuracy']:.3f} | {row['expected_calibration_error']:.3f} |"
        for kind, row in measured["kinds"].items()
    )
    return (
        f"On {measured['images']:,} of them corrupted in 15 kinds and five severities, as served: accuracy "
        f"**{measured['accuracy']:.1%}**, calibration error {measured['expected_calibration_error']:.3f}. The "
        "corruptions are drawn by the rules of [CIFAR-10-C](https://arxiv.org/abs/1903.12261); figures on its own "
        f"files differ somewhat.\n\n| corruption | accuracy | calibration error |\n|---|---:|---:|\n{rows}"
    )


def _calibration(contract: Contract, report: dict[str, Any]) -> str:
    """Calibration errors before and after the temperature, on the images that fitted it and on the test images."""
    figures = contract.accepted.figures
    rows = [
        (
            f"{report['data']['part']}, as served",
            report["expected_calibration_error_before"],
            report["expected_calibration_error"],
        )
    ]
    text = "Expected calibration error in 15 bins; the temperature divides the logits before the softmax"
    if figures.held_out is not None:
        text += f" and was fitted on the {figures.held_out_images:,} held-out images"
        rows.append(_calibration_row("held out, full precision", figures.held_out))
    if figures.served is not None:
        rows.append(_calibration_row("held out, as served", figures.served))
    table = "\n".join(f"| {name} | {before:.4f} | {after:.4f} |" for name, before, after in rows)
    parts = [f"{text}.", f"| images | temperature 1 | fitted temperature |\n|---|---:|---:|\n{table}"]
    if figures.held_out is not None:
        parts.append(_held_out_accuracy(figures, figures.held_out))
    return "\n\n".join(parts)


def _calibration_row(name: str, measured: Measured) -> tuple[str, float, float]:
    return name, measured.calibration_error_before, measured.calibration_error


def _held_out_accuracy(figures: Figures, held_out: Measured) -> str:
    text = f"Accuracy on the held-out images in full precision: {held_out.accuracy:.2%}"
    if figures.served is not None:
        text += (
            f"; as served: {figures.served.accuracy:.2%}, the same class as full precision for "
            f"{figures.engine_agreement:.2%} (more in gate.json)"
        )
    return f"{text}. They also chose the epoch, so these figures flatter."


def _explanations(contract: Contract, report: dict[str, Any]) -> str:
    choice, figures = contract.explain, contract.accepted.figures
    parts = [f"Heatmaps come from `{choice.layer}` by `{choice.method}`, unless a caller asks for another method."]
    if figures.explain_images:
        parts[0] += (
            f" Both were chosen on {figures.explain_images} held-out images, among the candidates in explanations.json."
        )
    if figures.explain_class_correlation is not None:
        parts[0] += (
            " The heatmaps for an image's first and second class have a rank correlation of "
            f"{figures.explain_class_correlation:.2f} on held-out images; near 1 they would say nothing about the "
            "class."
        )
    if measured := report.get("explanation"):
        parts.append(_measured_explanation(measured, report["data"]["part"]))
    if figures.explainer_disagreement is not None:
        share = figures.explainer_disagreement
        parts.append(
            "Class and confidence are the serving engine's, heatmaps those of the full-precision network for that "
            f"class. The two name different classes for {share:.2%} of the held-out images "
            f"({round(share * (figures.held_out_images or 0)):,})."
        )
    return "\n\n".join(parts)


def _measured_explanation(measured: dict[str, Any], part: str) -> str:
    rows = "\n".join(
        f"| {name} | {row['deletion_area']:.3f} | {row['insertion_area']:.3f} | {row['score']:.3f} |"
        for name, row in (
            ("heatmaps", measured),
            ("heatmap of another image", measured["stranger"]),
            ("random order", measured["random"]),
        )
    )
    randomised = ", ".join(f"{name} {value:.2f}" for name, value in measured["randomised"].items())
    return (
        f"On {measured['images']} {part} images, confidence as the hottest pixels are greyed (deletion: less is "
        "better) or restored into the blurred image (insertion: more is better), as areas under the curves "
        "([Petsiuk et al. 2018](https://arxiv.org/abs/1806.07421)):\n\n"
        f"| pixels in the order of | deletion | insertion | difference |\n|---|---:|---:|---:|\n{rows}\n\n"
        "Rank correlation with the heatmaps of a network whose weights are random from the head down to a layer "
        f"([Adebayo et al. 2018](https://arxiv.org/abs/1810.03292)): {randomised}. Heatmaps of different images: "
        f"{measured['stranger_similarity']:.2f}; of an image's first and second class: "
        f"{measured['class_similarity']:.2f}."
    )


def _trainings(accepted: Accepted) -> list[str]:
    """The model's training, then those of the models that it began with, the last one first."""
    parts = [_training(accepted.provenance), _table("hyper-parameter", _flat(accepted.recipe or {}))]
    ancestor = accepted.ancestor
    if ancestor is None:
        return parts
    name = f"{ancestor.name} {ancestor.version}"
    return [f"It began with the weights of {name}.", *parts, f"### {name}, before that", *_trainings(ancestor.accepted)]


def _training(provenance: Provenance | None) -> str:
    """Return lines on the training's environment; older runs have none."""
    if provenance is None:
        return ""
    names = ("epochs", "training_images", "held_out_images", "processes")
    facts = {
        "duration": f"{provenance.duration_s / 3600:.2f} h",
        **{name: f"{getattr(provenance, name):,}" for name in names},
        "SHA-256 of the decoded training images": provenance.data_sha256,
    }
    tables = [_table("training", facts)]
    tables += [_table("trained with", environment) for environment in provenance.environments]
    return "\n\n".join(tables)


def _data(report: dict[str, Any], figures: Figures) -> str:
    data = report["data"]
    parts = [f"{data['name']}; SHA-256 of the decoded {data['part']} part: `{data['sha256']}`."]
    if figures.held_out_images is not None:
        parts[0] += (
            f" {figures.held_out_images:,} of the training images were held out and made every choice: epoch, "
            "temperatures, precision, layer and method of the heatmaps."
        )
    if data["name"] == "cifar10":
        parts.append(_CIFAR10)
    return "\n\n".join(parts)


def _table(title: str, facts: dict[str, Any]) -> str:
    if not facts:
        return ""
    rows = "\n".join(f"| {name.replace('_', ' ')} | `{value}` |" for name, value in facts.items())
    return f"| {title} | |\n|---|---|\n{rows}"


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}: ") if isinstance(value, dict) else {prefix + key: value}
    return flat
