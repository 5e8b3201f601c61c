"""When each op and transfer of a step starts and ends, exactly, for any schedule.

Rules of the clock:

- A stage runs its ops one after another in schedule order, each as soon as what it needs is there.
- The outputs of op `F m` of stage `s` cross cut `s` (between stages `s` and `s + 1`) downstream,
  those of `B m` of stage `s + 1` cross it back. A transfer occupies its link direction for
  `transfer_s` (bytes / bandwidth) and arrives `latency_s` after it has left: latency delays, but
  does not occupy. Directions are independent (full duplex), each serves its transfers in the order
  in which they become ready, and none of it costs the stages time. Transfers that share a channel
  (`CutTimes.forward_channels`: a half-duplex link, the air of a cell) take turns, see `contention`.
- Where the backward is split (ops `W`), `B m` takes what is left of the backward without its weight
  part, and the gradient leaves for upstream then; `W m` takes `weight_s`, once `B m` is done.
- After its last op a stage takes `reduce_s` for the scalars that the optimizer mixes across
  layers (0 for most); they ride up the chain, paying latencies only.
- **Commit point**: stage 0 has ended its last op and holds those scalars. `Commit` travels
  down, paying latencies only; each stage applies its update (`update_s`) when it arrives, and runs
  the next step's ops after that. So stage 0 starts the next step as soon as it has applied.

Where no channel is shared, every order above is fixed by the schedule, so start times are a longest
path over the event graph; the computation here is that path, not a simulation with a clock. Shared
channels serve in an order that depends on times: there a simulation runs. It knows nothing of
devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ScheduleError
from .contention import simulate
from .schedule import OpKind, Schedule
from .times import CutTimes, Direction, StageTimes, TimedOp, TimedTransfer, deadlock, op_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """One step, with all stages and links free at 0.

    `ops` go stage by stage, `transfers` cut by cut (downstream, then back), each in time order.
    """

    ops: tuple[TimedOp, ...]
    transfers: tuple[TimedTransfer, ...]
    commit_s: float
    """The commit point of this step."""
    step_s: float
    """From one commit point to the next when step follows step. It is `commit_s` plus stage 0's
    update, plus what later stages still lack when the next step's first microbatch reaches them."""
    bubble_share: tuple[float, ...]
    """Per stage, the share of `step_s` in which it neither runs ops, reduces nor updates."""
    link_busy_share: tuple[tuple[float, float], ...]
    """Per cut, the share of `step_s` in which a direction is occupied: (downstream, back)."""

    def stage_ops(self, stage: int) -> tuple[TimedOp, ...]:
        """The ops of one stage, in time order."""
        return tuple(op for op in self.ops if op.stage == stage)


def evaluate(
    schedule: Schedule, stages: Sequence[StageTimes], cuts: Sequence[CutTimes]
) -> Timeline:
    """Computes the exact timeline of a schedule.

    Args:
        schedule: `S` stages, `M` microbatches; need not have been checked.
        stages: `S` entries.
        cuts: `S - 1` entries; cut `s` joins stages `s` and `s + 1`.

    Raises:
        ScheduleError: Lengths do not match, or the schedule is incomplete or deadlocks.

    Example:
        >>> from crowdmesh_jax.core import make_schedule
        >>> stages = [StageTimes(forward_s=1.0, backward_s=2.0)] * 2
        >>> timeline = evaluate(make_schedule("1f1b", 2, 4), stages, [CutTimes()])
        >>> timeline.step_s, timeline.commit_s  # 4 microbatches of 3 s, and a bubble of 3 s
        (15.0, 15.0)
    """
    ops: list[TimedOp] = []
    sent: list[TimedTransfer] = []
    starts, commit_s = _one_step(schedule, stages, cuts, [0.0] * len(stages), ops, sent)
    step_s = _steady_step_s(schedule, stages, cuts, starts, commit_s)
    ops.sort(key=lambda op: op.stage)  # stable: time order within a stage
    if sent:
        transfers = sorted(sent, key=lambda t: (t.cut, t.direction == "backward", t.start_s))
    else:
        transfers = _transfers(ops, cuts)
    microbatches = schedule.num_microbatches
    busy_s = [microbatches * t.compute_s + t.update_s + t.reduce_s for t in stages]
    return Timeline(
        ops=tuple(ops),
        transfers=tuple(transfers),
        commit_s=commit_s,
        step_s=step_s,
        bubble_share=tuple(max(0.0, 1.0 - _share(busy, step_s)) for busy in busy_s),
        link_busy_share=tuple(
            (
                _share(microbatches * cut.forward_transfer_s, step_s),
                _share(microbatches * cut.backward_transfer_s, step_s),
            )
            for cut in cuts
        ),
    )


