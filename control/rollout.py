"""How versions move: each operation edits the plan, in steps that are true in themselves, and waits for the agents.

Whoever is killed between two steps leaves a plan that is carried out: a version that is loaded and gets no traffic, or
one with more workers than before. Routing changes in one step, by one atomic write.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from control import moves, registry
from control.archive import Archive, file_sha256, inspect_archive
from control.errors import (
    ArchiveError,
    ImpossibleMove,
    NotFollowed,
    Refused,
    RegistryUnusable,
    WouldBreakCallers,
)
from control.overview import ask_agent
from control.releases import operator
from gateway import traffic

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from control.gate import Gate
    from control.releases import PlanStore

LOAD_WITHIN_S = 300.0
FOLLOW_WITHIN_S = 20.0
RETIRE_WITHIN_S = 120.0


class Rollout:
    """One operator's hands: the plan, the agents' addresses, the model store, and where to say what happens."""

    def __init__(self, store: PlanStore, agents: Sequence[str], model_store: Path, say: Callable[[str], None]) -> None:
        self._store = store
        self._agents = agents
        self._model_store = model_store
        self._say = say

    def deploy(
        self,
        what: str,
        *,
        share: float | None = None,
        shadow: bool = False,
        stable: bool = False,
        yes: bool = False,
        gate: Gate | None = None,
    ) -> traffic.Plan:
        """Brings a version in: checked, loaded, verified by every agent, and only then given the role asked for.

        Without a role it stays loaded without traffic.

        Raises:
            ArchiveError, WouldBreakCallers, ImpossibleMove, GateUnusable: refused before the plan was touched.
            Refused: an agent could not load or verify it, or it did not pass the gate; it is out of the plan again.
        """
        with self._store.lock(f"deploy {what}"):
            plan = self._store.read()
            archive = self._fetch(plan, what)
            self._compare(plan, archive, yes=yes)
            if gate is not None:
                gate.check(archive.classes)
            release = traffic.Release(archive.version, archive.path.name, archive.sha256)
            loaded = moves.retain(plan, release)
            if loaded != plan:
                plan = self._store.write(loaded, f"deploy {release.version}: load")
            self._say(f"{release.version}: loading and verifying")
            self._wait_until_ready(plan, release.version)
            self._say(f"{release.version}: every agent computes its reference outputs")
            if gate is not None:
                self._pass(gate, plan, release.version)
            if share is not None:
                plan = self._route(moves.give_canary(plan, release.version, share), f"canary {release.version}")
            elif shadow:
                plan = self._route(moves.give_shadow(plan, release.version), f"shadow {release.version}")
            elif stable:
                plan = self._promote(plan, release.version)
            return plan

    def promote(self, version: str | None = None, *, expected: int | None = None, **facts: str) -> traffic.Plan:
        """Makes `version` (default: the canary, else the shadow) stable; the old stable version stays loaded.

        `expected` is the revision that the plan must still have; `facts` go into the audit line.

        Raises:
            ImpossibleMove: there is none to promote, or the plan is another by now.
            NotFollowed: it did not get its workers in time.
        """
        with self._store.lock(f"promote {version or 'canary'}"):
            plan = self._read(expected)
            candidate = plan.canary or plan.shadow
            if version is None and candidate is None:
                raise ImpossibleMove("there is neither canary nor shadow: name the version to promote")
            return self._promote(plan, version or (candidate.version if candidate else ""), **facts)

    def rollback(self, *, expected: int | None = None, **facts: str) -> traffic.Plan:
        """Takes the canary (else the shadow) out of traffic; without one, makes the version stable that was before.

        `expected` is the revision that the plan must still have; `facts` go into the audit line.

        Raises:
            ImpossibleMove: there was no other stable version, or the plan is another by now.
            Refused: that version has to be loaded anew and cannot be.
        """
        with self._store.lock("rollback"):
            plan = self._read(expected)
            candidate = plan.canary or plan.shadow
            if candidate is not None:
                release = moves.find(plan, candidate.version)
                return self._route(moves.retain(plan, release), f"rollback {candidate.version}", **facts)
            before = self._store.stable_before(plan)
            if before is None:
                raise ImpossibleMove(f"{plan.stable.version} is the first stable version: there is none to go back to")
            workers = self._stable_workers(plan)
            if moves.role_of(plan, before.version) is None:
                self._say(f"{before.version} is not loaded any more: loading and verifying it first")
                loaded = moves.retain(plan, replace(before, workers=workers))
                plan = self._store.write(loaded, f"rollback to {before.version}: load")
                self._wait_until_ready(plan, before.version)
            # One agent that is down must not keep the others from going back.
            there = [url for url in self._agents if "error" not in ask_agent(url)]
            self._wait_until_serving(plan, before.version, 1, there)
            back = moves.make_stable(plan, before.version, workers=workers)
            plan = self._route(back, f"rollback to {before.version}", **facts)
            self._tell_registry(plan)
            return plan

    def retire(self, version: str) -> traffic.Plan:
        """Takes `version` out of the plan and waits until every agent has drained and unregistered it.

        Raises:
            ImpossibleMove: it is stable, or unknown.
            NotFollowed: it is still there after two minutes.
        """
        with self._store.lock(f"retire {version}"):
            plan = self._store.write(moves.remove(self._store.read(), version), f"retire {version}")
            self._say(f"{version}: out of the plan; agents unregister it once it has been idle")
            self._wait(f"retire {version}", lambda status: _find(status, version) is None, plan, RETIRE_WITHIN_S)
            return plan

    def scale(self, version: str, workers: int) -> traffic.Plan:
        """Gives `version` so many prediction workers.

        More are there when this returns. Fewer become true when the version is loaded the next time: TorchServe drops
        what a worker it takes away has in hand.

        Raises:
            ImpossibleMove: the plan does not name it.
            NotFollowed: they are not ready in time.
        """
        with self._store.lock(f"scale {version}"):
            plan = self._store.read()
            plan = self._store.write(moves.give_workers(plan, version, workers), f"scale {version} to {workers}")
            self._wait(f"scale {version}", lambda status: _has_workers(status, version, workers), plan, LOAD_WITHIN_S)
            return plan

    def _fetch(self, plan: traffic.Plan, what: str) -> Archive:
        """The checked archive that `what` names (registered, a file, a version in the model store), in the store."""
        if reference := registry.parse_reference(what):
            return self._fetch_registered(plan, reference)
        given = Path(what)
        path = given if given.suffix == ".mar" else self._model_store / f"{plan.model}-{what}.mar"
        return self._keep(plan, inspect_archive(path, _checksum_beside(path)))

    def _fetch_registered(self, plan: traffic.Plan, reference: registry.Reference) -> Archive:
        """The registered archive; downloaded unless these very bytes are in the model store."""
        if reference.name != plan.model:
            raise ImpossibleMove(f"the plan is of {plan.model}, not of {reference.name}")
        release = registry.find(reference)
        self._say(f"models:/{release.name}/{release.number} is {release.version}")
        home = self._model_store / f"{plan.model}-{release.version}.mar"
        if home.is_file() and file_sha256(home) == release.sha256:
            return self._keep(plan, inspect_archive(home, release.sha256))
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=self._model_store) as folder:
            path = registry.fetch(release, Path(folder))
            return self._keep(plan, inspect_archive(path, release.sha256))

    def _keep(self, plan: traffic.Plan, archive: Archive) -> Archive:
        """The checked archive, in the model store."""
        path = archive.path
        if archive.contract["name"] != plan.model:
            raise ArchiveError(path, f"holds the model {archive.contract['name']}, the plan is of {plan.model}")
        home = self._model_store / f"{plan.model}-{archive.version}.mar"
        if path.resolve() != home.resolve():
            if home.exists() and inspect_archive(home).sha256 != archive.sha256:
                raise ArchiveError(path, f"{home.name} is in the model store with other bytes: use a new version")
            partial = home.with_suffix(".partial")
            shutil.copyfile(path, partial)
            partial.replace(home)
        return replace(archive, path=home)

    def _compare(self, plan: traffic.Plan, archive: Archive, *, yes: bool) -> None:
        stable = inspect_archive(self._model_store / plan.stable.archive)
        differences = contract_differences(stable.contract, archive.contract)
        if differences and not yes:
            raise WouldBreakCallers(archive.version, differences)
        for difference in differences:
            self._say(f"{archive.version}: {difference} (accepted with --yes)")

    def _pass(self, gate: Gate, plan: traffic.Plan, version: str) -> None:
        """Returns when the version has passed the gate; otherwise takes it out of the plan again.

        Raises:
            Refused: it has not.
        """
        self._say(f"{version}: at the gate, beside {plan.stable.version}")
        try:
            accuracies = gate.judge(plan.stable.version, version)
        except Refused as error:
            self._store.write(moves.remove(plan, version), f"{version} refused", reason=error.reason)
            raise
        self._say(f"{version}: passed the gate, {accuracies}")
        self._store.note(f"{version} passed the gate", gate=str(gate.folder), found=accuracies)

    def _read(self, expected: int | None) -> traffic.Plan:
        plan = self._store.read()
        if expected not in {None, plan.revision}:
            raise ImpossibleMove(f"the plan is at revision {plan.revision} by now, not at {expected}: nothing was done")
        return plan

    def _promote(self, plan: traffic.Plan, version: str, **facts: str) -> traffic.Plan:
        """Gives it as many workers as stable has, waits for them, then routes."""
        workers = self._stable_workers(plan)
        target = moves.make_stable(plan, version, workers=workers)  # refuses before anything is written
        if moves.find(plan, version).workers != workers:
            scaled = moves.give_workers(plan, version, workers)
            plan = self._store.write(scaled, f"promote {version}: workers")
            self._say(f"{version}: waiting for {workers} workers")
            target = moves.make_stable(plan, version, workers=workers)
        self._wait_until_serving(plan, version, workers, self._agents)
        plan = self._route(target, f"promote {version}", **facts)
        self._tell_registry(plan)
        return plan

    def _tell_registry(self, plan: traffic.Plan) -> None:
        """Moves MLflow's aliases after the traffic has moved; where that fails, it is said and noted, and no more."""
        if not registry.is_used():
            return
        stable = plan.stable
        try:
            self._say(registry.tell_champion(plan.model, stable.sha256, home=self._store.home, who=operator()))
        except RegistryUnusable as error:
            self._say(f"WARNING: MLflow was not told that {stable.version} is stable: {error}")
            self._store.note(f"registry not told of {stable.version}", reason=str(error))

    def _route(self, plan: traffic.Plan, what: str, **facts: str) -> traffic.Plan:
        """Writes a plan that changes traffic, and waits until every agent follows it (gateways read it themselves)."""
        plan = self._store.write(plan, what, **facts)
        self._wait(what, lambda _: True, plan, FOLLOW_WITHIN_S)
        self._say(f"{what}: done, revision {plan.revision}")
        return plan

    def _stable_workers(self, plan: traffic.Plan) -> int:
        """How many prediction workers the stable version has: the plan's word, else what agents give it."""
        if plan.stable.workers is not None:
            return plan.stable.workers
        found = [_find(status, plan.stable.version) for status in map(ask_agent, self._agents)]
        return max((version["predict"]["wanted"] for version in found if version is not None), default=1)

    def _wait_until_ready(self, plan: traffic.Plan, version: str) -> None:
        """Returns when every agent has it loaded, verified and complete; otherwise takes it out of the plan again.

        Raises:
            Refused: an agent gave it up, or it took too long.
        """

        def is_ready(status: dict[str, Any]) -> bool:
            found = _find(status, version)
            if found is not None and found["state"] == "failed":
                raise Refused(version, "loading", found["reason"])
            if found is not None and found["state"] == "degraded" and found["reason"] and _is_complete(found):
                raise Refused(version, "verification", found["reason"])
            return found is not None and found["state"] == "ready"

        try:
            self._wait(f"load {version}", is_ready, plan, LOAD_WITHIN_S)
        except Refused as error:
            self._store.write(moves.remove(plan, version), f"{version} refused", reason=error.reason)
            raise
        except NotFollowed as error:
            self._store.write(moves.remove(plan, version), f"{version} refused", reason=str(error))
            raise Refused(version, "loading", str(error)) from error

    def _wait_until_serving(self, plan: traffic.Plan, version: str, workers: int, agents: Sequence[str]) -> None:
        """Returns when the version could take traffic on each of the agents.

        Raises:
            Refused: one of them has given it up.
            NotFollowed: it took too long.
        """

        def serves(status: dict[str, Any]) -> bool:
            found = _find(status, version)
            if found is not None and found["state"] == "failed":
                raise Refused(version, "routing", found["reason"])
            return _has_workers(status, version, workers)

        self._wait(f"{version} ready", serves, plan, LOAD_WITHIN_S, agents)

    def _wait(
        self,
        what: str,
        is_done: Callable[[dict[str, Any]], bool],
        plan: traffic.Plan,
        within_s: float,
        agents: Sequence[str] | None = None,
    ) -> None:
        """Returns when every agent (of `agents`, or all) is at the plan's revision and `is_done` with its status.

        Raises:
            NotFollowed: that took longer than `within_s`.
        """
        began, waiting = time.monotonic(), list(self._agents if agents is None else agents)
        state = ""
        while waiting:
            for url in list(waiting):
                status = ask_agent(url)
                state = status.get("error") or f"{url} is at revision {status.get('plan_revision')}"
                if "error" not in status and status["plan_revision"] == plan.revision and is_done(status):
                    waiting.remove(url)
            if waiting and time.monotonic() - began > within_s:
                raise NotFollowed(what, within_s, state)
            if waiting:
                time.sleep(0.1)


