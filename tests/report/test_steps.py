"""Shares of a step: every instant belongs to one, and predictions agree with `evaluate`."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report.run_folders import CUTS, PLAN, PREDICTION, STAGES, TIMELINE, measured_events

from crowdmesh_jax.core import CutTimes, PipelinePlan, StageTimes, evaluate, schedule_for
from crowdmesh_jax.record import RunPrediction, TraceEvent
from crowdmesh_jax.report.steps import (
    SHARES,
    cut_uses,
    device_shares,
    median_window,
    predicted_shares,
    windows,
)

seconds = st.floats(0.001, 1.0)
latencies = st.floats(0.0, 0.2)


@st.composite
def predictions(draw):
    count = draw(st.integers(1, 4))
    microbatches = draw(st.integers(1, 5))
    stages = tuple(
        StageTimes(
            forward_s=draw(seconds), backward_s=draw(seconds), update_s=draw(latencies),
            reduce_s=draw(latencies),
        )
        for _ in range(count)
    )  # fmt: skip
    cuts = tuple(
        CutTimes(
            forward_latency_s=draw(latencies), forward_transfer_s=draw(latencies),
            backward_latency_s=draw(latencies), backward_transfer_s=draw(latencies),
        )
        for _ in range(count - 1)
    )  # fmt: skip
    schedule = draw(st.sampled_from(["gpipe", "1f1b"]))
    devices = [f"d{i}" for i in range(count)]
    plan = PipelinePlan.even(count, devices, microbatches=microbatches, schedule=schedule)
    timeline = evaluate(schedule_for(plan), stages, cuts)
    return plan, RunPrediction(stages=stages, cuts=cuts, step_s=timeline.step_s), timeline


@given(predictions())
def test_predicted_shares_add_up_and_leave_no_more_time_than_evaluate_does(case):
    plan, prediction, timeline = case
    shares = predicted_shares(plan, prediction, timeline)
    assert [share.device for share in shares] == list(plan.devices)
    for index, share in enumerate(shares):
        parts = {name: getattr(share, name) for name in SHARES}
        assert min(parts.values()) >= 0
        assert sum(parts.values()) == pytest.approx(1.0)
        work_s = plan.microbatches * prediction.stages[index].compute_s
        # A late update of the step before covers the first op, which in truth then starts later.
        covered_s = prediction.stages[index].update_s if index else 0.0
        least, most = (seconds / timeline.step_s for seconds in (work_s - covered_s, work_s))
        assert least * (1 - 1e-6) <= parts["compute"] <= most * (1 + 1e-6)
        idle = parts["link"] + parts["bubble"] + parts["ready"]
        # A late update of the step before may reach into this one's first op, where evaluate would
        # shift it; so at most, and nearly always exactly, what evaluate leaves.
        assert idle >= timeline.bubble_share[index] - 1e-6
        if index == 0:
            assert idle == pytest.approx(timeline.bubble_share[0], abs=1e-6)


def _event(device, kind, start_s, end_s, microbatch=None, step=0, **rest):
    return TraceEvent(
        device=device, kind=kind, step=step, microbatch=microbatch, start_s=start_s, end_s=end_s,
        **rest,
    )  # fmt: skip


def test_each_instant_of_a_device_goes_to_the_share_that_its_definition_says():
    plan = PipelinePlan.even(2, ["u", "l"], microbatches=1)
    events = [
        _event("u", "forward", 0, 2, 0),
        _event("u", "backward", 8, 9, 0),
        _event("u", "update", 9.5, 10),
        _event("u", "forward", 10, 12, 0, step=1),
        _event("l", "forward", 4, 4, 0),
        _event("l", "backward", 4, 6, 0),
        _event("l", "update", 9, 9.5),
        _event("l", "receive", 2.5, 3.5, 0, peer="u", label="activations"),
        _event("u", "receive", 6, 7.5, 0, peer="l", label="gradients"),
    ]
    (window,) = windows(plan, events)
    assert (window.start_s, window.end_s) == (0, 10)
    upper, lower = device_shares(plan, events, [window])
    # u: 0-2 forward, 2-6 nobody has sent, 6-7.5 on its way, 7.5-8 there, 8-9 backward, 9-9.5 there
    assert (upper.compute, upper.update) == pytest.approx((0.3, 0.05))
    assert (upper.bubble, upper.link, upper.ready) == pytest.approx((0.4, 0.15, 0.1))
    # l: 0-2.5 nobody has sent, 2.5-3.5 on its way, 3.5-4 there, 4-6 backward, 6-9 no commit yet
    assert (lower.compute, lower.update) == pytest.approx((0.2, 0.05))
    assert (lower.bubble, lower.link, lower.ready) == pytest.approx((0.25 + 0.3 + 0.05, 0.1, 0.05))
    down, back = cut_uses(plan, events, [window])
    assert (down.source, down.target, down.transfer_s) == ("u", "l", pytest.approx(1.0))
    assert down.busy_share == pytest.approx(0.1)
    assert back.busy_share == pytest.approx(0.15)


def test_steps_that_lack_an_op_or_an_end_are_no_windows():
    events = measured_events(5)
    assert [w.step for w in windows(PLAN, events)] == [0, 1, 2, 3]  # the last has no next start
    gone = next(e for e in events if e.step == 2 and e.kind == "backward" and e.device == "slow")
    events.remove(gone)
    assert [w.step for w in windows(PLAN, events)] == [0, 1, 3]


def test_steps_that_an_evaluation_lengthened_are_no_windows():
    events = measured_events(5)
    found = windows(PLAN, events)
    during_s = found[2].start_s + 0.5 * found[2].length_s
    events.append(_event("slow", "evaluate", during_s, during_s + 1e-3, 0, step=2))
    assert [w.step for w in windows(PLAN, events)] == [0, 1, 3]


def test_the_drawn_step_is_of_median_length_and_not_of_the_warm_up():
    found = windows(PLAN, measured_events(5))
    assert median_window(found).step in (2, 3)
    assert median_window(found[:1]).step == 0
    assert median_window([]) is None


def test_steps_measured_as_predicted_have_the_predicted_shares():
    measured = device_shares(PLAN, measured_events(8), windows(PLAN, measured_events(8))[2:5])
    predicted = predicted_shares(PLAN, PREDICTION, TIMELINE)
    for ours, theirs in zip(measured, predicted, strict=True):
        for name in SHARES:
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), abs=1e-6)
    assert STAGES[0].compute_s * 3 / TIMELINE.step_s == pytest.approx(predicted[0].compute)
    assert CUTS