def evaluate_step_s(
    schedule: Schedule, stages: Sequence[StageTimes], cuts: Sequence[CutTimes]
) -> float:
    """`evaluate(...).step_s` alone, several times faster: for solvers that rank many plans."""
    starts, commit_s = _one_step(schedule, stages, cuts, [0.0] * len(stages), None, None)
    return _steady_step_s(schedule, stages, cuts, starts, commit_s)


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _steady_step_s(
    schedule: Schedule,
    stages: Sequence[StageTimes],
    cuts: Sequence[CutTimes],
    starts: list[float],
    commit_s: float,
) -> float:
    # At a commit point no op or transfer of the step is left, and from it each stage's release
    # is a fixed delay. So the second step already is the steady one: the same graph, released late,
    # and with shared channels the same simulation from the same state.
    released, down_s = [], 0.0
    for stage, times in enumerate(stages):
        released.append(down_s + times.update_s)
        if stage < len(cuts):
            down_s += cuts[stage].forward_latency_s
    first = released[0]
    if all(late <= first + start for late, start in zip(released, starts, strict=True)):
        return first + commit_s  # nobody is later than the first microbatch: all shifts by stage 0
    return _one_step(schedule, stages, cuts, released, None, None)[1]


def _one_step(
    schedule: Schedule,
    stages: Sequence[StageTimes],
    cuts: Sequence[CutTimes],
    released: list[float],
    timed: list[TimedOp] | None,
    sent: list[TimedTransfer] | None,
) -> tuple[list[float], float]:
    """Start of each stage's first op, and the commit point; appends to the lists where given.

    `released[s]`: when stage `s` may start.
    """
    if any(cut.forward_channels or cut.backward_channels for cut in cuts):
        _check_lengths(schedule, stages, cuts)
        starts, free = simulate(schedule, stages, cuts, released, timed, sent)
    else:
        starts, free = _longest_path(schedule, stages, cuts, released, timed)
    scalars_s = 0.0
    for stage in range(len(stages) - 1, -1, -1):
        scalars_s = max(scalars_s, free[stage] + stages[stage].reduce_s)
        if stage:
            scalars_s += cuts[stage - 1].backward_latency_s
    return starts, scalars_s


def _check_lengths(
    schedule: Schedule, stages: Sequence[StageTimes], cuts: Sequence[CutTimes]
) -> None:
    num_stages = schedule.num_stages
    if num_stages == 0 or len(stages) != num_stages or len(cuts) != num_stages - 1:
        raise ScheduleError(
            f"schedule {schedule.name!r} has {num_stages} stages, given are times of"
            f" {len(stages)} stages and {len(cuts)} cuts (one less than stages)"
        )


