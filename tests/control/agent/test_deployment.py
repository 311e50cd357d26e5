import dataclasses

import pytest

from contracts.model import Contract, Input
from contracts.reference import Reference
from control.agent.deployment import Deployment, Step, Wanted, next_step
from control.agent.torchserve.management import Registered, Worker
from control.archive import Archive

WANTED = Wanted("cifar10", "1.0.0", "stable", "cifar10-1.0.0.mar", "a" * 64, 2, 1)


def entry(ready, loading=0, *, dead=0, pending=0, wanted=None, pid=100):
    workers = [Worker(pid + i, ready=True) for i in range(ready)]
    workers += [Worker(pid + 50 + i, ready=False) for i in range(loading)]
    workers += [Worker(pid + 80 + i, ready=False, alive=False) for i in range(dead)]
    return Registered("1.0.0", "m.mar", len(workers) if wanted is None else wanted, tuple(workers), pending, 100)


@pytest.fixture
def deployment(tmp_path):
    contract = Contract("m", "1.0.0", ("a", "b"), Input(1, 1, (0.0,) * 3, (1.0,) * 3), "resnet18")
    archive = Archive(tmp_path / "x.mar", "a" * 64, contract, Reference(0.01, (), ()))
    return Deployment(WANTED, archive=archive)


def step(deployment, now=1000.0, *, is_released=None):
    return next_step(deployment, now, load_timeout_s=120, settle_s=15, is_released=is_released)


def serve(deployment, now=1000.0):
    deployment.verified, deployment.explains, deployment.defaults = True, True, {"predict", "explain"}
    deployment.update(entry(2), entry(1), now)


def test_the_archive_is_inspected_before_it_is_registered(deployment):
    deployment.archive = None
    assert step(deployment) is Step.INSPECT


def test_a_new_version_is_registered_then_verified_then_gets_its_explain_entry(deployment):
    assert step(deployment) is Step.REGISTER_PREDICT
    deployment.update(entry(0, 2), None, 1000)
    assert step(deployment) is Step.NOTHING
    deployment.update(entry(1, 1), None, 1001)
    assert not deployment.routable
    assert step(deployment) is Step.VERIFY
    deployment.verified = True
    assert deployment.routable
    assert deployment.state == "degraded"
    assert step(deployment) is Step.REGISTER_EXPLAIN
    deployment.update(entry(2), entry(1), 1002)
    assert step(deployment) is Step.VERIFY_EXPLAIN
    deployment.explains = True
    assert step(deployment) is Step.SET_DEFAULT
    deployment.defaults = {"predict", "explain"}
    assert step(deployment) is Step.NOTHING
    assert deployment.state == "ready"


def test_workers_that_die_while_loading_fail_the_version(deployment):
    for attempt in range(3):
        deployment.update(entry(0, 2, pid=1000 * attempt), None, 1000 + attempt)
    assert step(deployment, 1003) is Step.FAIL_CRASHES


def test_a_version_that_does_not_load_in_time_fails(deployment):
    deployment.update(entry(0, 2), None, 1000)
    assert step(deployment, 1119) is Step.NOTHING
    assert step(deployment, 1121) is Step.FAIL_SLOW


def test_a_failed_version_is_unregistered_and_retried_with_growing_pauses(deployment):
    deployment.update(entry(0, 2), None, 1000)
    deployment.fail("it crashed", 1000)
    assert step(deployment, 1001) is Step.UNREGISTER
    deployment.update(None, None, 1002)
    assert step(deployment, 1004.9) is Step.NOTHING
    assert step(deployment, 1005.1) is Step.RETRY
    deployment.fail("again", 1010)
    assert step(deployment, 1019.9) is Step.NOTHING
    assert step(deployment, 1020.1) is Step.RETRY


def test_a_dead_worker_degrades_a_version_and_without_workers_it_is_not_routable(deployment):
    serve(deployment)
    deployment.update(entry(1, 1), entry(1), 1001)
    assert (deployment.state, deployment.routable) == ("degraded", True)
    deployment.update(entry(0, 2), entry(1), 1002)
    assert (deployment.state, deployment.routable) == ("degraded", False)


