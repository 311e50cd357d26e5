"""Parts of the local stack as child processes: started together, restarted with back-off, stopped in order."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from control.errors import PartFailed
from control.stack.children import die_with_parent, end_group, signal_group

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_log = logging.getLogger(__name__)
_DEATHS, _WITHIN_S = 3, 60.0
_BACKOFF_FIRST_S = 1.0
_TAIL_BYTES = 3000
# A log is the file that is written to and this many older ones.
_OLD_LOGS = 3
LOG_MB = 256


@dataclass
class Part:
    """One program: its command line, its whole environment, its log, and how long it may take to stop."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    stop_within_s: float
    log_bytes: int = LOG_MB * 1_000_000
    """Bytes that the log may have, older files included."""
    process: subprocess.Popen[bytes] | None = None
    deaths: deque[float] = field(default_factory=deque)
    start_at: float = 0.0

    def start(self) -> None:
        """Starts the program, in a process group of its own that ends with this process; its output is appended."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(  # noqa: S603 (our own command lines)
                self.command,
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
                preexec_fn=die_with_parent(signal.SIGTERM),  # noqa: PLW1509 (no threads here; see children.py)
            )

    def check(self, now: float) -> None:
        """Notes a death and starts the part again when its pause is over.

        Raises:
            PartFailed: it died three times within a minute.
        """
        if self.process is not None and self.process.poll() is not None:
            end_group(self.process.pid)  # what it left behind would hold its ports
            _log.warning("%s ended with status %s", self.name, self.process.returncode)
            self.process = None
            self.deaths.append(now)
            while now - self.deaths[0] > _WITHIN_S:
                self.deaths.popleft()
            if len(self.deaths) >= _DEATHS:
                raise PartFailed(self.name, len(self.deaths), self.log, self.tail())
            self.start_at = now + _BACKOFF_FIRST_S * 2 ** (len(self.deaths) - 1)
        if self.process is None and now >= self.start_at:
            self.start()

    def stop(self, *, in_a_hurry: bool = False) -> None:
        """Ends the part: asked first, killed when it does not follow in time, and whatever it left with it."""
        if self.process is None:
            return
        group = self.process.pid
        if not in_a_hurry and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(self.stop_within_s)
            except subprocess.TimeoutExpired:
                _log.warning("%s did not end within %.0f s; it is killed", self.name, self.stop_within_s)
        signal_group(group, signal.SIGKILL)
        self.process.wait()
        end_group(group)
        self.process = None

    def rotate_log(self) -> None:
        """Make room in the log once its file has its share of `log_bytes`."""
        rotate(self.log, self.log_bytes // (1 + _OLD_LOGS))

    def tail(self) -> str:
        """The end of the log."""
        try:
            with self.log.open("rb") as file:
                file.seek(0, 2)
                file.seek(max(0, file.tell() - _TAIL_BYTES))
                lines = file.read().decode("utf-8", "replace").splitlines()
        except OSError:
            return "(no log)"
        return "\n".join(f"  {line}" for line in lines[-15:])


def rotate(path: Path, most_bytes: int) -> None:
    """Move what the log `path` holds to `path`.1, and older logs on, when it has more than `most_bytes`.

    The program goes on writing to the file that it holds open, at its end: so the file is copied and emptied in place.
    What is written between the last read and that, for microseconds, is lost. On a full disk all of it is.
    """
    try:
        if path.stat().st_size <= most_bytes:
            return
        files = [path.with_name(f"{path.name}.{number}") for number in range(1, _OLD_LOGS + 1)]
        for older, newer in zip(files[:0:-1], files[-2::-1], strict=True):
            if newer.exists():
                newer.replace(older)
        _copy(path, files[0])
        os.truncate(path, 0)
    except OSError as error:
        _log.warning("%s cannot be rotated: %s", path, error.strerror)


def _copy(path: Path, to: Path) -> None:
    """Copy what can be copied."""
    try:
        with path.open("rb") as source, to.open("wb") as copy:
            while chunk := source.read(1 << 20):
                copy.write(chunk)
    except OSError as error:  # no room: better that the log goes than that it fills the disk
        _log.warning("%s is emptied without a copy: %s", path, error.strerror)
        to.unlink(missing_ok=True)


def stop_all(parts: Sequence[Part], *, in_a_hurry: bool = False) -> None:
    """Stops the parts, last started first."""
    for part in reversed(parts):
        part.stop(in_a_hurry=in_a_hurry)


def check_all(parts: Sequence[Part]) -> None:
    """Look after every part and its log once.

    Raises:
        PartFailed: one died three times within a minute.
    """
    for part in parts:
        part.check(time.monotonic())
        part.rotate_log()
