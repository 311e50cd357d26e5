import json

from contracts.report import Report
from contracts.status import GatewayStatus
from control.agent.gateway_reports import GatewayReports

VERSION = ("cifar10", "1.0.0")


def report(name="a", revision=3, **in_flight):
    return json.dumps({"id": name, "revision": revision, "in_flight": in_flight}, separators=(",", ":"))


def test_a_header_that_is_no_report_is_ignored():
    gateways = GatewayReports()
    assert not gateways.record('{"id":"a","revision":1}', 1.0)
    assert not gateways


def test_the_status_has_each_processs_last_report_with_its_age():
    gateways = GatewayReports()
    gateways.record(report(revision=2, **{"1.0.0": 4}), 10.0)
    assert gateways.status(10.55) == (GatewayStatus(Report("a", 2, {"1.0.0": 4}), 0.6),)


def test_a_version_is_released_when_the_gateway_follows_the_plan_with_no_request_in_flight():
    gateways = GatewayReports()
    gateways.record(report(revision=2, **{"1.0.0": 4}), 9.9)
    assert "not read the status" in gateways.blocker(VERSION, since=10, revision=3)
    gateways.record(report(revision=2, **{"1.0.0": 4}), 10.4)  # made before it read our answer to this poll
    assert "not read the status" in gateways.blocker(VERSION, since=10, revision=3)
    gateways.record(report(revision=3, **{"1.0.0": 2}), 10.9)
    assert "2 requests in flight" in gateways.blocker(VERSION, since=10, revision=3)
    gateways.record(report(revision=2), 11.4)
    assert "revision 2" in gateways.blocker(VERSION, since=10, revision=3)
    gateways.record(report(revision=3, **{"2.0.0": 7}), 11.9)
    assert gateways.blocker(VERSION, since=10, revision=3) is None
    assert "7 requests" in gateways.blocker(None, since=10)


def test_calls_to_another_model_of_the_same_version_block_nothing():
    gateways = GatewayReports()
    for at in (10.5, 11.0):
        gateways.record(report(**{"photos/1.0.0": 5}), at)
    assert gateways.blocker(VERSION, since=10) is None
    assert "5 requests" in gateways.blocker(("photos", "1.0.0"), since=10)


def test_a_gateway_without_a_plan_blocks_nothing():
    gateways = GatewayReports()
    for at in (10.5, 11.0):
        gateways.record(report(revision=None), at)
    assert gateways.blocker(VERSION, since=10, revision=3) is None


def test_a_silent_process_blocks_until_its_requests_must_have_ended():
    gateways = GatewayReports()
    gateways.record(report("dead", **{"1.0.0": 1}), 10.0)
    for at in (10.5, 11.0, 24.9):
        gateways.record(report("alive"), at)
    gateways.drop_silent(24.9, 15)
    assert "dead" in gateways.blocker(VERSION, since=10, revision=3)
    gateways.drop_silent(25.1, 15)
    assert gateways.blocker(VERSION, since=10, revision=3) is None
    gateways.drop_silent(50, 15)
    assert not gateways


def test_made_up_ids_are_limited_to_256():
    gateways = GatewayReports()
    taken = [gateways.record(report(f"g{number}"), 1.0) for number in range(300)]
    assert sum(taken) == 256
    assert gateways.record(report("g0"), 2.0)
