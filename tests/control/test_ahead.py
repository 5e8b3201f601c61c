"""What is planned ahead: losses that idle devices could not take, the likeliest first."""

from __future__ import annotations

from policy_world import PARTY, Policy, solved

from crowdmesh_jax import control
from crowdmesh_jax.control.state import KEPT_PLANS
from crowdmesh_jax.core import PipelinePlan

OWNERS = PARTY[:3]
ONE_SPARE = PARTY[:4]
RATES = {"d0": 1e-4, "d1": 2e-4, "d2": 4e-4, "s0": 1e-5, "s1": 1e-5}


def planned(policy: Policy, most: int = 30) -> list[tuple[str, ...]]:
    """Who is lost in each plan that is asked for, in order; each is answered at once."""
    policy.running()
    found = []
    for _ in range(most):
        for action in policy.tell(control.Tick(), 1.0):
            if isinstance(action, control.Solve):
                assert not action.urgent
                found.append(tuple(d for d in policy.party if d not in action.devices))
                plan = PipelinePlan.even(6, action.devices, microbatches=4)
                policy.tell(solved(action.devices, plan))
    return found


def test_after_the_singles_come_the_likeliest_pairs():
    policy = Policy(party=OWNERS, losses_per_s=RATES)
    singles, pairs = [("d2",), ("d1",), ("d0",)], [("d1", "d2"), ("d0", "d2"), ("d0", "d1")]
    assert planned(policy) == singles + pairs
    assert planned(Policy(party=OWNERS, losses_per_s=RATES, doubles=1)) == [*singles, pairs[0]]
    assert planned(Policy(party=OWNERS, losses_per_s=RATES, standby=False)) == []


def test_what_is_rare_is_planned_for_later():
    assert planned(Policy(party=ONE_SPARE, losses_per_s=RATES), most=9) == []
    assert len(planned(Policy(party=ONE_SPARE, losses_per_s=RATES), most=10)) == 1
    assert len(planned(Policy(party=OWNERS, losses_per_s=RATES), most=9)) == 3, "singles are not"


def test_what_idle_devices_can_take_is_not_planned_for():
    assert planned(Policy(party=ONE_SPARE, losses_per_s=RATES)) == [
        ("d1", "d2"), ("d0", "d2"), ("d0", "d1"),
    ]  # fmt: skip
    assert planned(Policy(party=PARTY, losses_per_s=RATES)) == [], "two for two"


def test_a_group_goes_at_once_and_with_it_the_idle_device_in_it():
    van = {"d1": ("van",), "s0": ("van",)}
    (first, *_) = planned(Policy(party=ONE_SPARE, losses_per_s=RATES, hazards=van))
    assert first == ("d1", "s0"), "the spare cannot take what it is lost with"
    both = {"d0": ("van",), "d1": ("van",)}
    (first, *_) = planned(Policy(party=ONE_SPARE, losses_per_s=RATES, hazards=both))
    assert first == ("d0", "d1"), "though d2 is the frailest"
    two = planned(Policy(party=PARTY, losses_per_s=RATES, hazards=van))
    assert two == [("d1", "d2", "s0"), ("d0", "d1", "s0")], "one spare is left for two stages"


def test_who_is_not_here_is_lost_with_nobody():
    """Else the pair with s1, which is not there, would be the one pair that is planned for."""
    van = {"d1": ("van",), "s1": ("van",)}
    policy = Policy(party=OWNERS, losses_per_s=RATES, hazards=van, doubles=1)
    assert planned(policy) == [("d1",), ("d2",), ("d0",), ("d1", "d2")]


def test_a_group_that_nobody_survives_is_not_planned_for():
    all_of_it = dict.fromkeys(OWNERS, ("power",))
    assert ("d0", "d1", "d2") not in planned(
        Policy(party=OWNERS, losses_per_s=RATES, hazards=all_of_it)
    )


def test_two_that_are_lost_at_once_find_their_plan_made_and_compiled():
    policy = Policy(party=ONE_SPARE, losses_per_s=RATES)
    planned(policy)
    plan = PipelinePlan.even(6, ("d0", "s0"), microbatches=4)
    asked = [
        (a.device, a.stage) for _, _, actions in policy.entries for a in actions
        if isinstance(a, control.Compile) and a.plan == plan
    ]  # fmt: skip
    assert asked == [("d0", 0), ("s0", 1)]
    wanted = policy.need((1, 2), ("d1", "d2"))
    (answer,) = wanted
    assert isinstance(answer, control.Answer), "nothing is solved while everyone waits"
    assert answer.choice.plan == plan


def test_no_plan_is_made_twice_where_there_are_more_than_are_kept():
    names = tuple(f"d{i:02}" for i in range(KEPT_PLANS + 4))
    plan = PipelinePlan.even(len(names), names, microbatches=4)
    policy = Policy(party=names, plan=plan)
    policy.running(keys=tuple(f"k{name}" for name in names), plan=plan)
    found = []
    for _ in range(KEPT_PLANS + 8):
        for action in policy.tell(control.Tick(), 1.0):
            if isinstance(action, control.Solve):
                found.append(action.devices)
                policy.tell(control.PlanSolved(devices=action.devices, plan=None))
    assert len(found) == len(set(found)) == KEPT_PLANS
