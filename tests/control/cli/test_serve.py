"""`gradserve serve` refuses what it cannot serve before it packs or starts anything."""

import json

import pytest
from typer.testing import CliRunner

from contracts.plan import Plan, Release
from control.cli.main import app
from control.errors import NoModel, OtherModel
from control.release.plan_store import PlanStore


@pytest.fixture(autouse=True)
def _own_home(monkeypatch, tmp_path):
    monkeypatch.setenv("GRADSERVE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("GRADSERVE_PLAN", raising=False)
    monkeypatch.chdir(tmp_path)


def serve(path):
    return CliRunner().invoke(app, ["serve", str(path)], catch_exceptions=False)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(NoModel, match=r"no folder with a readable contract\.json"):
        serve(tmp_path)


def test_a_run_beside_another_models_plan_is_refused_with_a_command_that_works(tmp_path):
    store = PlanStore(tmp_path / "home")
    with store.lock("test"):
        store.write(Plan(0, "photos", Release("1.0", "photos-1.0.mar", "0" * 64)), "first")
    run = tmp_path / "run"
    run.mkdir()
    (run / "contract.json").write_text(json.dumps({"name": "pets"}))
    (run / "best.pth").touch()
    with pytest.raises(OtherModel, match=r"serves photos, not pets.*GRADSERVE_HOME=home-pets gradserve serve .*run"):
        serve(run)
    assert store.read_all().names() == ("photos",)
    assert [path.name for path in tmp_path.iterdir() if path.name not in {"home", "run"}] == [], "nothing was packed"
