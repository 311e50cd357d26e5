"""Ratios are taken within a round, and are given as median, least and most."""

from pathlib import Path

from benchmarks.mechanisms import REFERENCE, compare, parse_variant


def figures(good_per_s: float, p99_ms: float = 10.0) -> dict[str, float]:
    return {"good_per_s": good_per_s, "p99_ms": p99_ms, "failed_share": 0.0}


def test_ratios_are_those_within_a_round() -> None:
    rounds = {
        REFERENCE: [figures(100), figures(200), figures(400)],
        "slow": [figures(50, 20), figures(150), figures(100, 5)],
    }
    slow = compare(rounds)["slow"]
    assert slow["good_per_s"] == [100, 50, 150]
    assert slow["times_good_per_s"] == [0.5, 0.25, 0.75]
    assert slow["times_p99_ms"] == [1, 0.5, 2]


def test_a_round_without_any_answer_has_no_ratio() -> None:
    rounds = {REFERENCE: [figures(0, 0)], "fast": [figures(50)]}
    assert compare(rounds)["fast"]["times_good_per_s"] == []


def test_a_variant_names_its_folder_and_its_settings() -> None:
    assert parse_variant("one process=/tmp/one,GATEWAY_WORKERS=1") == (
        "one process", Path("/tmp/one"), {"GATEWAY_WORKERS": "1"},
    )  # fmt: skip