def _longest_path(
    schedule: Schedule,
    stages: Sequence[StageTimes],
    cuts: Sequence[CutTimes],
    released: list[float],
    timed: list[TimedOp] | None,
) -> tuple[list[float], list[float]]:
    """When each stage starts its first op and ends its last, where no channel is shared."""
    _check_lengths(schedule, stages, cuts)
    num_stages = schedule.num_stages
    last = num_stages - 1
    microbatches = schedule.num_microbatches
    # When a microbatch's input (gradient) is at hand; None: not sent yet.
    inputs: list[list[float | None]] = [[None] * microbatches for _ in range(num_stages)]
    gradients: list[list[float | None]] = [[None] * microbatches for _ in range(num_stages)]
    # When the first half of a split backward is done.
    halves: list[list[float | None]] = [[None] * microbatches for _ in range(num_stages)]
    backward_s = op_seconds(schedule, stages)
    inputs[0] = [released[0]] * microbatches
    free = list(released)
    starts = list(released)
    position = [0] * num_stages
    down_free, back_free = [0.0] * num_stages, [0.0] * num_stages
    left = sum(len(ops) for ops in schedule.ops)
    forward, backward = OpKind.FORWARD, OpKind.BACKWARD
    order = list(range(num_stages))
    while left:
        before = left
        for stage in order:
            ops = schedule.ops[stage]
            at, now = position[stage], free[stage]
            begin, times = at, stages[stage]
            my_inputs, my_gradients, my_halves = inputs[stage], gradients[stage], halves[stage]
            while at < len(ops):
                op = ops[at]
                microbatch = op.microbatch
                kind = op.kind
                if kind is forward:
                    ready = my_inputs[microbatch]
                else:
                    ready = (my_gradients if kind is backward else my_halves)[microbatch]
                if ready is None:
                    break
                start = ready if ready > now else now
                if at == 0:
                    starts[stage] = start
                if kind is forward:
                    now = start + times.forward_s
                    if stage == last:
                        my_gradients[microbatch] = now
                    else:
                        cut = cuts[stage]
                        sent = down_free[stage]
                        sent = (now if now > sent else sent) + cut.forward_transfer_s
                        down_free[stage] = sent
                        inputs[stage + 1][microbatch] = sent + cut.forward_latency_s
                elif kind is backward:
                    now = start + backward_s[stage]
                    my_halves[microbatch] = now
                    if stage:
                        cut = cuts[stage - 1]
                        sent = back_free[stage]
                        sent = (now if now > sent else sent) + cut.backward_transfer_s
                        back_free[stage] = sent
                        gradients[stage - 1][microbatch] = sent + cut.backward_latency_s
                else:
                    now = start + times.weight_s
                if timed is not None:
                    timed.append(
                        TimedOp(
                            stage=stage,
                            kind=kind,
                            microbatch=microbatch,
                            start_s=start,
                            end_s=now,
                        )
                    )
                at += 1
            left -= at - begin
            position[stage], free[stage] = at, now
        if left == before:
            raise deadlock(schedule, position)
        order.reverse()
    return starts, free


def _transfers(ops: list[TimedOp], cuts: Sequence[CutTimes]) -> list[TimedTransfer]:
    found: dict[tuple[int, Direction], list[TimedTransfer]] = {}
    free: dict[tuple[int, Direction], float] = {}
    for op in ops:
        if op.kind is OpKind.WEIGHT:
            continue
        direction: Direction = "forward" if op.kind is OpKind.FORWARD else "backward"
        cut = op.stage if direction == "forward" else op.stage - 1
        if not 0 <= cut < len(cuts):
            continue
        times = cuts[cut]
        if direction == "forward":
            transfer_s, latency_s = times.forward_transfer_s, times.forward_latency_s
        else:
            transfer_s, latency_s = times.backward_transfer_s, times.backward_latency_s
        key = (cut, direction)
        start_s = max(op.end_s, free.get(key, 0.0))
        free[key] = start_s + transfer_s
        found.setdefault(key, []).append(
            TimedTransfer(
                cut=cut,
                direction=direction,
                microbatch=op.microbatch,
                start_s=start_s,
                end_s=free[key] + latency_s,
            )
        )
    both: tuple[Direction, Direction] = ("forward", "backward")
    return [t for cut in range(len(cuts)) for d in both for t in found.get((cut, d), ())]
