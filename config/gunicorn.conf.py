"""Gunicorn for the gateway: `gunicorn -c config/gunicorn.conf.py 'gateway.app:create_app()'`.

Everything comes from the gateway's own settings (`GATEWAY_*`), so that there is one place to set a thing.

The master imports the whole application before it forks, and each worker only makes it (`create_app`): a worker that is
started after the files on disk have changed runs the same code as the others. New code needs a restart.
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
    Callers(settings)  # keys and quotas, too, are refused here and not by each worker
    connection_limit(settings.max_connections)
    return settings


raise_open_files_limit()  # the workers inherit it
try:
    _settings = _load()
except SettingsError as error:
    raise SystemExit(f"gateway: {error}") from None
_master = os.getpid()

bind = f"[{_settings.host}]:{_settings.port}" if ":" in _settings.host else f"{_settings.host}:{_settings.port}"
workers = _settings.workers
worker_class = "gateway.server.worker.GatewayWorker"
keepalive = _settings.keep_alive_s
# A worker that does not answer the master for this long is killed; the event loop is never blocked for seconds.
timeout = 30
# After SIGTERM: the drain, then the slowest body and the longest answer, and a little.
graceful_timeout = int(_settings.drain_s + _settings.body_timeout_s + _settings.timeout_s) + 5
forwarded_allow_ips = ",".join(_settings.trusted_proxies)
logconfig_dict = logging_config(_settings.log_level)
control_socket_disable = True
# Our lines name no thread, process or place in the code; to find these is half of what a record costs.
# Source: https://docs.python.org/3/howto/logging.html#optimization
logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
logging._srcfile = None  # type: ignore[attr-defined]  # noqa: SLF001 — as that page names it

# Before any worker imports prometheus_client. Kept over a reload (HUP), where this file is read again: counters go on.
if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(prefix="gateway-metrics-")
    atexit.register(
        lambda folder: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == _master else None,
        os.environ["PROMETHEUS_MULTIPROC_DIR"],
    )

PACKAGES = {"gateway", "contracts"}
# Gunicorn reads this file again at a reload; the modules stay those of the start. The last four would be loaded late.
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
    """Looks at what is really listened on: `--bind` and GUNICORN_CMD_ARGS go before this file.

    And lets a reload (HUP) be refused: one that fails would end Gunicorn, with all that its workers have in hand.
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
            "GATEWAY_TRUSTED_PROXIES=* believes the X-Forwarded-For of every caller: quotas by address can be evaded "
            "and the log's addresses forged; name the proxies instead"
        )
    code = _stamp()

    def reload_if_possible() -> None:
        if _stamp() != code:
            logger.error("not reloaded, and as it was: the code on disk has changed, and new code needs a restart")
            return
        try:
            _load()
        except SettingsError as error:
            logger.error("not reloaded, and as it was: %s", error)  # noqa: TRY400 — it says it all
        else:
            reload()

    server.handle_hup = reload_if_possible


def child_exit(server: Any, worker: Any) -> None:  # noqa: ANN401, ARG001 — Gunicorn's hook
    """Takes a dead worker's gauges out of the sums, and what it told; its counters stay, or they would fall."""
    from prometheus_client import multiprocess  # noqa: PLC0415 — not before the folder is named

    from gateway.server.worker import CONNECTIONS, INFERENCE  # noqa: PLC0415 — as above

    CONNECTIONS.leave(worker.age)
    INFERENCE.leave(worker.age)
    multiprocess.mark_process_dead(worker.pid)
