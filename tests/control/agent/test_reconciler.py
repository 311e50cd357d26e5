"""The reconciler's steps with a fake TorchServe that lists workers as the real one does."""

import asyncio
import hashlib
import json
import logging
import subprocess

import httpx
import pytest

from contracts.reference import Reference
from control.agent.reconciler import Reconciler
from control.agent.torchserve.log import ServerLog
from control.agent.torchserve.management import Management
from control.archive import Archive
from control.settings import AgentSettings

SHA256 = "a" * 64
PLAN = {
    "schema": 1,
    "revision": 1,
    "model": "cifar10",
    "stable": {"version": "1.0.0", "archive": "cifar10-1.0.0.mar", "sha256": SHA256, "workers": 2},
}


class TorchServe:
    """The management API. The workers of an entry are a list of pids; `dead` are the pids of ended processes."""

    def __init__(self):
        self.models = {}
        self.dead = set()
        self.asked = []

    def add(self, entry, url, pids):
        self.models[entry] = {"modelVersion": "1.0.0", "modelUrl": url, "pids": pids}

    def __call__(self, request):
        entry = request.url.path.split("/")[2:3]
        if request.method != "GET":
            self.asked.append((request.method, request.url.path, dict(request.url.params)))
        if request.method == "POST":
            self.add(request.url.params["model_name"], request.url.params["url"], [70, 71])
        elif not entry:
            return httpx.Response(200, json={"models": [{"modelName": name} for name in self.models]})
        elif entry[0] not in self.models:
            return httpx.Response(404, json={"code": 404})
        elif request.method == "DELETE":
            del self.models[entry[0]]
        elif "min_worker" in request.url.params:
            pids = self.models[entry[0]]["pids"]
            pids += range(90, 90 + int(request.url.params["min_worker"]) - len(pids))
        elif request.method == "GET":
            return httpx.Response(200, json=[self.describe(self.models[entry[0]])])
        return httpx.Response(200, json={"status": "done"})

    def describe(self, model):
        workers = [{"pid": pid, "status": "UNLOADING" if pid in self.dead else "READY"} for pid in model["pids"]]
        return {**model, "minWorkers": len(workers), "workers": workers}


@pytest.fixture
def torchserve():
    return TorchServe()


@pytest.fixture
def run(tmp_path, torchserve):
    """`run(seconds, pids)`: the reconciler after it kept version 1.0.0 with the workers `pids` for `seconds`.

    `url` names the archive that the predict entry was registered from.
    """
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))

    def run(seconds, pids, url=f"{SHA256}.mar"):
        async def reconcile():
            management = Management(httpx.MockTransport(torchserve), logging.getLogger("test"))
            settings = AgentSettings(plan=tmp_path / "plan.json")
            reconciler = Reconciler(settings, tmp_path, management, ServerLog(lambda _: None), workers=2)
            reconciler.follow_plan()
            (deployment,) = reconciler.deployments.values()
            contract = {"version": "1.0.0", "classes": ["cat", "dog"]}
            deployment.archive = Archive(tmp_path / f"{SHA256}.mar", SHA256, contract, Reference(0.01, (), ()))
            deployment.verified, deployment.explains, deployment.defaults = True, True, {"predict", "explain"}
            for entry, workers in (("cifar10", pids), ("cifar10-explain", [60])):
                torchserve.add(entry, url if entry == "cifar10" else f"{SHA256}.mar", workers)
                reconciler._registered[entry, "1.0.0"] = f"{SHA256}.mar"
            for _ in range(int(seconds / 0.02)):
                await reconciler.tick()
                await asyncio.sleep(0.02)
            await reconciler.close()
            return reconciler

        return asyncio.run(reconcile())

    return run


def test_one_worker_is_added_for_a_dead_one(run, torchserve, monkeypatch):
    monkeypatch.setattr("control.agent.deployment._DEAD_S", 0.2)
    gone = subprocess.Popen(["true"])
    gone.wait()
    torchserve.dead.add(gone.pid)  # its pid stays in the list, as in the real TorchServe
    reconciler = run(1.5, [41, gone.pid])
    three = {"min_worker": "3", "max_worker": "3", "synchronous": "false"}
    assert torchserve.asked == [("PUT", "/models/cifar10/1.0.0", three)]
    assert torchserve.models["cifar10"]["pids"] == [41, gone.pid, 90]
    assert [found.state for found in reconciler.deployments.values()] == ["ready"]


