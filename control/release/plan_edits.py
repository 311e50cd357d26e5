"""The changes of a traffic plan, as functions from plan to plan. Each version has one role."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import TypeVar

from contracts.plan import MAX_PREVIOUS, Canary, Plan, Release
from control.errors import ImpossibleMove

_AnyRelease = TypeVar("_AnyRelease", bound=Release)


def find(plan: Plan, version: str) -> Release:
    """Return the version's entry in the plan, without its role.

    Raises:
        ImpossibleMove: the plan does not name the version.
    """
    for release in plan.releases():
        if release.version == version:
            return Release(release.version, release.archive, release.sha256, release.workers, release.source)
    known = ", ".join(release.version for release in plan.releases())
    raise ImpossibleMove(f"{version} is not in the plan ({known}): deploy it first")


def role_of(plan: Plan, version: str) -> str | None:
    """Return the version's role: `stable`, `canary`, `shadow` or `retained`; None if the plan does not name it."""
    named = {"stable": plan.stable, "canary": plan.canary, "shadow": plan.shadow}
    for role, release in named.items():
        if release is not None and release.version == version:
            return role
    return "retained" if any(release.version == version for release in plan.retained) else None


def retain(plan: Plan, release: Release) -> Plan:
    """Return the plan with `release` retained: loaded and without traffic.

    Raises:
        ImpossibleMove: it is the stable version, or the plan names the version with other bytes.
    """
    role = role_of(plan, release.version)
    if role is None:
        return replace(plan, retained=(*plan.retained, release))
    if find(plan, release.version).sha256 != release.sha256:
        raise ImpossibleMove(f"{release.version} is in the plan with other bytes: give the new build a new version")
    if role == "stable":
        raise ImpossibleMove(f"{release.version} is already the stable version")
    return _without_role(plan, release.version, keep=True)


def set_canary(plan: Plan, version: str, share: float) -> Plan:
    """Return the plan with `version` as canary of `share` per cent; a canary that gets more keeps its callers.

    Raises:
        ImpossibleMove: the version is stable or unknown, or there is another canary.
    """
    release = find(plan, version)
    _refuse_stable(plan, version)
    if plan.canary is not None and plan.canary.version != version:
        raise ImpossibleMove(f"{plan.canary.version} is the canary: promote it or roll it back first")
    salt = plan.canary.salt if plan.canary is not None else secrets.token_hex(8)
    canary = Canary(version, release.archive, release.sha256, release.workers, release.source, share=share, salt=salt)
    return replace(_without_role(plan, version, keep=False), canary=canary)


def set_shadow(plan: Plan, version: str) -> Plan:
    """Return the plan with `version` as shadow.

    Raises:
        ImpossibleMove: the version is stable or unknown, or there is another shadow.
    """
    release = find(plan, version)
    _refuse_stable(plan, version)
    if plan.shadow is not None and plan.shadow.version != version:
        raise ImpossibleMove(f"{plan.shadow.version} is the shadow: roll it back first")
    return replace(_without_role(plan, version, keep=False), shadow=release)


def make_stable(plan: Plan, version: str, *, workers: int | None) -> Plan:
    """Return the plan with `version` stable and the former stable version retained, both with `workers` workers.

    The former stable version keeps its workers, so that going back only changes the routing. It becomes the first of
    `plan.previous`, the versions that `go_back` returns to.

    Raises:
        ImpossibleMove: `version` is already stable, or unknown.
    """
    routed = _with_stable(plan, version, workers)
    previous = (plan.stable, *(release for release in plan.previous if release.version != version))
    return replace(routed, previous=previous[:MAX_PREVIOUS])


def go_back(plan: Plan, version: str, *, workers: int | None) -> Plan:
    """Return the plan with `version`, one of `plan.previous`, stable again.

    `version` and the later stable versions leave that list. So a second call goes one version further back, never to
    the version that was left.

    Raises:
        ImpossibleMove: `version` is already stable, or unknown.
    """
    routed = _with_stable(plan, version, workers)
    versions = [release.version for release in plan.previous]
    return replace(routed, previous=plan.previous[versions.index(version) + 1 :])


def _with_stable(plan: Plan, version: str, workers: int | None) -> Plan:
    release = find(plan, version)
    _refuse_stable(plan, version)
    rest = _without_role(plan, version, keep=False)
    before = replace(plan.stable, workers=workers)
    return replace(rest, stable=replace(release, workers=workers), retained=(before, *rest.retained))


def set_workers(plan: Plan, version: str, workers: int) -> Plan:
    """Return the plan with `workers` prediction workers for `version`.

    Raises:
        ImpossibleMove: the plan does not name the version.
    """
    find(plan, version)

    def scaled(release: _AnyRelease) -> _AnyRelease:
        return replace(release, workers=workers) if release.version == version else release

    return replace(
        plan,
        stable=scaled(plan.stable),
        canary=scaled(plan.canary) if plan.canary else None,
        shadow=scaled(plan.shadow) if plan.shadow else None,
        retained=tuple(scaled(release) for release in plan.retained),
    )


def remove(plan: Plan, version: str) -> Plan:
    """Return the plan without `version`.

    Raises:
        ImpossibleMove: the version is stable or unknown.
    """
    find(plan, version)
    _refuse_stable(plan, version)
    return _without_role(plan, version, keep=False)


def _without_role(plan: Plan, version: str, *, keep: bool) -> Plan:
    """Return the plan with `version` out of its role: retained if `keep`, else removed."""
    release = find(plan, version)
    kept = (release,) if keep else ()
    return replace(
        plan,
        canary=None if plan.canary and plan.canary.version == version else plan.canary,
        shadow=None if plan.shadow and plan.shadow.version == version else plan.shadow,
        retained=(*(other for other in plan.retained if other.version != version), *kept),
    )


def _refuse_stable(plan: Plan, version: str) -> None:
    if plan.stable.version == version:
        raise ImpossibleMove(f"{version} is the stable version: promote another one or roll back first")
