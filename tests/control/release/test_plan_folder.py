"""The plan in a folder: whole files, a lock that ends with its holder, and a history."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from contracts.plan import Plan, Plans, Release, load
from control.errors import AnotherOperator, HomeNotWritable, NoPlan, PlanUnusable
from control.release.plan_folder import PlanFolder, operator, write_atomically

PLANS = Plans(1, "m", (Plan(1, "m", Release("1.0", "m-1.0.mar", "1" * 64)),))


@pytest.fixture
def folder(tmp_path):
    return PlanFolder(tmp_path / "home")


def test_a_written_plan_is_read_again_and_readable_for_other_users(folder):
    assert not folder.exists()
    folder.write(PLANS)
    assert folder.exists()
    assert folder.read() == PLANS
    assert folder.path.stat().st_mode & 0o777 == 0o644


def test_a_failed_write_leaves_only_the_old_file(tmp_path):
    path = tmp_path / "plan.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_plan_and_a_broken_one_are_different_errors(folder):
    with pytest.raises(NoPlan):
        folder.read()
    write_atomically(folder.path, "{")
    with pytest.raises(PlanUnusable, match="history"):
        folder.read()


def test_a_second_lock_is_refused_with_what_the_first_holder_does(folder, monkeypatch):
    monkeypatch.setenv("GRADSERVE_OPERATOR", "alice")
    refused = pytest.raises(AnotherOperator, match=r"alice \(deploy 2\.0\.0, pid")
    with folder.lock("deploy 2.0.0"), refused, folder.lock("promote"):
        pass
    with folder.lock("promote"):
        pass


def test_the_lock_of_a_killed_operator_is_free(folder, tmp_path):
    code = f"""
import os, signal, pathlib
from control.release.plan_folder import PlanFolder
with PlanFolder(pathlib.Path({str(tmp_path / "home")!r})).lock("deploy"):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False, env=os.environ)
    with folder.lock("promote"):
        pass


def test_a_home_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").touch()
    folder = PlanFolder(tmp_path / "file" / "home")
    with pytest.raises(HomeNotWritable, match=r"home cannot be written to \(Not a directory\)"), folder.lock("deploy"):
        pass


def test_the_history_has_each_recorded_revision(folder, tmp_path):
    assert folder.last_recorded() == 0
    for revision in (1, 9, 10):
        folder.record(replace(PLANS, revision=revision))
    (tmp_path / "home" / "history" / "plan-notes.json").touch()
    assert folder.last_recorded() == 10
    assert [folder.is_recorded(revision) for revision in (9, 11)] == [True, False]
    assert load(tmp_path / "home" / "history" / "plan-000009.json").revision == 9


def test_notes_are_lines_of_the_audit_log(folder):
    for what in ("deploy", "promote"):
        folder.note({"what": what})
    assert [json.loads(line)["what"] for line in folder.audit_path.read_text().splitlines()] == ["deploy", "promote"]


def test_previous_versions_of_a_schema_1_plan_come_from_its_history(folder, tmp_path):
    def write(path, revision, version):
        release = {"version": version, "archive": f"m-{version}.mar", "sha256": version[0] * 64, "workers": None}
        data = {"schema": 1, "revision": revision, "model": "m", "stable": release}
        write_atomically(path, json.dumps(data | {"canary": None, "shadow": None, "retained": []}))

    for revision, version in enumerate(("1.0", "2.0", "2.0", "1.0", "3.0"), start=1):
        write(tmp_path / "home" / "history" / f"plan-{revision:06d}.json", revision, version)
    write(folder.path, 5, "3.0")
    (plan,) = folder.read().models
    assert [release.version for release in plan.previous] == ["1.0", "2.0"]
    shorter = replace(plan, previous=plan.previous[1:])
    folder.write(Plans(6, "m", (shorter,)))
    assert folder.read().models[0].previous == shorter.previous, "a plan of today lists its own"


def test_the_operator_is_named_by_the_environment_else_by_user_and_machine(monkeypatch):
    monkeypatch.setenv("GRADSERVE_OPERATOR", "alice")
    assert operator() == "alice"
    monkeypatch.delenv("GRADSERVE_OPERATOR")
    assert "@" in operator()
