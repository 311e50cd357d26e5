"""The limit of open files is raised, and connections leave a reserve."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from gateway.server.open_files import connection_limit, raise_open_files_limit
soft, hard, wanted = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
raise_open_files_limit()
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], connection_limit(wanted))
"""


def limits(soft: int, hard: int, wanted: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, str(soft), str(hard), str(wanted)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("soft", "hard", "wanted", "raised", "connections"),
    [(300, 2000, 1000, 2000, 1000), (300, 500, 1000, 500, 244), (300, 500, 10, 500, 10)],
)
def test_the_soft_limit_is_raised_and_connections_leave_a_reserve(
    soft: int, hard: int, wanted: int, raised: int, connections: int
) -> None:
    assert limits(soft, hard, wanted).stdout.split() == [str(raised), str(connections)]


def test_a_limit_that_leaves_room_for_no_connection_is_refused_with_the_remedy() -> None:
    said = limits(100, 200, 1000).stderr
    assert "the limit of open files is 200, and 256 are needed besides connections: raise it (`ulimit -n`)" in said