def test_a_broken_explain_entry_leaves_the_version_routable(deployment):
    serve(deployment)
    deployment.explains = False
    assert (deployment.state, deployment.routable) == ("degraded", True)


def test_an_explain_entry_that_torchserve_refuses_is_retried_with_growing_pauses(deployment):
    serve(deployment)
    deployment.update(entry(2), None, 1001)
    for now, pause in ((1001, 5), (1010, 10), (1030, 20)):
        assert step(deployment, now) is Step.REGISTER_EXPLAIN
        deployment.fail_explanations("the disk is full", now)
        assert (deployment.state, deployment.routable, deployment.reason) == ("degraded", True, "the disk is full")
        assert step(deployment, now + pause - 0.1) is Step.NOTHING
    deployment.update(entry(2), entry(1), 1060)
    assert (deployment.reason, step(deployment, 1060)) == (None, Step.VERIFY_EXPLAIN)


def test_workers_that_torchserve_gave_up_are_recycled(deployment):
    serve(deployment)
    deployment.update(entry(0, 2), entry(1), 1000)
    deployment.update(entry(0, 2), entry(1), 1089)
    assert step(deployment, 1089) is Step.NOTHING
    assert step(deployment, 1091) is Step.RECYCLE_PREDICT
    deployment.update(entry(0, 0, wanted=0), entry(1), 1092)
    assert step(deployment, 1092) is Step.SCALE_PREDICT


def test_a_routable_version_gets_missing_workers_and_keeps_surplus_ones(deployment):
    serve(deployment)
    deployment.wanted = dataclasses.replace(WANTED, workers=3)
    assert step(deployment) is Step.SCALE_PREDICT
    deployment.wanted = dataclasses.replace(WANTED, workers=1)
    assert step(deployment) is Step.NOTHING


def test_a_retiring_version_is_unregistered_only_after_it_has_been_idle(deployment):
    serve(deployment, 1000)
    deployment.wanted = dataclasses.replace(WANTED, role="retiring")
    assert not deployment.routable
    deployment.update(entry(2, pending=3), entry(1), 1010)
    assert step(deployment, 1020) is Step.NOTHING
    deployment.update(entry(2), entry(1), 1024)
    assert step(deployment, 1024) is Step.NOTHING
    assert step(deployment, 1025) is Step.UNREGISTER
    deployment.update(None, None, 1026)
    assert step(deployment, 1026) is Step.FORGET


def test_a_retiring_version_is_unregistered_when_gateways_released_it_and_no_job_waits(deployment):
    serve(deployment, 1000)
    assert deployment.unroutable_since is None
    deployment.wanted = dataclasses.replace(WANTED, role="retiring")
    deployment.update(entry(2, pending=1), entry(1), 1001)
    assert deployment.unroutable_since == 1001
    assert step(deployment, 1001, is_released=True) is Step.NOTHING
    deployment.update(entry(2), entry(1), 1002)
    assert deployment.unroutable_since == 1001
    assert step(deployment, 1100, is_released=False) is Step.NOTHING
    assert step(deployment, 1002, is_released=True) is Step.UNREGISTER


def test_a_version_that_never_served_is_unregistered_at_once(deployment):
    deployment.update(entry(0, 2), None, 1000)
    deployment.fail("it crashed", 1001)
    assert step(deployment, 1001, is_released=False) is Step.UNREGISTER


def test_a_retiring_version_that_the_plan_names_again_continues_to_serve(deployment):
    serve(deployment)
    deployment.wanted = dataclasses.replace(WANTED, role="retiring", workers=0, explain_workers=0)
    deployment.replace(WANTED, 1001)
    assert (deployment.state, deployment.routable) == ("ready", True)


def test_other_bytes_of_the_same_version_are_drained_and_loaded_again(deployment):
    serve(deployment, 1000)
    deployment.replace(dataclasses.replace(WANTED, sha256="b" * 64), 1000)
    assert not deployment.routable
    assert step(deployment, 1001) is Step.NOTHING
    assert step(deployment, 1015) is Step.UNREGISTER
    deployment.update(None, None, 1016)
    assert step(deployment, 1016) is Step.RETRY


