"""Split backwards: order rules, ZB-H1's bubbles and memory, and where it is no slower than 1F1B.

That `evaluate` times them exactly is proven in `test_timeline`, against a simulation.
"""

from __future__ import annotations

import dataclasses

import pytest
from core_strategies import split_schedules, times
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from crowdmesh_jax.core import (
    Crowd,
    CutTimes,
    DeviceId,
    LayerProfile,
    LayerSeconds,
    ModelProfile,
    Op,
    OpKind,
    PipelinePlan,
    Schedule,
    Stage,
    StageTimes,
    check_runnable,
    check_schedule,
    closed_form,
    evaluate,
    evaluate_step_s,
    make_schedule,
    predict,
    stage_memory,
    stage_times,
    warmup_depths,
    weight_delays,
)
from crowdmesh_jax.errors import InvalidValueError, ScheduleError

W = OpKind.WEIGHT


def ops(text: str) -> tuple[Op, ...]:
    return tuple(Op(OpKind(word[0]), int(word[1:])) for word in text.split())


def shown(schedule: Schedule, stage: int) -> str:
    return " ".join(str(op) for op in schedule.ops[stage])


def test_zb_h1_of_three_stages_and_four_microbatches_is_that_of_the_paper():
    schedule = make_schedule("zb-h1", 3, 4)
    assert shown(schedule, 0) == "F0 F1 F2 B0 W0 F3 B1 W1 B2 W2 B3 W3"
    assert shown(schedule, 1) == "F0 F1 B0 F2 B1 W0 F3 B2 W1 B3 W2 W3"
    assert shown(schedule, 2) == "F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3"


def test_the_times_of_two_stages_are_those_worked_out_by_hand():
    stages = [
        StageTimes(forward_s=1.0, backward_s=3.0, weight_s=1.0),
        StageTimes(forward_s=0.0, backward_s=4.0, weight_s=1.5),
    ]
    cuts = [CutTimes(forward_transfer_s=0.5, backward_latency_s=0.25, backward_transfer_s=0.5)]
    schedule = make_schedule("zb-h1", 2, 2)
    assert shown(schedule, 1) == "F0 B0 F1 B1 W0 W1"
    timeline = evaluate(schedule, stages, cuts)
    times_of = [(f"{op.kind.value}{op.microbatch}", op.start_s, op.end_s) for op in timeline.ops]
    assert times_of == [
        ("F0", 0.0, 1.0),
        ("F1", 1.0, 2.0),
        ("B0", 4.75, 6.75),  # 4.0 on the stage after, 0.5 on the link, 0.25 of latency
        ("W0", 6.75, 7.75),
        ("B1", 7.75, 9.75),  # its gradient is there at 7.25
        ("W1", 9.75, 10.75),
        ("F0", 1.5, 1.5),
        ("B0", 1.5, 4.0),
        ("F1", 4.0, 4.0),
        ("B1", 4.0, 6.5),
        ("W0", 6.5, 8.0),
        ("W1", 8.0, 9.5),
    ]
    assert timeline.commit_s == timeline.step_s == 10.75  # under 1F1B 13.25
    assert evaluate_step_s(make_schedule("1f1b", 2, 2), stages, cuts) == 13.25
    assert [t.microbatch for t in timeline.transfers] == [0, 1, 0, 1]  # a weight part sends nothing


def test_the_commit_waits_for_weight_parts_of_later_stages():
    stages = [
        StageTimes(forward_s=0, backward_s=0),
        StageTimes(forward_s=0, backward_s=5.0, weight_s=5),
    ]
    late = Schedule(name="mine", ops=(ops("F0 B0"), ops("F0 B0 W0")))
    timeline = evaluate(late, stages, [CutTimes(backward_latency_s=0.5)])
    assert timeline.stage_ops(0)[-1].end_s == 0.5
    assert timeline.commit_s == 5.5


