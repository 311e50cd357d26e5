from dataclasses import replace

import pytest

from contracts.plan import Plan, Release, dump, parse
from control.errors import ImpossibleMove
from control.release import plan_edits


def release(version, workers=None):
    return Release(version, f"m-{version}.mar", version[0] * 64, workers)


PLAN = Plan(1, "m", release("1.0", 2), retained=(release("2.0"), release("3.0")))


def test_a_canary_draws_its_callers_anew_when_it_begins_and_keeps_them_when_its_share_changes():
    first = plan_edits.give_canary(PLAN, "2.0", 10)
    more = plan_edits.give_canary(first, "2.0", 50)
    assert first.canary.salt == more.canary.salt
    again = plan_edits.give_canary(plan_edits.retain(first, release("2.0")), "2.0", 10)
    assert again.canary.salt != first.canary.salt
    assert parse(dump(more)) == more
    assert [r.version for r in more.releases()] == ["1.0", "2.0", "3.0"]


def test_one_canary_one_shadow_and_nothing_of_the_stable_version():
    canary = plan_edits.give_canary(PLAN, "2.0", 10)
    with pytest.raises(ImpossibleMove, match=r"2\.0 is the canary"):
        plan_edits.give_canary(canary, "3.0", 10)
    shadow = plan_edits.give_shadow(canary, "3.0")
    with pytest.raises(ImpossibleMove, match=r"3\.0 is the shadow"):
        plan_edits.give_shadow(shadow, "2.0")
    for move in (lambda: plan_edits.give_canary(PLAN, "1.0", 1), lambda: plan_edits.remove(PLAN, "1.0")):
        with pytest.raises(ImpossibleMove, match="stable"):
            move()
    with pytest.raises(ImpossibleMove, match="deploy it first"):
        plan_edits.find(PLAN, "4.0")


def test_promotion_keeps_the_version_before_loaded_with_its_workers_and_going_back_is_the_same_move():
    promoted = plan_edits.make_stable(plan_edits.give_canary(PLAN, "2.0", 10), "2.0", workers=2)
    assert (promoted.stable.version, promoted.stable.workers, promoted.canary) == ("2.0", 2, None)
    assert promoted.retained[0] == release("1.0", 2)
    back = plan_edits.make_stable(promoted, "1.0", workers=2)
    assert {r.version for r in back.releases()} == {r.version for r in PLAN.releases()}
    assert back.stable == PLAN.stable


def test_the_same_version_with_other_bytes_is_another_version():
    with pytest.raises(ImpossibleMove, match="other bytes"):
        plan_edits.retain(PLAN, replace(release("2.0"), sha256="f" * 64))


def versions(releases):
    return [release.version for release in releases]


def test_going_back_twice_goes_two_stable_versions_back_and_never_to_the_one_that_was_left():
    third = plan_edits.make_stable(plan_edits.make_stable(PLAN, "2.0", workers=2), "3.0", workers=2)
    assert versions(third.previous) == ["2.0", "1.0"]
    second = plan_edits.go_back(third, "2.0", workers=2)
    assert (second.stable.version, versions(second.previous)) == ("2.0", ["1.0"])
    first = plan_edits.go_back(second, "1.0", workers=2)
    assert (first.stable.version, first.previous) == ("1.0", ())
    assert parse(dump(third)) == third


def test_a_version_that_becomes_stable_once_more_stands_once_among_the_previous_ones():
    plan = PLAN
    for version in ["2.0", "1.0"] * 20:
        plan = plan_edits.make_stable(plan, version, workers=2)
    assert (plan.stable.version, versions(plan.previous)) == ("1.0", ["2.0"])
