"""Fixtures: a gateway in front of a fake TorchServe and a fake agent, which are functions from request to response."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import random
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import httpx
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal

from contracts import status as agent_status
from contracts import wire
from contracts.evidence import AnswerSet, Evidence, Familiar, Similar
from contracts.model import Contract, Explanation, Input
from contracts.report import Report
from contracts.status import AgentStatus, GatewayStatus, Pool, ServerStatus, VersionStatus
from gateway.api import schemas
from gateway.app import create_app
from gateway.inference.discovery import Discovery
from gateway.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from gateway.inference.discovery import Resolve

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG fake image"
CLASSES = ["cat", "dog", "frog"]


def overlay_png(about: str) -> bytes:
    """Return the first bytes of a PNG as the handler writes it: signature, header, and the explanation's facts."""
    text = b"gradserve\0" + about.encode("ascii")
    header = (13).to_bytes(4, "big") + b"IHDR" + bytes(17)
    return b"\x89PNG\r\n\x1a\n" + header + len(text).to_bytes(4, "big") + b"tEXt" + text + bytes(4)


@dataclass
class FakeTorchServe:
    """Answers as our handler does; bytes that begin with `bad:<code>` get that error. `answer` may replace it."""

    calls: list[httpx.Request] = field(default_factory=list)
    answer: Callable[[httpx.Request], httpx.Response | None] | None = None
    familiar: bool | None = None

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.calls.append(request)
        if self.answer is not None and (response := self.answer(request)) is not None:
            return response
        options = wire.parse_options(request.headers[wire.OPTIONS_HEADER])
        images = [bytes(image) for image in wire.parse_body(request.headers["content-type"], request.content)]
        if options.example is not None:
            return thumbnail(options.example)
        if options.images and options.format == "png":
            return self.overlay(images[0], options)
        if request.url.path.startswith("/explanations/") and not options.images:
            return self.explain(images[0], options)
        if options.images:
            asked = zip(images, options.images, strict=True)
            return httpx.Response(200, json={"results": [self.evidence(*pair, options.top_k) for pair in asked]})
        return httpx.Response(200, json={"results": [self.entry(image, options) for image in images]})

    def asked(self) -> tuple[str, wire.Options]:
        """Return the path and the options of the last call."""
        return self.calls[-1].url.path, wire.parse_options(self.calls[-1].headers[wire.OPTIONS_HEADER])

    def explain(self, image: bytes, options: wire.Options) -> httpx.Response:
        target = options.target or "cat"
        if target not in CLASSES:
            error = {"code": "unknown_target", "detail": "there is no such class", "classes": CLASSES}
            return httpx.Response(200, json={"results": [{"error": error}]})
        if image.startswith(b"bad:"):
            return httpx.Response(200, json={"results": [self.entry(image, options)]})
        entry = {"class": "cat", "confidence": 0.9, "target": target, "method": options.method or "gradcam"}
        entry |= {"layer": "layer3", "heatmap": [[0.0, 1.0]]}  # of wire 1
        if options.format != "json":
            overlay = overlay_png(wire.dump_about(entry, "cifar10", "1.0.0"))
            return httpx.Response(200, content=overlay, headers={"content-type": "image/png"})
        return httpx.Response(200, json={"results": [entry]})

    def overlay(self, image: bytes, options: wire.Options) -> httpx.Response:
        entry = self.evidence(image, options.images[0], 1)
        if "error" in entry:
            return httpx.Response(200, json={"results": [entry]})
        overlay = overlay_png(wire.dump_about(entry, "cifar10", "1.0.0"))
        return httpx.Response(200, content=overlay, headers={"content-type": "image/png"})

    def evidence(self, image: bytes, asked: wire.ImageOptions, top_k: int) -> wire.Entry:
        """Return the entry of wire 2 for one image."""
        entry = self.entry(image, wire.Options(top_k=top_k))
        if "error" in entry:
            return entry
        if not asked.explain:
            return {**entry, "familiar": True}
        target = entry["class"] if asked.target is None else CLASSES[asked.target]
        similar = [
            {"id": rank, "class": target, "similarity": round(0.9 - rank / 10, 1)} for rank in range(asked.similar)
        ]
        evidence: dict[str, Any] = {"familiar": True, "familiarity": 0.75, "similar": similar}
        if asked.coverage is not None:
            evidence["classes"] = [{"class": entry["class"], "confidence": asked.coverage}]
        if asked.test:
            evidence["test"] = {"kept": 0.8, "removed": 0.1, "verdict": "The hot region is enough."}
        return wire.dump_evidence(
            (entry["class"], entry["confidence"]),
            target=(target, 0.25),
            method=asked.method or "sharpcam",
            strength=2.5,
            heatmap=wire.dump_heatmap(1, 3, bytes((0, 128, 255))),
            **evidence,
        )

    def entry(self, image: bytes, options: wire.Options) -> wire.Entry:
        if image.startswith(b"bad:"):
            return wire.dump_error(image[4:].decode(), "the handler's sentence", {"limit": 7})
        name = image.decode("latin-1").removeprefix("image-of-")
        name = name if name in CLASSES else "cat"
        return wire.dump_prediction([(name, 0.9), ("frog", 0.1)][: options.top_k], familiar=self.familiar)


