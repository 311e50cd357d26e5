"""How versions move: each operation edits the plan, in steps that are true in themselves, and waits for the agents.

Whoever is killed between two steps leaves a plan that is carried out: a version that is loaded and gets no traffic, or
one with more workers than before. Routing changes in one step, by one atomic write.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from contracts import plan as traffic_plan
from control.agents import ask_agent
from control.errors import GateUnusable, ImpossibleMove, NoAgentAnswers, NotFollowed, Refused, RegistryUnusable
from control.release import archive_source, plan_edits, registry
from control.release.plan_store import operator

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from contracts.status import AgentStatus, VersionStatus
    from control.release.accuracy_gate import Gate
    from control.release.plan_store import PlanStore
    from control.signatures import TrustedKeys

LOAD_WITHIN_S = 300.0
FOLLOW_WITHIN_S = 20.0
RETIRE_WITHIN_S = 120.0
NAME_EVERY_S = 5.0
MISSING_AFTER_S = 5.0


class Rollout:
    """One operator's hands: the plan, the agents' addresses, the model store, and where to say what happens.

    With `allow_missing` an agent that is silent for five seconds is left out, as long as another one answers. With
    `trusted` keys only archives that one of them has signed are deployed.
    """

    def __init__(
        self,
        store: PlanStore,
        agents: Sequence[str],
        model_store: Path,
        say: Callable[[str], None],
        *,
        allow_missing: bool = False,
        trusted: TrustedKeys | None = None,
    ) -> None:
        self._store = store
        self._agents = agents
        self._model_store = model_store
        self._say = say
        self._allow_missing = allow_missing
        self._trusted = trusted
        self._left_out: set[str] = set()

    def deploy(
        self,
        what: str,
        *,
        share: float | None = None,
        shadow: bool = False,
        stable: bool = False,
        yes: bool = False,
        gate: Gate | None = None,
    ) -> traffic_plan.Plan:
        """Brings a version in: checked, loaded, verified by every agent, and only then given the role asked for.

        Without a role it stays loaded without traffic.

        Raises:
            ArchiveError, WouldBreakCallers, ImpossibleMove, GateUnusable: refused before the plan was touched.
            Refused: an agent could not load or verify it, or it did not pass the gate; the plan is as it was before.
        """
        with self._store.lock(f"deploy {what}"):
            plan = self._store.read()
            archive = archive_source.fetch(plan, what, self._model_store, self._say, self._trusted)
            archive_source.compare(plan, archive, self._model_store, yes=yes, say=self._say)
            if gate is not None:
                gate.check(archive.classes)
            release = traffic_plan.Release(archive.version, archive.path.name, archive.sha256)
            loaded = plan_edits.retain(plan, release)
            is_new = plan_edits.role_of(plan, release.version) is None
            if is_new:  # else it keeps its traffic until it gets another role
                plan = self._store.write(loaded, f"deploy {release.version}: load")
            self._say(f"{release.version}: loading and verifying")
            self._wait_until_ready(plan, release.version, is_new=is_new)
            who = "every agent that answers" if self._left_out else "every agent"
            self._say(f"{release.version}: {who} computes its reference outputs")
            if gate is not None:
                self._pass(gate, plan, release.version, is_new=is_new)
            if share is not None:
                plan = self._route(plan_edits.give_canary(plan, release.version, share), f"canary {release.version}")
            elif shadow:
                plan = self._route(plan_edits.give_shadow(plan, release.version), f"shadow {release.version}")
            elif stable:
                plan = self._promote(plan, release.version)
            elif not is_new and (idle := plan_edits.retain(plan, release)) != plan:
                plan = self._route(idle, f"{release.version} without traffic")
            return plan

    def promote(self, version: str | None = None, *, expected: int | None = None, **facts: str) -> traffic_plan.Plan:
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

    def rollback(self, *, expected: int | None = None, **facts: str) -> traffic_plan.Plan:
        """Take the canary (else the shadow) out of traffic; without one, go back to the stable version of before.

        A second roll-back goes one stable version further back, never to the version that was left.

        `expected` is the revision that the plan must still have; `facts` go into the audit line.

        Raises:
            ImpossibleMove: there is no stable version of before, or the plan is another by now.
            ArchiveError: that version is not loaded any more, and its archive is gone or another.
            Refused: that version has to be loaded anew and cannot be.
        """
        with self._store.lock("rollback"):
            plan = self._read(expected)
            candidate = plan.canary or plan.shadow
            if candidate is not None:
                release = plan_edits.find(plan, candidate.version)
                return self._route(
                    plan_edits.retain(plan, release), f"rollback {candidate.version}", self._there(), **facts
                )
            if not plan.previous:
                raise ImpossibleMove(
                    f"{plan.stable.version} has no stable version before it to go back to: "
                    "name the version that shall be stable (gradserve promote VERSION)"
                )
            before = plan.previous[0]
            workers = self._stable_workers(plan)
            if plan_edits.role_of(plan, before.version) is None:
                self._say(f"{before.version} is not loaded any more: loading and verifying it first")
                found = archive_source.find_again(before, self._model_store, self._say)
                loaded = plan_edits.retain(plan, replace(found, workers=workers))
                plan = self._store.write(loaded, f"rollback to {before.version}: load")
                self._wait_until_ready(plan, before.version, is_new=True)
            there = self._there()
            self._wait_until_serving(plan, before.version, 1, there)
            back = plan_edits.go_back(plan, before.version, workers=workers)
            plan = self._route(back, f"rollback to {before.version}", there, **facts)
            self._tell_registry(plan)
            return plan

    def retire(self, version: str) -> traffic_plan.Plan:
        """Takes `version` out of the plan and waits until every agent has drained and unregistered it.

        Raises:
            ImpossibleMove: it is stable, or unknown.
            NotFollowed: it is still there after two minutes.
        """
        with self._store.lock(f"retire {version}"):
            plan = self._store.write(plan_edits.remove(self._store.read(), version), f"retire {version}")
            self._say(f"{version}: out of the plan; agents unregister it once it has been idle")
            self._wait(f"retire {version}", lambda status: status.version(version) is None, plan, RETIRE_WITHIN_S)
            return plan

    def scale(self, version: str, workers: int) -> traffic_plan.Plan:
        """Gives `version` so many prediction workers.

        More are there when this returns. Fewer become true when the version is loaded the next time: TorchServe drops
        what a worker it takes away has in hand.

        Raises:
            ImpossibleMove: the plan does not name it.
            NotFollowed: they are not ready in time.
        """
        with self._store.lock(f"scale {version}"):
            plan = self._store.read()
            plan = self._store.write(plan_edits.give_workers(plan, version, workers), f"scale {version} to {workers}")
            self._wait(f"scale {version}", lambda status: _has_workers(status, version, workers), plan, LOAD_WITHIN_S)
            return plan

    def _there(self) -> list[str]:
        """The agents that answer: one that is down must not keep the others from going back."""
        there = [url for url in self._agents if ask_agent(url).status is not None]
        for url in set(self._agents) - set(there):
            self._say(f"WARNING: {url} does not answer: it follows when it is back")
        return there

    def _refuse(self, plan: traffic_plan.Plan, version: str, reason: str, *, is_new: bool) -> None:
        """Takes a version that was refused out of the plan again, if it came in for this."""
        if is_new:
            self._store.write(plan_edits.remove(plan, version), f"{version} refused", reason=reason)
        else:
            self._store.note(f"{version} refused", reason=reason)

    def _pass(self, gate: Gate, plan: traffic_plan.Plan, version: str, *, is_new: bool) -> None:
        """Returns when the version has passed the gate; otherwise leaves the plan as it was before.

        Raises:
            Refused: it has not.
            GateUnusable: most files of the gate's folder are no images.
        """
        self._say(f"{version}: at the gate, beside {plan.stable.version}")
        try:
            accuracies = gate.judge(plan.stable.version, version, self._say)
        except (Refused, GateUnusable) as error:
            reason = error.reason if isinstance(error, Refused) else str(error)
            self._refuse(plan, version, reason, is_new=is_new)
            raise
        self._say(f"{version}: passed the gate, {accuracies}")
        self._store.note(f"{version} passed the gate", gate=str(gate.folder), found=accuracies)

    def _read(self, expected: int | None) -> traffic_plan.Plan:
        plan = self._store.read()
        if expected not in {None, plan.revision}:
            raise ImpossibleMove(f"the plan is at revision {plan.revision} by now, not at {expected}: nothing was done")
        return plan

    def _promote(self, plan: traffic_plan.Plan, version: str, **facts: str) -> traffic_plan.Plan:
        """Gives it as many workers as stable has, waits for them, then routes."""
        workers = self._stable_workers(plan)
        target = plan_edits.make_stable(plan, version, workers=workers)  # refuses before anything is written
        if plan_edits.find(plan, version).workers != workers:
            scaled = plan_edits.give_workers(plan, version, workers)
            plan = self._store.write(scaled, f"promote {version}: workers")
            self._say(f"{version}: waiting for {workers} workers")
            target = plan_edits.make_stable(plan, version, workers=workers)
        self._wait_until_serving(plan, version, workers, self._agents)
        plan = self._route(target, f"promote {version}", **facts)
        self._tell_registry(plan)
        return plan

    def _tell_registry(self, plan: traffic_plan.Plan) -> None:
        """Moves MLflow's aliases after the traffic has moved; where that fails, it is said and noted, and no more."""
        if not registry.is_used():
            return
        stable = plan.stable
        try:
            self._say(registry.tell_champion(plan.model, stable.sha256, home=self._store.home, who=operator()))
        except RegistryUnusable as error:
            self._say(f"WARNING: MLflow was not told that {stable.version} is stable: {error}")
            self._store.note(f"registry not told of {stable.version}", reason=str(error))

    def _route(
        self, plan: traffic_plan.Plan, what: str, agents: Sequence[str] | None = None, **facts: str
    ) -> traffic_plan.Plan:
        """Writes a plan that changes traffic, and waits until all `agents` follow it (gateways read it themselves)."""
        plan = self._store.write(plan, what, **facts)
        self._wait(what, lambda _: True, plan, FOLLOW_WITHIN_S, agents)
        self._say(f"{what}: done, revision {plan.revision}")
        return plan

    def _stable_workers(self, plan: traffic_plan.Plan) -> int:
        """How many prediction workers the stable version has: the plan's word, else what agents give it."""
        if plan.stable.workers is not None:
            return plan.stable.workers
        statuses = [asked.status for asked in map(ask_agent, self._agents)]
        found = [status.version(plan.stable.version) for status in statuses if status is not None]
        return max((version.predict.wanted for version in found if version is not None), default=1)

    def _wait_until_ready(self, plan: traffic_plan.Plan, version: str, *, is_new: bool) -> None:
        """Returns when every agent has it loaded, verified and complete; otherwise leaves the plan as it was before.

        Raises:
            Refused: an agent gave it up, or it took too long.
        """

        def is_ready(status: AgentStatus) -> bool:
            found = status.version(version)
            if found is None:
                return False
            if found.state == "failed":
                raise Refused(version, "loading", found.reason or "")
            if found.state == "degraded" and found.reason and _is_settled(found):
                raise Refused(version, "verification", found.reason)
            return found.state == "ready"

        try:
            self._wait(f"load {version}", is_ready, plan, LOAD_WITHIN_S)
        except Refused as error:
            self._refuse(plan, version, error.reason, is_new=is_new)
            raise
        except (NotFollowed, NoAgentAnswers) as error:
            self._refuse(plan, version, str(error), is_new=is_new)
            raise Refused(version, "loading", str(error)) from error

    def _wait_until_serving(self, plan: traffic_plan.Plan, version: str, workers: int, agents: Sequence[str]) -> None:
        """Returns when the version could take traffic on each of the agents.

        Raises:
            Refused: one of them has given it up.
            NotFollowed: it took too long.
        """

        def serves(status: AgentStatus) -> bool:
            found = status.version(version)
            if found is not None and found.state == "failed":
                raise Refused(version, "routing", found.reason or "")
            return _has_workers(status, version, workers)

        self._wait(f"{version} ready", serves, plan, LOAD_WITHIN_S, agents)

    def _wait(
        self,
        what: str,
        is_done: Callable[[AgentStatus], bool],
        plan: traffic_plan.Plan,
        within_s: float,
        agents: Sequence[str] | None = None,
    ) -> None:
        """Return when every agent (of `agents`, or all) is at the plan's revision and `is_done` with its status.

        Every five seconds the agents that are waited for are named, each with what it said last; while all of them
        answer, only once something has changed.

        Raises:
            NotFollowed: that took longer than `within_s`.
            NoAgentAnswers: missing agents are allowed, and every one is missing.
        """
        asked = list(self._agents if agents is None else agents)
        began = named_at = time.monotonic()
        named = ""
        heard_at = dict.fromkeys(asked, began)
        self._leave_out([], asked)
        waiting = [url for url in asked if url not in self._left_out]
        with ThreadPoolExecutor(max(1, len(asked))) as threads:  # a host that is silent must not hold the others up
            while waiting:
                states, silent = {}, False
                for asked_agent in threads.map(ask_agent, waiting):
                    url, status = asked_agent.url, asked_agent.status
                    if status is None:
                        states[url], silent = asked_agent.error, True
                        continue
                    heard_at[url] = time.monotonic()
                    if status.plan_revision != plan.revision or not is_done(status):
                        states[url] = _progress(status, plan)
                now = time.monotonic()
                if self._allow_missing:
                    self._leave_out([url for url in states if now - heard_at[url] > MISSING_AFTER_S], asked)
                waiting = [url for url in states if url not in self._left_out]
                state = "; ".join(f"{url} {states[url]}" for url in waiting)
                if waiting and now - began > within_s:
                    raise NotFollowed(what, within_s, state)
                if waiting and now - named_at > NAME_EVERY_S and (silent or state != named):
                    named_at, named = now, state
                    self._say(f"{what}: waiting for {state}")
                if waiting:
                    time.sleep(0.1)

    def _leave_out(self, silent: Sequence[str], asked: Sequence[str]) -> None:
        """Go on without the agents in `silent`.

        Raises:
            NoAgentAnswers: none of those `asked` is left.
        """
        for url in silent:
            self._say(f"WARNING: {url} does not answer: left out; it follows the plan when it is back")
        self._left_out |= set(silent)
        if asked and self._left_out >= set(asked):
            raise NoAgentAnswers(asked)


def _progress(status: AgentStatus, plan: traffic_plan.Plan) -> str:
    """Return what an agent that answers has still to do, to stand behind its address."""
    revision = status.plan_revision
    return "has not done it yet" if revision == plan.revision else f"is at revision {revision} of {plan.revision}"


def _is_settled(found: VersionStatus) -> bool:
    """Return True if it has all its workers, or TorchServe did not even take the explainers in."""
    is_complete = all(pool.ready >= pool.wanted for pool in (found.predict, found.explain))
    return is_complete or found.explain.capacity is None


def _has_workers(status: AgentStatus, version: str, workers: int) -> bool:
    found = status.version(version)
    return found is not None and found.routable and found.predict.ready >= workers
