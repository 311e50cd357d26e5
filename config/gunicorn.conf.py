"""Gunicorn for the gateway: `gunicorn -c config/gunicorn.conf.py 'gateway.app:create_app()'`.

All values come from the gateway's own settings (`GATEWAY_*`), so that each is set in one place.

The master imports all code before it forks, and each worker only calls `create_app`. So a worker that
starts after the files on disk have changed runs the same code as the others. New code needs a restart.
"""

import atexit
import contextlib
import importlib
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from gateway.auth.callers import Callers
from gateway.server.open_files import connection_limit, raise_open_files_limit
from gateway.settings import Settings, SettingsError, load_settings, trusts_everyone
from gateway.telemetry.logs import logging_config


def _load() -> Settings:
    settings = load_settings()
    Callers(settings)  # refuses bad keys and quotas here instead of in each worker
    connection_limit(settings.max_connections)
    return settings


raise_open_files_limit()  # the workers inherit the limit
try:
    _settings = _load()
except SettingsError as error:
    raise SystemExit(f"gateway: {error}") from None
_master = os.getpid()

bind = f"[{_settings.host}]:{_settings.port}" if ":" in _settings.host else f"{_settings.host}:{_settings.port}"
workers = _settings.workers
worker_class = "gateway.server.worker.GatewayWorker"
keepalive = _settings.keep_alive_s
# The master kills a worker that does not answer for this long; the event loop is never blocked for seconds.
timeout = 30
# After SIGTERM: the drain, the slowest body, the longest answer, and a margin.
graceful_timeout = int(_settings.drain_s + _settings.body_timeout_s + _settings.timeout_s) + 5
forwarded_allow_ips = ",".join(_settings.trusted_proxies)
logconfig_dict = logging_config(_settings.log_level)
control_socket_disable = True
# Our log lines contain no thread or process.
# Source: https://docs.python.org/3/howto/logging.html#optimization
logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False

# The master's heartbeat files and the metrics are kept in memory: on a full disk no process would start.
worker_tmp_dir = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 — a folder of random name inside
# Set before any worker imports prometheus_client. A reload (HUP) reads this file again and keeps the folder, so that
# counters continue.
if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(prefix="gateway-metrics-", dir=worker_tmp_dir)
    atexit.register(
        lambda folder: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == _master else None,
        os.environ["PROMETHEUS_MULTIPROC_DIR"],
    )

PACKAGES = {"gateway", "contracts"}
# A reload reads this file again but keeps the modules of the start. The last four would otherwise be imported later.
for _name in (
    "gateway.app",
    "gateway.server.worker",
    "prometheus_client.multiprocess",
    "httpcore",
    "uvicorn.lifespan.on",
    "uvicorn.loops.uvloop",
    "uvicorn.protocols.http.httptools_impl",
):
    importlib.import_module(_name)
if _settings.otlp_endpoint:
    importlib.import_module("gateway.telemetry.tracing")


def _stamp() -> dict[str, tuple[int, int] | None]:
    """Return time and size of each file that the gateway's own code was loaded from; None for one that is gone."""
    found: dict[str, tuple[int, int] | None] = {__file__: None}
    found.update((module.__file__, None) for name, module in sys.modules.items() if name.split(".")[0] in PACKAGES)
    for path in found:
        with contextlib.suppress(OSError):
            stat = Path(path).stat()
            found[path] = (stat.st_mtime_ns, stat.st_size)
    return found


def when_ready(server: Any) -> None:  # noqa: ANN401 — Gunicorn's hook
    """Check the addresses that Gunicorn really listens on, and let a reload (HUP) be refused.

    `--bind` and GUNICORN_CMD_ARGS override this file. A reload that fails would end Gunicorn with all its calls.
    """
    addresses = [listener.sock.getsockname() for listener in server.LISTENERS]
    try:
        _settings.check_addresses([address[0] for address in addresses if isinstance(address, tuple)])
    except ValueError as error:
        raise SystemExit(f"gateway: {error}") from None
    reload = server.handle_hup
    logger = logging.getLogger("gateway")
    if trusts_everyone(_settings.trusted_proxies):
        logger.warning(
            "GATEWAY_TRUSTED_PROXIES=* trusts the X-Forwarded-For of every caller, who can evade quotas by address and "
            "forge the addresses in the log: name the proxies instead"
        )
    code = _stamp()

    def reload_if_possible() -> None:
        if _stamp() != code:
            logger.error("not reloaded: the code on disk has changed, and new code needs a restart")
            return
        try:
            _load()
        except SettingsError as error:
            logger.error("not reloaded, the old settings stay: %s", error)  # noqa: TRY400 — the traceback adds nothing
        else:
            reload()

    server.handle_hup = reload_if_possible


def child_exit(server: Any, worker: Any) -> None:  # noqa: ANN401, ARG001 — Gunicorn's hook
    """Remove a dead worker's gauges from the sums; its counters stay: counters must not fall."""
    from prometheus_client import multiprocess  # noqa: PLC0415 — not before the folder is named

    multiprocess.mark_process_dead(worker.pid)