@given(split_schedules())
def test_any_mixture_of_split_and_whole_backwards_passes_the_check(schedule):
    check_schedule(schedule)
    for stage in range(schedule.num_stages):
        assert schedule.is_split(stage) == any(op.kind is W for op in schedule.ops[stage])


@pytest.mark.parametrize(
    ("stage_ops", "complaint"),
    [
        ("F0 W0 B0", "stage 0: W0 stands before its backward"),
        (
            "F0 F1 B0 B1 W1 W0",
            "W1 stands where W0 is due; gradients are summed in",
        ),
        ("F0 F1 B0 W0 B1", "stage 0: W1 is missing"),
        ("F0 F1 B0 W0 W0 B1 W1", "stage 0: W0 stands twice"),
        ("F0 W0", "stage 0: W0 stands before its backward"),
        ("F0 B0 W0 W1", "W1 is outside microbatches 0..0"),
    ],
)
def test_weight_parts_that_could_not_run_are_refused(stage_ops, complaint):
    with pytest.raises(ScheduleError) as caught:
        check_schedule(Schedule(name="mine", ops=(ops(stage_ops),)))
    assert complaint in str(caught.value)


@given(st.integers(1, 6), st.integers(1, 9))
def test_zb_h1_keeps_no_more_in_flight_than_the_first_stage_of_1f1b(num_stages, microbatches):
    schedule = make_schedule("zb-h1", num_stages, microbatches)
    check_schedule(schedule)
    most = min(num_stages, microbatches)
    assert [schedule.max_in_flight(s) for s in range(num_stages)] == [most] * num_stages
    delays = weight_delays(num_stages, microbatches)
    depths = warmup_depths("zb-h1", num_stages, microbatches)
    for stage, stage_ops in enumerate(schedule.ops):
        assert schedule.max_awaiting_weight(stage) == min(delays[stage] + 1, microbatches)
        assert stage_ops.index(Op(OpKind.BACKWARD, 0)) == depths[stage]


@given(st.integers(1, 6), st.integers(1, 9), st.data())
def test_a_warmup_limits_what_is_in_flight(num_stages, microbatches, data):
    limits = [data.draw(st.integers(num_stages - s, 12)) for s in range(num_stages)]
    schedule = make_schedule("zb-h1", num_stages, microbatches, limits)
    check_schedule(schedule)
    found = [schedule.max_in_flight(stage) for stage in range(num_stages)]
    assert found == [min(limit, microbatches) for limit in limits]


def test_a_warmup_below_that_of_1f1b_is_refused():
    with pytest.raises(ScheduleError, match=r"stage 0: at most 2 in flight .* it needs 3"):
        make_schedule("zb-h1", 3, 8, [2, None, None])
    with pytest.raises(ScheduleError, match="it needs 3"):
        closed_form(
            "zb-h1",
            8,
            [StageTimes(forward_s=1, backward_s=1)] * 3,
            [CutTimes()] * 2,
            [2, None, None],
        )
    make_schedule("zb-h1", 3, 2, [2, None, None])  # there are only two


@pytest.mark.parametrize("num_stages", [2, 3, 5])
def test_on_equal_stages_the_bubble_is_a_third_of_that_of_1f1b(num_stages):
    """(S - 1) (F + B - W) instead of (S - 1) (F + B + W), the paper's figures."""
    stages = [StageTimes(forward_s=1.0, backward_s=2.0, weight_s=1.0)] * num_stages
    cuts = [CutTimes()] * (num_stages - 1)
    for name, bubble_s in (("1f1b", 3.0 * (num_stages - 1)), ("zb-h1", 1.0 * (num_stages - 1))):
        timeline = evaluate(make_schedule(name, num_stages, 12), stages, cuts)
        assert timeline.step_s == 12 * 3.0 + bubble_s
        for share in timeline.bubble_share:
            assert share * timeline.step_s == pytest.approx(bubble_s)


@st.composite
def chains(draw, max_stages: int = 5):
    return draw(times(draw(st.integers(1, max_stages))))


def no_delay(num_stages: int) -> list[int]:
    return [num_stages - stage for stage in range(num_stages)]