def contract_differences(stable: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What callers of the stable version would notice, each as a sentence's part."""
    differences = []
    gone = [name for name in stable["classes"] if name not in new["classes"]]
    added = [name for name in new["classes"] if name not in stable["classes"]]
    if gone or added:
        differences.append(f"classes gone: {', '.join(gone) or 'none'}, new: {', '.join(added) or 'none'}")
    methods = [m for m in stable["explain"].get("methods", []) if m not in new["explain"].get("methods", [])]
    if methods:
        differences.append(f"explanation methods gone: {', '.join(methods)}")
    sizes = [f"{contract['input']['width']}x{contract['input']['height']}" for contract in (stable, new)]
    if sizes[0] != sizes[1]:
        differences.append(f"input size {sizes[1]} instead of {sizes[0]} (heatmaps as numbers have that size)")
    return differences


def _find(status: dict[str, Any], version: str) -> dict[str, Any] | None:
    return next((found for found in status.get("versions", []) if found["version"] == version), None)


def _is_complete(found: dict[str, Any]) -> bool:
    return all(found[kind]["ready"] >= found[kind]["wanted"] for kind in ("predict", "explain"))


def _has_workers(status: dict[str, Any], version: str, workers: int) -> bool:
    found = _find(status, version)
    return found is not None and found["routable"] and found["predict"]["ready"] >= workers


def _checksum_beside(path: Path) -> str | None:
    """The SHA-256 in the file `<archive>.sha256`, if there is one."""
    try:
        return path.with_name(f"{path.name}.sha256").read_text(encoding="ascii").split()[0]
    except (OSError, IndexError, UnicodeDecodeError):
        return None
