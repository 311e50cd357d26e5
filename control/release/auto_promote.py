"""`promote --auto`: compare a version on trial with the stable one, then promote it, roll it back or leave it.

The last comparison, at the end of the window, decides. Earlier ones can only roll back, and at a far stricter
significance, so that repeated tests do not take chance for a fault (the Haybittle-Peto boundary).

Source: Haybittle 1971, https://doi.org/10.1259/0007-1285-44-526-793
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from control.errors import ImpossibleMove, MetricsUnreadable
from control.release.gateway_metrics import read_counts
from control.release.verdict import Limits, Verdict, judge

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from contracts import plan as traffic_plan
    from control.release.gateway_metrics import Counts
    from control.release.plan_store import PlanStore
    from control.release.rollout import Rollout

_COMPARE_EVERY_S = 5.0
_REPORT_EVERY_S = 30.0
_EARLY_SIGNIFICANCE = 0.001


@dataclass(frozen=True)
class Window:
    """The gateways whose counts are compared, the API key for them, and the length of the comparison."""

    gateways: Sequence[str]
    key: str | None
    seconds: float


def promote_or_roll_back(
    rollout: Rollout,
    store: PlanStore,
    version: str | None,
    *,
    window: Window,
    limits: Limits,
    say: Callable[[str], None],
) -> tuple[Verdict, traffic_plan.Plan]:
    """Compare the canary (else the shadow) with the stable version, act on the verdict and write it to the audit log.

    The operators' lock is not held meanwhile: a change of the plan ends the comparison without a verdict.

    Raises:
        ImpossibleMove: no version is on trial, or another one than `version`.
        MetricsUnreadable: the counts of a gateway cannot be read.
    """
    plan = store.read()
    trial = plan.canary or plan.shadow
    if trial is None:
        raise ImpossibleMove("no version is on trial: deploy a version with --canary or --shadow first")
    if version not in {None, trial.version}:
        raise ImpossibleMove(f"{version} is not on trial, {trial.version} is")
    role = "canary" if plan.canary else "shadow"
    say(f"comparing {role} {trial.version} with {plan.stable.version} for {window.seconds:g} s")
    verdict = _compare(store, plan, trial.version, window=window, limits=limits, say=say)
    reason = "; ".join(verdict.reasons)
    say(f"verdict on {trial.version}: {verdict.decision}: {reason}")
    store.note(f"judged {trial.version}", role=role, window_s=window.seconds, verdict=verdict.facts())
    if verdict.decision == "promote":
        plan = rollout.promote(trial.version, expected=plan.revision, reason=reason)
    elif verdict.decision == "rollback":
        plan = rollout.rollback(expected=plan.revision, reason=reason)
    return verdict, plan


def _compare(
    store: PlanStore, plan: traffic_plan.Plan, trial: str, *, window: Window, limits: Limits, say: Callable[[str], None]
) -> Verdict:
    """Return the verdict at the end of the window, or an earlier rollback."""
    stable, is_shadow = plan.stable.version, plan.canary is None
    first = read_counts(window.gateways, window.key, plan.model)
    began = reported_at = time.monotonic()
    strict = replace(limits, significance=_EARLY_SIGNIFICANCE)
    while True:
        left_s = began + window.seconds - time.monotonic()
        time.sleep(max(0.0, min(_COMPARE_EVERY_S, left_s)))
        if store.read().revision != plan.revision:
            return Verdict("none", ("the plan was changed during the comparison",))
        is_last = left_s <= _COMPARE_EVERY_S
        try:
            counts = read_counts(window.gateways, window.key, plan.model).since(first)
        except MetricsUnreadable:
            if is_last:
                raise
            continue
        if counts is None:
            return Verdict("none", ("a gateway was restarted during the comparison",))
        verdict = judge(counts, stable, trial, limits if is_last else strict, is_shadow=is_shadow)
        if is_last or verdict.decision == "rollback":
            return verdict
        if (now := time.monotonic()) - reported_at >= _REPORT_EVERY_S:
            reported_at = now
            say(f"after {now - began:.0f} s: {_progress(counts, stable, trial)}")


def _progress(counts: Counts, stable: str, trial: str) -> str:
    """Return the counts so far, in a line."""
    pairs = counts.pairs(trial)
    lines = [
        f"{version} {requests} requests, {failed} failed"
        for version, (requests, failed) in ((v, counts.requests(v)) for v in (trial, stable))
    ]
    if any(pairs.values()):
        lines.append(f"pairs {', '.join(f'{count} {outcome}' for outcome, count in pairs.items())}")
    return "; ".join(lines)
