"""The folder of a running agent: private, removed after the agent has ended, on a usable file system."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from control.agent.torchserve.run_folder import MAX_PATH_BYTES, RunFolder, run_base
from control.errors import TempTooLong, TempUnusable

IMPORTS = "import sys; from pathlib import Path; from control.agent.torchserve.run_folder import RunFolder, run_base; "
HOLD = IMPORTS + "f = RunFolder(Path(sys.argv[1])); print(f.path, flush=True); sys.stdin.read()"


@pytest.fixture
def tmp_path():
    """Return a folder with a shorter path than pytest's: TorchServe's sockets are in such folders."""
    with tempfile.TemporaryDirectory(prefix="g") as folder:
        yield Path(folder)


@contextlib.contextmanager
def holder(base):
    """Yield a process that holds a folder under `base`, and the folder; kill the process at the end."""
    command = [sys.executable, "-c", HOLD, str(base)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_the_folder_is_private_and_removed_at_the_end(tmp_path):
    with RunFolder(tmp_path / "run") as folder:
        folder.prepare()
        assert folder.path.stat().st_mode & 0o777 == 0o700
    assert not folder.path.exists()


def test_the_next_agent_removes_only_the_folders_of_killed_agents(tmp_path):
    with holder(tmp_path) as (killed, left), holder(tmp_path) as (_, held):
        (left / "tmp").mkdir()
        killed.kill()
        killed.wait()
        assert left.exists()
        with RunFolder(tmp_path) as folder:
            assert {held, folder.path} == set(tmp_path.glob("ts-*"))


def test_prepare_empties_the_temporary_folder_and_keeps_the_archives(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.prepare()
        (folder.temp / "models").mkdir()
        (folder.store / "x.mar").touch()
        folder.prepare()
        assert list(folder.temp.iterdir()) == []
        assert (folder.store / "x.mar").exists()


def test_models_are_unpacked_in_the_home_by_default(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADSERVE_HOME", str(tmp_path / "home"))
    assert run_base(None) == tmp_path / "home" / "run"


def test_the_cache_is_used_if_the_homes_path_is_too_long_for_sockets(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADSERVE_HOME", str(tmp_path / ("x" * 90)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert run_base(None) == tmp_path / "gradserve"


def test_a_path_too_long_for_sockets_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(TempTooLong, match="AGENT_TEMP"):
        run_base(tmp_path / ("x" * 90))


def test_the_longest_accepted_path_leaves_room_for_every_socket(tmp_path):
    base = tmp_path / ("x" * (MAX_PATH_BYTES - 12 - len(os.fsencode(tmp_path)) - 1))
    with RunFolder(run_base(base)) as folder:
        assert len(os.fsencode(folder.path)) == MAX_PATH_BYTES
        assert len(os.fsencode(folder.temp / ".ts.sock.10000")) == 107
        assert len(os.fsencode(folder.management_socket)) <= 107


def test_a_file_instead_of_a_folder_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TempUnusable, match="AGENT_TEMP"):
        run_base(tmp_path / "file")


def test_a_file_system_mounted_with_noexec_is_refused(tmp_path):
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
