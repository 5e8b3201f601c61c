"""Standby plans: same cuts first, hosted copies counted, programs named."""

from dataclasses import replace

import pytest
from replica_worlds import copies, crowd, plan, profile

from crowdmesh_jax.core import DeviceId, PipelinePlan, Stage
from crowdmesh_jax.propagation import (
    Loss,
    hosted_bytes,
    programs_ahead,
    stage_key,
    stage_need,
    standby_plans,
)
from crowdmesh_jax.solvers import PartitionProblem, plan_faults


def lose(*devices, probability=0.5):
    return Loss(devices=tuple(DeviceId(d) for d in devices), probability=probability)


def problem(there, **more):
    return PartitionProblem(
        profile=profile(), crowd=there, **{"compile_peak_bytes": 0, **more}
    )  # fmt: skip


def answer(there, made, holders, *lost, solver="dp", mode="take_over", **more):
    return standby_plans(
        problem(there, **more), made, copies(made, holders), [lose(*lost)],
        solver=solver, mode=mode,
    )[0]  # fmt: skip


class NoSolver:
    """Nothing may be cut anew."""

    def solve(self, problem):
        raise AssertionError("the solver was asked")


def test_the_holder_takes_the_stage_whole_and_nobody_else_changes():
    there = crowd(flops={"d": 0.5e6, "e": 1e6})
    made = plan()
    found = answer(there, made, {"a": "e", "b": "d", "c": "e"}, "b", solver=NoSolver())
    # d is slower than e, but it has the copy.
    assert found.how == "take_over"
    assert found.plan.devices == ("a", "d", "c")
    assert [s.layers for s in found.plan.stages] == [s.layers for s in made.stages]
    (move,) = found.moves
    assert (move.to, move.source, move.first_layer, move.last_layer) == ("d", "d", 2, 3)
    assert found.programs == (("d", stage_key(made, 1)),)
    assert found.step_s > 0


def test_another_spare_fetches_from_the_holder():
    found = answer(crowd(), plan(), {"b": "c"}, "b", solver=NoSolver())
    assert (found.how, found.plan.devices[1]) == ("take_over", "d")
    assert [(m.to, m.source) for m in found.moves] == [("d", "c")]


def test_without_spares_the_neighbour_that_holds_it_merges():
    found = answer(crowd("a b c"), plan(), {"b": "c"}, "b")
    assert found.how == "merge"
    assert [(s.device, *s.layers) for s in found.plan.stages] == [("a", 0, 1), ("c", 2, 3, 4, 5)]
    assert [d for d, _ in found.programs] == ["c"]
    other = answer(crowd("a b c"), plan(), {"b": "a"}, "b")
    assert [s.device for s in other.plan.stages] == ["a", "c"]
    assert other.plan.stages[0].last_layer == 3


def test_a_merge_that_is_too_slow_gives_way_to_a_new_cut():
    there = crowd("a b c d", flops={"c": 0.1e6})
    made = plan("a b c d", 6)
    found = answer(there, made, {"b": "c"}, "b")
    assert found.how == "recut"
    assert "b" not in found.plan.devices


def test_without_copy_and_spare_the_chain_is_cut_anew_and_it_is_told():
    found = answer(crowd("a b c"), plan(), {}, "b")
    assert found.how == "recut"
    assert set(found.plan.devices) <= {"a", "c"}
    assert "no copy of layers" in found.why
    assert None in {m.source for m in found.moves}
    assert {m.source for m in found.moves if not 2 <= m.first_layer <= 3} <= {"a", "c"}


def test_hosted_copies_count_against_memory():
    made, holders = plan(), {"a": "d", "b": "d", "c": "d"}
    hosted = hosted_bytes(copies(made, holders), profile(), "d")
    assert hosted == 2 * 3 * 6 * 1000
    bare = stage_need(profile(), made, 1, compile_peak_bytes=0).total_bytes
    fits = crowd(memory={"d": bare + hosted})
    assert answer(fits, made, holders, "b").plan.devices[1] == "d"
    short = crowd(memory={"d": bare + hosted - 1})
    assert answer(short, made, holders, "b").plan.devices[1] == "e"
    # On disk they take no memory.
    disk = standby_plans(
        problem(short), made, copies(made, holders, "disk"), [lose("b")], solver="dp"
    )  # fmt: skip
    assert disk[0].plan.devices[1] == "d"


def test_new_cuts_leave_room_for_hosted_copies():
    made = plan("a b", 6)
    need = stage_need(profile(), plan("a", 6), 0, compile_peak_bytes=0).total_bytes
    hosted = 2 * 3 * 3 * 1000
    fits = answer(crowd("a b", memory={"a": need + hosted}), made, {"b": "a"}, "b")
    assert fits.plan.devices == ("a",)
    short = answer(crowd("a b", memory={"a": need + hosted - 1}), made, {"b": "a"}, "b")
    assert (short.how, short.plan) == ("none", None)
    assert short.why


def test_the_solver_is_told_of_hosted_copies_and_finds_a_cut_that_leaves_room():
    need = stage_need(profile(), plan("a", 6), 0, compile_peak_bytes=0).total_bytes
    there = crowd("a b c", flops={"a": 100e6}, memory={"a": need + 2 * 3 * 2 * 1000 - 1})
    found = answer(there, plan(), {"b": "a"}, "b", mode="recut")
    assert set(found.plan.devices) == {"a", "c"}


