"""A client of the safe part of TorchServe's management API. Only the agent calls it.

Query parameters only: a JSON body breaks batching (a typo in 0.12 sets the batch delay to -10000). Registrations are
asynchronous only: a synchronous one blocks an event loop that inference shares until the workers are up. Every call is
written to the debug log as one JSON object a line, so that the order of calls can be checked afterwards.
"""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import quote

import httpx

from control.errors import ManagementError, ManagementUnreachable

READY = "READY"
# 1 ms means "take the queued jobs, then start": the yaml's and the API's 0 become 100 ms or batches of two.
MAX_BATCH_DELAY_MS = 1
_LOG_BYTES, _LOG_FILES = 8_000_000, 3


@dataclass(frozen=True)
class Worker:
    """One worker as TorchServe describes it. `pid` is its current or last process, None before the first.

    `alive` is False if there is no such process, which TorchServe does not report.
    """

    pid: int | None
    ready: bool
    alive: bool = True


@dataclass(frozen=True)
class Registered:
    """One registered version of one TorchServe entry; `pending` jobs wait in a queue of `capacity`."""

    version: str
    archive: str
    """The file name or URL that it was registered from."""
    min_workers: int
    workers: tuple[Worker, ...]
    pending: int | None
    capacity: int | None

    @property
    def ready(self) -> int:
        """Return the number of workers that take jobs."""
        return sum(worker.ready for worker in self.workers)

    @property
    def dead(self) -> int:
        """Return the number of workers without a process: TorchServe restarts them, or has given them up."""
        return sum(not worker.alive and not worker.ready for worker in self.workers)


