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


def step(deployment, now=1000.0, *, let_go=None):
    return next_step(deployment, now, load_timeout_s=120, settle_s=15, let_go=let_go)


def serve(deployment, now=1000.0):
    deployment.verified, deployment.explains, deployment.defaults = True, True, {"predict", "explain"}
    deployment.see(entry(2), entry(1), now)


def test_the_archive_is_judged_before_anything_is_registered(deployment):
    deployment.archive = None
    assert step(deployment) is Step.INSPECT


def test_a_version_on_its_way_is_registered_verified_and_only_then_explained(deployment):
    assert step(deployment) is Step.REGISTER_PREDICT
    deployment.see(entry(0, 2), None, 1000)
    assert step(deployment) is Step.NOTHING
    deployment.see(entry(1, 1), None, 1001)
    assert not deployment.routable
    assert step(deployment) is Step.VERIFY
    deployment.verified = True
    assert deployment.routable
    assert deployment.state == "degraded"
    assert step(deployment) is Step.REGISTER_EXPLAIN
    deployment.see(entry(2), entry(1), 1002)
    assert step(deployment) is Step.VERIFY_EXPLAIN
    deployment.explains = True
    assert step(deployment) is Step.SET_DEFAULT
    deployment.defaults = {"predict", "explain"}
    assert step(deployment) is Step.NOTHING
    assert deployment.state == "ready"


def test_workers_that_die_while_loading_fail_the_version(deployment):
    for attempt in range(3):
        deployment.see(entry(0, 2, pid=1000 * attempt), None, 1000 + attempt)
    assert step(deployment, 1003) is Step.FAIL_CRASHES


def test_a_version_that_hangs_on_load_fails_after_its_time(deployment):
    deployment.see(entry(0, 2), None, 1000)
    assert step(deployment, 1119) is Step.NOTHING
    assert step(deployment, 1121) is Step.FAIL_SLOW


def test_a_failed_version_is_unregistered_and_tried_again_later_and_later(deployment):
    deployment.see(entry(0, 2), None, 1000)
    deployment.fail("it crashed", 1000)
    assert step(deployment, 1001) is Step.UNREGISTER
    deployment.see(None, None, 1002)
    assert step(deployment, 1004.9) is Step.NOTHING
    assert step(deployment, 1005.1) is Step.RETRY
    deployment.fail("again", 1010)
    assert step(deployment, 1019.9) is Step.NOTHING
    assert step(deployment, 1020.1) is Step.RETRY


def test_a_dead_worker_degrades_and_a_dead_version_is_not_routable(deployment):
    serve(deployment)
    deployment.see(entry(1, 1), entry(1), 1001)
    assert (deployment.state, deployment.routable) == ("degraded", True)
    deployment.see(entry(0, 2), entry(1), 1002)
    assert (deployment.state, deployment.routable) == ("degraded", False)


def test_a_broken_explainer_leaves_predictions_served(deployment):
    serve(deployment)
    deployment.explains = False
    assert (deployment.state, deployment.routable) == ("degraded", True)


def test_explainers_that_are_not_taken_in_leave_predictions_served_and_are_tried_later_and_later(deployment):
    serve(deployment)
    deployment.see(entry(2), None, 1001)
    for now, pause in ((1001, 5), (1010, 10), (1030, 20)):
        assert step(deployment, now) is Step.REGISTER_EXPLAIN
        deployment.fail_explanations("the disk is full", now)
        assert (deployment.state, deployment.routable, deployment.reason) == ("degraded", True, "the disk is full")
        assert step(deployment, now + pause - 0.1) is Step.NOTHING
    deployment.see(entry(2), entry(1), 1060)
    assert (deployment.reason, step(deployment, 1060)) == (None, Step.VERIFY_EXPLAIN)


def test_workers_that_torchserve_has_given_up_are_started_anew(deployment):
    serve(deployment)
    deployment.see(entry(0, 2), entry(1), 1000)
    deployment.see(entry(0, 2), entry(1), 1089)
    assert step(deployment, 1089) is Step.NOTHING
    assert step(deployment, 1091) is Step.RECYCLE_PREDICT
    deployment.see(entry(0, 0, wanted=0), entry(1), 1092)
    assert step(deployment, 1092) is Step.SCALE_PREDICT


def test_missing_workers_are_added_and_surplus_ones_are_never_taken_from_a_routable_version(deployment):
    serve(deployment)
    deployment.wanted = dataclasses.replace(WANTED, workers=3)
    assert step(deployment) is Step.SCALE_PREDICT
    deployment.wanted = dataclasses.replace(WANTED, workers=1)
    assert step(deployment) is Step.NOTHING


def test_a_retiring_version_is_unregistered_only_after_it_has_been_idle(deployment):
    serve(deployment, 1000)
    deployment.wanted = dataclasses.replace(WANTED, role="retiring")
    assert not deployment.routable
    deployment.see(entry(2, pending=3), entry(1), 1010)
    assert step(deployment, 1020) is Step.NOTHING
    deployment.see(entry(2), entry(1), 1024)
    assert step(deployment, 1024) is Step.NOTHING
    assert step(deployment, 1025) is Step.UNREGISTER
    deployment.see(None, None, 1026)
    assert step(deployment, 1026) is Step.FORGET


