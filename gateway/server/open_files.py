"""The limit of open files, and how many connections it leaves room for.

A connection is an open file. Without a reserve, callers who only hold connections would leave none for the plan, the
keys and TorchServe: every call would get 503, and no change of plan or keys would be followed.
"""

from __future__ import annotations

import resource

from gateway.settings import SettingsError

RESERVED = 256
"""Open files of a process beside its callers' connections: plan, keys, metrics, agents, and calls to TorchServe."""

ENOUGH = 65_536
"""Some systems allow a billion, and some libraries make a list of all."""


def raise_open_files_limit() -> None:
    """Raise the soft limit of open files to the hard one, or to 65,536."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def connection_limit(wanted: int) -> int:
    """Return how many connections this process may hold: `wanted`, or what the limit of open files leaves room for.

    Raises:
        SettingsError: it leaves room for none.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    if soft <= RESERVED:
        raise SettingsError(
            f"the limit of open files is {soft}, and {RESERVED} are needed beside connections: raise it (`ulimit -n`)"
        )
    return min(wanted, soft - RESERVED)