class Management:
    """A client of one TorchServe's management API, to be used as an async context manager."""

    def __init__(self, transport: httpx.AsyncBaseTransport, log: logging.Logger) -> None:
        # A registration unpacks the archive before it answers; other calls are fast unless the machine is busy.
        timeout = httpx.Timeout(30.0, connect=2.0)
        self._client = httpx.AsyncClient(
            base_url="http://torchserve", timeout=timeout, transport=transport, trust_env=False
        )
        self._log = log

    async def __aenter__(self) -> Management:
        """Return the client itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def describe(self, name: str) -> dict[str, Registered]:
        """Return the registered versions of the entry `name`; empty if there are none.

        Raises:
            ManagementError: TorchServe did not answer, or not readably.
        """
        path = f"/models/{quote(name)}/all"
        response = await self._call("GET", path, timeout_s=3.0, accept=(200, 404))
        if response.status_code == 404:
            return {}
        try:
            found = [_registered(item) for item in response.json()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ManagementError("GET", path, response.status_code, "unreadable answer") from error
        return {item.version: item for item in found}

    async def entries(self) -> set[str]:
        """Return the names of all entries that TorchServe has.

        Raises:
            ManagementError: TorchServe did not answer, or not readably.
        """
        names: set[str] = set()
        page = "0"
        while page:
            params = {"next_page_token": page}
            response = await self._call("GET", "/models", params=params, timeout_s=3.0, accept=(200,))
            try:
                answer = response.json()
                names |= {str(item["modelName"]) for item in answer["models"]}
                page = str(answer.get("nextPageToken") or "")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ManagementError("GET", "/models", response.status_code, "unreadable answer") from error
        return names

    async def register(self, archive: str, name: str, *, workers: int, batch_size: int) -> None:
        """Register `archive` (a file name in the model store) as `name`, without waiting for its workers.

        A version that is already registered stays as it is.

        Raises:
            ManagementError: TorchServe refused or did not answer.
        """
        params = {
            "url": archive,
            "model_name": name,
            "initial_workers": str(workers),
            "batch_size": str(batch_size),
            "max_batch_delay": str(MAX_BATCH_DELAY_MS),
            "synchronous": "false",
        }
        await self._call("POST", "/models", params=params, accept=(200, 202, 409))

    async def scale(self, name: str, version: str, workers: int) -> None:
        """Set the number of workers to `workers`, without waiting for them.

        Raises:
            ManagementError: TorchServe refused or did not answer.
        """
        params = {"min_worker": str(workers), "max_worker": str(workers), "synchronous": "false"}
        await self._call("PUT", _version_path(name, version), params=params, accept=(200, 202))

    async def set_default(self, name: str, version: str) -> None:
        """Make `version` the default of calls without a version (the default cannot be unregistered).

        Raises:
            ManagementError: TorchServe refused or did not answer.
        """
        await self._call("PUT", _version_path(name, version) + "/set-default", accept=(200,))

    async def unregister(self, name: str, version: str) -> None:
        """Unregister `version`. Jobs in its queue are lost: drain it before.

        Raises:
            ManagementError: TorchServe refused or did not answer.
        """
        await self._call("DELETE", _version_path(name, version), timeout_s=40.0, accept=(200, 404))

    async def is_answering(self) -> bool:
        """Return True if the API answers."""
        try:
            await self._call("GET", "/models", timeout_s=2.0, accept=(200,))
        except ManagementError:
            return False
        return True

    async def _call(
        self,
        method: Literal["GET", "POST", "PUT", "DELETE"],
        path: str,
        *,
        accept: tuple[int, ...],
        params: dict[str, str] | None = None,
        timeout_s: float = 30.0,
    ) -> httpx.Response:
        started = time.perf_counter()
        url = httpx.URL(path, params=params)
        try:
            response = await self._client.request(method, url, timeout=timeout_s)
        except httpx.HTTPError as error:
            self._write(method, url, 0, started, type(error).__name__)
            raise ManagementUnreachable(method, path, type(error).__name__) from error
        self._write(method, url, response.status_code, started, _summary(response))
        if response.status_code not in accept:
            raise ManagementError(method, path, response.status_code, _message(response))
        return response

    def _write(self, method: str, url: httpx.URL, status: int, started: float, answer: object) -> None:
        if not self._log.isEnabledFor(logging.DEBUG):
            return
        line = {
            "time": round(time.time(), 3),
            "method": method,
            "path": str(url),
            "status": status,
            "ms": round(1000 * (time.perf_counter() - started), 1),
            "answer": answer,
        }
        self._log.debug(json.dumps(line))


def debug_log(path: Path | None) -> logging.Logger:
    """Return the logger of management calls: it writes to `path` (rotated, a few megabytes), or nowhere without one."""
    log = logging.getLogger("gradserve.management")
    log.propagate = False
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    if path is None:
        log.setLevel(logging.CRITICAL)
        return log
    path.parent.mkdir(parents=True, exist_ok=True)
    log.setLevel(logging.DEBUG)
    log.addHandler(
        logging.handlers.RotatingFileHandler(path, maxBytes=_LOG_BYTES, backupCount=_LOG_FILES, encoding="utf-8")
    )
    return log


def _version_path(name: str, version: str) -> str:
    return f"/models/{quote(name)}/{quote(version)}"


def _worker(item: dict[str, Any]) -> Worker:
    # -1 before the first process. A worker whose process has ended keeps that process's pid.
    pid = item["pid"] if item.get("pid", -1) > 0 else None
    return Worker(pid, item.get("status") == READY, alive=pid is not None and Path(f"/proc/{pid}").exists())


def _registered(item: dict[str, Any]) -> Registered:
    queue = item.get("jobQueueStatus") or {}
    pending, remaining = queue.get("pendingRequests"), queue.get("remainingCapacity")
    return Registered(
        version=str(item["modelVersion"]),
        archive=str(item.get("modelUrl", "")),
        min_workers=int(item["minWorkers"]),
        workers=tuple(_worker(worker) for worker in item.get("workers", [])),
        pending=pending,
        capacity=None if pending is None or remaining is None else pending + remaining,
    )


def _summary(response: httpx.Response) -> object:
    """Return the answer's summary for the debug log: the state by version of a description, else its message."""
    try:
        data = response.json()
    except ValueError:
        return response.text[:200]
    if isinstance(data, list):
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            states = [_registered(item) for item in data]
            return {state.version: {"ready": state.ready, "pending": state.pending} for state in states}
    return data.get("status") or data.get("message") if isinstance(data, dict) else None


def _message(response: httpx.Response) -> str:
    try:
        return str(cast("dict[str, Any]", response.json()).get("message", ""))
    except (ValueError, AttributeError):
        return ""
