"""Bring one TorchServe to the plan and keep it there: observe, decide and act, twice a second.

The plan outlives a restart of TorchServe. Each version has at most one step under way, in a task of its own: a version
that loads slowly delays neither another version nor the observation.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

from contracts.names import EXPLAIN_SUFFIX
from control.agent.archive_cache import ArchiveCache
from control.agent.deployment import Deployment, Kind, Role, Step, Wanted, missing_defaults, next_step
from control.agent.gateway_reports import GatewayReports
from control.agent.torchserve.priority import WorkerPriority, can_restore_priority
from control.agent.verification import verify_explanation, verify_predictions
from control.archive import copy_name, inspect_copy, load_trusted_keys
from control.errors import (
    ArchiveError,
    ClusterUnusable,
    ManagementError,
    MissingExtra,
    SigningKeyError,
    VerificationError,
)
from gateway.kubernetes.errors import NotInCluster
from gateway.kubernetes.plan_object import watch_plan

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from contracts import plan as traffic_plan
    from contracts.watched_file import WatchedFile
    from control.agent.torchserve.log import ServerLog
    from control.agent.torchserve.management import Management, Registered
    from control.archive import Archive
    from control.settings import AgentSettings
    from gateway.kubernetes.plan_object import WatchedPlan

_log = logging.getLogger(__name__)
_PAUSE_AFTER_ERROR_S = 1.0


class Reconciler:
    """The versions of one TorchServe: the plan's entries, the observed state, and the steps in between."""

    def __init__(
        self, settings: AgentSettings, store: Path, management: Management, log: ServerLog, *, workers: int
    ) -> None:
        self._settings = settings
        self._store = store
        self._management = management
        self._server_log = log
        self._trusted = load_trusted_keys(settings.trusted_keys)
        self._priority = WorkerPriority(is_allowed=can_restore_priority())
        self._workers = workers
        self._cache = ArchiveCache(settings)
        self.plan_file = _watch_plan(settings.plan)
        self.gateways = GatewayReports()
        self.deployments: dict[tuple[str, str], Deployment] = {}
        self.removed: deque[str] = deque(maxlen=10)
        """The last foreign entries that the agent removed from TorchServe since its start."""
        self._registered: dict[tuple[str, str], str] = {}
        self._removal: asyncio.Task[None] | None = None
        # Two versions of one entry that leave together would each make the other one the default.
        self._unregistering = asyncio.Lock()
        self.step_ended = asyncio.Event()
        """Set when a step has ended, so that the next one starts without waiting for the next regular tick."""

    async def tick(self) -> None:
        """Read the plan and TorchServe's state once, and start the steps that are due.

        Raises:
            ManagementError: TorchServe's state could not be read.
        """
        self.step_ended.clear()
        plans = self.follow_plan()
        observed_at = time.monotonic()
        entries = await self._list_own_entries()
        now = time.monotonic()
        self._retire_others(plans)
        for (model, version), deployment in list(self.deployments.items()):
            predict, explain = entries.get((model, version)), entries.get((explain_entry(model), version))
            deployment.update(predict, explain, now, self._server_log.fallback_pids)
            if deployment.task is None and deployment.acted_at < observed_at:
                self._start_step(deployment, now)
        # Explain workers lower their own priority for good, see handlers/image_handler.py.
        found = [(d.predict, d.wanted.role) for d in self.deployments.values() if d.predict is not None]
        self._priority.apply(
            [entry for entry, role in found if role != "shadow"], [entry for entry, role in found if role == "shadow"]
        )

    def follow_plan(self) -> traffic_plan.Plans | None:
        """Read the plan and take over its entries; needs no TorchServe."""
        plans = self._read_plan()
        for wanted in self._wanted_versions(plans) if plans is not None else ():
            known = self.deployments.setdefault((wanted.model, wanted.version), Deployment(wanted))
            if known.wanted != wanted:
                known.replace(wanted, time.monotonic())
        return plans

    def _read_plan(self) -> traffic_plan.Plans | None:
        """Return the plan in force: the one that is written, or the last good one if that is broken or missing."""
        file = self.plan_file
        if file.refresh():
            if file.error is not None:
                _log.error("the plan cannot be used; the last good one stays in force: %s", file.error)
            elif file.content is not None:
                _log.info("plan revision %d in force", file.content.revision)
        return file.content

    def start_over(self) -> None:
        """Reset the state of all versions: a restarted TorchServe has none of them."""
        self._registered.clear()
        for deployment in self.deployments.values():
            if deployment.task is not None:
                deployment.task.cancel()
            deployment.start_over()
        retiring = [key for key, found in self.deployments.items() if found.wanted.role == "retiring"]
        for key in retiring:
            del self.deployments[key]

    def pending(self) -> int:
        """Return the number of jobs in all queues, by the last observation."""
        return sum(deployment.pending for deployment in self.deployments.values())

    async def close(self) -> None:
        """Cancel every step under way."""
        tasks = [task for task in (self._removal, *(d.task for d in self.deployments.values())) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _list_own_entries(self) -> dict[tuple[str, str], Registered]:
        """Return TorchServe's entries of this agent, by entry and version, and start to remove foreign ones.

        Only this agent registers entries, from private copies of archives. An entry from another file is foreign code.
        """
        own: dict[tuple[str, str], Registered] = {}
        foreign: dict[tuple[str, str], Registered] = {}
        # A step may register or unregister an entry meanwhile.
        before = dict(self._registered)
        for entry in sorted(await self._management.entries()):
            for version, found in (await self._management.describe(entry)).items():
                key = (entry, version)
                is_own = found.archive in {before.get(key), self._registered.get(key)}
                (own if is_own else foreign)[key] = found
        if foreign and (self._removal is None or self._removal.done()):
            self._removal = asyncio.create_task(self._remove(foreign))
        return own

    async def _remove(self, foreign: dict[tuple[str, str], Registered]) -> None:
        for (entry, version), found in foreign.items():
            what = f"{entry} {version} from {found.archive}"
            _log.error("TorchServe has an entry that this agent did not register; it is removed: %s", what)
            try:
                await self._unregister_entry(entry, version)
            except ManagementError as error:
                _log.warning("%s cannot be removed: %s", what, error)
                await asyncio.sleep(_PAUSE_AFTER_ERROR_S)
            else:
                self.removed.append(what)

    def _retire_others(self, plans: traffic_plan.Plans | None) -> None:
        """Give every version that the plan does not want loaded the role `retiring`; without a plan do nothing."""
        if plans is None:
            return
        wanted = {(each.model, each.version) for each in self._wanted_versions(plans)}
        for model, version in set(self.deployments) - wanted:
            deployment = self.deployments[model, version]
            if deployment.wanted.role != "retiring":
                _log.info("%s %s is not to be loaded any more and retires", model, version)
                # Its archive stays set: the plan may name it again before it is unregistered.
                deployment.wanted = replace(deployment.wanted, role="retiring", workers=0, explain_workers=0)

    def _wanted_versions(self, plans: traffic_plan.Plans) -> Iterable[Wanted]:
        """Yield the versions to load, of all models.

        Without a number of workers in the plan, the stable versions of all loaded models get equal shares of the
        agent's workers, at least one each, and every other version one.
        """
        loaded = [plan for plan in plans.models if plan.stable.workers != 0]
        share = max(1, self._workers // max(1, len(loaded)))
        for plan in plans.models:
            roles: list[tuple[Role, traffic_plan.Release | None]] = [
                ("stable", plan.stable),
                ("canary", plan.canary),
                ("shadow", plan.shadow),
                *(("retained", release) for release in plan.retained),
            ]
            for role, release in roles:
                if release is None or release.workers == 0:
                    continue
                workers = release.workers or (share if role == "stable" else 1)
                explainers = self._settings.explain_workers
                yield Wanted(
                    plan.model,
                    release.version,
                    role,
                    release.archive,
                    release.sha256,
                    workers,
                    explainers,
                    release.source,
                )

    def _start_step(self, deployment: Deployment, now: float) -> None:
        step = next_step(
            deployment,
            now,
            load_timeout_s=self._settings.load_timeout_s,
            settle_s=self._settings.retire_settle_s,
            is_released=self._is_released(deployment, now),
        )
        if step is Step.NOTHING:
            return
        if step is Step.FORGET:
            del self.deployments[deployment.wanted.model, deployment.wanted.version]
            self._drop_copies()
            return
        deployment.task = asyncio.create_task(self._carry_out(deployment, step))

    def _is_released(self, deployment: Deployment, now: float) -> bool | None:
        """Return True if no gateway process can still send to the version; None if no gateway reports."""
        self.gateways.drop_silent(now, self._settings.retire_settle_s)
        if deployment.unroutable_since is None or not self.gateways:
            return None
        plan, wanted = self.plan_file.content, deployment.wanted
        # The plan still names a version that failed: only the status keeps gateways from sending to it.
        revision = plan.revision if plan is not None and wanted.role == "retiring" else None
        version = (wanted.model, wanted.version)
        blocker = self.gateways.blocker(version, since=deployment.unroutable_since, revision=revision)
        if wanted.role == "retiring":
            deployment.reason = f"waits: {blocker}" if blocker else None
        return blocker is None

    async def _carry_out(self, deployment: Deployment, step: Step) -> None:
        wanted = deployment.wanted
        try:
            await self._step(deployment, step)
        except (ArchiveError, MissingExtra, SigningKeyError, VerificationError) as error:
            _log.error("%s %s failed: %s", wanted.model, wanted.version, error)
            deployment.fail(str(error), time.monotonic())
        except ManagementError as error:
            _log.warning("%s %s: %s", wanted.model, wanted.version, error)
            if step is Step.REGISTER_PREDICT and error.status >= 400:
                deployment.fail(str(error), time.monotonic())
            elif step is Step.REGISTER_EXPLAIN and error.status >= 400:
                deployment.fail_explanations(str(error), time.monotonic())
            else:
                deployment.reason = str(error)
                await asyncio.sleep(_PAUSE_AFTER_ERROR_S)
        except Exception:  # noqa: BLE001 (an error of one version must not end the agent; the traceback is logged)
            _log.exception("%s %s: step %s failed", wanted.model, wanted.version, step.name)
            deployment.fail("an unexpected error; see the agent's log", time.monotonic())
        finally:
            deployment.verifying = False
            deployment.task = None
            deployment.acted_at = time.monotonic()
            self.step_ended.set()

    async def _step(self, deployment: Deployment, step: Step) -> None:
        wanted, now = deployment.wanted, time.monotonic()
        match step:
            case Step.INSPECT:
                await self._inspect(deployment)
            case Step.VERIFY:
                await self._verify(deployment)
            case Step.VERIFY_EXPLAIN:
                await self._verify_explanation(deployment)
            case Step.SET_DEFAULT:
                await self._set_default(deployment)
            case Step.UNREGISTER:
                await self._unregister(deployment)
            case Step.FAIL_CRASHES:
                deployment.fail(f"its workers die while they load: {self._load_failure(wanted)}", now)
            case Step.FAIL_SLOW:
                limit = self._settings.load_timeout_s
                reason = (
                    f"no worker was ready within {limit:.0f} s (AGENT_LOAD_TIMEOUT_S): {self._load_failure(wanted)}"
                )
                deployment.fail(reason, now)
            case Step.RETRY:
                deployment.failed, deployment.archive = False, None
            case _:
                await self._change_workers(deployment, step)

    async def _register(self, wanted: Wanted, entry: str, *, workers: int, batch_size: int) -> None:
        archive = copy_name(wanted.sha256)
        # Before the call: the entry is ours even if the answer comes too late.
        self._registered[entry, wanted.version] = archive
        await self._management.register(archive, entry, workers=workers, batch_size=batch_size)

    async def _set_default(self, deployment: Deployment) -> None:
        wanted = deployment.wanted
        for kind in missing_defaults(deployment):
            entry = wanted.model if kind == "predict" else explain_entry(wanted.model)
            await self._management.set_default(entry, wanted.version)
            deployment.defaults.add(kind)

    async def _change_workers(self, deployment: Deployment, step: Step) -> None:
        """Register an entry, or change the number of its workers."""
        wanted = deployment.wanted
        entry, explain = wanted.model, explain_entry(wanted.model)
        match step:
            case Step.REGISTER_PREDICT:
                _log.info("%s %s is registered as %s", entry, wanted.version, wanted.role)
                size = self._settings.batch_size
                await self._register(wanted, entry, workers=wanted.workers, batch_size=size)
            case Step.REGISTER_EXPLAIN:
                await self._register(wanted, explain, workers=wanted.explain_workers, batch_size=1)
            case Step.SCALE_PREDICT:
                await self._management.scale(entry, wanted.version, wanted.workers)
            case Step.SCALE_EXPLAIN:
                await self._management.scale(explain, wanted.version, wanted.explain_workers)
            case Step.RECYCLE_PREDICT:
                # To no worker; the next step scales back to the wanted number.
                await self._management.scale(entry, wanted.version, 0)
            case Step.RECYCLE_EXPLAIN:
                await self._management.scale(explain, wanted.version, 0)
            case Step.REVIVE_PREDICT:
                await self._revive(deployment, "predict", entry)
            case Step.REVIVE_EXPLAIN:
                await self._revive(deployment, "explain", explain)

    async def _revive(self, deployment: Deployment, kind: Kind, entry: str) -> None:
        """Add a worker for each dead one: TorchServe does not restart a worker that it has given up.

        No worker is removed, and the ready ones continue to serve. The dead ones stay in TorchServe's list until the
        version is loaded again.
        """
        found = deployment.predict if kind == "predict" else deployment.explain
        if found is None:
            return
        wanted = deployment.wanted
        more = min(found.dead, deployment.wanted_workers(kind) - found.ready)
        _log.warning("%s %s: %d of its workers stay dead; as many are added", entry, wanted.version, more)
        deployment.note_revival(kind, time.monotonic())
        await self._management.scale(entry, wanted.version, len(found.workers) + more)

    def _load_failure(self, wanted: Wanted) -> str:
        found = self._server_log.load_failure(wanted.model, wanted.version)
        return found or "they logged no reason; see TorchServe's log"

    async def _inspect(self, deployment: Deployment) -> None:
        wanted = deployment.wanted
        path = self._settings.model_store / wanted.archive
        self._drop_copies()
        archive = await asyncio.to_thread(self._fetch_copy, wanted, path)
        if archive.version != wanted.version:
            raise ArchiveError(path, f"holds version {archive.version}, the plan says {wanted.version}")
        deployment.archive, deployment.contract = archive, archive.contract

    def _fetch_copy(self, wanted: Wanted, path: Path) -> Archive:
        """Return the checked copy of the archive at `path`, or from the plan's source if the model store lacks it."""
        if wanted.source is None or path.is_file():
            return inspect_copy(path, wanted.sha256, self._store, self._trusted)
        try:
            cached = self._cache.fetch(wanted.source, wanted.sha256)
            return inspect_copy(cached, wanted.sha256, self._store, self._trusted)
        except ArchiveError as error:
            raise ArchiveError(path, error.problem) from error  # by its name in the plan, not by its hash

    async def _verify(self, deployment: Deployment) -> None:
        if deployment.archive is None:
            return
        deployment.verifying = True
        wanted = deployment.wanted
        deployment.runs_engine = await verify_predictions(self._url, deployment.archive, wanted.model)
        deployment.verified, deployment.failures, deployment.reason = True, 0, None
        _log.info("%s %s is verified and routable as %s", wanted.model, wanted.version, wanted.role)

    async def _verify_explanation(self, deployment: Deployment) -> None:
        """Verify the explain entry; if that fails the version is degraded, predicts on, and is retried."""
        if deployment.archive is None:
            return
        wanted = deployment.wanted
        entry = explain_entry(wanted.model)
        try:
            await verify_explanation(self._url, deployment.archive, entry)
        except VerificationError as error:
            _log.error("%s", error)
            deployment.fail_explanations(str(error), time.monotonic())
            return
        if deployment.explain_failures:
            deployment.explain_failures, deployment.reason = 0, None
        deployment.explains = True

    @property
    def _url(self) -> str:
        """TorchServe's inference address on this machine, not the advertised one."""
        return f"http://{self._settings.inference_host}:{self._settings.inference_port}"

    async def _unregister(self, deployment: Deployment) -> None:
        """Unregister both entries of the version."""
        wanted = deployment.wanted
        for name, entry in ((wanted.model, deployment.predict), (explain_entry(wanted.model), deployment.explain)):
            if entry is not None:
                await self._unregister_entry(name, wanted.version)
                self._registered.pop((name, wanted.version), None)
        # If the plan names the version again, it is loaded and verified again.
        deployment.verified, deployment.explains = False, None
        deployment.defaults.clear()
        _log.info("%s %s is unregistered", wanted.model, wanted.version)

    async def _unregister_entry(self, entry: str, version: str) -> None:
        """Unregister one version of an entry. First make another one the default, which cannot be unregistered.

        Raises:
            ManagementError: TorchServe refused or did not answer.
        """
        async with self._unregistering:
            rest = [other for other in await self._management.describe(entry) if other != version]
            if rest:
                stable = self._stable_version(entry)
                await self._management.set_default(entry, stable if stable in rest else rest[0])
            await self._management.unregister(entry, version)

    def _stable_version(self, entry: str) -> str | None:
        """Return the stable version of the model that the entry belongs to; None without a plan of it."""
        plans = self.plan_file.content
        models = plans.models if plans is not None else ()
        return next((plan.stable.version for plan in models if entry in {plan.model, explain_entry(plan.model)}), None)

    def _drop_copies(self) -> None:
        """Remove the private copies of archives that no version needs any more."""
        needed = {copy_name(found.wanted.sha256) for found in self.deployments.values()}
        for copy in self._store.glob("*.mar"):
            if copy.name not in needed:
                copy.unlink(missing_ok=True)


def explain_entry(model: str) -> str:
    """Return the name of the TorchServe entry that explains `model`."""
    return model + EXPLAIN_SUFFIX


def _watch_plan(where: Path) -> WatchedFile[traffic_plan.Plans] | WatchedPlan:
    try:
        return watch_plan(where, missing=f"there is no plan at {where}")
    except NotInCluster as error:
        raise ClusterUnusable(str(error)) from error