def thumbnail(example: int) -> httpx.Response:
    """Return the handler's answer for a training image; those from 8 on are missing."""
    if example >= 8:
        error = wire.dump_error("unknown_example", "the handler's sentence", {})
        return httpx.Response(200, json={"results": [error]})
    return httpx.Response(200, content=PNG + str(example).encode(), headers={"content-type": "image/png"})


def contract_of(version: str, schema: int, explanation: Explanation | None = None) -> Contract:
    """Return the contract of a version: packed with evidence from schema 3 on."""
    methods = ("gradcam", "eigencam")
    explain = Explanation("layer3", "gradcam", methods)
    evidence = None
    if schema >= 3:
        explain = Explanation("layer3", "sharpcam", ("sharpcam", *methods), sharp_layer="layer3", forward=("sharpcam",))
        evidence = Evidence(Familiar("knn", 5, 100), Similar(10, thumbnails=True, accuracy_kept=0.97), AnswerSet(100))
    return Contract(
        "cifar10",
        version,
        tuple(CLASSES),
        Input(32, 32, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)),
        "resnet18_small",
        explanation or explain,
        evidence=evidence,
        schema=schema,
    )


def version_status(version: str = "1.0.0", role: str = "stable", schema: int = 2, **changes: Any) -> dict[str, Any]:
    found = VersionStatus(
        "cifar10",
        version,
        role,
        "ready",
        routable=True,
        predict=Pool(2, 2, 0, 100),
        explain=Pool(1, 1, 0, 100),
        verified=True,
        contract=contract_of(version, schema),
    )
    status = AgentStatus(0.0, draining=False, torchserve=ServerStatus("running", 0, "http://a"), versions=(found,))
    return agent_status.dump(status)["versions"][0] | changes


@dataclass
class FakeAgent:
    """Reports `versions`; `observes` False freezes the time of its last observation, `up` False refuses connections.

    Its clock is `ahead_s` ahead of ours.

    `others` are the calls in flight of other gateway processes that report to it.
    `heard` is the report that came with the last poll; `processes` has the last report of each process by its id.
    """

    versions: list[dict[str, Any]] = field(default_factory=lambda: [version_status()])
    draining: bool = False
    observes: bool = True
    up: bool = True
    observed_at: float = 0.0
    ahead_s: float = 0.0
    inference_url: str = "http://torchserve:8080"
    others: list[dict[str, int]] = field(default_factory=list)
    heard: dict[str, Any] = field(default_factory=dict)
    processes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.heard = json.loads(request.headers["x-gradserve-gateway"])
        self.processes[self.heard["id"]] = self.heard
        if not self.up:
            raise httpx.ConnectError("refused")
        if self.observes:
            self.observed_at = time.time() + self.ahead_s
        status = AgentStatus(
            told_at=time.time() + self.ahead_s,
            observed_at=self.observed_at,
            draining=self.draining,
            plan_revision=1,
            torchserve=ServerStatus("running", 0, self.inference_url, pid=7),
            versions=(),
            gateways=tuple(
                GatewayStatus(Report(f"other-{index}", 1, calls), 0.1) for index, calls in enumerate(self.others)
            ),
        )
        return httpx.Response(200, json=agent_status.dump(status) | {"versions": self.versions})


