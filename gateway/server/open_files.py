"""The limit of open files, and the number of connections that it allows.

A connection is an open file. Without a reserve, callers who only hold connections would leave no files for the plan,
the keys and TorchServe: every call would get 503, and changes of the plan or the keys would be missed.
"""

from __future__ import annotations

import resource

from gateway.settings import SettingsError

RESERVED = 256
"""Open files that a process needs besides its callers' connections: plan, keys, metrics, agents, TorchServe."""

ENOUGH = 65_536
"""The highest limit that is set: some systems allow a billion, and some libraries loop over all possible files."""


def raise_open_files_limit() -> None:
    """Raise the soft limit of open files to the hard one, or to 65,536."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def connection_limit(wanted: int) -> int:
    """Return the number of connections that this process may hold: `wanted`, or fewer by the limit of open files.

    Raises:
        SettingsError: the limit leaves no file for connections.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    if soft <= RESERVED:
        raise SettingsError(
            f"the limit of open files is {soft}, and {RESERVED} are needed besides connections: raise it (`ulimit -n`)"
        )
    return min(wanted, soft - RESERVED)
