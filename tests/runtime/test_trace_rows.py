"""What the trace makes of a recovery, from op times alone."""

import itertools

from report.run_folders import recovery

from crowdmesh_jax.core import PipelinePlan
from crowdmesh_jax.record import trace_events
from crowdmesh_jax.runtime.told import Span
from crowdmesh_jax.runtime.tracing import KEPT_FIRST, KEPT_LAST, TraceWriter

PLAN = PipelinePlan.even(4, ("fast", "slow"), microbatches=1)
STEP_S = 0.1


def _steps(writer, first, last, devices, start_s):
    for step in range(first, last):
        for stage, device in enumerate(devices):
            at_s = start_s + (step - first) * STEP_S + 0.01 * stage
            spans = [Span(device, "forward", step, 0, at_s, at_s + 0.005)]
            if stage:
                spans.append(Span(device, "receive_forward", step, 0, at_s - 0.004, at_s))
            writer.add(spans)


def _run(base=40, steps=120):
    event = recovery(base)
    writer = TraceWriter(PLAN)
    begin_s = event.spans[0][1] - base * STEP_S
    _steps(writer, 0, base, ("fast", "slow"), begin_s)
    writer.add([Span("fast", "forward", base, 0, event.opened_s - 0.01, event.opened_s)])
    ready_s = event.spans[3][2]
    for step in (base - 2, base - 1):
        at_s = ready_s - 0.2 + 0.01 * (step - base)
        writer.add([Span("spare", "forward", step, 0, at_s, at_s + 0.005)])
        writer.add([Span("spare", "receive_forward", step, 0, at_s, at_s)])
    writer.recovered(event)
    writer.replan(event.plan, event.opened_s)
    _steps(writer, base, steps, ("fast", "spare"), ready_s)
    return event, trace_events(writer.finish())


def test_void_and_replayed_ops_are_named_and_the_rest_is_as_it_was():
    _, events = _run()
    of = {kind: [(e.device, e.step) for e in events if e.kind == kind] for kind in
          ("dropped_forward", "replayed_forward", "forward")}  # fmt: skip
    assert of["dropped_forward"] == [("fast", 40)]
    assert of["replayed_forward"] == [("spare", 38), ("spare", 39)]
    assert sorted(of["forward"]).count(("fast", 40)) == 1
    assert ("slow", 39) in of["forward"], "the lost device did it when it still was there"
    assert not {d for d, step in of["forward"] if d == "spare" and step < 40}


def test_frames_go_between_the_devices_of_their_time():
    _, events = _run()
    frames = {(e.device, e.peer, e.step) for e in events if e.kind == "send"}
    assert ("fast", "slow", 39) in frames
    assert ("fast", "spare", 41) in frames
    assert not {step for _, peer, step in frames if peer == "spare" and step < 40}


def test_a_recovery_has_a_row_of_its_own_last_and_without_gaps():
    event, events = _run()
    row = sorted((e for e in events if e.device == "recovery"), key=lambda e: e.start_s)
    assert [e.kind for e in row] == ["noticed", "fenced", "planned", "installed", "first_step"]
    assert {(e.label, e.step) for e in row} == {("epoch 2", 40)}
    for one, next_one in itertools.pairwise(row):
        assert abs(one.end_s - next_one.start_s) < 1e-8
    assert abs(row[-1].end_s - row[0].start_s - event.total_s) < 1e-8


def test_steps_round_a_recovery_stay_in_the_trace_of_a_long_run():
    _, events = _run(base=40, steps=300)
    steps = {e.step for e in events if e.kind == "forward"}
    assert {36, 37, 38, 39, 40, 41, 42} <= steps
    assert len(steps) <= KEPT_FIRST + KEPT_LAST + 2 + 7
    assert 100 not in steps