def test_nothing_is_changed_while_all_workers_are_ready(run, torchserve):
    reconciler = run(0.3, [41, 42])
    assert (torchserve.asked, list(reconciler.removed)) == ([], [])


def test_foreign_entries_are_removed_also_under_our_own_name(run, torchserve):
    torchserve.add("intruder", "/somebody/elses/folder", [])
    reconciler = run(0.5, [41, 42], url="other.mar")
    urls = {name: model["modelUrl"] for name, model in torchserve.models.items()}
    assert urls == {"cifar10": f"{SHA256}.mar", "cifar10-explain": f"{SHA256}.mar"}
    assert sorted(reconciler.removed) == ["cifar10 1.0.0 from other.mar", "intruder 1.0.0 from /somebody/elses/folder"]


def wanted_versions(tmp_path, *models):
    """The versions that an agent with six workers loads for these models, with their workers."""
    plans = {"schema": 3, "revision": 1, "default": "a", "models": list(models)}
    (tmp_path / "plan.json").write_text(json.dumps(plans))
    management = Management(httpx.MockTransport(lambda _: httpx.Response(500)), logging.getLogger("test"))
    settings = AgentSettings(plan=tmp_path / "plan.json")
    reconciler = Reconciler(settings, tmp_path, management, ServerLog(lambda _: None), workers=6)
    reconciler.follow_plan()
    return {key: deployment.wanted.workers for key, deployment in reconciler.deployments.items()}


def planned(model, version="1.0.0", workers=None, **more):
    release = {"version": version, "archive": f"{model}-{version}.mar", "sha256": SHA256, "workers": workers}
    return {"model": model, "stable": release, **more}


def test_models_share_the_workers_equally_unless_the_plan_gives_their_number(tmp_path):
    assert wanted_versions(tmp_path, planned("a")) == {("a", "1.0.0"): 6}
    two = wanted_versions(tmp_path, planned("a"), planned("b", workers=4))
    assert two == {("a", "1.0.0"): 3, ("b", "1.0.0"): 4}
    many = wanted_versions(tmp_path, *map(planned, "abcdefgh"))
    assert set(many.values()) == {1}, "at least one each"


def test_a_version_with_no_workers_is_not_loaded_and_takes_no_share(tmp_path):
    canary = {**planned("a", "2.0.0")["stable"], "workers": 0, "share": 5}
    found = wanted_versions(tmp_path, planned("a", canary=canary), planned("b", workers=0))
    assert found == {("a", "1.0.0"): 6}


def test_an_archive_that_the_model_store_lacks_is_fetched_and_refused_before_it_is_parsed(tmp_path):
    (tmp_path / "elsewhere.mar").write_bytes(b"no archive")
    sha256 = hashlib.sha256(b"no archive").hexdigest()
    source = (tmp_path / "elsewhere.mar").as_uri()
    release = {"version": "1.0.0", "archive": "a-1.0.0.mar", "workers": 1, "source": source}
    plans = {"schema": 3, "revision": 1, "default": "a"}

    async def failure(sha256):
        plans["models"] = [{"model": "a", "stable": {**release, "sha256": sha256}}]
        (tmp_path / "plan.json").write_text(json.dumps(plans))
        management = Management(httpx.MockTransport(TorchServe()), logging.getLogger("test"))
        settings = AgentSettings(plan=tmp_path / "plan.json", model_store=tmp_path / "store", cache=tmp_path / "cache")
        run = tmp_path / "run"
        run.mkdir(exist_ok=True)
        reconciler = Reconciler(settings, run, management, ServerLog(lambda _: None), workers=2)
        await reconciler.tick()
        (deployment,) = reconciler.deployments.values()
        await asyncio.wait_for(reconciler.step_ended.wait(), 5)
        await reconciler.close()
        return deployment.reason

    assert "the plan says 000000000000" in asyncio.run(failure("0" * 64))
    assert asyncio.run(failure(sha256)) == "archive a-1.0.0.mar: is no zip file, or is damaged"
    assert not (tmp_path / "store").exists()
