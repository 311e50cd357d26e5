"""The verdict on a version on trial, from its counts and the stable version's. Nothing is changed here.

Errors: Fisher's exact test, one-sided, of its failures against the stable version's in the same time.
Times: the exact binomial test of a quantile, one-sided: did more than 1 % of its answers take longer than the stable
version's 99th percentile (the upper bound of its bucket) times the allowed factor?
Disagreement, of a shadow: the exact binomial test, one-sided: did it name another class more often than allowed?

Sources: Fisher 1935, The Design of Experiments; Conover 1999, Practical Nonparametric Statistics, sections 3.1 and 3.2.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from control.release.gateway_metrics import Counts

_QUANTILE = 0.99


@dataclass(frozen=True)
class Limits:
    """The limits that the version on trial has to keep."""

    requests: int = 500
    """Requests (of a shadow: pairs) that each version needs for a verdict."""
    significance: float = 0.01
    """A difference counts if its p-value is below this."""
    slower: float = 1.5
    """Allowed factor on the stable version's p99."""
    disagreement: float = 0.1
    """Allowed share of pairs with another class, 0 to 1."""


@dataclass(frozen=True)
class Finding:
    """The result of one test: the observation as a sentence, and its p-value."""

    about: str
    text: str
    p: float


@dataclass(frozen=True)
class Verdict:
    """`promote`, `rollback`, or `none` without enough requests; with its reasons and findings."""

    decision: Literal["promote", "rollback", "none"]
    reasons: tuple[str, ...]
    findings: tuple[Finding, ...] = ()

    def facts(self) -> dict[str, Any]:
        """Return the verdict as JSON-able data, for the audit log."""
        return asdict(self)


def judge(counts: Counts, stable: str, trial: str, limits: Limits, *, is_shadow: bool) -> Verdict:
    """Return the verdict on the version `trial`, by the counts of it and of `stable` in the same time."""
    pairs = counts.pairs(trial)
    of_stable = counts.requests(stable)
    compared = pairs["agree"] + pairs["disagree"]
    of_trial = (compared + pairs["failed"], pairs["failed"]) if is_shadow else counts.requests(trial)
    too_few = [
        f"{version} has {count} {what}, {limits.requests} are needed"
        for version, count, what in (
            (trial, of_trial[0], "pairs" if is_shadow else "requests"),
            (stable, of_stable[0], "requests"),
        )
        if count < limits.requests
    ]
    if too_few:
        return Verdict("none", tuple(too_few))
    findings = [_errors(of_trial, of_stable)]
    if is_shadow:
        findings.append(_disagreement(pairs["disagree"], compared, limits.disagreement))
    else:
        findings += _times(counts, stable, trial, limits)
    return conclude(findings, limits.significance)


def conclude(findings: list[Finding], significance: float) -> Verdict:
    """Return `rollback` if a finding's p-value is below `significance`, else `promote`."""
    bad = [finding for finding in findings if finding.p < significance]
    reasons = tuple(f"{finding.text} (p = {finding.p:.2g})" for finding in bad or findings)
    return Verdict("rollback" if bad else "promote", reasons, tuple(findings))


def _errors(trial: tuple[int, int], stable: tuple[int, int]) -> Finding:
    p = fisher_exact(trial[1], trial[0], stable[1], stable[0])
    return Finding("errors", f"failed {trial[1]} of {trial[0]}, stable {stable[1]} of {stable[0]}", p)


def _disagreement(disagree: int, compared: int, allowed: float) -> Finding:
    p = binomial_at_least(disagree, compared, allowed)
    return Finding("disagreement", f"another class in {disagree} of {compared} pairs, allowed {allowed:.1%}", p)


def _times(counts: Counts, stable: str, trial: str, limits: Limits) -> list[Finding]:
    """Return one finding about the kind of request that the trial answered most; none without answers of both."""
    kind = counts.kind(trial)
    of_stable, of_trial = counts.times(stable, kind), counts.times(trial, kind)
    if not of_stable.count or not of_trial.count:
        return []
    p99, own = of_stable.quantile_bound(_QUANTILE), of_trial.quantile_bound(_QUANTILE)
    # Above the histogram's largest bound no two answers can be told apart: there the trial has to be within it.
    largest = max((bound for bound in of_trial.bounds if math.isfinite(bound)), default=math.inf)
    slow = of_trial.slower_than(min(p99 * limits.slower, largest))
    p = binomial_at_least(slow, of_trial.count, 1 - _QUANTILE)
    text = (
        f"{slow} of {of_trial.count} answers ({kind}) took longer than {limits.slower:g} times stable's p99; "
        f"p99 within {1000 * own:.0f} ms, stable's within {1000 * p99:.0f} ms"
    )
    return [Finding("times", text, p)]


def fisher_exact(failed: int, of: int, others_failed: int, of_others: int) -> float:
    """Return the p-value of `failed` failures of `of`, where the others had `others_failed` of `of_others`.

    It is the upper tail of the hypergeometric distribution: all failures, distributed at random over both groups.
    """
    failures, total = failed + others_failed, of + of_others
    most = min(failures, of)
    logs = [
        _log_choose(of, k) + _log_choose(of_others, failures - k) - _log_choose(total, failures)
        for k in range(max(failed, failures - of_others), most + 1)
    ]
    return min(1.0, math.fsum(map(math.exp, logs)))


def binomial_at_least(successes: int, trials: int, probability: float) -> float:
    """Return the probability of at least `successes` in `trials`, each with `probability` in (0, 1)."""
    if successes <= 0:
        return 1.0
    hit, miss = math.log(probability), math.log1p(-probability)
    logs = [_log_choose(trials, k) + k * hit + (trials - k) * miss for k in range(successes, trials + 1)]
    return min(1.0, math.fsum(map(math.exp, logs)))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