def test_a_slow_holder_is_among_many_quick_spares():
    quick = "s1 s2 s3 s4 s5 s6 s7 s8"
    there = crowd(f"a b c {quick} z", flops={"z": 0.5e6})
    found = answer(there, plan(), {"b": "z"}, "b", solver=NoSolver())
    assert found.plan.devices[1] == "z"


def test_double_losses():
    found = answer(crowd(), plan(), {"a": "d", "b": "e"}, "a", "b", solver=NoSolver())
    assert found.plan.devices == ("d", "e", "c")
    # Both copies at one device: it takes one, the other is fetched from it.
    one = answer(crowd(), plan(), {"a": "d", "b": "d"}, "a", "b", solver=NoSolver())
    assert one.how == "take_over"
    assert {m.source for m in one.moves} == {"d"}
    # A holder that is lost with the owner is no source.
    gone = answer(crowd(), plan(), {"b": "c"}, "b", "c", solver=NoSolver())
    assert {m.source for m in gone.moves if m.first_layer == 2} == {None}
    three = answer(crowd("a b c"), plan(), {"a": "b"}, "a", "b")
    assert three.plan.devices == ("c",)


def test_spares_may_be_lost_without_a_new_plan():
    made = plan()
    found = answer(crowd(), made, {}, "e", solver=NoSolver())
    assert (found.plan, found.programs, found.moves) == (made, (), ())


def test_a_pin_on_the_lost_device_leaves_no_plan():
    found = answer(crowd(), plan(), {"a": "d"}, "a", pins={0: "a"})
    assert (found.how, found.plan) == ("none", None)
    assert found.why


def test_required_devices_that_are_lost_are_not_required():
    found = answer(crowd("a b c"), plan(), {}, "b", requires=("b", "c"))
    assert "c" in found.plan.devices


def test_spread_goes_to_both_neighbours_by_speed():
    there = crowd("a b c", flops={"a": 3e6, "c": 1e6})
    made = PipelinePlan(
        stages=(
            Stage(device=DeviceId("a"), first_layer=0, last_layer=0),
            Stage(device=DeviceId("b"), first_layer=1, last_layer=4),
            Stage(device=DeviceId("c"), first_layer=5, last_layer=5),
        ),
        num_layers=6,
        microbatches=4,
    )
    found = answer(there, made, {"b": "c"}, "b", mode="spread", solver=NoSolver())
    assert found.how == "spread"
    assert [(s.device, s.first_layer, s.last_layer) for s in found.plan.stages] == [
        ("a", 0, 3), ("c", 4, 5),
    ]  # fmt: skip
    ends = [answer(there, made, {}, lost, mode="spread", solver=NoSolver()) for lost in "ac"]
    assert [e.plan.devices for e in ends] == [("b", "c"), ("a", "b")]
    assert answer(there, made, {}, "a", "b", "c", mode="spread").how == "none"


def test_recut_asks_the_solver_even_where_a_spare_is_there():
    found = answer(crowd(), plan(), {"b": "d"}, "b", mode="recut")
    assert found.how == "recut"
    assert "b" not in found.plan.devices


@pytest.mark.parametrize("mode", ["take_over", "spread", "recut"])
@pytest.mark.parametrize("lost", [("a",), ("b",), ("c",), ("a", "b"), ("b", "c"), ("a", "c")])
def test_every_plan_answers_the_survivors_problem(mode, lost):
    there = crowd("a b c d")
    found = answer(there, plan(), {"a": "b", "b": "c", "c": "a"}, *lost, mode=mode)
    assert found.plan is not None
    left = problem(there, bans=lost)
    assert plan_faults(left, found.plan) == ()
    covered = {(m.to, la) for m in found.moves for la in range(m.first_layer, m.last_layer + 1)}
    before = {(s.device, la) for s in plan().stages for la in s.layers}
    after = {(s.device, la) for s in found.plan.stages for la in s.layers}
    assert covered == after - before


def test_keys_say_what_programs_depend_on():
    made = plan()
    assert stage_key(made, 1) == stage_key(plan("x y z"), 1)
    cast = replace(made, stages=(replace(made.stages[0], wire_dtype="bfloat16"), *made.stages[1:]))
    assert stage_key(cast, 1).wire_in == "bfloat16"
    assert stage_key(cast, 0).wire_out == "bfloat16"
    assert stage_key(cast, 2) == stage_key(made, 2)
    again = replace(made, stages=tuple(replace(s, recompute=True) for s in made.stages))
    assert stage_key(again, 1) != stage_key(made, 1)
    # The last stage's forward, loss and backward are one program.
    assert stage_key(again, 2) == stage_key(made, 2)


def test_a_take_over_of_a_casting_stage_asks_for_the_same_casts():
    made = plan()
    cast = replace(made, stages=(replace(made.stages[0], wire_dtype="bfloat16"), *made.stages[1:]))
    found = answer(crowd(), cast, {"b": "d"}, "b", wire_dtype="auto", solver=NoSolver())
    assert [key.wire_in for _, key in found.programs] == ["bfloat16"]


def test_programs_ahead_are_told_by_device_likeliest_first():
    made = plan()
    plans = standby_plans(
        problem(crowd("a b c d")),
        made,
        copies(made, {"a": "d", "b": "d"}),
        [lose("a", probability=0.1), lose("b", probability=0.4)],
        solver=NoSolver(),
    )
    assert programs_ahead(plans) == {"d": (stage_key(made, 1), stage_key(made, 0))}


def test_who_takes_over_uses_its_own_copy():
    found = answer(crowd(), plan(), {"b": "c d"}, "b", solver=NoSolver())
    assert [(m.to, m.source) for m in found.moves] == [("d", "d")]
