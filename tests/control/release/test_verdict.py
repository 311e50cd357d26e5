"""The statistics equal scipy's; verdicts on counts in a gateway's format."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from control.release.gateway_metrics import Counts, parse_metrics
from control.release.verdict import Limits, binomial_at_least, fisher_exact, judge

LIMITS = Limits(requests=100)


@settings(deadline=None)
@given(st.integers(0, 400), st.integers(0, 400), st.integers(0, 4000), st.integers(0, 4000))
def test_fishers_exact_test_equals_scipys(failed, good, others_failed, others_good):
    expected = stats.fisher_exact([[failed, good], [others_failed, others_good]], alternative="greater").pvalue
    got = fisher_exact(failed, failed + good, others_failed, others_failed + others_good)
    assert got == pytest.approx(expected, rel=1e-6, abs=1e-12)


@settings(deadline=None)
@given(st.integers(0, 3000), st.integers(1, 3000), st.floats(0.001, 0.999))
def test_the_binomial_tail_equals_scipys(successes, trials, probability):
    expected = stats.binom.sf(successes - 1, trials, probability)
    assert binomial_at_least(successes, trials, probability) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_the_tails_stay_exact_for_a_million_requests():
    assert fisher_exact(30, 100_000, 90, 900_000) == pytest.approx(
        stats.fisher_exact([[30, 99_970], [90, 899_910]], alternative="greater").pvalue, rel=1e-6
    )


def metrics(*versions, pairs=None):
    """The counts of versions, each (name, successful answers by upper bound in seconds, failed)."""
    lines = []
    for name, times, failed in versions:
        labels = f'version="{name}",kind="predict"'
        good = sum(times.values())
        lines += [
            f'gateway_version_requests_total{{{labels},outcome="ok"}} {good}',
            f'gateway_version_requests_total{{{labels},outcome="handler_failed"}} {failed}',
            f'gateway_version_requests_total{{{labels},outcome="saturated"}} 1000',
            f'gateway_version_requests_total{{{labels},outcome="image_unreadable"}} 1000',
        ]
        for bound in (0.01, 0.02, 0.04, 0.08, float("inf")):
            within = sum(count for upper, count in times.items() if upper <= bound)
            le = "+Inf" if bound == float("inf") else bound
            lines.append(f'gateway_model_seconds_bucket{{{labels},le="{le}"}} {within}')
    for outcome, count in (pairs or {}).items():
        lines.append(f'gateway_shadow_images_total{{version="2.0",outcome="{outcome}"}} {count}')
    return Counts(parse_metrics("\n".join(lines) + "\n"))


def verdict(*versions, pairs=None, limits=LIMITS):
    return judge(metrics(*versions, pairs=pairs), "1.0", "2.0", limits, is_shadow=pairs is not None)


STABLE = ("1.0", {0.01: 880, 0.02: 20}, 0)


def test_an_equal_canary_is_promoted_and_caller_errors_and_refusals_under_load_do_not_count():
    found = verdict(STABLE, ("2.0", {0.01: 98, 0.02: 2}, 0))
    assert (found.decision, len(found.findings)) == ("promote", 2)


def test_a_canary_that_fails_more_is_rolled_back():
    found = verdict(STABLE, ("2.0", {0.01: 95}, 5))
    assert found.decision == "rollback"
    assert found.reasons[0].startswith("failed 5 of 100, stable 0 of 900")


def test_one_failure_in_a_hundred_is_chance():
    assert verdict(STABLE, ("2.0", {0.01: 99}, 1)).decision == "promote"


def test_a_canary_that_fails_as_often_as_the_stable_version_is_promoted():
    assert verdict(("1.0", {0.01: 850}, 50), ("2.0", {0.01: 94}, 6)).decision == "promote"


def test_a_slow_canary_is_rolled_back_and_one_within_the_allowance_is_not():
    slow = verdict(STABLE, ("2.0", {0.01: 90, 0.08: 10}, 0))
    assert slow.decision == "rollback"
    assert "10 of 100 answers (predict) took longer than 1.5 times" in slow.reasons[0]
    assert "p99 within 80 ms, stable's within 20 ms" in slow.reasons[0]
    allowed = Limits(requests=100, slower=4)
    assert verdict(STABLE, ("2.0", {0.01: 90, 0.08: 10}, 0), limits=allowed).decision == "promote"
    assert verdict(STABLE, ("2.0", {0.01: 98, 0.08: 2}, 0)).decision == "promote", "2 of 100 where 1 is expected"


@pytest.mark.parametrize("versions", [(STABLE,), (STABLE, ("2.0", {0.01: 0}, 99)), (("2.0", {0.01: 500}, 0),)])
def test_too_few_requests_give_no_verdict_even_if_all_failed(versions):
    found = verdict(*versions)
    assert found.decision == "none"
    assert "100 are needed" in found.reasons[0]


def test_a_shadow_is_judged_by_its_pairs():
    good = {"agree": 960, "disagree": 40, "failed": 0, "dropped": 500}
    assert verdict(STABLE, pairs=good).decision == "promote"
    other = verdict(STABLE, pairs=good | {"agree": 800, "disagree": 200})
    assert other.decision == "rollback"
    assert "another class in 200 of 1000 pairs, allowed 10.0%" in other.reasons[0]
    assert verdict(STABLE, pairs=good | {"failed": 30}).decision == "rollback"
    assert verdict(STABLE, pairs={"agree": 50, "disagree": 0, "failed": 0, "dropped": 900}).decision == "none"


def test_a_trial_whose_answers_all_pass_the_largest_bound_is_not_promoted_beside_a_slow_stable_version():
    stable, trial = ("1.0", {0.01: 900, float("inf"): 100}, 0), ("2.0", {float("inf"): 1000}, 0)
    assert verdict(stable, trial).decision == "rollback"
