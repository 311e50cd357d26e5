"""The folder of a running agent: private, removed when the agent has gone, on a file system that can be used."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from control.agent.torchserve.run_folder import MAX_PATH_BYTES, RunFolder, run_base
from control.errors import TempTooLong, TempUnusable

IMPORTS = "import sys; from pathlib import Path; from control.agent.torchserve.run_folder import RunFolder, run_base; "
HOLD = IMPORTS + "f = RunFolder(Path(sys.argv[1])); print(f.path, flush=True); sys.stdin.read()"


@contextlib.contextmanager
def holder(base):
    """A process that holds a folder under `base`, and the folder; the process is killed at the end."""
    command = [sys.executable, "-c", HOLD, str(base)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_nobody_else_can_enter_the_folder_and_it_goes_with_its_agent(tmp_path):
    with RunFolder(tmp_path / "run") as folder:
        folder.prepare()
        assert folder.path.stat().st_mode & 0o777 == 0o700
    assert not folder.path.exists()


def test_the_folder_of_a_killed_agent_is_swept_and_that_of_a_living_one_is_not(tmp_path):
    with holder(tmp_path) as (killed, left), holder(tmp_path) as (_, held):
        (left / "tmp").mkdir()
        killed.kill()
        killed.wait()
        assert left.exists()
        with RunFolder(tmp_path) as folder:
            assert {held, folder.path} == set(tmp_path.glob("ts-*"))


def test_a_new_server_finds_nothing_of_the_one_before_and_the_archives_stay(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.prepare()
        (folder.temp / "models").mkdir()
        (folder.store / "x.mar").touch()
        folder.prepare()
        assert list(folder.temp.iterdir()) == []
        assert (folder.store / "x.mar").exists()


def test_models_are_not_unpacked_below_tmp_where_they_would_be_cleaned_by_age(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADSERVE_HOME", str(tmp_path / "home"))
    assert run_base(None) == tmp_path / "home" / "run"


def test_a_home_too_deep_for_sockets_is_passed_over_for_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADSERVE_HOME", str(tmp_path / ("x" * 90)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert run_base(None) == tmp_path / "gradserve"


def test_a_folder_too_deep_for_sockets_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(TempTooLong, match="AGENT_TEMP"):
        run_base(tmp_path / ("x" * 90))


def test_the_longest_folder_that_is_taken_leaves_room_for_every_socket(tmp_path):
    base = tmp_path / ("x" * (MAX_PATH_BYTES - 12 - len(os.fsencode(tmp_path)) - 1))
    with RunFolder(run_base(base)) as folder:
        assert len(os.fsencode(folder.path)) == MAX_PATH_BYTES
        assert len(os.fsencode(folder.temp / ".ts.sock.10000")) == 107
        assert len(os.fsencode(folder.management_socket)) <= 107


def test_a_folder_that_is_none_is_refused_with_the_systems_word(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TempUnusable, match="AGENT_TEMP"):
        run_base(tmp_path / "file")


def test_a_file_system_without_exec_is_refused_before_java_falls_back_to_tcp_ports(tmp_path):
    if shutil.which("unshare") is None:
        pytest.skip("unshare (util-linux) is not installed")
    script = f"mount -t tmpfs -o noexec none '{tmp_path}' && exec '{sys.executable}' -c \"$1\" '{tmp_path}'"
    code = IMPORTS + "run_base(Path(sys.argv[1]))"
    probe = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*probe, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this user may not make a mount namespace")
    answer = subprocess.run([*probe, "sh", "-c", script, "sh", code], capture_output=True, text=True, check=False)
    assert "TempNoExec" in answer.stderr
    assert "noexec" in answer.stderr