def plan_data(**changes: Any) -> dict[str, Any]:
    stable = {"version": "1.0.0", "archive": "cifar10-1.0.0.mar", "sha256": "0" * 64, "workers": None}
    plan = {"schema": 1, "revision": 1, "model": "cifar10", "stable": stable, "canary": None, "shadow": None}
    return {**plan, "retained": [], **changes}


class Client:
    """A caller for tests that are not coroutines; the gateway runs in the portal's event loop."""

    def __init__(self, portal: BlockingPortal, http: httpx.AsyncClient) -> None:
        self.portal = portal
        self.http = http

    def request(self, method: str, path: str, **what: Any) -> httpx.Response:
        return self.portal.call(partial(self.http.request, method, path, **what))

    def get(self, path: str, **what: Any) -> httpx.Response:
        return self.request("GET", path, **what)

    def post(self, path: str, **what: Any) -> httpx.Response:
        return self.request("POST", path, **what)


@dataclass
class Stand:
    """The gateway under test with everything around it."""

    app: Any
    client: Client
    torchserve: FakeTorchServe
    agent: FakeAgent
    plan: Path

    @staticmethod
    def body(route: str, *images: bytes) -> dict[str, Any]:
        """Return the arguments of `client.post` that send the images as the route takes them."""
        if not route.endswith("/infer"):
            return {"files": [("file", ("x.png", image, "image/png")) for image in images]}
        data = [base64.b64encode(image).decode() for image in images]
        return {"json": {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [len(images)], "data": data}]}}

    def explain(self, query: str = "") -> dict[str, Any]:
        """Return the explanation of an image of a dog as JSON, whose form is checked."""
        headers = {"accept": "application/json"}
        answer = self.client.post(f"/explain{query}", content=b"image-of-dog", headers=headers)
        assert answer.status_code == 200, answer.text
        schemas.Explanation.model_validate_json(answer.content)
        return dict(answer.json())

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of the metrics called `name` that have these labels."""
        wanted = {f'{label}="{value}"' for label, value in labels.items()}
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in self.client.get("/metrics").text.splitlines()
            if line.startswith(f"{name}{{") and all(label in line for label in wanted)
        )

    def wait_until(self, is_true: Callable[[], bool], timeout_s: float = 20.0) -> None:
        end = time.monotonic() + timeout_s
        while not is_true():
            assert time.monotonic() < end, "it did not come true in time"
            time.sleep(0.01)


class JumpingSelector(selectors.SelectSelector):
    """A selector that moves the clock to the next timer instead of waiting for it."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        self.now += timeout or 0.0
        return super().select(0)


class JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop in which hours pass in milliseconds, always in the same order."""

    def __init__(self) -> None:
        self.clock = JumpingSelector()
        super().__init__(self.clock)

    def time(self) -> float:
        return self.clock.now


Run: TypeAlias = "Callable[[Coroutine[Any, Any, Any]], Any]"


@pytest.fixture(scope="session")
def run() -> Run:
    """Return `run(scene)`, which returns the coroutine's result from a JumpingLoop."""

    def run(scene: Coroutine[Any, Any, Any]) -> Any:
        with asyncio.Runner(loop_factory=JumpingLoop) as runner:
            return runner.run(scene)

    return run


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("GATEWAY_") or name == "GRADSERVE_HOME":
            monkeypatch.delenv(name)


