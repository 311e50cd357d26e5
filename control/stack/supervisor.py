"""The local stack's child processes: start them together, restart with back-off, stop them in order."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from control.errors import ProcessFailed
from control.stack.children import die_with_parent, end_group, signal_group

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_log = logging.getLogger(__name__)
_DEATHS, _WITHIN_S = 3, 60.0
_BACKOFF_FIRST_S = 1.0
_TAIL_BYTES = 3000
# A log consists of the current file and this many older ones.
_OLD_LOGS = 3
LOG_MB = 256


@dataclass
class SupervisedProcess:
    """One supervised program: its command line, its whole environment, its log, and the time it may take to stop."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    stop_within_s: float
    log_bytes: int = LOG_MB * 1_000_000
    """Largest size of the log, older files included."""
    child: subprocess.Popen[bytes] | None = None
    deaths: deque[float] = field(default_factory=deque)
    start_at: float = 0.0

    def start(self) -> None:
        """Start the program in its own process group and append its output to the log; it ends with this process."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self.child = subprocess.Popen(  # noqa: S603 (our own command lines)
                self.command,
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
                preexec_fn=die_with_parent(signal.SIGTERM),  # noqa: PLW1509 (no threads here; see children.py)
            )

    def check(self, now: float) -> None:
        """Record a death, and restart the process when its back-off has passed.

        Raises:
            ProcessFailed: it died three times within a minute.
        """
        if self.child is not None and self.child.poll() is not None:
            end_group(self.child.pid)  # processes that it left behind would keep its ports
            _log.warning("%s ended with status %s", self.name, self.child.returncode)
            self.child = None
            self.deaths.append(now)
            while now - self.deaths[0] > _WITHIN_S:
                self.deaths.popleft()
            if len(self.deaths) >= _DEATHS:
                raise ProcessFailed(self.name, len(self.deaths), self.log, self.tail())
            self.start_at = now + _BACKOFF_FIRST_S * 2 ** (len(self.deaths) - 1)
        if self.child is None and now >= self.start_at:
            self.start()

    def stop(self, *, at_once: bool = False) -> None:
        """Stop the process by SIGTERM, or kill it after `stop_within_s`; then kill the rest of its group."""
        if self.child is None:
            return
        group = self.child.pid
        if not at_once and self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)
            try:
                self.child.wait(self.stop_within_s)
            except subprocess.TimeoutExpired:
                _log.warning("%s did not end within %.0f s; it is killed", self.name, self.stop_within_s)
        signal_group(group, signal.SIGKILL)
        self.child.wait()
        end_group(group)
        self.child = None

    def rotate_log(self) -> None:
        """Rotate the log if its current file exceeds its share of `log_bytes`."""
        rotate(self.log, self.log_bytes // (1 + _OLD_LOGS))

    def tail(self) -> str:
        """Return the last lines of the log."""
        try:
            with self.log.open("rb") as file:
                file.seek(0, 2)
                file.seek(max(0, file.tell() - _TAIL_BYTES))
                lines = file.read().decode("utf-8", "replace").splitlines()
        except OSError:
            return "(no log)"
        return "\n".join(f"  {line}" for line in lines[-15:])


def rotate(path: Path, max_bytes: int) -> None:
    """Move the content of the log `path` to `path`.1, and older logs on, if it has more than `max_bytes`.

    The program keeps the file open and appends to it, so the file is copied and emptied in place. Lines written between
    the last read and the truncation (microseconds) are lost. On a full disk the whole content is lost.
    """
    try:
        if path.stat().st_size <= max_bytes:
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
    """Copy the file; if that fails, log a warning and remove the copy."""
    try:
        with path.open("rb") as source, to.open("wb") as copy:
            while chunk := source.read(1 << 20):
                copy.write(chunk)
    except OSError as error:  # disk full: losing the log is better than filling the disk
        _log.warning("%s is emptied without a copy: %s", path, error.strerror)
        to.unlink(missing_ok=True)


def stop_all(processes: Sequence[SupervisedProcess], *, at_once: bool = False) -> None:
    """Stop the processes, last started first."""
    for process in reversed(processes):
        process.stop(at_once=at_once)


def check_all(processes: Sequence[SupervisedProcess]) -> None:
    """Check every process and rotate its log.

    Raises:
        ProcessFailed: one died three times within a minute.
    """
    for process in processes:
        process.check(time.monotonic())
        process.rotate_log()
