"""Passes TorchServe's output on, line by line, and remembers what its workers said last about why they cannot load."""

from __future__ import annotations

import contextlib
import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

# config/torchserve/log4j2.xml: "<time> [INFO ] MODEL_LOG W-9000-<entry>_<version>-stdout - <what the worker printed>".
_WORKER_LINE = re.compile(r"MODEL_LOG W-\d+-(?P<entry>\S+)-std(?:out|err) - (?P<said>.*)")
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

    def why(self, entry: str, version: str) -> str | None:
        """The last complaint of a worker of this entry and version, if there was one."""
        return self._reasons.get(f"{entry}_{version}")

    def forget(self) -> None:
        """Forgets every complaint: another server starts."""
        self._reasons.clear()

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
        reason = _REASON.search(found["said"]) if found else None
        if found and reason:
            sentence, exception = reason["sentence"], reason["exception"]
            # The handler's sentence says more than the exception that is raised because of it.
            if sentence or "cannot be served" not in self._reasons.get(found["entry"], ""):
                self._reasons[found["entry"]] = (sentence or exception)[:_MAX_REASON]