async def itself(host: str, _port: int) -> list[str]:
    """Resolve a host name of the tests, which no name server knows, to itself."""
    return [host]


@pytest.fixture
def make_stand(tmp_path: Path) -> Iterator[Callable[..., Stand]]:
    """Yield `make_stand(agent=…, torchserve=…, plan=…, any setting=…)`, which starts a gateway."""
    with start_blocking_portal() as portal, ExitStack() as stack:

        def make(
            *,
            agent: FakeAgent | Callable[..., Any] | None = None,
            torchserve: FakeTorchServe | None = None,
            upstream: Callable[..., Any] | None = None,
            tracer: Any = None,
            plan: dict[str, Any] | None = None,
            resolve: Resolve = itself,
            chance: Callable[[], float] = random.random,
            **settings: Any,
        ) -> Stand:
            agent, torchserve = agent or FakeAgent(), torchserve or FakeTorchServe()
            plan_path = tmp_path / "plan.json"
            plan_path.write_text(json.dumps(plan or plan_data()), encoding="utf-8")
            app = create_app(
                # Long, so that a machine that stands still for a moment fails no test that is not about staleness.
                Settings(**{"plan": plan_path, "poll_s": 0.02, "status_max_age_s": 60, **settings}),
                upstream=httpx.MockTransport(upstream or torchserve),
                agent=httpx.MockTransport(agent),
                resolve=resolve,
                chance=chance,
                tracer=tracer,
            )
            stack.enter_context(portal.wrap_async_context_manager(app.router.lifespan_context(app)))
            http = httpx.AsyncClient(
                transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://gateway"
            )
            stack.enter_context(portal.wrap_async_context_manager(http))
            return Stand(app, Client(portal, http), torchserve, agent, plan_path)

        yield make


@pytest.fixture
def stand(make_stand: Callable[..., Stand]) -> Stand:
    """Return a gateway whose agent and TorchServe work."""
    return make_stand()


@pytest.fixture
def make_two_models(make_stand: Callable[..., Stand]) -> Callable[..., Stand]:
    """Return `make_two_models(…)`: as `make_stand`, with the models cifar10, the default one, and photos."""

    def make(**what: Any) -> Stand:
        only = plan_data()
        models = [{"model": name, "stable": only["stable"]} for name in ("cifar10", "photos")]
        plan = {"schema": 3, "revision": 1, "default": "cifar10", "models": models}
        agent = FakeAgent([version_status(), version_status(model="photos")])
        return make_stand(**{"agent": agent, "plan": plan, **what})

    return make


@pytest.fixture
def evidence_stand(make_stand: Callable[..., Stand]) -> Stand:
    """Return a gateway whose stable version was packed with evidence."""
    return make_stand(agent=FakeAgent([version_status(schema=3)]), torchserve=FakeTorchServe(familiar=True))


@pytest.fixture(scope="session")
def assert_problem() -> Callable[[httpx.Response, int, str], None]:
    """Return `assert_problem(answer, status, code)`, which checks that an answer is this problem document."""

    def check(answer: httpx.Response, status: int, code: str) -> None:
        assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), answer.text
        problem = schemas.Problem.model_validate_json(answer.content)
        assert (problem.status, problem.code) == (status, code)
        assert problem.request_id == answer.headers["x-request-id"]
        is_handlers_own = problem.code.startswith(("image_", "unknown_", "bad_"))
        assert problem.detail.endswith(".") or ": curl " in problem.detail or is_handlers_own

    return check


@pytest.fixture(scope="session")
def make_agent() -> type[FakeAgent]:
    """Return the class of the fake agent, for modules that start a gateway of their own."""
    return FakeAgent


@pytest.fixture(scope="session")
def make_torchserve() -> type[FakeTorchServe]:
    """Return the class of the fake TorchServe."""
    return FakeTorchServe


@pytest.fixture(scope="session")
def make_plan() -> Callable[..., dict[str, Any]]:
    """Return the function that makes the data of a traffic plan."""
    return plan_data


