"""The application: `create_app` makes its state, passes it in and includes the routers."""

from __future__ import annotations

import asyncio
import logging
import random
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from gateway.api import explanations, feedback, health, playground, predictions
from gateway.api.middleware import RequestMiddleware
from gateway.api.openapi import document, page
from gateway.api.problems import from_exception, problem_response
from gateway.api.v2 import routes as v2
from gateway.auth.callers import Callers
from gateway.errors import GatewayError
from gateway.feedback.recorder import Recorder
from gateway.feedback.store import FeedbackStore, StoreError
from gateway.inference.admission import Admission, BodyBudget, PixelBudget, Places
from gateway.inference.discovery import Discovery, Resolve, resolve_host
from gateway.inference.examples import Examples
from gateway.inference.replicas import Agents
from gateway.inference.routing import Router, Workers
from gateway.inference.service import InferenceService
from gateway.inference.shadow import Shadow
from gateway.inference.torchserve import TorchServe
from gateway.inference.transport import PooledTransport
from gateway.kubernetes.errors import NotInCluster
from gateway.request_context import context_of
from gateway.settings import Settings, SettingsError, load_settings
from gateway.state import AppState
from gateway.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    import httpx
    from fastapi.routing import APIRoute
    from starlette.requests import Request
    from starlette.responses import Response

    from gateway.telemetry.tracing import Tracer

logger = logging.getLogger(__name__)
# The response headers that scripts of another origin may read.
EXPOSED = (
    "x-request-id",
    "server-timing",
    "retry-after",
    "ratelimit",
    "ratelimit-policy",
    "x-model-version",
    *(f"x-{name}" for name in explanations.OVERLAY_FACTS),
)
ROUTERS = (predictions.router, explanations.router, health.router, v2.router, page.router, playground.router)


def create_app(
    settings: Settings | None = None,
    *,
    upstream: httpx.AsyncBaseTransport | None = None,
    agent: httpx.AsyncBaseTransport | None = None,
    tracer: Tracer | None = None,
    resolve: Resolve = resolve_host,
    chance: Callable[[], float] = random.random,
) -> FastAPI:
    """Return the gateway. Without `settings` they come from the environment; tests pass in all else.

    Raises:
        SettingsError: the environment's settings cannot be used, or no Kubernetes API is known for plan or agents.
    """
    settings = settings or load_settings()
    agents = Agents(make_discovery(settings, resolve), max_age_s=settings.status_max_age_s, transport=agent)
    router = make_router(settings, agents, chance)
    torchserve = TorchServe(upstream or PooledTransport())
    metrics = Metrics()
    admission = Admission(partial(places_of_model, settings), settings.admission_wait_s)
    service = InferenceService(
        router,
        torchserve,
        admission=admission,
        chunk_images=settings.chunk_images,
        timeout_s=settings.timeout_s,
        processes=settings.workers,
        max_pixels=settings.max_pixels,
        pixels=PixelBudget(settings.max_caller_pixels),
    )
    state = AppState(
        settings,
        agents,
        router,
        service,
        admission,
        BodyBudget(settings.max_buffered_bytes),
        # Gunicorn's configuration refuses an unusable key file at the start. A file that breaks later must not stop a
        # new worker, because Gunicorn would then stop the gateway.
        Callers(settings, waits_for_file=True),
        metrics,
        Examples(router, torchserve, admission),
        Shadow(
            router,
            torchserve,
            metrics,
            admission=admission,
            timeout_s=settings.timeout_s,
            batch_images=settings.chunk_images,
        ),
        tracer,
    )

    if settings.feedback_file is not None:
        state.recorder = make_recorder(settings, chance)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        if state.tracer is None and settings.otlp_endpoint:
            # Imported here, so that a gateway without traces does not pay for the import.
            from gateway.telemetry.tracing import exporting_tracer  # noqa: PLC0415

            state.tracer = exporting_tracer(settings.otlp_endpoint)
        refresh(state)
        await agents.poll_all(router.revision)
        admission.fit(router.stable_workers())
        tasks = [asyncio.create_task(refresh_forever(state))]
        if state.recorder is not None:
            tasks.append(asyncio.create_task(state.recorder.run()))
        yield
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await state.shadow.close()
        if state.tracer is not None:
            await asyncio.to_thread(state.tracer.close)
        await agents.close()
        await torchserve.close()
        await state.callers.close()
        report_refused(state)

    app = FastAPI(
        title="gradserve",
        lifespan=lifespan,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=operation_id,
        # FastAPI's own spans would duplicate ours (gateway/telemetry/tracing.py).
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state.gateway = state
    app.add_middleware(RequestMiddleware, state=state)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=EXPOSED,
        )
    app.add_exception_handler(GatewayError, answer_problem)
    app.add_exception_handler(HTTPException, answer_problem)
    app.openapi = partial(document.document, app, settings)  # type: ignore[method-assign]  # the way FastAPI documents
    for routes in ROUTERS:
        app.include_router(routes)
    if state.recorder is not None:
        app.include_router(feedback.router)
    return app


