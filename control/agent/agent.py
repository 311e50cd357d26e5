"""The agent: keeps one TorchServe running and at the plan, drains it before it stops, and tells what it sees.

`GET /status` on a private port is all that gateways and operators ever see of TorchServe's side. It is answered from
the last look, so that a slow server makes the look old (`observed_at`), never the answer late.
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
LOOK_EVERY_S = 0.5
# Alive but silent for this long: as good as dead. Loading on a busy machine has been seen to cost seconds.
_SILENT_S = 30.0
# A look older than this tells nothing; gateways hold to the same (GATEWAY_STATUS_MAX_AGE_S).
_LOOK_IS_OLD_S = 3.0
_BACKOFF_FIRST_S, _BACKOFF_MOST_S, _STABLE_AFTER_S = 1.0, 30.0, 60.0
# A gateway polls twice a second; whoever has not asked for this long is gone.
_POLLER_GONE_S = 2.0
# From the answer that says "draining" to the last request sent by who read it, and the time that one takes.
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
        """The private pages: the status, and whether this replica should be called (for a container's health check)."""
        return Starlette(routes=[Route("/status", self._answer_status), Route("/readyz", self._answer_ready)])

    async def keep_running(self) -> None:
        """Starts TorchServe, and starts it again with back-off whenever it ends; never returns.

        Raises:
            ControlError: it cannot be started at all, because something is not installed.
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

    async def keep_looking(self) -> None:
        """Looks at plan and server twice a second and acts; never returns."""
        silent_since: float | None = None
        while True:
            began = time.monotonic()
            try:
                if self._state == "running":
                    await self._reconciler.tick()
                else:
                    self._reconciler.follow()
                self._observed_at, silent_since = time.time(), None
            except ManagementError as error:
                silent_since = silent_since or began
                _log.warning("cannot look at TorchServe: %s", error)
                if self._state == "running" and began - silent_since > _SILENT_S:
                    _log.error("TorchServe has been silent for %.0f s; it is restarted", _SILENT_S)
                    silent_since = None
                    await self._process.kill()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._reconciler.stepped.wait(), LOOK_EVERY_S)

    async def drain(self) -> None:
        """Tells gateways to stop sending, and returns when nothing waits any more (or the time is up)."""
        self._draining = True
        began = time.monotonic()
        _log.info("draining")
        gateways = self._reconciler.gateways
        while (now := time.monotonic()) - began < self._settings.drain_timeout_s:
            gateways.forget(now, _POLLER_GONE_S)
            told = self._polled_at > began or now - self._polled_at > _POLLER_GONE_S
            if told and self._reconciler.pending() == 0 and gateways.hold(None, since=began) is None:
                break
            await asyncio.sleep(0.1)
        if self._polled_at > began:
            await asyncio.sleep(_LAST_REQUEST_S)

    async def close(self) -> None:
        """Ends what is under way and stops TorchServe."""
        self._state = "stopped"
        await self._reconciler.close()
        await self._process.stop()

    def status(self) -> AgentStatus:
        """Return what the status page says."""
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
        # Whoever polls without a report (an operator, another gateway) is believed to send for a while yet.
        if not self._reconciler.gateways.take(request.headers.get(report.HEADER, ""), now):
            self._polled_at = now
        return JSONResponse(agent_status.dump(self.status()))

    async def _answer_ready(self, _request: Request) -> JSONResponse:
        """200 with a verified READY worker of the stable version, by a look that is not old; else 503."""
        stable = [found for _, found in self._reconciler.deployments.items() if found.wanted.role == "stable"]
        seen = time.time() - self._observed_at < _LOOK_IS_OLD_S
        is_ready = seen and not self._draining and any(found.routable for found in stable)
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
        # Gateways send explanations to whoever has ready workers for them.
        explain=_pool(deployment, "explain", deployment.explain, counts=bool(deployment.explains)),
        verified=deployment.verified,
        signed=deployment.archive.signed if deployment.archive is not None else None,
        reason=deployment.trouble,
        # Gateways ask twice a second, and whoever may read the models sees it.
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
    """uvicorn without its own signal handlers: the page must answer while the agent drains."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves the signals to the agent."""
        yield


async def run_agent(settings: AgentSettings) -> None:
    """Runs an agent until SIGTERM or SIGINT; a second signal cuts the draining short.

    Raises:
        ControlError: it cannot run here; the text says what is missing.
    """
    asked_to_stop, in_a_hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (in_a_hurry if asked_to_stop.is_set() else asked_to_stop).set()

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
        parts = [asyncio.create_task(part) for part in (server.serve(), agent.keep_running(), agent.keep_looking())]
        try:
            await _first_of(_until(asked_to_stop), *parts)
            await _first_of(_until(in_a_hurry), asyncio.create_task(agent.drain()), *parts)
        finally:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)


def _until(event: asyncio.Event) -> asyncio.Task[None]:
    """A task that ends when the event is set."""

    async def wait() -> None:
        await event.wait()

    return asyncio.create_task(wait())


async def _first_of(stop: asyncio.Task[None], *others: asyncio.Task[None]) -> None:
    """Returns when one of the tasks has ended, with that one's exception if it has one; `stop` ends with this."""
    done, _ = await asyncio.wait([stop, *others], return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    for task in done - {stop}:
        task.result()
