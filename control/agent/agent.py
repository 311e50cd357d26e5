"""The agent: keep one TorchServe running and at the plan, report its status, and drain it before it stops.

Gateways and operators read only `GET /status`, on a private port. The answer is the last observation of TorchServe: a
slow TorchServe makes the observation old (`observed_at`), not the answer late.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Literal

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from contracts import report
from contracts import status as agent_status
from contracts.status import AgentStatus, Pool, ServerStatus, VersionStatus
from control.agent.cores import usable_cores
from control.agent.reconciler import Reconciler
from control.agent.torchserve.log import ServerLog
from control.agent.torchserve.management import Management, Registered, debug_log
from control.agent.torchserve.process import TorchServeProcess
from control.agent.torchserve.run_folder import RunFolder, run_base
from control.errors import ManagementError, TorchServeFailed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.requests import Request

    from control.agent.deployment import Deployment, Kind
    from control.settings import AgentSettings

_log = logging.getLogger(__name__)
RECONCILE_EVERY_S = 0.5
# A TorchServe that does not answer for this long is restarted. Loading on a busy machine was seen to take seconds.
_SILENT_S = 30.0
# An older observation does not count; gateways use the same limit (GATEWAY_STATUS_MAX_AGE_S).
_MAX_OBSERVATION_AGE_S = 3.0
_BACKOFF_FIRST_S, _BACKOFF_MOST_S, _STABLE_AFTER_S = 1.0, 30.0, 60.0
# A gateway polls twice a second; one that has not asked for this long is gone.
_POLLER_GONE_S = 2.0
# Time from the answer that says "draining" to the end of the last request of the gateway that read it.
_LAST_REQUEST_S = 1.0

ServerState = Literal["starting", "running", "backoff", "stopped"]


class Agent:
    """One agent with its TorchServe."""

    def __init__(self, settings: AgentSettings, folder: RunFolder, management: Management) -> None:
        workers = settings.workers or max(1, usable_cores() // settings.threads)
        self._settings = settings
        self._management = management
        log = ServerLog()
        self._process = TorchServeProcess(settings, folder, log, threads=settings.threads)
        self._reconciler = Reconciler(settings, folder.store, management, log, workers=workers)
        self._state: ServerState = "stopped"
        self._restarts = 0
        self._observed_at = time.time()
        self._draining = False
        self._polled_at = 0.0

    def app(self) -> Starlette:
        """Return the app of the private port: `/status`, and `/livez` and `/readyz` for a container's probes."""
        routes = {"/status": self._answer_status, "/livez": self._answer_alive, "/readyz": self._answer_ready}
        return Starlette(routes=[Route(path, answer) for path, answer in routes.items()])

    async def keep_running(self) -> None:
        """Start TorchServe, and restart it with back-off whenever it ends; never return.

        Raises:
            ControlError: TorchServe cannot be started, because something is not installed.
        """
        delay_s = _BACKOFF_FIRST_S
        while True:
            self._state, started = "starting", time.monotonic()
            try:
                await self._process.start(self._management.is_answering)
            except TorchServeFailed as error:
                _log.error("%s", error)
            else:
                self._state = "running"
                await self._process.wait()
                _log.error("TorchServe ended with status %s", self._process.returncode)
            self._state = "backoff"
            self._restarts += 1
            self._reconciler.start_over()
            await self._process.kill()
            if time.monotonic() - started > _STABLE_AFTER_S:
                delay_s = _BACKOFF_FIRST_S
            await asyncio.sleep(delay_s)
            delay_s = min(_BACKOFF_MOST_S, 2 * delay_s)

    async def keep_reconciling(self) -> None:
        """Read the plan and TorchServe's state twice a second and reconcile them; never return."""
        silent_since: float | None = None
        while True:
            began = time.monotonic()
            try:
                if self._state == "running":
                    await self._reconciler.tick()
                else:
                    self._reconciler.follow_plan()
                self._observed_at, silent_since = time.time(), None
            except ManagementError as error:
                silent_since = silent_since or began
                _log.warning("cannot read TorchServe's state: %s", error)
                if self._state == "running" and began - silent_since > _SILENT_S:
                    _log.error("TorchServe has not answered for %.0f s; it is restarted", _SILENT_S)
                    silent_since = None
                    await self._process.kill()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._reconciler.step_ended.wait(), RECONCILE_EVERY_S)

    async def drain(self) -> None:
        """Ask gateways to stop sending; return when no request is left or `drain_timeout_s` has passed."""
        self._draining = True
        began = time.monotonic()
        _log.info("draining")
        gateways = self._reconciler.gateways
        while (now := time.monotonic()) - began < self._settings.drain_timeout_s:
            gateways.drop_silent(now, _POLLER_GONE_S)
            pollers_know = self._polled_at > began or now - self._polled_at > _POLLER_GONE_S
            if pollers_know and self._reconciler.pending() == 0 and gateways.blocker(None, since=began) is None:
                break
            await asyncio.sleep(0.1)
        if self._polled_at > began:
            await asyncio.sleep(_LAST_REQUEST_S)

    async def close(self) -> None:
        """Cancel the steps under way and stop TorchServe."""
        self._state = "stopped"
        await self._reconciler.close()
        await self._process.stop()

    def status(self) -> AgentStatus:
        """Return the document of the status page."""
        plan = self._reconciler.plan_file
        return AgentStatus(
            told_at=time.time(),
            observed_at=self._observed_at,
            draining=self._draining,
            plan_revision=plan.content.revision if plan.content else None,
            plan_error=plan.error,
            torchserve=ServerStatus(
                state=self._state,
                pid=self._process.pid,
                restarts=self._restarts,
                inference_url=self._settings.inference_url,
                removed_entries=tuple(self._reconciler.removed),
            ),
            gateways=self._reconciler.gateways.status(time.monotonic()),
            versions=tuple(_version_status(found) for _, found in sorted(self._reconciler.deployments.items())),
        )

    async def _answer_status(self, request: Request) -> JSONResponse:
        now = time.monotonic()
        # A poller without a report (an operator, a gateway that sends none) may still send for a while.
        if not self._reconciler.gateways.record(request.headers.get(report.HEADER, ""), now):
            self._polled_at = now
        return JSONResponse(agent_status.dump(self.status()))

    async def _answer_alive(self, _request: Request) -> JSONResponse:
        """Answer 200: the agent's loop runs. It restarts a TorchServe that does not answer itself."""
        return JSONResponse({"status": "ok"})

    async def _answer_ready(self, _request: Request) -> JSONResponse:
        """Answer 200 if a recent observation has a READY worker of the default model's stable version, else 503."""
        plans = self._reconciler.plan_file.content
        default = plans.default if plans is not None else None
        found = self._reconciler.deployments.values()
        stable = [each for each in found if each.wanted.role == "stable" and default in {None, each.wanted.model}]
        is_recent = time.time() - self._observed_at < _MAX_OBSERVATION_AGE_S
        is_ready = is_recent and not self._draining and any(each.routable for each in stable)
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)