def make_discovery(settings: Settings, resolve: Resolve) -> Discovery:
    """Return the list of the agents.

    Raises:
        SettingsError: the agents are the endpoints of a Service, and no Kubernetes API is known.
    """
    try:
        return Discovery(settings.agents, resolve=resolve)
    except NotInCluster as error:
        raise SettingsError(f"GATEWAY_AGENTS: {error}") from error


def make_router(settings: Settings, agents: Agents, chance: Callable[[], float]) -> Router:
    """Return the router with its reader of the plan.

    Raises:
        SettingsError: the plan is in Kubernetes, and no API of it is known.
    """
    try:
        return Router(settings.plan, agents, chance=chance)
    except NotInCluster as error:
        raise SettingsError(f"GATEWAY_PLAN: {error}") from error


def make_recorder(settings: Settings, chance: Callable[[], float]) -> Recorder:
    """Return the recorder with its store.

    Raises:
        SettingsError: the store cannot be used.
    """
    path = settings.feedback_file or Path()
    store = FeedbackStore(path, max_bytes=settings.feedback_mb * 1_000_000, days=settings.feedback_days)
    try:
        store.create()
    except StoreError as error:
        raise SettingsError(f"GATEWAY_FEEDBACK_FILE: {error}") from error
    return Recorder(store, settings.feedback_sample, chance)


def places_of_model(settings: Settings, workers: Workers) -> Places:
    """Return the places of a model with these workers."""
    share = workers.share(settings.workers)
    return Places(settings.places_predict(share), settings.places_explain(share), settings.in_flight_backward)


def refresh(state: AppState) -> None:
    """Re-read the plan and the keys, fit the places to the workers, sample their use, and report the refused calls."""
    state.router.refresh_plan()
    state.callers.refresh_keys()
    state.admission.fit(state.router.stable_workers())
    for model, kind, limiter in state.admission.limiters():
        state.metrics.sample(model, kind, limiter)
    report_refused(state)


def report_refused(state: AppState) -> None:
    """Log the number of calls that were refused since the last report because no place was free."""
    if state.saturated:
        logger.warning("saturated", extra={"refused": state.saturated})
    state.saturated = 0


async def refresh_forever(state: AppState) -> None:
    """Refresh the state and poll the agents every `poll_s` seconds; an exception is logged and does not end it."""
    while True:
        await asyncio.sleep(state.settings.poll_s)
        try:
            refresh(state)
            # After the plan was read: a poll reports the revision that calls are routed by.
            state.agents.begin_polls(state.router.revision)
        except Exception:
            logger.exception("refreshing the plan, the keys and the agents' statuses failed")


def operation_id(route: APIRoute) -> str:
    """Return a route's operation id; generated clients name their functions after it."""
    return route.name


async def answer_problem(request: Request, exception: Exception) -> Response:
    """Return the problem document of a refusal or failure."""
    error = from_exception(exception)
    request.state.error = error
    return problem_response(error, context_of(request.scope).request_id, request.scope["path"])
