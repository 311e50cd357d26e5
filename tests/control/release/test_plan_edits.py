from dataclasses import replace

import pytest

from contracts.plan import Plan, Plans, Release, dump, parse
from control.errors import ImpossibleMove
from control.release import plan_edits


def release(version, workers=None):
    return Release(version, f"m-{version}.mar", version[0] * 64, workers)


PLAN = Plan(1, "m", release("1.0", 2), retained=(release("2.0"), release("3.0")))


def of_one(plan):
    """Return the plan after it was written and read as the only one."""
    return parse(dump(Plans(plan.revision, plan.model, (plan,)))).plan()


def test_a_new_canary_gets_new_callers_and_keeps_them_when_its_share_changes():
    first = plan_edits.set_canary(PLAN, "2.0", 10)
    more = plan_edits.set_canary(first, "2.0", 50)
    assert first.canary.salt == more.canary.salt
    again = plan_edits.set_canary(plan_edits.retain(first, release("2.0")), "2.0", 10)
    assert again.canary.salt != first.canary.salt
    assert of_one(more) == more
    assert [r.version for r in more.releases()] == ["1.0", "2.0", "3.0"]


def test_a_second_canary_or_shadow_and_a_role_for_the_stable_version_are_refused():
    canary = plan_edits.set_canary(PLAN, "2.0", 10)
    with pytest.raises(ImpossibleMove, match=r"2\.0 is the canary"):
        plan_edits.set_canary(canary, "3.0", 10)
    shadow = plan_edits.set_shadow(canary, "3.0")
    with pytest.raises(ImpossibleMove, match=r"3\.0 is the shadow"):
        plan_edits.set_shadow(shadow, "2.0")
    for move in (lambda: plan_edits.set_canary(PLAN, "1.0", 1), lambda: plan_edits.remove(PLAN, "1.0")):
        with pytest.raises(ImpossibleMove, match="stable"):
            move()
    with pytest.raises(ImpossibleMove, match="deploy it first"):
        plan_edits.find(PLAN, "4.0")


def test_a_promotion_retains_the_old_stable_version_with_its_workers_and_can_be_reversed():
    promoted = plan_edits.make_stable(plan_edits.set_canary(PLAN, "2.0", 10), "2.0", workers=2)
    assert (promoted.stable.version, promoted.stable.workers, promoted.canary) == ("2.0", 2, None)
    assert promoted.retained[0] == release("1.0", 2)
    back = plan_edits.make_stable(promoted, "1.0", workers=2)
    assert {r.version for r in back.releases()} == {r.version for r in PLAN.releases()}
    assert back.stable == PLAN.stable


def test_the_same_version_with_other_bytes_is_refused():
    with pytest.raises(ImpossibleMove, match="other bytes"):
        plan_edits.retain(PLAN, replace(release("2.0"), sha256="f" * 64))


def versions(releases):
    return [release.version for release in releases]


def test_going_back_twice_goes_two_stable_versions_back():
    third = plan_edits.make_stable(plan_edits.make_stable(PLAN, "2.0", workers=2), "3.0", workers=2)
    assert versions(third.previous) == ["2.0", "1.0"]
    second = plan_edits.go_back(third, "2.0", workers=2)
    assert (second.stable.version, versions(second.previous)) == ("2.0", ["1.0"])
    first = plan_edits.go_back(second, "1.0", workers=2)
    assert (first.stable.version, first.previous) == ("1.0", ())
    assert of_one(third) == third


def test_previous_versions_lists_each_version_once():
    plan = PLAN
    for version in ["2.0", "1.0"] * 20:
        plan = plan_edits.make_stable(plan, version, workers=2)
    assert (plan.stable.version, versions(plan.previous)) == ("1.0", ["2.0"])
