from dataclasses import replace

import pytest

from contracts.evidence import AnswerSet, Evidence, Familiar, HeatmapFigures, Similar
from contracts.model import Accepted, Ancestor, Contract, Engine, Figures, Measured, Provenance
from training.data.images import CIFAR10_INPUT
from training.evaluate.card import write_card

CONTRACT = Contract(
    "pets", "1.2.0", ("cat", "dog"), CIFAR10_INPUT, "resnet18_small", engine=Engine("openvino", "int8", 1.3)
)
REPORT = {
    "created": "2026-05-01T12:00:00",
    "accuracy": 0.914,
    "macro": {"f1": 0.9},
    "per_class": {name: {"precision": 0.9, "recall": 0.8, "f1": 0.85} for name in CONTRACT.classes},
    "environment": {"version_torch": "2.13.0", "processor": "2 × Zen"},
    "data": {"name": "pets", "part": "test", "images": 10_000, "sha256": "ab" * 32},
    "expected_calibration_error_before": 0.04,
    "expected_calibration_error": 0.01,
}


def card(report=REPORT, **accepted):
    return write_card(replace(CONTRACT, accepted=Accepted(**accepted)), report)


def test_card_has_the_models_figures_with_what_measured_them():
    text = card()
    assert text.startswith("# pets 1.2.0\n")
    assert "served by the openvino engine in int8, temperature 1.3" in text
    assert "accuracy **91.40%**, macro F1 0.9000. Measured 2026-05-01 with torch 2.13.0 on 2 × Zen" in text
    assert "| dog | 0.900 | 0.800 | 0.850 |" in text
    assert "| test, as served | 0.0400 | 0.0100 |" in text


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("test", "10,000 test images, which decided nothing"),
        ("held-out", "10,000 held-out images, which made the model's choices"),
        ("training", "10,000 images that it learnt from"),
    ],
)
def test_card_says_what_the_images_that_measured_it_had_decided(part, told):
    assert told in card(REPORT | {"data": REPORT["data"] | {"part": part}})


def test_what_was_not_measured_has_no_section():
    text = card()
    for absent in ("## Evidence", "corrupted", "It began with", "CIFAR-10 (Krizhevsky", "held-out images in full"):
        assert absent not in text
    assert "CIFAR-10 (Krizhevsky" in card(REPORT | {"data": REPORT["data"] | {"name": "cifar10"}})


def test_held_out_figures_are_said_to_flatter():
    whole, served = Measured(0.92, 0.05, 0.02), Measured(0.91, 0.06, 0.03)
    figures = Figures(held_out_images=5000, held_out=whole, served=served, engine_agreement=0.985)
    text = card(figures=figures)
    assert "| held out, as served | 0.0600 | 0.0300 |" in text
    assert "full precision: 92.00%; as served: 91.00%, the same class as full precision for 98.50%" in text
    assert "They also chose the epoch, so these figures flatter." in text


def test_a_heatmap_figure_that_could_not_be_measured_is_named_as_such():
    text = card(
        figures=Figures(explanations=HeatmapFigures(half=0.9, insertion=0.7), random_heat=HeatmapFigures(half=0.5))
    )
    assert "| heat in the class's half of a half-and-half image | 0.900 | 0.500 |" in text
    assert "| ROAD | not measured | not measured |" in text


def test_evidence_is_described_by_its_settings_and_the_reason_for_what_is_absent():
    evidence = Evidence(
        Familiar("knn", 5, 2000), Similar(1000, thumbnails=True, accuracy_kept=0.97), AnswerSet(2000),
        absent=(("similar", "the data set has one class"),),
    )  # fmt: skip
    report = REPORT | {"familiarity": {"familiar": 0.94, "accuracy_of_familiar": 0.95, "accuracy_of_unfamiliar": None}}
    text = write_card(replace(CONTRACT, evidence=evidence), report)
    assert "its score (`knn`, k = 5) is as high as that of 95% of 2,000 held-out images" in text
    assert "Of the test images 94.0% are: 95.0% right; the others: no image." in text
    assert "1,000 training images, chosen by herding" in text
    assert "No `similar`: the data set has one class." in text


def provenance(epochs):
    return Provenance("cd" * 32, training_images=45_000, held_out_images=5000, epochs=epochs, duration_s=7200.0,
                      processes=1, environments=({"git_commit": "abc"},))  # fmt: skip


def test_card_tells_of_the_models_that_a_training_began_with():
    before = Accepted(recipe={"rate": 0.7}, provenance=provenance(76))
    text = card(recipe={"rate": 0.1}, provenance=provenance(10), ancestor=Ancestor("cifar10", "0.5.0", before))
    own, earlier = text.split("### cifar10 0.5.0, before that")
    assert "It began with the weights of cifar10 0.5.0." in own
    for part, rate, epochs in ((own, 0.1, 10), (earlier, 0.7, 76)):
        assert f"| epochs | `{epochs}` |" in part
        assert f"| rate | `{rate}` |" in part
        assert "| duration | `2.00 h` |" in part
        assert "| git commit | `abc` |" in part
