"""The operations of a rollout: each edits the plan in steps and waits until the agents have carried them out.

Every step leaves a valid plan. A command that is killed between two steps leaves a version that is loaded and gets no
traffic, or one with more workers than before. Routing changes in one step, by one atomic write.
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
from control.release.plan_folder import operator

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
REPORT_EVERY_S = 5.0
MISSING_AFTER_S = 5.0


class Rollout:
    """The operations on one plan, with the addresses of its agents, its model store, and `say`, which prints progress.

    With `allow_missing` an agent that is silent for five seconds is left out, as long as another one answers. With
    `trusted` keys only archives signed by one of them are deployed.
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
        """Deploy a version: check it, load and verify it on every agent, and only then give it its role.

        Without a role it is loaded without traffic.

        Raises:
            ArchiveError, WouldBreakCallers, ImpossibleMove, GateUnusable: refused before the plan was changed.
            Refused: an agent could not load or verify it, or it did not pass the gate; the plan is restored.
        """
        with self._store.lock(f"deploy {what}"):
            plan = self._store.read()
            archive = archive_source.fetch(plan, what, self._model_store, self._say, self._trusted)
            archive_source.compare(plan, archive, self._model_store, yes=yes, say=self._say)
            if gate is not None:
                gate.check(archive.classes)
            release = traffic_plan.Release(
                archive.version, archive.path.name, archive.sha256, source=archive_source.source_of(what)
            )
            loaded = plan_edits.retain(plan, release)
            is_new = plan_edits.role_of(plan, release.version) is None
            if is_new:  # a known version keeps its traffic until it gets another role
                plan = self._store.write(loaded, f"deploy {release.version}: load")
            self._say(f"{release.version}: loading and verifying")
            self._wait_until_ready(plan, release.version, is_new=is_new)
            agents = "every agent that answers" if self._left_out else "every agent"
            self._say(f"{release.version}: {agents} computes its reference outputs")
            if gate is not None:
                self._check_gate(gate, plan, release.version, is_new=is_new)
            if share is not None:
                plan = self._route(plan_edits.set_canary(plan, release.version, share), f"canary {release.version}")
            elif shadow:
                plan = self._route(plan_edits.set_shadow(plan, release.version), f"shadow {release.version}")
            elif stable:
                plan = self._promote(plan, release.version)
            elif not is_new and (idle := plan_edits.retain(plan, release)) != plan:
                plan = self._route(idle, f"{release.version} without traffic")
            return plan

    def add_model(self, what: str, *, workers: int | None = None) -> traffic_plan.Plan:
        """Add the model of the archive `what` to the plan, with its version as the stable one, and wait for the agents.

        Callers name it by `model=`. The other models keep their plans; without a number of workers in the plan, all
        models share the agents' workers equally.

        Raises:
            ArchiveError: refused before the plan was changed.
            Refused: an agent could not load or verify it; the plan is restored.
        """
        with self._store.lock(f"add {what}"):
            archive = archive_source.fetch_new(what, self._model_store, self._trusted)
            release = traffic_plan.Release(
                archive.version, archive.path.name, archive.sha256, workers, archive_source.source_of(what)
            )
            name = archive.contract.name
            plan = self._store.write(traffic_plan.Plan(0, name, release), f"add {name} {release.version}")
            self._say(f"{name} {release.version}: loading and verifying")
            try:
                self._wait_until_ready(plan, release.version, is_new=False)
            except Refused:
                self._store.remove_model(name, f"{name} removed: {release.version} was refused")
                raise
            self._say(f"{name}: serves, revision {plan.revision}; callers name it by model={name}")
            return plan

    def remove_model(self, name: str) -> None:
        """Remove a model with all its versions from the plan, and wait until every agent has unregistered them.

        Raises:
            ModelNotPlanned: the plan has no such model.
            ImpossibleMove: it is the default model.
            NotFollowed: an agent still has one of them after two minutes.
        """
        with self._store.lock(f"remove {name}"):
            plan = self._store.read()
            revision = self._store.remove_model(name, f"remove {name}").revision
            self._say(f"{name}: removed from the plan; the agents unregister its versions once they are idle")

            def is_gone(status: AgentStatus) -> bool:
                return not any(found.model == name for found in status.versions)

            self._wait(f"remove {name}", is_gone, replace(plan, revision=revision), RETIRE_WITHIN_S)

    def promote(self, version: str | None = None, *, expected: int | None = None, **facts: str) -> traffic_plan.Plan:
        """Make `version` (default: the canary, else the shadow) stable; the old stable version stays loaded.

        `expected` is the revision that the plan must have; `facts` are added to the audit line.

        Raises:
            ImpossibleMove: there is no version to promote, or the plan has another revision.
            NotFollowed: its workers were not ready in time.
        """
        with self._store.lock(f"promote {version or 'canary'}"):
            plan = self._read(expected)
            candidate = plan.canary or plan.shadow
            if version is None and candidate is None:
                raise ImpossibleMove("there is neither canary nor shadow: name the version to promote")
            return self._promote(plan, version or (candidate.version if candidate else ""), **facts)

    def rollback(self, *, expected: int | None = None, **facts: str) -> traffic_plan.Plan:
        """Take the canary (else the shadow) out of traffic; without one, go back to the previous stable version.

        A second rollback goes one stable version further back, never to the version that was left.

        `expected` is the revision that the plan must have; `facts` are added to the audit line.

        Raises:
            ImpossibleMove: there is no previous stable version, or the plan has another revision.
            ArchiveError: the version has to be loaded again, and its archive is missing or changed.
            Refused: the version has to be loaded again, and an agent could not load it.
        """
        with self._store.lock("rollback"):
            plan = self._read(expected)
            candidate = plan.canary or plan.shadow
            if candidate is not None:
                release = plan_edits.find(plan, candidate.version)
                return self._route(
                    plan_edits.retain(plan, release), f"rollback {candidate.version}", self._answering_agents(), **facts
                )
            if not plan.previous:
                raise ImpossibleMove(
                    f"there is no stable version before {plan.stable.version} to go back to: "
                    "name a version to make stable (gradserve promote VERSION)"
                )
            before = plan.previous[0]
            workers = self._stable_workers(plan)
            if plan_edits.role_of(plan, before.version) is None:
                self._say(f"{before.version} is not loaded: loading and verifying it first")
                found = archive_source.find_again(before, self._model_store, self._say)
                loaded = plan_edits.retain(plan, replace(found, workers=workers))
                plan = self._store.write(loaded, f"rollback to {before.version}: load")
                self._wait_until_ready(plan, before.version, is_new=True)
            answering = self._answering_agents()
            self._wait_until_serving(plan, before.version, 1, answering)
            back = plan_edits.go_back(plan, before.version, workers=workers)
            plan = self._route(back, f"rollback to {before.version}", answering, **facts)
            self._update_registry(plan)
            return plan

    def retire(self, version: str) -> traffic_plan.Plan:
        """Remove `version` from the plan and wait until every agent has drained and unregistered it.

        Raises:
            ImpossibleMove: the version is stable or unknown.
            NotFollowed: an agent still has it after two minutes.
        """
        with self._store.lock(f"retire {version}"):
            plan = self._store.write(plan_edits.remove(self._store.read(), version), f"retire {version}")
            self._say(f"{version}: removed from the plan; the agents unregister it once it is idle")
            self._wait(
                f"retire {version}", lambda status: status.version(plan.model, version) is None, plan, RETIRE_WITHIN_S
            )
            return plan

    def scale(self, version: str, workers: int) -> traffic_plan.Plan:
        """Give `version` `workers` prediction workers.

        Added workers are ready when this returns. Fewer workers take effect when the version is loaded the next time,
        because TorchServe drops the requests of a worker that it removes. With 0 the version is unloaded once it is
        idle, and stays in the plan.

        Raises:
            ImpossibleMove: the plan does not name the version.
            NotFollowed: the workers are not ready in time.
        """
        with self._store.lock(f"scale {version}"):
            plan = self._store.read()
            plan = self._store.write(plan_edits.set_workers(plan, version, workers), f"scale {version} to {workers}")
            self._wait(
                f"scale {version}",
                lambda status: _has_workers(status, plan.model, version, workers),
                plan,
                LOAD_WITHIN_S,
            )
            return plan

    def _answering_agents(self) -> list[str]:
        """Return the agents that answer: one that is down must not delay the others' rollback."""
        answering = [url for url in self._agents if ask_agent(url).status is not None]
        for url in set(self._agents) - set(answering):
            self._say(f"WARNING: {url} does not answer: it follows the plan when it is back")
        return answering

    def _refuse(self, plan: traffic_plan.Plan, version: str, reason: str, *, is_new: bool) -> None:
        """Remove a refused version from the plan, if this deploy added it; write an audit line."""
        if is_new:
            self._store.write(plan_edits.remove(plan, version), f"{version} refused", reason=reason)
        else:
            self._store.note(f"{version} refused", reason=reason)

    def _check_gate(self, gate: Gate, plan: traffic_plan.Plan, version: str, *, is_new: bool) -> None:
        """Compare the version with the stable one at the gate; restore the plan if it does not pass.

        Raises:
            Refused: the version does not pass.
            GateUnusable: more than half of the files in the gate's folder are no images.
        """
        self._say(f"{version}: at the gate, compared with {plan.stable.version}")
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
            raise ImpossibleMove(f"the plan has revision {plan.revision}, not {expected}: nothing was changed")
        return plan

    def _promote(self, plan: traffic_plan.Plan, version: str, **facts: str) -> traffic_plan.Plan:
        """Give the version as many workers as the stable one, wait for them, then route."""
        workers = self._stable_workers(plan)
        target = plan_edits.make_stable(plan, version, workers=workers)  # raises before anything is written
        if plan_edits.find(plan, version).workers != workers:
            scaled = plan_edits.set_workers(plan, version, workers)
            plan = self._store.write(scaled, f"promote {version}: workers")
            self._say(f"{version}: waiting for {workers} workers")
            target = plan_edits.make_stable(plan, version, workers=workers)
        self._wait_until_serving(plan, version, workers, self._agents)
        plan = self._route(target, f"promote {version}", **facts)
        self._update_registry(plan)
        return plan

    def _update_registry(self, plan: traffic_plan.Plan) -> None:
        """Move MLflow's aliases after the traffic; a failure only gives a warning and an audit line."""
        if not registry.is_used():
            return
        stable = plan.stable
        try:
            self._say(registry.move_champion(plan.model, stable.sha256, home=self._store.home, who=operator()))
        except RegistryUnusable as error:
            self._say(f"WARNING: MLflow's aliases were not moved to {stable.version}: {error}")
            self._store.note(f"registry not updated for {stable.version}", reason=str(error))

    def _route(
        self, plan: traffic_plan.Plan, what: str, agents: Sequence[str] | None = None, **facts: str
    ) -> traffic_plan.Plan:
        """Write a plan that changes traffic and wait until all `agents` follow it (gateways read it themselves)."""
        plan = self._store.write(plan, what, **facts)
        self._wait(what, lambda _: True, plan, FOLLOW_WITHIN_S, agents)
        self._say(f"{what}: done, revision {plan.revision}")
        return plan

    def _stable_workers(self, plan: traffic_plan.Plan) -> int:
        """Return the stable version's number of prediction workers: the plan's, else the agents' largest."""
        if plan.stable.workers is not None:
            return plan.stable.workers
        statuses = [asked.status for asked in map(ask_agent, self._agents)]
        found = [status.version(plan.model, plan.stable.version) for status in statuses if status is not None]
        return max((version.predict.wanted for version in found if version is not None), default=1)

    def _wait_until_ready(self, plan: traffic_plan.Plan, version: str, *, is_new: bool) -> None:
        """Return once every agent has loaded and verified the version with all its workers; else restore the plan.

        Raises:
            Refused: an agent gave the version up, or it took too long.
        """

        def is_ready(status: AgentStatus) -> bool:
            found = status.version(plan.model, version)
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
        """Return once the version can take traffic on each of the agents.

        Raises:
            Refused: an agent gave the version up.
            NotFollowed: it took too long.
        """

        def serves(status: AgentStatus) -> bool:
            found = status.version(plan.model, version)
            if found is not None and found.state == "failed":
                raise Refused(version, "routing", found.reason or "")
            return _has_workers(status, plan.model, version, workers)

        self._wait(f"{version} ready", serves, plan, LOAD_WITHIN_S, agents)

    def _wait(
        self,
        what: str,
        is_done: Callable[[AgentStatus], bool],
        plan: traffic_plan.Plan,
        within_s: float,
        agents: Sequence[str] | None = None,
    ) -> None:
        """Return once every agent (of `agents`, or all) has the plan's revision and `is_done` is true of its status.

        Every five seconds `say` gets the agents that are not done, each with its last state; while all of them answer,
        only if a state has changed.

        Raises:
            NotFollowed: it took longer than `within_s`.
            NoAgentAnswers: missing agents are allowed, and none answers.
        """
        asked = list(self._agents if agents is None else agents)
        began = reported_at = time.monotonic()
        reported = ""
        heard_at = dict.fromkeys(asked, began)
        self._leave_out([], asked)
        waiting = [url for url in asked if url not in self._left_out]
        with ThreadPoolExecutor(max(1, len(asked))) as threads:  # a silent host must not delay the others
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
                if waiting and now - reported_at > REPORT_EVERY_S and (silent or state != reported):
                    reported_at, reported = now, state
                    self._say(f"{what}: still waiting, because {state}")
                if waiting:
                    time.sleep(0.1)

    def _leave_out(self, silent: Sequence[str], asked: Sequence[str]) -> None:
        """Continue without the agents in `silent`.

        Raises:
            NoAgentAnswers: no agent of `asked` is left.
        """
        for url in silent:
            self._say(f"WARNING: {url} does not answer: left out; it follows the plan when it is back")
        self._left_out |= set(silent)
        if asked and self._left_out >= set(asked):
            raise NoAgentAnswers(asked)


def _progress(status: AgentStatus, plan: traffic_plan.Plan) -> str:
    """Return the state of an agent that answers and is not done, as the end of a sentence."""
    revision = status.plan_revision
    return "is not done yet" if revision == plan.revision else f"is at revision {revision} of {plan.revision}"


def _is_settled(found: VersionStatus) -> bool:
    """Return True if the version has all its workers, or TorchServe refused its explain entry."""
    is_complete = all(pool.ready >= pool.wanted for pool in (found.predict, found.explain))
    return is_complete or found.explain.capacity is None


def _has_workers(status: AgentStatus, model: str, version: str, workers: int) -> bool:
    found = status.version(model, version)
    if not workers:
        return found is None
    return found is not None and found.routable and found.predict.ready >= workers