def test_another_role_keeps_a_version_loaded_and_verified(deployment):
    serve(deployment)
    deployment.replace(dataclasses.replace(WANTED, role="retained"), 1000)
    assert (deployment.verified, step(deployment)) == (True, Step.NOTHING)
    deployment.replace(WANTED, 1001)
    assert step(deployment) is Step.SET_DEFAULT


def test_a_dead_worker_beside_ready_ones_is_replaced_after_90_s_then_with_growing_pauses(deployment):
    serve(deployment)
    deployment.update(entry(1, dead=1), entry(1), 1000)
    deployment.update(entry(1, dead=1), entry(1), 1089)
    assert step(deployment, 1089) is Step.NOTHING
    assert step(deployment, 1090) is Step.REVIVE_PREDICT
    for now, pause in ((1090, 180), (1300, 360), (1700, 720)):
        deployment.note_revival("predict", now)
        deployment.update(entry(1, dead=2), entry(1), now + 1)
        assert step(deployment, now + pause - 1) is Step.NOTHING
        assert step(deployment, now + pause) is Step.REVIVE_PREDICT


def test_a_lasting_revival_resets_the_pause(deployment):
    serve(deployment)
    deployment.note_revival("predict", 1000)
    deployment.update(entry(2, dead=1), entry(1), 1180)
    deployment.update(entry(1, dead=2), entry(1), 1200)
    assert step(deployment, 1289) is Step.NOTHING
    assert step(deployment, 1290) is Step.REVIVE_PREDICT
    deployment.note_revival("predict", 1290)
    assert deployment.revive_at["predict"] == 1290 + 180


def test_a_worker_that_loads_slowly_is_not_replaced(deployment):
    serve(deployment)
    deployment.update(entry(1, 1), entry(1), 1000)
    assert step(deployment, 1200) is Step.NOTHING


def test_dead_workers_are_recycled_though_the_explain_entry_has_no_default(deployment):
    serve(deployment)
    deployment.defaults = {"predict"}
    deployment.update(entry(0, dead=2), entry(1), 1000)
    assert step(deployment, 1001) is Step.SET_DEFAULT
    assert step(deployment, 1091) is Step.RECYCLE_PREDICT


def test_an_unregistered_explain_entry_is_not_made_the_default(deployment):
    serve(deployment)
    deployment.defaults = {"predict"}
    deployment.update(entry(2), None, 1000)
    deployment.fail_explanations("the disk is full", 1000)
    assert step(deployment, 1001) is Step.NOTHING


def test_a_wrong_explanation_is_verified_again_with_growing_pauses(deployment):
    serve(deployment)
    for now, pause in ((1000, 5), (1010, 10)):
        deployment.fail_explanations("it explains reference input 0 as dog", now)
        deployment.update(entry(2), entry(1), now + 1)
        assert (deployment.state, deployment.shown_reason) == ("degraded", "it explains reference input 0 as dog")
        assert step(deployment, now + pause - 1) is Step.NOTHING
        assert step(deployment, now + pause) is Step.VERIFY_EXPLAIN


def test_a_worker_on_the_fallback_degrades_a_version_verified_on_its_engine(deployment):
    serve(deployment)
    deployment.update(entry(2), entry(1, pid=500), 1001, {101})
    assert (deployment.state, deployment.routable) == ("degraded", True)
    assert deployment.on_fallback == {"predict": 1, "explain": 0}
    assert deployment.shown_reason == "1 of 2 predict workers run the fallback engine; TorchServe's log says why"
    deployment.update(entry(2), entry(1, pid=500), 1002, {999})
    assert (deployment.state, deployment.shown_reason) == ("ready", None)


def test_a_version_verified_on_the_fallback_is_ready_on_the_fallback(deployment):
    serve(deployment)
    deployment.runs_engine = False
    deployment.update(entry(2), entry(1, pid=500), 1001, {100, 101, 500})
    assert deployment.state == "ready"
    assert deployment.shown_reason == "its engine cannot run on this machine; the fallback serves"
