"""Forward TorchServe's output line by line, and keep what its workers log while they load.

Kept are the reason why a worker cannot load, and the pids of workers that run the fallback engine.
"""

from __future__ import annotations

import contextlib
import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

# config/torchserve/log4j2.xml: "<time> [INFO ] MODEL_LOG W-9000-<entry>_<version>-stdout - <the worker's line>".
_WORKER_LINE = re.compile(r"MODEL_LOG W-(?P<number>\d+)-(?P<entry>\S+)-std(?:out|err) - (?P<said>.*)")
# TorchServe's own line at the start of each worker, and the handler's (handlers/model.py).
_PID = re.compile(r"\[PID\](?P<pid>\d+)$")
_FALLBACK = "the engine cannot run here, falling back to"
# The handler's own sentence, or the last line of a traceback; not the source line that a traceback quotes.
_REASON = re.compile(
    r"^(?:Failed to load model|RuntimeError:).*?(?P<sentence>cannot be served: .+)"
    r"|^(?P<exception>[\w.]*(?:Error|Exception)\b.*)"
)
_MAX_REASON = 300


class ServerLog:
    """The reader of one TorchServe's output."""

    def __init__(self, write: Callable[[bytes], object] | None = None) -> None:
        self._write = write or sys.stdout.buffer.write
        self._reasons: dict[str, str] = {}
        self._pids: dict[str, int] = {}
        self.fallback_pids: set[int] = set()
        """Process ids of the workers that loaded the fallback engine, including dead ones."""

    def load_failure(self, entry: str, version: str) -> str | None:
        """Return the last error of a worker of this entry and version; None without one."""
        return self._reasons.get(f"{entry}_{version}")

    def clear(self) -> None:
        """Clear everything: another TorchServe starts."""
        for kept in (self._reasons, self._pids, self.fallback_pids):
            kept.clear()

    async def forward(self, output: asyncio.StreamReader) -> None:
        """Forward the output until it ends."""
        rest = b""
        while chunk := await output.read(65536):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self.read_line(line)
            # Limit a line without an end.
            rest = rest[-65536:]
        if rest:
            self.read_line(rest)

    def read_line(self, line: bytes) -> None:
        """Forward one line, and keep it if it is a worker's error or names its engine."""
        # A full disk must not stop the reading: java would block on its output.
        with contextlib.suppress(OSError):
            self._write(line + b"\n")
            sys.stdout.flush()
        found = _WORKER_LINE.search(line.decode("utf-8", "replace"))
        if found is None:
            return
        if pid := _PID.search(found["said"]):
            # The kernel may give a dead worker's number to a new one.
            self._pids[found["number"]] = int(pid["pid"])
            self.fallback_pids.discard(int(pid["pid"]))
        elif _FALLBACK in found["said"] and found["number"] in self._pids:
            self.fallback_pids.add(self._pids[found["number"]])
        elif reason := _REASON.search(found["said"]):
            sentence, exception = reason["sentence"], reason["exception"]
            # The handler's sentence says more than the exception that follows from it.
            if sentence or "cannot be served" not in self._reasons.get(found["entry"], ""):
                self._reasons[found["entry"]] = (sentence or exception)[:_MAX_REASON]
