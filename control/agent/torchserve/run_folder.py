"""The folder of one running agent with the files of its TorchServe: sockets, archives, unpacked models.

Each agent creates its own folder and holds a lock on it while it lives. The next agent on the machine removes the
folders whose lock is free: those of agents that were killed. The folder's mode is 0700, because any process that can
open the management socket in it can run code as the agent's user.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

from control.errors import TempNoExec, TempTooLong, TempUnusable
from control.settings import home_directory

if TYPE_CHECKING:
    from collections.abc import Iterator

_PREFIX = "ts-"
_LOCK = ".lock"
# A Unix socket's path ends at 107 bytes. The longest of ours is "<folder>/tmp/.ts.sock.10000", a worker's.
MAX_PATH_BYTES = 107 - len("/tmp/.ts.sock.10000")  # noqa: S108 (a part of a path)
# mkdtemp adds eight characters to the prefix.
MAX_BASE_BYTES = MAX_PATH_BYTES - len(f"/{_PREFIX}") - 8


class RunFolder:
    """One agent's folder under `base`. A context manager, which removes it at the end."""

    def __init__(self, base: Path) -> None:
        base.mkdir(parents=True, exist_ok=True)
        with _locked(base / _LOCK):
            _sweep(base)
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
            self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.store.mkdir()

    def __enter__(self) -> Self:
        """Return the folder itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the folder with everything in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    @property
    def store(self) -> Path:
        """TorchServe's model store: private copies of the archives, each named by its hash."""
        return self.path / "store"

    @property
    def temp(self) -> Path:
        """The temporary folder of java and its workers: unpacked archives and the workers' sockets."""
        return self.path / "tmp"

    @property
    def management_socket(self) -> Path:
        """The Unix socket of TorchServe's management API."""
        return self.path / "management.sock"

    @property
    def grpc_gate(self) -> Path:
        """The named pipe that keeps TorchServe from starting gRPC, see config/torchserve/config.properties."""
        return self.path / "grpc-off"

    @property
    def config(self) -> Path:
        """TorchServe's configuration."""
        return self.path / "config.properties"

    def prepare(self) -> None:
        """Empty the temporary folder, and create what the next TorchServe needs."""
        shutil.rmtree(self.temp, ignore_errors=True)
        self.temp.mkdir()
        if not self.grpc_gate.exists():
            os.mkfifo(self.grpc_gate, 0o600)


def run_base(temp: Path | None) -> Path:
    """Return the parent of the agents' folders: `temp`, else GRADSERVE_HOME/run, else ~/.cache/gradserve.

    It is not below /tmp unless `temp` is, because systemd-tmpfiles removes old files there: a worker that restarts
    still needs a model that was unpacked ten days ago.

    Raises:
        TempTooLong: the path leaves no room for the names of Unix sockets.
        TempNoExec: the file system is mounted with noexec; Java could not load its library for Unix sockets.
        TempUnusable: the folder cannot be written to.
    """
    if temp is not None:
        return _checked(temp.resolve())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    with contextlib.suppress(TempTooLong, TempNoExec, TempUnusable):
        return _checked(home_directory() / "run")
    return _checked(cache.resolve() / "gradserve")


def _checked(base: Path) -> Path:
    if len(os.fsencode(base)) > MAX_BASE_BYTES:
        raise TempTooLong(base, MAX_BASE_BYTES)
    try:
        base.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=base):
            pass
    except OSError as error:
        raise TempUnusable(base, error.strerror or type(error).__name__) from error
    if os.statvfs(base).f_flag & os.ST_NOEXEC:
        raise TempNoExec(base)
    return base


def _sweep(base: Path) -> None:
    """Remove the folders of agents that have ended."""
    for folder in base.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), _locked(folder / _LOCK, wait=False):
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock on the file `path`.

    Raises:
        BlockingIOError: another process holds it, and `wait` is False.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)
