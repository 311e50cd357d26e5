"""The local stack's ports: find free private ports, and refuse a port that was set and is taken."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

from control.errors import BadSetting, PortsTaken
from control.settings import PORTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from control.settings import AgentSettings

MLFLOW_PORT = 5000


def with_free_ports(settings: AgentSettings, reserved: Iterable[int]) -> AgentSettings:
    """Return the settings with a free port for each port that the environment does not set.

    The defaults are kept if all of them are free. If one is taken, all are replaced: another stack that has just been
    started may not listen on its other ports yet.
    """
    unset = [field for field in PORTS if field not in settings.model_fields_set]
    used = {*reserved, *(getattr(settings, field) for field in PORTS if field not in unset)}
    if all(_may_use(getattr(settings, field), used) for field in unset):
        return settings
    return settings.model_copy(update={field: free_port(used) for field in unset})


def mlflow_port(reserved: Iterable[int]) -> int:
    """Return the port of MLflow's page: `MLFLOW_PORT`, else 5000, else a free port.

    Raises:
        BadSetting: `MLFLOW_PORT` is not a port number.
    """
    if named := os.environ.get("MLFLOW_PORT"):
        if not named.isdecimal() or not 1 <= int(named) <= 65535:
            raise BadSetting([f"MLFLOW_PORT = {named!r}: use a number from 1 to 65535"])
        return int(named)
    used = {*reserved}
    return MLFLOW_PORT if _may_use(MLFLOW_PORT, used) else free_port(used)


def free_port(used: set[int]) -> int:
    """Return a free port of this machine that is not in `used`, and add it to `used`."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port not in used:
            used.add(port)
            return port


def refuse_taken_ports(ports: Mapping[int, str], host: str = "127.0.0.1") -> None:
    """Raise `PortsTaken` if a port is in use. `ports` maps each to its use and the variable that moves it.

    Raises:
        PortsTaken: at least one port is in use; the error names all of them.
    """
    taken = {port: use for port, use in ports.items() if not all(is_free(at, port) for at in {host, "127.0.0.1"})}
    if taken:
        raise PortsTaken(taken)


def is_free(host: str, port: int) -> bool:
    """Return True if a server could listen on this port of `host`."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # As servers do: a port in TIME_WAIT counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _may_use(port: int, used: set[int]) -> bool:
    return port not in used and is_free("127.0.0.1", port)