@pytest.fixture(scope="session")
def listed() -> Callable[..., Discovery]:
    """Return the function that makes a list of agents of their URLs."""
    return lambda *urls: Discovery(urls, resolve=itself)


@pytest.fixture(scope="session")
def make_version() -> Callable[..., dict[str, Any]]:
    """Return the function that makes the data of one version in an agent's status."""
    return version_status


class Backend(BaseHTTPRequestHandler):
    """The fake agent and the fake TorchServe on one real socket; every answer of the model takes 50 ms."""

    protocol_version = "HTTP/1.1"
    server: BackendServer

    def do_GET(self) -> None:
        request = httpx.Request("GET", "http://agent/status", headers=dict(self.headers))
        report = json.loads(self.server.agent(request).content)
        report["torchserve"]["inference_url"] = f"http://127.0.0.1:{self.server.server_port}"
        self.reply(json.dumps(report).encode())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        time.sleep(0.05)
        request = httpx.Request("POST", f"http://torchserve{self.path}", headers=dict(self.headers), content=body)
        self.reply(FakeTorchServe()(request).content)

    def reply(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Silent."""


class BackendServer(ThreadingHTTPServer):
    """Serves `Backend` silently, because a killed gateway worker leaves broken connections behind."""

    agent: FakeAgent
    request_queue_size = 128

    def handle_error(self, *args: object) -> None:
        """Silent."""


@pytest.fixture(scope="module")
def start_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., tuple[str, int]]]:
    """Yield `start_gateway(WORKERS="2", …)`, which starts Gunicorn and returns the address and the master's pid.

    With `folder` the plan (`plan.json`) and the log (`log`) lie there; `agent` reports instead of one in good order.
    `code` is the folder of the gateway's code, and `environ` has variables that are no settings.
    """
    masters = []
    with ExitStack() as stack:

        def start(
            folder: Path | None = None,
            agent: FakeAgent | None = None,
            code: Path = ROOT,
            environ: dict[str, str] | None = None,
            **settings: str,
        ) -> tuple[str, int]:
            folder = folder or tmp_path_factory.mktemp("gateway")
            process = gateway_process(folder, agent or FakeAgent(), settings, code, environ or {})
            base, master = stack.enter_context(process)
            masters.append(master)
            return base, master

        yield start
        for master in masters:  # all at once, and once: Python's last steps have no handler for a second signal
            os.kill(master, signal.SIGTERM)


@contextlib.contextmanager
def gateway_process(
    folder: Path, agent: FakeAgent, settings: dict[str, str], code: Path, environ: dict[str, str]
) -> Iterator[tuple[str, int]]:
    """Run Gunicorn; whoever asked for it sends it SIGTERM before the end of the context, which waits for its exit."""
    server = BackendServer(("127.0.0.1", 0), Backend)
    server.agent = agent
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (folder / "plan.json").write_text(json.dumps(plan_data()), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    agents = f"http://127.0.0.1:{server.server_port}"
    # Long, as in `make_stand`.
    settings = {
        "AGENTS": agents,
        "PLAN": str(folder / "plan.json"),
        "PORT": port,
        "STATUS_MAX_AGE_S": "60",
        "DRAIN_S": "0.2",
        **settings,
    }
    named = {f"GATEWAY_{name}": value for name, value in settings.items()}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", "-c", "config/gunicorn.conf.py", "gateway.app:create_app()"],
            cwd=code,
            env={**os.environ, "PYTHONPATH": str(code), **named, **environ},
            stdout=log,
            stderr=log,
        )
    base = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 60
        while not is_ready(base):
            assert time.monotonic() < end, (folder / "log").read_text()
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.05)
        yield base, process.pid
        assert process.wait(timeout=60) == 0, (folder / "log").read_text()
    finally:
        process.kill()
        process.wait()
        server.shutdown()
        server.server_close()


def is_ready(base: str) -> bool:
    try:
        return httpx.get(f"{base}/readyz").status_code == 200
    except httpx.TransportError:
        return False
