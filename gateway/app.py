"""The application: `create_app` puts the parts together, passes them in and names the routes."""

from __future__ import annotations

import asyncio
import logging
import math
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from gateway.api import docs_page, health, predictions, v2
from gateway.api.middleware import RequestMiddleware
from gateway.api.problems import from_exception, problem_response
from gateway.auth.callers import Callers
from gateway.errors import GatewayError
from gateway.inference.admission import BodyBudget, ConcurrencyLimiter, PixelBudget
from gateway.inference.replicas import Agents
from gateway.inference.routing import Router
from gateway.inference.service import InferenceService
from gateway.inference.shadow import Shadow
from gateway.inference.torchserve import TorchServe
from gateway.inference.transport import PooledTransport
from gateway.request_context import context_of
from gateway.settings import Settings, load_settings
from gateway.state import AppState
from gateway.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import httpx
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import Receive, Scope, Send

    from gateway.telemetry.tracing import Tracer

logger = logging.getLogger(__name__)
ROUTES = (
    ("POST", "/predict", predictions.predict),
    ("POST", "/predict/batch", predictions.predict_batch),
    ("POST", "/explain", predictions.explain),
    ("GET", "/health", health.health),
    ("GET", "/livez", health.livez),
    ("GET", "/readyz", health.readyz),
    ("GET", "/models", health.models),
    ("GET", "/metrics", health.metrics),
    ("GET", "/v2", v2.server),
    ("GET", "/v2/health/live", v2.live),
    ("GET", "/v2/health/ready", v2.ready),
    ("GET", "/v2/models/{model}", v2.model_metadata),
    ("GET", "/v2/models/{model}/ready", v2.model_ready),
    ("POST", "/v2/models/{model}/infer", v2.infer),
    ("GET", "/v2/models/{model}/versions/{version}", v2.model_metadata),
    ("GET", "/v2/models/{model}/versions/{version}/ready", v2.model_ready),
    ("POST", "/v2/models/{model}/versions/{version}/infer", v2.infer),
)
# What another site's page may read of an answer's headers.
EXPOSED = (
    "x-request-id",
    "server-timing",
    "retry-after",
    "ratelimit",
    "ratelimit-policy",
    "x-model-version",
    *(f"x-{name}" for name in predictions.OVERLAY_FACTS),
)
# For people, so not in the OpenAPI document.
PAGES = (
    ("GET", "/openapi.json", docs_page.document),
    ("GET", "/docs", docs_page.page),
    ("GET", "/docs/swagger-ui-bundle.js", docs_page.script),
    ("GET", "/docs/swagger-ui.css", docs_page.style),
)


def create_app(
    settings: Settings | None = None,
    *,
    upstream: httpx.AsyncBaseTransport | None = None,
    agent: httpx.AsyncBaseTransport | None = None,
    tracer: Tracer | None = None,
) -> FastAPI:
    """The gateway; settings come from the environment unless given, transports and tracer are passed in by tests.

    Raises:
        SettingsError: the environment's settings cannot be used.
    """
    settings = settings or load_settings()
    agents = Agents(settings.agents, max_age_s=settings.status_max_age_s, transport=agent)
    versions = Router(settings.plan, agents)
    torchserve = TorchServe(upstream or PooledTransport())
    metrics = Metrics()
    predict = limiter(settings.in_flight_predict, settings)
    service = InferenceService(
        versions,
        torchserve,
        predict=predict,
        explain=limiter(settings.in_flight_explain, settings),
        chunk_images=settings.chunk_images,
        timeout_s=settings.timeout_s,
        processes=settings.workers,
        max_pixels=settings.max_pixels,
        pixels=PixelBudget(settings.max_caller_pixels),
    )
    parts = AppState(
        settings,
        agents,
        versions,
        service,
        BodyBudget(settings.max_buffered_bytes),
        # Gunicorn's configuration refuses an unusable key file. One that breaks later must not end a new worker, and
        # with it the gateway.
        Callers(settings, waits_for_file=True),
        metrics,
        Shadow(
            versions,
            torchserve,
            metrics,
            predict=predict,
            timeout_s=settings.timeout_s,
            row_images=settings.chunk_images,
        ),
        tracer,
    )

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        if parts.tracer is None and settings.otlp_endpoint:
            # Not at the top: a gateway without traces does not pay for the import.
            from gateway.telemetry.tracing import exporting_tracer  # noqa: PLC0415

            parts.tracer = exporting_tracer(settings.otlp_endpoint)
        look(parts)
        await agents.poll_all(versions.revision)
        watch = asyncio.create_task(keep_fresh(parts))
        yield
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch
        await parts.shadow.close()
        if parts.tracer is not None:
            await asyncio.to_thread(parts.tracer.close)
        await agents.close()
        await torchserve.close()
        await parts.callers.close()
        tell_refused(parts)

    app = FastAPI(
        title="gradserve",
        lifespan=lifespan,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        # Its own spans would stand beside ours (gateway/telemetry/tracing.py), and it looks for them at each request.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state.parts = parts
    direct = {path: endpoint for method, path, endpoint in ROUTES if method == "POST" and "{" not in path}
    app.add_middleware(RequestMiddleware, parts=parts, direct=direct)
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
    app.router.routes.extend(NotedRoute(path, endpoint, methods=[method]) for method, path, endpoint in ROUTES + PAGES)
    return app


def limiter(for_one: int, settings: Settings) -> ConcurrencyLimiter:
    """Return the places of one kind of call: so many for one caller, and a quarter more for the others."""
    return ConcurrencyLimiter(for_one + math.ceil(for_one / 4), settings.admission_wait_s, per_caller=for_one)


class NotedRoute(Route):
    """A route that notes its own path, for logs and metrics."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, when the path fits."""
        context_of(scope).route = self.path
        await super().handle(scope, receive, send)


def look(parts: AppState) -> None:
    """One look at the plan, the keys and the places."""
    parts.versions.refresh_plan()
    parts.callers.refresh_keys()
    parts.metrics.sample("predict", parts.service.predict_limiter)
    parts.metrics.sample("explain", parts.service.explain_limiter)
    tell_refused(parts)


def tell_refused(parts: AppState) -> None:
    """Logs and counts the refusals for want of a place since the last time."""
    for route, count in parts.refused_early.items():
        parts.metrics.count_refused(route, count)
    if refused := parts.saturated + parts.refused_early.total():
        logger.warning("saturated", extra={"refused": refused})
    parts.saturated = 0
    parts.refused_early.clear()


async def keep_fresh(parts: AppState) -> None:
    """Looks again and again; a fault in one look must not end the looking."""
    while True:
        await asyncio.sleep(parts.settings.poll_s)
        try:
            look(parts)
            parts.agents.begin_polls(parts.versions.revision)  # after the plan: they report by which one is routed
        except Exception:
            logger.exception("a look at the plan and the agents failed")


async def answer_problem(request: Request, exception: Exception) -> Response:
    """The problem document of a refusal or failure."""
    context = context_of(request.scope)
    error = from_exception(exception)
    context.code = error.code
    return problem_response(error, context.request_id, request.scope["path"])
