"""Brings one TorchServe to the plan, and keeps it there: look, decide, act, twice a second.

What TorchServe forgets at a restart, the plan remembers. Each version has at most one step under way, so that one that
loads slowly holds up no other, and no look is held up by a step.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

from contracts import plan as traffic_plan
from contracts.watched_file import WatchedFile
from control.agent.deployment import Deployment, Kind, Role, Step, Wanted, missing_defaults, next_step
from control.agent.gateway_reports import Gateways
from control.agent.torchserve.priority import WorkerPriority, can_restore_priority
from control.agent.verification import verify_explanation, verify_predictions
from control.archive import copy_name, inspect_copy, load_trusted_keys
from control.errors import ArchiveError, ManagementError, SigningKeyError, VerificationError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from control.agent.torchserve.log import ServerLog
    from control.agent.torchserve.management import Management, Registered
    from control.settings import AgentSettings

_log = logging.getLogger(__name__)
_PAUSE_AFTER_ERROR_S = 1.0


class Reconciler:
    """The versions of one TorchServe: what the plan wants, what is there, and the steps between."""

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
        self.plan_file = WatchedFile(settings.plan, traffic_plan.load, missing=f"there is no plan at {settings.plan}")
        self.gateways = Gateways()
        self.deployments: dict[tuple[str, str], Deployment] = {}
        self.removed: deque[str] = deque(maxlen=10)
        """The last entries of TorchServe that somebody else had made, removed since the agent started."""
        self._made: dict[tuple[str, str], str] = {}
        self._removal: asyncio.Task[None] | None = None
        self.stepped = asyncio.Event()
        """Set when a step has ended: the next one need not wait for the next regular look."""

    async def tick(self) -> None:
        """One look at plan and server, and the start of whatever step is due.

        Raises:
            ManagementError: the server could not be looked at.
        """
        self.stepped.clear()
        plan = self.follow()
        looked_at = time.monotonic()
        seen = await self._look()
        now = time.monotonic()
        self._retire_others(plan)
        for (model, version), deployment in list(self.deployments.items()):
            predict, explain = seen.get((model, version)), seen.get((explain_entry(model), version))
            deployment.see(predict, explain, now, self._server_log.fallen_back)
            if deployment.task is None and deployment.acted_at < looked_at:
                self._start_step(deployment, now)
        # Explainers lower themselves for good, see handlers/image_handler.py.
        found = [(d.predict, d.wanted.role) for d in self.deployments.values() if d.predict is not None]
        self._priority.apply(
            [entry for entry, role in found if role != "shadow"], [entry for entry, role in found if role == "shadow"]
        )

    def follow(self) -> traffic_plan.Plan | None:
        """Reads the plan and takes over its wishes; works without a server."""
        plan = self._read_plan()
        for wish in self._wishes(plan) if plan is not None else ():
            known = self.deployments.setdefault((wish.model, wish.version), Deployment(wish))
            if known.wanted != wish:
                known.replace(wish, time.monotonic())
        return plan

    def _read_plan(self) -> traffic_plan.Plan | None:
        """Return the plan in force; a broken or missing file leaves the last good one there."""
        file = self.plan_file
        if file.refresh():
            if file.error is not None:
                _log.error("the plan cannot be used, the last good one stays in force: %s", file.error)
            elif file.content is not None:
                _log.info("plan revision %d in force", file.content.revision)
        return file.content

    def start_over(self) -> None:
        """Forgets what was seen and verified: TorchServe has been restarted and knows nothing."""
        self._made.clear()
        for deployment in self.deployments.values():
            if deployment.task is not None:
                deployment.task.cancel()
            deployment.start_over()
        retiring = [key for key, found in self.deployments.items() if found.wanted.role == "retiring"]
        for key in retiring:
            del self.deployments[key]

    def pending(self) -> int:
        """Jobs that wait in any queue, by the last look."""
        return sum(deployment.pending for deployment in self.deployments.values())

    async def close(self) -> None:
        """Ends every step under way."""
        tasks = [task for task in (self._removal, *(d.task for d in self.deployments.values())) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _look(self) -> dict[tuple[str, str], Registered]:
        """Return what TorchServe has of ours, by entry and version, and begin to remove what it has of others.

        Only this agent registers anything, and by the name of a private copy: what was registered otherwise, or from
        another file, is somebody else's code.
        """
        ours: dict[tuple[str, str], Registered] = {}
        foreign: dict[tuple[str, str], Registered] = {}
        # A step may register or unregister something meanwhile.
        before = dict(self._made)
        for entry in sorted(await self._management.entries()):
            for version, found in (await self._management.describe(entry)).items():
                key = (entry, version)
                is_ours = found.archive in {before.get(key), self._made.get(key)}
                (ours if is_ours else foreign)[key] = found
        if foreign and (self._removal is None or self._removal.done()):
            self._removal = asyncio.create_task(self._remove(foreign))
        return ours

    async def _remove(self, foreign: dict[tuple[str, str], Registered]) -> None:
        for (entry, version), found in foreign.items():
            what = f"{entry} {version} from {found.archive}"
            _log.error("TorchServe has an entry that this agent did not make, it is removed: %s", what)
            try:
                await self._unregister_entry(entry, version)
            except ManagementError as error:
                _log.warning("%s cannot be removed: %s", what, error)
                await asyncio.sleep(_PAUSE_AFTER_ERROR_S)
            else:
                self.removed.append(what)

    def _retire_others(self, plan: traffic_plan.Plan | None) -> None:
        """Sends everything that is not in the plan on its way out; without a plan nothing is touched."""
        if plan is None:
            return
        wanted = {(plan.model, release.version) for release in plan.releases()}
        for model, version in set(self.deployments) - wanted:
            deployment = self.deployments[model, version]
            if deployment.wanted.role != "retiring":
                _log.info("%s %s is out of the plan and retires", model, version)
                # With its archive, for the plan may name it again before it is gone.
                deployment.wanted = replace(deployment.wanted, role="retiring", workers=0, explain_workers=0)

    def _wishes(self, plan: traffic_plan.Plan) -> Iterable[Wanted]:
        roles: list[tuple[Role, traffic_plan.Release | None]] = [
            ("stable", plan.stable),
            ("canary", plan.canary),
            ("shadow", plan.shadow),
            *(("retained", release) for release in plan.retained),
        ]
        for role, release in roles:
            if release is not None:
                workers = release.workers or (self._workers if role == "stable" else 1)
                explainers = self._settings.explain_workers
                yield Wanted(
                    plan.model, release.version, role, release.archive, release.sha256, workers, explainers
                )  # fmt: skip

    def _start_step(self, deployment: Deployment, now: float) -> None:
        step = next_step(
            deployment,
            now,
            load_timeout_s=self._settings.load_timeout_s,
            settle_s=self._settings.retire_settle_s,
            let_go=self._let_go(deployment, now),
        )
        if step is Step.NOTHING:
            return
        if step is Step.FORGET:
            del self.deployments[deployment.wanted.model, deployment.wanted.version]
            self._drop_copies()
            return
        deployment.task = asyncio.create_task(self._carry_out(deployment, step))

    def _let_go(self, deployment: Deployment, now: float) -> bool | None:
        """Whether no gateway process can still ask for a version on its way out; None where none says anything."""
        self.gateways.forget(now, self._settings.retire_settle_s)
        if deployment.out_since is None or not self.gateways:
            return None
        plan, wanted = self.plan_file.content, deployment.wanted
        # The plan names a version that failed: of it gateways are held back by the status alone.
        revision = plan.revision if plan is not None and wanted.role == "retiring" else None
        hold = self.gateways.hold(wanted.version, since=deployment.out_since, revision=revision)
        if wanted.role == "retiring":
            deployment.reason = f"waits: {hold}" if hold else None
        return hold is None

    async def _carry_out(self, deployment: Deployment, step: Step) -> None:
        wanted = deployment.wanted
        try:
            await self._step(deployment, step)
        except (ArchiveError, SigningKeyError, VerificationError) as error:
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
        except Exception:  # noqa: BLE001 (one version's trouble must not end the agent; the traceback is logged)
            _log.exception("%s %s: step %s went wrong", wanted.model, wanted.version, step.name)
            deployment.fail("an unforeseen error; the agent's log has it", time.monotonic())
        finally:
            deployment.verifying = False
            deployment.task = None
            deployment.acted_at = time.monotonic()
            self.stepped.set()

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
                deployment.fail(f"its workers die while they load: {self._why(wanted)}", now)
            case Step.FAIL_SLOW:
                limit = self._settings.load_timeout_s
                deployment.fail(f"no worker was ready within {limit:.0f} s: {self._why(wanted)}", now)
            case Step.RETRY:
                deployment.failed, deployment.archive = False, None
            case _:
                await self._change_workers(deployment, step)

    async def _register(self, wanted: Wanted, entry: str, *, workers: int, batch_size: int) -> None:
        archive = copy_name(wanted.sha256)
        # Before the call: an answer that comes too late does not make the entry somebody else's.
        self._made[entry, wanted.version] = archive
        await self._management.register(archive, entry, workers=workers, batch_size=batch_size)

    async def _set_default(self, deployment: Deployment) -> None:
        wanted = deployment.wanted
        for kind in missing_defaults(deployment):
            entry = wanted.model if kind == "predict" else explain_entry(wanted.model)
            await self._management.set_default(entry, wanted.version)
            deployment.defaults.add(kind)

    async def _change_workers(self, deployment: Deployment, step: Step) -> None:
        """Registers an entry, or changes the number of its workers."""
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
                # To none and, at the next look, back to what the plan wants.
                await self._management.scale(entry, wanted.version, 0)
            case Step.RECYCLE_EXPLAIN:
                await self._management.scale(explain, wanted.version, 0)
            case Step.REVIVE_PREDICT:
                await self._revive(deployment, "predict", entry)
            case Step.REVIVE_EXPLAIN:
                await self._revive(deployment, "explain", explain)

    async def _revive(self, deployment: Deployment, kind: Kind, entry: str) -> None:
        """Adds a worker for each that has died: TorchServe restarts no worker that it has given up.

        None is taken away, the ready ones serve on. The dead keep their places in TorchServe's list until the version
        is loaded anew.
        """
        found = deployment.predict if kind == "predict" else deployment.explain
        if found is None:
            return
        wanted = deployment.wanted
        more = min(found.dead, deployment.wanted_workers(kind) - found.ready)
        _log.warning("%s %s: %d of its workers stay dead, as many are added", entry, wanted.version, more)
        deployment.note_revival(kind, time.monotonic())
        await self._management.scale(entry, wanted.version, len(found.workers) + more)

    def _why(self, wanted: Wanted) -> str:
        return self._server_log.why(wanted.model, wanted.version) or "they did not say why; TorchServe's log may"

    async def _inspect(self, deployment: Deployment) -> None:
        wanted = deployment.wanted
        path = self._settings.model_store / wanted.archive
        self._drop_copies()
        archive = await asyncio.to_thread(inspect_copy, path, wanted.sha256, self._store, self._trusted)
        if archive.version != wanted.version:
            raise ArchiveError(path, f"holds version {archive.version}, the plan says {wanted.version}")
        deployment.archive, deployment.contract = archive, archive.contract

    async def _verify(self, deployment: Deployment) -> None:
        if deployment.archive is None:
            return
        deployment.verifying = True
        wanted = deployment.wanted
        deployment.runs_engine = await verify_predictions(self._url, deployment.archive, wanted.model)
        deployment.verified, deployment.failures, deployment.reason = True, 0, None
        _log.info("%s %s is verified and routable as %s", wanted.model, wanted.version, wanted.role)

    async def _verify_explanation(self, deployment: Deployment) -> None:
        """Notes whether it explains; one that does not goes on predicting, visibly degraded, and is tried again."""
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
        """TorchServe's inference address on this machine, whatever name gateways use."""
        return f"http://{self._settings.inference_host}:{self._settings.inference_port}"

    async def _unregister(self, deployment: Deployment) -> None:
        """Removes both entries; TorchServe's default goes to another version first, since it cannot be removed."""
        wanted = deployment.wanted
        for name, entry in ((wanted.model, deployment.predict), (explain_entry(wanted.model), deployment.explain)):
            if entry is not None:
                await self._unregister_entry(name, wanted.version)
                self._made.pop((name, wanted.version), None)
        # What is loaded again, because the plan names it again by now, is verified again.
        deployment.verified, deployment.explains = False, None
        deployment.defaults.clear()
        _log.info("%s %s is unregistered", wanted.model, wanted.version)

    async def _unregister_entry(self, entry: str, version: str) -> None:
        """Removes one version of an entry, after another one of it, the stable one if it is there, became the default.

        Raises:
            ManagementError: TorchServe refused, or could not be asked.
        """
        rest = [other for other in await self._management.describe(entry) if other != version]
        if rest:
            plan = self.plan_file.content
            stable = plan.stable.version if plan is not None else ""
            await self._management.set_default(entry, stable if stable in rest else rest[0])
        await self._management.unregister(entry, version)

    def _drop_copies(self) -> None:
        """Removes the private copies of archives that no version needs any more."""
        needed = {copy_name(found.wanted.sha256) for found in self.deployments.values()}
        for copy in self._store.glob("*.mar"):
            if copy.name not in needed:
                copy.unlink(missing_ok=True)


def explain_entry(model: str) -> str:
    """The name of the TorchServe entry that explains `model`."""
    return f"{model}-explain"