@settings(max_examples=300, deadline=None)
@given(chains(), st.integers(1, 9))
def test_with_1f1bs_microbatches_in_flight_it_is_never_slower(chain, microbatches):
    stages, cuts = chain
    count = len(stages)
    split = make_schedule("zb-h1", count, microbatches, no_delay(count))
    whole = make_schedule("1f1b", count, microbatches)
    assert evaluate_step_s(split, stages, cuts) <= evaluate_step_s(whole, stages, cuts)


@settings(max_examples=300, deadline=None)
@given(chains(), st.integers(1, 9))
def test_by_default_it_is_slower_at_most_by_the_weight_parts_that_it_puts_off(chain, microbatches):
    stages, cuts = chain
    count = len(stages)
    split = evaluate(make_schedule("zb-h1", count, microbatches), stages, cuts)
    whole = evaluate(make_schedule("1f1b", count, microbatches), stages, cuts)
    delays = weight_delays(count, microbatches)
    late_s = max(d * t.weight_s for d, t in zip(delays, stages, strict=True))
    assert split.step_s <= whole.step_s + late_s
    begun = {(op.stage, op.kind, op.microbatch): op.start_s for op in whole.ops}
    for op in split.ops:
        if op.kind is not W:
            assert op.start_s <= begun[op.stage, op.kind, op.microbatch]


def test_it_can_be_slower_where_a_stage_waits_long_for_its_last_gradients():
    stages = [
        StageTimes(forward_s=0.0, backward_s=0.0),
        StageTimes(forward_s=0.0, backward_s=1.0, weight_s=1.0),
        StageTimes(forward_s=0.0, backward_s=10.0),
    ]
    cuts = [CutTimes()] * 2
    step_s = {n: evaluate_step_s(make_schedule(n, 3, 4), stages, cuts) for n in ("1f1b", "zb-h1")}
    assert step_s == {"1f1b": 41.0, "zb-h1": 42.0}
    assert closed_form("1f1b", 4, stages, cuts)[0] == 41.0
    assert closed_form("zb-h1", 4, stages, cuts)[0] == 42.0  # that of 1F1B would be too low
    assert evaluate_step_s(make_schedule("zb-h1", 3, 4, [3, 2, 1]), stages, cuts) == 41.0


@settings(max_examples=200, deadline=None)
@given(chains(), st.integers(1, 9), st.booleans())
def test_the_closed_form_is_never_below_evaluate(chain, microbatches, by_default):
    stages, cuts = chain
    warmups = None if by_default else no_delay(len(stages))
    step_s = evaluate_step_s(
        make_schedule("zb-h1", len(stages), microbatches, warmups), stages, cuts
    )
    bound_s, _ = closed_form("zb-h1", microbatches, stages, cuts, warmups)
    assert step_s <= bound_s * (1 + 1e-12)


@settings(max_examples=40, deadline=None)
@given(chains(4))
def test_the_period_is_that_of_evaluate_in_steady_state(chain):
    stages, cuts = chain
    assume(sum(t.compute_s for t in stages) + sum(cut.round_trip_s for cut in cuts) > 0)
    expected = closed_form("zb-h1", 300, stages, cuts)[1]
    few, many = (
        evaluate(make_schedule("zb-h1", len(stages), count), stages, cuts).commit_s
        for count in (240, 300)
    )
    assert (many - few) / 60 == pytest.approx(expected, rel=0.005)


# Seconds and bytes of a stage ---------------------------------------------------------------------


def profile(**changes) -> ModelProfile:
    layers = tuple(
        LayerProfile(
            name=f"l{i}",
            forward_flops=2.0,
            backward_flops=4.0,
            parameter_bytes=0 if i == 2 else 100,
            output_bytes=1000,
            gradient_bytes=10,
            residual_bytes=7,
        )
        for i in range(4)
    )
    return ModelProfile(layers=layers, microbatches=4, microbatch_size=2, input_bytes=50, **changes)


