"""`gradserve models`: the plan's models, the default one first."""

import pytest
from typer.testing import CliRunner

from contracts.plan import Plan, Release
from control.cli.main import app
from control.errors import ImpossibleMove, ModelNotPlanned
from control.release.plan_store import PlanStore


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A plan of cats, the default model, and ants."""
    monkeypatch.setenv("GRADSERVE_HOME", str(tmp_path))
    for name in ("GRADSERVE_PLAN", "GATEWAY_AGENTS"):
        monkeypatch.delenv(name, raising=False)
    for model in ("cats", "ants"):
        store = PlanStore(tmp_path, model)
        with store.lock("test"):
            store.write(Plan(0, model, Release("1.0", f"{model}-1.0.mar", "0" * 64)), "first")
    return PlanStore(tmp_path)


def run(*arguments):
    return CliRunner().invoke(app, ["models", *arguments], catch_exceptions=False)


def test_the_default_model_is_listed_first_and_marked(store):
    cats, ants = run("list").stdout.splitlines()
    assert "cats" in cats
    assert cats.endswith("(default)")
    assert "ants" in ants
    assert not ants.endswith("(default)")


def test_another_model_becomes_the_default_one(store):
    assert "ants is the default model, revision 3" in run("default", "ants").stdout
    assert store.read().model == "ants"
    assert run("list").stdout.splitlines()[0].endswith("(default)")


def test_an_unknown_model_is_refused_with_those_of_the_plan(store):
    with pytest.raises(ModelNotPlanned, match=r"serves (cats, ants|ants, cats), not dogs"):
        run("default", "dogs")
    assert store.read_all().revision == 2


def test_the_default_model_is_not_removed(store):
    with pytest.raises(ImpossibleMove, match="cats is the default model"):
        run("remove", "cats", "--agents", "http://127.0.0.1:9")
    assert set(store.read_all().names()) == {"cats", "ants"}