def _version_status(deployment: Deployment) -> VersionStatus:
    wanted, contract = deployment.wanted, deployment.contract
    return VersionStatus(
        model=wanted.model,
        version=wanted.version,
        role=wanted.role,
        state=deployment.state,
        routable=deployment.routable,
        predict=_pool(deployment, "predict", deployment.predict),
        # Gateways send explanations wherever explain workers are ready.
        explain=_pool(deployment, "explain", deployment.explain, counts=bool(deployment.explains)),
        verified=deployment.verified,
        signed=deployment.archive.signed if deployment.archive is not None else None,
        reason=deployment.shown_reason,
        # The public part only: every caller who may read the models sees it.
        contract=contract.public() if contract is not None else None,
    )


def _pool(deployment: Deployment, kind: Kind, entry: Registered | None, *, counts: bool = True) -> Pool:
    return Pool(
        ready=entry.ready if entry is not None and counts else 0,
        wanted=deployment.wanted_workers(kind),
        fallback=deployment.on_fallback.get(kind, 0),
        pending=entry.pending if entry is not None else None,
        capacity=entry.capacity if entry is not None else None,
    )


class _StatusServer(uvicorn.Server):
    """A uvicorn server without signal handlers: the page must answer while the agent drains."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to the agent."""
        yield


async def run_agent(settings: AgentSettings) -> None:
    """Run an agent until SIGTERM or SIGINT; a second signal ends the draining at once.

    Raises:
        ControlError: the agent cannot run here; the text says what is missing.
    """
    stop, stop_at_once = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (stop_at_once if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, on_signal)
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(RunFolder(run_base(settings.temp)))
        transport = httpx.AsyncHTTPTransport(uds=str(folder.management_socket))
        management = await stack.enter_async_context(Management(transport, debug_log(settings.management_log)))
        agent = Agent(settings, folder, management)
        stack.push_async_callback(agent.close)
        config = uvicorn.Config(
            agent.app(), host=settings.host, port=settings.port, log_config=None, access_log=False, lifespan="off"
        )
        server = _StatusServer(config)
        loops = (server.serve(), agent.keep_running(), agent.keep_reconciling())
        tasks = [asyncio.create_task(loop) for loop in loops]
        try:
            await _first_of(_until(stop), *tasks)
            await _first_of(_until(stop_at_once), asyncio.create_task(agent.drain()), *tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _until(event: asyncio.Event) -> asyncio.Task[None]:
    """Return a task that ends when the event is set."""

    async def wait() -> None:
        await event.wait()

    return asyncio.create_task(wait())


async def _first_of(stop: asyncio.Task[None], *others: asyncio.Task[None]) -> None:
    """Wait until one of the tasks ends and raise its exception if it has one; `stop` is cancelled then."""
    done, _ = await asyncio.wait([stop, *others], return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    for task in done - {stop}:
        task.result()
