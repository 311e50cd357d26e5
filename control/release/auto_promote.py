"""`promote --auto`: a version on trial is watched beside the stable one, then promoted, rolled back, or left as it is.

The last look, at the window's end, decides. Looks before it only stop what is plainly bad, by a far stricter level, so
that looking often does not make chance look like a fault (the Haybittle-Peto boundary).

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

_LOOK_EVERY_S = 5.0
_TELL_EVERY_S = 30.0
_EARLY_SIGNIFICANCE = 0.001


@dataclass(frozen=True)
class Window:
    """Whom to ask what was counted, with which key, and for how long to watch."""

    gateways: Sequence[str]
    key: str | None
    seconds: float


def settle(
    rollout: Rollout,
    store: PlanStore,
    version: str | None,
    *,
    window: Window,
    limits: Limits,
    say: Callable[[str], None],
) -> tuple[Verdict, traffic_plan.Plan]:
    """Watches the canary (else the shadow), acts on the verdict, and writes down what it rests on.

    Nobody is kept from moving versions meanwhile; whoever does ends the watch without a verdict.

    Raises:
        ImpossibleMove: there is nothing on trial, or something else than `version`.
        MetricsUnreadable: a gateway does not tell what it has counted.
    """
    plan = store.read()
    trial = plan.canary or plan.shadow
    if trial is None:
        raise ImpossibleMove("nothing is on trial: deploy a version with --canary or --shadow first")
    if version not in {None, trial.version}:
        raise ImpossibleMove(f"{version} is not on trial, {trial.version} is")
    role = "canary" if plan.canary else "shadow"
    say(f"watching {role} {trial.version} beside {plan.stable.version} for {window.seconds:g} s")
    verdict = _watch(store, plan, trial.version, window=window, limits=limits, say=say)
    reason = "; ".join(verdict.reasons)
    say(f"verdict on {trial.version}: {verdict.decision}: {reason}")
    store.note(f"judged {trial.version}", role=role, window_s=window.seconds, verdict=verdict.facts())
    if verdict.decision == "promote":
        plan = rollout.promote(trial.version, expected=plan.revision, reason=reason)
    elif verdict.decision == "rollback":
        plan = rollout.rollback(expected=plan.revision, reason=reason)
    return verdict, plan


def _watch(
    store: PlanStore, plan: traffic_plan.Plan, trial: str, *, window: Window, limits: Limits, say: Callable[[str], None]
) -> Verdict:
    """The verdict after the window, or at the first look that leaves no doubt."""
    stable, is_shadow = plan.stable.version, plan.canary is None
    first = read_counts(window.gateways, window.key)
    began = told = time.monotonic()
    strict = replace(limits, significance=_EARLY_SIGNIFICANCE)
    while True:
        left_s = began + window.seconds - time.monotonic()
        time.sleep(max(0.0, min(_LOOK_EVERY_S, left_s)))
        if store.read().revision != plan.revision:
            return Verdict("none", ("the plan was changed while it was watched",))
        is_last = left_s <= _LOOK_EVERY_S
        try:
            counts = read_counts(window.gateways, window.key).since(first)
        except MetricsUnreadable:
            if is_last:
                raise
            continue
        if counts is None:
            return Verdict("none", ("a gateway was started anew while it was watched",))
        verdict = judge(counts, stable, trial, limits if is_last else strict, is_shadow=is_shadow)
        if is_last or verdict.decision == "rollback":
            return verdict
        if (now := time.monotonic()) - told >= _TELL_EVERY_S:
            told = now
            say(f"after {now - began:.0f} s: {_progress(counts, stable, trial)}")


def _progress(counts: Counts, stable: str, trial: str) -> str:
    """What was counted so far, in a line."""
    pairs = counts.pairs(trial)
    lines = [
        f"{version} {requests} requests, {failed} failed"
        for version, (requests, failed) in ((v, counts.requests(v)) for v in (trial, stable))
    ]
    if any(pairs.values()):
        lines.append(f"pairs {', '.join(f'{count} {outcome}' for outcome, count in pairs.items())}")
    return "; ".join(lines)
