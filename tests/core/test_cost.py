"""Closed forms against `evaluate`: the period, the bound, and how sharp both are."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest
from core_strategies import schedules, times
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from crowdmesh_jax.core import (
    Crowd,
    CutTimes,
    Device,
    DeviceId,
    LayerProfile,
    LayerSeconds,
    Link,
    ModelProfile,
    PipelinePlan,
    Prediction,
    Schedule,
    Stage,
    StageTimes,
    closed_form,
    cut_times,
    evaluate,
    evaluate_step_s,
    first_microbatch_s,
    from_json,
    make_schedule,
    period_s,
    predict,
    stage_times,
    step_time_s,
    strict_period_s,
    to_json,
)
from crowdmesh_jax.errors import (
    InvalidCrowdError,
    InvalidPlanError,
    InvalidValueError,
    ScheduleError,
)


def simple_s(schedule: str, microbatches: int, stages, cuts) -> float:
    """R_0 + (M - 1) T, what solvers minimise."""
    period = closed_form(schedule, microbatches, stages, cuts)[1]
    return first_microbatch_s(stages, cuts) + (microbatches - 1) * period


@st.composite
def chains(draw, max_stages: int = 5, *, updates: bool = False):
    num_stages = draw(st.integers(1, max_stages))
    return draw(times(num_stages, updates=updates))


@settings(max_examples=60, deadline=None)
@given(chains())
def test_the_strict_period_is_that_of_evaluate_in_steady_state(chain):
    stages, cuts = chain
    assume(sum(t.compute_s for t in stages) + sum(cut.round_trip_s for cut in cuts) > 0)
    expected = strict_period_s(
        [t.compute_s for t in stages],
        [cut.round_trip_s for cut in cuts],
        [cut.busiest_s for cut in cuts],
    )
    # 60 is a multiple of every window length here, so whole cycles are counted.
    few, many = (
        evaluate(make_schedule("1f1b", len(stages), count), stages, cuts).commit_s
        for count in (240, 300)
    )
    assert (many - few) / 60 == pytest.approx(expected, rel=0.005)


@settings(max_examples=40, deadline=None)
@given(chains(max_stages=4), st.data())
def test_the_period_of_any_warmups_is_that_of_evaluate_in_steady_state(chain, data):
    stages, cuts = chain
    depths = st.lists(st.integers(1, 6), min_size=len(stages), max_size=len(stages))
    warmups = sorted(data.draw(depths), reverse=True)
    assume(sum(t.compute_s for t in stages) + sum(cut.round_trip_s for cut in cuts) > 0)
    expected = closed_form("eager", 300, stages, cuts, warmups)[1]
    few, many = (
        evaluate(make_schedule("eager", len(stages), count, warmups), stages, cuts).commit_s
        for count in (600, 660)  # where links overtake slowly, the beginning lasts long
    )
    assert (many - few) / 60 == pytest.approx(expected, rel=0.005)


@settings(max_examples=300, deadline=None)
@given(schedules(), st.data())
def test_the_closed_form_is_never_below_evaluate(schedule: Schedule, data):
    stages, cuts = data.draw(times(schedule.num_stages))
    warmups = None
    if schedule.name == "eager":
        warmups = [schedule.max_in_flight(stage) for stage in range(schedule.num_stages)]
    bound_s, _ = closed_form(schedule.name, schedule.num_microbatches, stages, cuts, warmups)
    assert bound_s >= evaluate_step_s(schedule, stages, cuts) * (1 - 1e-12)


@given(chains(), st.integers(1, 9))
def test_the_closed_form_of_gpipe_is_exact(chain, microbatches):
    stages, cuts = chain
    step_s = evaluate_step_s(make_schedule("gpipe", len(stages), microbatches), stages, cuts)
    assert closed_form("gpipe", microbatches, stages, cuts)[0] == pytest.approx(step_s)
    assert simple_s("gpipe", microbatches, stages, cuts) == pytest.approx(step_s)


def picked(rng: random.Random, schedule: str, microbatches: int):
    """The plan that R_0 + (M - 1) T picks in a random problem, by trying all: `(stages, cuts)`.

    2-4 devices up to four times apart in speed, layers up to six times apart, backward twice as
    dear as forward, links from nearly free to twice as dear as compute, latency or bandwidth bound.
    """
    devices = rng.choice([2, 3, 3, 4])
    layers = 6 if devices == 4 else 8
    work = [rng.uniform(0.3, 1.7) for _ in range(layers)]
    size = [rng.uniform(0.2, 1.0) for _ in range(layers)]
    speed = [rng.uniform(0.25, 1.0) for _ in range(devices)]
    slow = {
        frozenset(pair): rng.uniform(0.5, 1.5) for pair in itertools.permutations(range(devices), 2)
    }
    scale = rng.choice([0.02, 0.1, 0.3, 1.0, 2.0]) * sum(work) / sum(speed)
    latency = rng.choice([0.0, 0.1, 0.5, 1.0])
    best, best_s = None, math.inf
    for count in range(1, devices + 1):
        for order in itertools.permutations(range(devices), count):
            for inner in itertools.combinations(range(1, layers), count - 1):
                ends = (0, *inner, layers)
                compute = [sum(work[ends[i] : ends[i + 1]]) / speed[order[i]] for i in range(count)]
                cross = [
                    scale * size[cut] * slow[frozenset(order[i : i + 2])]
                    for i, cut in enumerate(inner)
                ]
                depths = [
                    (2 if schedule == "eager" else 1) * (count - 1 - s) + 1 for s in range(count)
                ]
                trips = [2 * c for c in cross]
                busy = [c * (1 - latency) for c in cross]
                step_s = sum(compute) + sum(trips)
                step_s += (microbatches - 1) * period_s(compute, trips, depths, busy)
                if step_s < best_s:
                    best, best_s = (compute, cross), step_s
    assert best is not None
    compute, cross = best
    stages = [StageTimes(forward_s=c / 3, backward_s=2 * c / 3) for c in compute[:-1]]
    stages.append(StageTimes(forward_s=0.0, backward_s=compute[-1]))
    cuts = [
        CutTimes(
            forward_latency_s=latency * c,
            backward_latency_s=latency * c,
            forward_transfer_s=(1 - latency) * c,
            backward_transfer_s=(1 - latency) * c,
        )
        for c in cross
    ]
    return stages, cuts


@pytest.mark.parametrize(
    ("schedule", "microbatches", "most", "simple_most"),
    [
        ("1f1b", 8, 1.08, 1.11),
        ("1f1b", 4, 1.25, 1.25),
        ("eager", 8, 1.08, 1.25),
        ("eager", 4, 1.25, 1.25),
    ],
)
def test_on_plans_that_a_solver_picks_the_closed_form_is_sharp(
    schedule, microbatches, most, simple_most
):
    rng = random.Random(20)
    bounds, simples = [], []
    for _ in range(100):
        stages, cuts = picked(rng, schedule, microbatches)
        step_s = evaluate_step_s(make_schedule(schedule, len(stages), microbatches), stages, cuts)
        bounds.append(closed_form(schedule, microbatches, stages, cuts)[0] / step_s)
        simples.append(simple_s(schedule, microbatches, stages, cuts) / step_s)
    assert min(bounds) >= 1 - 1e-12
    assert max(bounds) <= most
    assert statistics.median(bounds) <= 1.01
    assert min(simples) >= 1 - 1e-12  # on these; not in general, see below
    assert max(simples) <= simple_most


def test_the_simple_form_can_be_too_low_and_the_bound_not():
    # Stage 1 runs two forwards before its first backward, and nothing after it takes any time.
    stages = [StageTimes(forward_s=f, backward_s=b) for f, b in ((1.0, 0.0), (0.0, 1.0), (0, 0))]
    cuts = [CutTimes(), CutTimes()]
    assert evaluate_step_s(make_schedule("1f1b", 3, 2), stages, cuts) == 4.0
    assert simple_s("1f1b", 2, stages, cuts) == 3.0
    assert closed_form("1f1b", 2, stages, cuts)[0] == 4.0


def test_a_window_of_stages_and_links_is_slower_than_the_slowest_stage():
    # Two stages hold two microbatches, which pay one round trip: (2 + 2 + 6) / 2.
    assert strict_period_s([2.0, 2.0], [6.0]) == 5.0
    assert period_s([2.0, 2.0], [6.0], (3, 1)) == pytest.approx(10 / 3)
    assert strict_period_s([2.0, 2.0], [0.0], [2.5]) == 2.5
    assert strict_period_s([1.0, 1.0, 7.0], [0.0, 0.0]) == 7.0


def test_period_refuses_lengths_and_depths_that_do_not_fit():
    with pytest.raises(InvalidValueError, match="2 stages need 1 round trips and 2 depths"):
        period_s([1.0, 1.0], [], (2, 1))
    with pytest.raises(InvalidValueError, match=r"must not rise downstream, got \(1, 2\)"):
        period_s([1.0, 1.0], [0.0], (1, 2))


A, Z = DeviceId("a"), DeviceId("z")


def two_devices(**default) -> Crowd:
    return Crowd(
        devices=(
            Device(id=A, flops_per_s=100.0, memory_bytes=10**6),
            Device(id=Z, flops_per_s=50.0, memory_bytes=10**6),
        ),
        links=(
            Link(source=A, target=Z, bandwidth_bytes_per_s=10.0, latency_s=0.5),
            *default.pop("links", ()),
        ),
        **default,
    )


BACK = Link(source=Z, target=A, bandwidth_bytes_per_s=20.0, latency_s=0.25)


def three_layers(**changes) -> ModelProfile:
    layers = tuple(
        LayerProfile(
            name=f"l{i}",
            forward_flops=100.0 * (i + 1),
            backward_flops=200.0 * (i + 1),
            parameter_count=25 * i,
            output_bytes=40 + i,
            gradient_bytes=20 + i,
        )
        for i in range(3)
    )
    return ModelProfile(layers=layers, microbatches=4, microbatch_size=2, input_bytes=8, **changes)


def two_stages(**changes) -> PipelinePlan:
    values = {"num_layers": 3, "microbatches": 4, "recompute": False, **changes}
    recompute = values.pop("recompute")
    return PipelinePlan(
        stages=(
            Stage(device=A, first_layer=0, last_layer=1, recompute=recompute),
            Stage(device=Z, first_layer=2, last_layer=2, recompute=recompute),
        ),
        **values,
    )


def test_stage_times_fuse_the_last_stage_and_add_recomputation():
    crowd = two_devices(links=(BACK,))
    kept = stage_times(three_layers(), crowd, two_stages())
    # Layer 0 has no weights, of the other layers' backward half is for theirs.
    assert kept[0] == StageTimes(forward_s=3.0, backward_s=6.0, update_s=1.0, weight_s=2.0)
    assert kept[1] == StageTimes(forward_s=0.0, backward_s=18.0, update_s=4.0, weight_s=6.0)
    again = stage_times(three_layers(), crowd, two_stages(recompute=True))
    assert again[0] == StageTimes(forward_s=3.0, backward_s=9.0, update_s=1.0, weight_s=2.0)
    assert again[1] == kept[1]


def test_measured_seconds_go_before_those_from_flops():
    rows = tuple(LayerSeconds(forward_s=i, backward_s=2 * i, update_s=0.5) for i in range(3))
    found = stage_times(three_layers(seconds={"a": rows}), two_devices(), two_stages())
    assert found[0] == StageTimes(forward_s=1.0, backward_s=2.0, update_s=1.0, weight_s=1.0)
    assert found[1].backward_s == 18.0


def test_cut_times_use_the_link_of_each_direction():
    (cut,) = cut_times(three_layers(), two_devices(links=(BACK,)), two_stages())
    assert cut == CutTimes(
        forward_latency_s=0.5,
        forward_transfer_s=4.1,
        backward_latency_s=0.25,
        backward_transfer_s=1.05,
    )


def test_neighbours_without_a_link_are_refused_by_name():
    with pytest.raises(InvalidPlanError, match=r"stages 0 and 1 .* no link 'z' -> 'a'"):
        cut_times(three_layers(), two_devices(), two_stages())


def test_a_plan_that_does_not_fit_the_profile_is_refused():
    crowd = two_devices(links=(BACK,))
    with pytest.raises(InvalidPlanError, match="plan is for 5 microbatches, the profile for 4"):
        predict(three_layers(), crowd, two_stages(microbatches=5))
    plan = PipelinePlan.even(2, ["a", "z"], microbatches=4)
    with pytest.raises(InvalidPlanError, match="cuts 2 layers, the profile has 3"):
        predict(three_layers(), crowd, plan)
    plan = PipelinePlan.even(3, ["a", "q"], microbatches=4)
    with pytest.raises(InvalidCrowdError, match="no device 'q'"):
        predict(three_layers(), crowd, plan)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "eager"])
def test_a_prediction_agrees_with_its_parts_and_survives_json(schedule):
    crowd, plan = two_devices(links=(BACK,)), two_stages(schedule=schedule)
    found = predict(three_layers(), crowd, plan)
    stages = stage_times(three_layers(), crowd, plan)
    cuts = cut_times(three_layers(), crowd, plan)
    assert found.timeline == evaluate(make_schedule(schedule, 2, 4), stages, cuts)
    assert found.step_s == found.timeline.step_s
    assert found.closed_form_step_s == step_time_s(three_layers(), crowd, plan)
    assert found.closed_form_step_s >= found.step_s * (1 - 1e-12)
    assert found.first_microbatch_s == pytest.approx(27.0 + 0.75 + 4.1 + 1.05)
    assert found.period_s == closed_form(schedule, 4, stages, cuts)[1]
    first, last = found.stages
    assert (first.device, first.first_layer, first.last_layer) == ("a", 0, 1)
    assert first.in_flight == {"gpipe": 4, "1f1b": 2, "eager": 3}[schedule]
    assert (first.cut_forward_s, first.cut_backward_s) == pytest.approx((4.6, 1.3))
    assert (last.cut_forward_s, last.cut_backward_s) == (None, None)
    assert last.idle_share == found.timeline.bubble_share[1]
    assert first.compute_s == 9.0
    assert from_json(Prediction, to_json(found)) == found


def test_a_schedule_of_ones_own_is_predicted_by_evaluate_alone():
    def serial(num_stages, microbatches, warmups):
        one = make_schedule("eager", num_stages, microbatches, [1] * num_stages)
        return Schedule(name="serial", ops=one.ops)

    crowd, plan = two_devices(links=(BACK,)), two_stages(schedule="serial")
    found = predict(three_layers(), crowd, plan, builders={"serial": serial})
    assert found.closed_form_step_s == found.step_s
    assert found.period_s == pytest.approx(found.first_microbatch_s)
    with pytest.raises(ScheduleError, match="unknown schedule 'serial'"):
        predict(three_layers(), crowd, plan)
    with pytest.raises(ScheduleError, match="'serial'"):
        step_time_s(three_layers(), crowd, plan)
