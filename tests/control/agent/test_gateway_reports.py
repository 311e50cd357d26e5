import json

from contracts.report import Report
from contracts.status import GatewayStatus
from control.agent.gateway_reports import Gateways


def report(name="a", revision=3, **in_flight):
    return json.dumps({"id": name, "revision": revision, "in_flight": in_flight}, separators=(",", ":"))


def test_a_header_that_is_no_report_is_not_listened_to():
    gateways = Gateways()
    assert not gateways.take('{"id":"a","revision":1}', 1.0)
    assert not gateways


def test_the_status_tells_what_each_process_said_last_and_when():
    gateways = Gateways()
    gateways.take(report(revision=2, **{"1.0.0": 4}), 10.0)
    assert gateways.status(10.55) == (GatewayStatus(Report("a", 2, {"1.0.0": 4}), 0.6),)


def test_a_gateway_lets_go_when_it_was_told_follows_the_plan_and_waits_for_nothing():
    gateways = Gateways()
    gateways.take(report(revision=2, **{"1.0.0": 4}), 9.9)
    assert "not been told" in gateways.hold("1.0.0", since=10, revision=3)
    gateways.take(report(revision=2, **{"1.0.0": 4}), 10.4)  # made before it read what we answer now
    assert "not been told" in gateways.hold("1.0.0", since=10, revision=3)
    gateways.take(report(revision=3, **{"1.0.0": 2}), 10.9)
    assert "2 calls in flight" in gateways.hold("1.0.0", since=10, revision=3)
    gateways.take(report(revision=2), 11.4)
    assert "revision 2" in gateways.hold("1.0.0", since=10, revision=3)
    gateways.take(report(revision=3, **{"2.0.0": 7}), 11.9)
    assert gateways.hold("1.0.0", since=10, revision=3) is None
    assert "7 calls" in gateways.hold(None, since=10)


def test_a_gateway_without_a_plan_routes_nothing():
    gateways = Gateways()
    for at in (10.5, 11.0):
        gateways.take(report(revision=None), at)
    assert gateways.hold("1.0.0", since=10, revision=3) is None


def test_every_process_has_to_let_go_and_one_that_fell_silent_only_until_its_calls_must_have_ended():
    gateways = Gateways()
    gateways.take(report("dead", **{"1.0.0": 1}), 10.0)
    for at in (10.5, 11.0, 24.9):
        gateways.take(report("alive"), at)
    gateways.forget(24.9, 15)
    assert "dead" in gateways.hold("1.0.0", since=10, revision=3)
    gateways.forget(25.1, 15)
    assert gateways.hold("1.0.0", since=10, revision=3) is None
    gateways.forget(50, 15)
    assert not gateways


def test_made_up_ids_do_not_fill_the_memory():
    gateways = Gateways()
    taken = [gateways.take(report(f"g{number}"), 1.0) for number in range(300)]
    assert sum(taken) == 256
    assert gateways.take(report("g0"), 2.0)
