"""Passes TorchServe's output on, line by line, and remembers what its workers said while they loaded.

That is: why they cannot load, and which of them run the fallback engine.
"""

from __future__ import annotations

import contextlib
import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

# config/torchserve/log4j2.xml: "<time> [INFO ] MODEL_LOG W-9000-<entry>_<version>-stdout - <what the worker printed>".
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
    """Reads one TorchServe's output for as long as it runs."""

    def __init__(self, write: Callable[[bytes], object] | None = None) -> None:
        self._write = write or sys.stdout.buffer.write
        self._reasons: dict[str, str] = {}
        self._pids: dict[str, int] = {}
        self.fallen_back: set[int] = set()
        """Process ids of the workers that loaded the fallback engine, dead ones too."""

    def why(self, entry: str, version: str) -> str | None:
        """The last complaint of a worker of this entry and version, if there was one."""
        return self._reasons.get(f"{entry}_{version}")

    def forget(self) -> None:
        """Forgets every complaint: another server starts."""
        for noted in (self._reasons, self._pids, self.fallen_back):
            noted.clear()

    async def follow(self, output: asyncio.StreamReader) -> None:
        """Passes everything on until the output ends."""
        rest = b""
        while chunk := await output.read(65536):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self.take(line)
            # A line without an end would grow for ever.
            rest = rest[-65536:]
        if rest:
            self.take(rest)

    def take(self, line: bytes) -> None:
        """Passes one line on and notes it if it is a worker's complaint."""
        # A disk that is full must not stop the reading: java would wait for it with everything that it does.
        with contextlib.suppress(OSError):
            self._write(line + b"\n")
            sys.stdout.flush()
        found = _WORKER_LINE.search(line.decode("utf-8", "replace"))
        if found is None:
            return
        if pid := _PID.search(found["said"]):
            # The kernel may give a dead worker's number to a new one.
            self._pids[found["number"]] = int(pid["pid"])
            self.fallen_back.discard(int(pid["pid"]))
        elif _FALLBACK in found["said"] and found["number"] in self._pids:
            self.fallen_back.add(self._pids[found["number"]])
        elif reason := _REASON.search(found["said"]):
            sentence, exception = reason["sentence"], reason["exception"]
            # The handler's sentence says more than the exception that is raised because of it.
            if sentence or "cannot be served" not in self._reasons.get(found["entry"], ""):
                self._reasons[found["entry"]] = (sentence or exception)[:_MAX_REASON]