def test_where_gateways_report_a_retiring_version_goes_when_they_let_go_and_nothing_waits(deployment):
    serve(deployment, 1000)
    assert deployment.out_since is None
    deployment.wanted = dataclasses.replace(WANTED, role="retiring")
    deployment.see(entry(2, pending=1), entry(1), 1001)
    assert deployment.out_since == 1001
    assert step(deployment, 1001, let_go=True) is Step.NOTHING
    deployment.see(entry(2), entry(1), 1002)
    assert deployment.out_since == 1001
    assert step(deployment, 1100, let_go=False) is Step.NOTHING
    assert step(deployment, 1002, let_go=True) is Step.UNREGISTER


def test_a_version_that_never_served_waits_for_nobody(deployment):
    deployment.see(entry(0, 2), None, 1000)
    deployment.fail("it crashed", 1001)
    assert step(deployment, 1001, let_go=False) is Step.UNREGISTER


def test_a_retiring_version_that_the_plan_names_again_serves_on(deployment):
    serve(deployment)
    deployment.wanted = dataclasses.replace(WANTED, role="retiring", workers=0, explain_workers=0)
    deployment.replace(WANTED, 1001)
    assert (deployment.state, deployment.routable) == ("ready", True)


def test_other_bytes_under_the_same_version_are_drained_and_loaded_anew(deployment):
    serve(deployment, 1000)
    deployment.replace(dataclasses.replace(WANTED, sha256="b" * 64), 1000)
    assert not deployment.routable
    assert step(deployment, 1001) is Step.NOTHING
    assert step(deployment, 1015) is Step.UNREGISTER
    deployment.see(None, None, 1016)
    assert step(deployment, 1016) is Step.RETRY


def test_another_role_keeps_a_version_loaded_and_verified(deployment):
    serve(deployment)
    deployment.replace(dataclasses.replace(WANTED, role="retained"), 1000)
    assert (deployment.verified, step(deployment)) == (True, Step.NOTHING)
    deployment.replace(WANTED, 1001)
    assert step(deployment) is Step.SET_DEFAULT


def test_a_worker_that_stays_dead_beside_ready_ones_is_replaced_after_90_s_and_later_and_later(deployment):
    serve(deployment)
    deployment.see(entry(1, dead=1), entry(1), 1000)
    deployment.see(entry(1, dead=1), entry(1), 1089)
    assert step(deployment, 1089) is Step.NOTHING
    assert step(deployment, 1090) is Step.REVIVE_PREDICT
    for now, pause in ((1090, 180), (1300, 360), (1700, 720)):
        deployment.note_revival("predict", now)
        deployment.see(entry(1, dead=2), entry(1), now + 1)
        assert step(deployment, now + pause - 1) is Step.NOTHING
        assert step(deployment, now + pause) is Step.REVIVE_PREDICT


def test_after_a_revival_that_lasted_the_next_one_waits_no_longer_than_the_first(deployment):
    serve(deployment)
    deployment.note_revival("predict", 1000)
    deployment.see(entry(2, dead=1), entry(1), 1180)
    deployment.see(entry(1, dead=2), entry(1), 1200)
    assert step(deployment, 1289) is Step.NOTHING
    assert step(deployment, 1290) is Step.REVIVE_PREDICT
    deployment.note_revival("predict", 1290)
    assert deployment.revive_at["predict"] == 1290 + 180


def test_workers_that_load_slowly_are_waited_for(deployment):
    serve(deployment)
    deployment.see(entry(1, 1), entry(1), 1000)
    assert step(deployment, 1200) is Step.NOTHING


def test_dead_workers_are_started_anew_though_the_explainers_cannot_be_made_the_default(deployment):
    serve(deployment)
    deployment.defaults = {"predict"}
    deployment.see(entry(0, dead=2), entry(1), 1000)
    assert step(deployment, 1001) is Step.SET_DEFAULT
    assert step(deployment, 1091) is Step.RECYCLE_PREDICT


def test_explainers_that_are_not_registered_are_not_made_the_default(deployment):
    serve(deployment)
    deployment.defaults = {"predict"}
    deployment.see(entry(2), None, 1000)
    deployment.fail_explanations("the disk is full", 1000)
    assert step(deployment, 1001) is Step.NOTHING


def test_explainers_that_explain_wrongly_are_asked_again_later_and_later(deployment):
    serve(deployment)
    for now, pause in ((1000, 5), (1010, 10)):
        deployment.fail_explanations("it explains reference input 0 as dog", now)
        deployment.see(entry(2), entry(1), now + 1)
        assert (deployment.state, deployment.trouble) == ("degraded", "it explains reference input 0 as dog")
        assert step(deployment, now + pause - 1) is Step.NOTHING
        assert step(deployment, now + pause) is Step.VERIFY_EXPLAIN


def test_a_worker_that_runs_the_fallback_after_verification_degrades_the_version_and_is_counted(deployment):
    serve(deployment)
    deployment.see(entry(2), entry(1, pid=500), 1001, {101})
    assert (deployment.state, deployment.routable) == ("degraded", True)
    assert deployment.on_fallback == {"predict": 1, "explain": 0}
    assert deployment.trouble == "1 of 2 predict workers run the fallback engine; TorchServe's log says why"
    deployment.see(entry(2), entry(1, pid=500), 1002, {999})
    assert (deployment.state, deployment.trouble) == ("ready", None)


def test_a_machine_on_which_the_engine_never_ran_is_as_it_was_verified(deployment):
    serve(deployment)
    deployment.runs_engine = False
    deployment.see(entry(2), entry(1, pid=500), 1001, {100, 101, 500})
    assert deployment.state == "ready"
    assert deployment.trouble == "its engine cannot run on this machine; the fallback serves"