CROWD = Crowd.local((1.0, 1.0), flops_per_s=1.0)
PLAN = PipelinePlan.even(4, ["device-0", "device-1"], microbatches=4, schedule="zb-h1")


def test_the_weight_part_is_half_all_or_nothing_where_nobody_measured_it():
    first, last = stage_times(profile(), CROWD, PLAN)
    assert first.weight_s == 4.0 + 2.0  # nobody needs the gradient of the model's input
    assert last.weight_s == 0.0 + 2.0  # layer 2 has no weights
    assert (last.forward_s, last.backward_s) == (0.0, 12.0)  # forward and loss are in its B


def test_a_measured_weight_part_goes_before_that():
    rows = tuple(LayerSeconds(forward_s=1.0, backward_s=4.0, weight_s=i / 2) for i in range(4))
    measured = profile(seconds={"device-0": rows, "device-1": rows})
    assert [t.weight_s for t in stage_times(measured, CROWD, PLAN)] == [0.5, 2.5]
    with pytest.raises(InvalidValueError, match=r"weight_s 3.0 is a part of backward_s 2.0"):
        LayerSeconds(forward_s=1.0, backward_s=2.0, weight_s=3.0)
    with pytest.raises(InvalidValueError, match="weight_s must be finite"):
        LayerSeconds(forward_s=1.0, backward_s=2.0, weight_s=-1.0)
    with pytest.raises(InvalidValueError, match=r"weight_s 3.0 is a part of backward_s 2.0"):
        StageTimes(forward_s=1.0, backward_s=2.0, weight_s=3.0)


def test_a_forward_run_again_stands_in_the_input_part():
    again = dataclasses.replace(
        PLAN, stages=tuple(dataclasses.replace(stage, recompute=True) for stage in PLAN.stages)
    )
    kept, recomputed = (
        stage_times(profile(), CROWD, PLAN)[0],
        stage_times(profile(), CROWD, again)[0],
    )
    assert recomputed.backward_s == kept.backward_s + kept.forward_s
    assert recomputed.weight_s == kept.weight_s


@pytest.mark.parametrize(
    ("stage_index", "recompute", "stash_bytes"),
    [
        (1, False, 3 * (1000 + 14) + 2 * 20),  # all residuals; 2 also have gradients of each output
        (1, True, 3 * 1000 + 2 * 14 + 2 * 20),  # residuals of those between the parts alone
        (2, False, 3 * 1000 + 2 * 14 + 2 * 20),  # as the last stage's forward is in its B
    ],
)
def test_a_microbatch_stays_until_its_weight_part(stage_index, recompute, stash_bytes):
    stage = Stage(device=DeviceId("d"), first_layer=2, last_layer=3, recompute=recompute)
    found = stage_memory(
        profile(), stage, stage_index=stage_index, num_stages=3, in_flight=3, awaiting_weight=2
    )
    assert found.stash_bytes == stash_bytes


def test_a_prediction_counts_what_the_schedule_keeps():
    found = predict(profile(), CROWD, PLAN)
    assert [stage.in_flight for stage in found.stages] == [2, 2]
    assert found.stages[1].memory.stash_bytes == 2 * 1000 + 2 * 14 + 2 * 20
    assert found.stages[0].weight_s == 6.0
    assert found.step_s <= found.closed_form_step_s
    assert (
        found.step_s < predict(profile(), CROWD, dataclasses.replace(PLAN, schedule="1f1b")).step_s
    )


def test_agents_do_not_run_split_backwards():
    check_runnable(make_schedule("eager", 3, 8))
    with pytest.raises(ScheduleError, match=r"'zb-h1', stage 0 splits the backward \(W0\)"):
        check_runnable(make_schedule("zb-h1", 3, 8))
    swapped = Schedule(name="mine", ops=(ops("F1 F0 B0 B1"),))
    check_schedule(swapped)
    with pytest.raises(ScheduleError, match="F1 stands where F0 is due"):
        check_runnable(swapped)
