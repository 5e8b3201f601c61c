"""What a plan will cost: seconds per stage and cut, closed forms of the step time, predictions.

Solvers optimise the closed forms; plans are compared by `timeline.evaluate` in the end. Notation:
stage `s` takes `C_s` seconds of compute per microbatch, cut `e` takes `c_e` each way, and stage `s`
has `d_s` microbatches in flight.

**Period.** In steady state a step's microbatches pass every `T` seconds. From a forward on stage
`s`, down to stage `u` and back to stage `s` is a cycle of the event graph that moves on by
`d_s - d_u + 1` microbatches, and every cycle is made of such windows. So, exactly,

    T = max over windows s..u of  [sum of C_s..C_u + round trips inside] / (d_s - d_u + 1)

and the occupation of each link direction; where transfers share channels (`CutTimes`), that of each
channel, summed over all cuts and directions. For 1F1B (`d_s = S - s`) the divisor is the number of
stages in the window; for `eager` it is about twice that, so that `T` is close to the slowest stage
or link.

**Step.** Solvers minimise the simple `R_0 + (M - 1) T`, where `R_0 = sum of C + round trips` is the
first microbatch. It is not a bound: where a stage with several microbatches in flight is much
slower than all after it, it can be too low (by 25 % in the worst small cases). `closed_form` is
never too low. It sharpens both terms:

    R_1 + T_1 + T_2 + ... + T_(M-1),   R_1 = max over stages u of
        [C_0..C_u + round trips before u] + (d_u - 1) x the slowest forward or transfer up to u

as stage `u` runs `d_u` forwards before its first backward (`R_1 = R_0` where no stage or link is
much slower than those after it), and `T_m` is the slowest of single backwards, transfers and those
windows s..u that microbatch `m` can still wait for, `m <= M - d_u`: after that stage `u` has no
forwards left. Read backwards in time, a step is a step of the same shape with forward and backward
swapped, so the smaller of the two bounds holds. It is exact for GPipe. How sharp it is otherwise
is a measurement, not a law: at most 8 % above `evaluate` at M = 8 and 7 % at M = 4 on 1,200 random
problems each, for the plan that `R_0 + (M - 1) T` picks (medians below 1 %; the simple form itself:
10 % and 14 % for 1F1B, 25 % and 19 % for `eager`), and at most 18 % on random plans that no solver
would pick. So plans are ranked by `evaluate` in the end.

**Split backward** (`zb-h1`). Weight parts lie on no path but their own stage's: a window counts
them for its first stage alone, where the next forward waits for them. In a step no forward or
backward starts later than under 1F1B, and the last weight parts, `k` more than one, end at most
`k weight_s` later: the bound is that of 1F1B with so much more `reduce_s`.

It knows nothing of search.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ..errors import InvalidPlanError, InvalidValueError
from .builders import BUILT_IN, ScheduleBuilder, schedule_for, warmup_depths, weight_delays
from .crowd import Crowd, DeviceId
from .links import link_between, occupied_s, pair_times
from .memory import COMPILE_PEAK_BYTES, MemoryBreakdown, stage_memory
from .plan import PipelinePlan, Stage
from .profile import ModelProfile
from .timeline import Timeline, evaluate
from .times import CutTimes, StageTimes


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePrediction:
    """What one stage is predicted to need. Seconds are per microbatch but `update_s`."""

    device: DeviceId
    first_layer: int
    last_layer: int
    forward_s: float
    """0 on the last stage: its forward is part of the program that runs loss and backward."""
    backward_s: float
    """All of it, also where it is split."""
    update_s: float
    memory: MemoryBreakdown
    """Of a shared stage, that of the device with the most rows."""
    in_flight: int
    idle_share: float
    """Of the step, the share in which the device computes nothing."""
    cut_forward_s: float | None
    """Seconds to send the output downstream; None on the last stage."""
    cut_backward_s: float | None
    """Seconds for the gradient to come back over the same cut."""
    weight_s: float = 0.0
    """The part of `backward_s` that a split backward may do later."""

    @property
    def compute_s(self) -> float:
        return self.forward_s + self.backward_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a plan is predicted to take."""

    step_s: float
    """From commit point to commit point, by `evaluate`."""
    period_s: float
    """T, seconds per microbatch in steady state."""
    first_microbatch_s: float
    """R_0."""
    closed_form_step_s: float
    """An upper bound of `step_s`; `step_s` itself where there is none, under a schedule without a
    closed form or where transfers share channels."""
    timeline: Timeline
    stages: tuple[StagePrediction, ...]


def stage_times(profile: ModelProfile, crowd: Crowd, plan: PipelinePlan) -> tuple[StageTimes, ...]:
    """Seconds of each stage on its device.

    The last stage's forward, loss and backward are one program, run where the schedule says
    backward: its forward takes 0, its backward both. Recomputation adds the forward to backward.
    A split backward leaves both with the part that computes the input's gradient (so the last
    stage's `B` is forward, loss and that part); the weight part is the sum of its layers', see
    `ModelProfile.weight_seconds`. A shared stage takes as long as its slowest device with that
    one's rows; after the last backward its devices sum gradients in a ring, 2 (g - 1) / g of their
    bytes over the slowest link between them (as Asteroid, arXiv 2408.08015, by two
    re-implementations).

    Raises:
        InvalidPlanError: The plan is for another number of layers or microbatches.
        InvalidCrowdError: A device is not in the crowd.
    """
    _check_plan(profile, plan)
    found = []
    for index, stage in enumerate(plan.stages):
        forward_s = backward_s = update_s = weight_s = 0.0
        for device, share in row_shares(profile, index, stage):
            all_rows = profile.layer_seconds(crowd, device)
            rows = all_rows[stage.first_layer : stage.last_layer + 1]
            weights = profile.weight_seconds(all_rows)[stage.first_layer : stage.last_layer + 1]
            forward_s = max(forward_s, share * math.fsum(row.forward_s for row in rows))
            backward_s = max(backward_s, share * math.fsum(row.backward_s for row in rows))
            weight_s = max(weight_s, share * math.fsum(weights))
            update_s = max(update_s, math.fsum(row.update_s for row in rows))
        weight_s = min(weight_s, backward_s)  # a sum of parts may round above that of the wholes
        if index == len(plan.stages) - 1:
            forward_s, backward_s = 0.0, forward_s + backward_s
        elif stage.recompute:
            backward_s += forward_s
        found.append(
            StageTimes(
                forward_s=forward_s,
                backward_s=backward_s,
                update_s=update_s,
                reduce_s=_ring_s(profile, crowd, index, stage),
                weight_s=weight_s,
            )
        )
    return tuple(found)


def row_shares(profile: ModelProfile, index: int, stage: Stage) -> list[tuple[DeviceId, float]]:
    """Each device of a stage with its part of a microbatch's rows; one device has them all.

    Raises:
        InvalidPlanError: The shares are not the rows of a microbatch.
    """
    if not stage.shares:
        return [(stage.device, 1.0)]
    total = sum(share.rows for share in stage.shares)
    if total != profile.microbatch_size:
        raise InvalidPlanError(
            f"stage {index} ({stage.device}) shares {total} rows,"
            f" a microbatch has {profile.microbatch_size}"
        )
    return [(share.device, share.rows / total) for share in stage.shares]


def _ring_s(profile: ModelProfile, crowd: Crowd, index: int, stage: Stage) -> float:
    devices = stage.devices
    if len(devices) == 1:
        return 0.0
    ring = [
        link_between(crowd, f"stage {index} is shared by {a!r} and {b!r}", a, b)
        for a, b in zip(devices, (*devices[1:], devices[0]), strict=True)
    ]
    count = len(devices)
    size = sum(profile.layers[layer].parameter_bytes for layer in stage.layers)
    slowest = min(link.bandwidth_bytes_per_s for link in ring)
    latency_s = max(link.latency_s for link in ring)
    return 2 * (count - 1) * (size / count / slowest + latency_s)


def cut_times(profile: ModelProfile, crowd: Crowd, plan: PipelinePlan) -> tuple[CutTimes, ...]:
    """Seconds of each cut, one less than stages.

    Raises:
        InvalidPlanError: As `stage_times`; or two neighbours of the plan have no link.
    """
    _check_plan(profile, plan)
    found = []
    for index, (left, right) in enumerate(pairwise(plan.stages)):
        why = f"stages {index} and {index + 1} are neighbours"
        pairs = [(a, b) for a in left.devices for b in right.devices]
        sizes = profile.cut_bytes(right.first_layer, left.wire_dtype)
        found.append(pair_times(crowd, pairs, *sizes, why=why))
    return tuple(found)


def _check_plan(profile: ModelProfile, plan: PipelinePlan) -> None:
    if plan.num_layers != len(profile.layers):
        raise InvalidPlanError(
            f"the plan cuts {plan.num_layers} layers, the profile has {len(profile.layers)}"
        )
    if plan.microbatches != profile.microbatches:
        raise InvalidPlanError(
            f"the plan is for {plan.microbatches} microbatches, the profile for"
            f" {profile.microbatches}; profile the job again or plan for its microbatches"
        )


def period_s(
    compute_s: Sequence[float],
    round_trip_s: Sequence[float],
    depths: Sequence[int],
    link_s: Sequence[float] = (),
    weight_s: Sequence[float] = (),
) -> float:
    """T, the steady seconds per microbatch (see the module).

    Args:
        compute_s: C_s, forward and backward of a microbatch, per stage.
        round_trip_s: Latency and transfer both ways, per cut (one less).
        depths: d_s, microbatches in flight, per stage; never rises downstream.
        link_s: Seconds that a microbatch occupies each cut's busier direction, or each channel.
        weight_s: Of `compute_s`, what a split backward does in ops of their own, per stage.

    Raises:
        InvalidValueError: Lengths differ, or depths rise.
    """
    count = len(compute_s)
    if count == 0 or len(round_trip_s) != count - 1 or len(depths) != count:
        raise InvalidValueError(
            f"{count} stages need {max(count - 1, 0)} round trips and {count} depths,"
            f" got {len(round_trip_s)} and {len(depths)}"
        )
    if any(right > left for left, right in pairwise(depths)):
        raise InvalidValueError(f"depths must not rise downstream, got {tuple(depths)}")
    slowest = max(link_s, default=0.0)
    for first in range(count):
        window_s = 0.0
        for last in range(first, count):
            window_s += compute_s[last] + (round_trip_s[last - 1] if last > first else 0.0)
            if weight_s and last > first:
                window_s -= weight_s[last]
            slowest = max(slowest, window_s / (depths[first] - depths[last] + 1))
    return slowest


def strict_period_s(
    compute_s: Sequence[float], round_trip_s: Sequence[float], link_s: Sequence[float] = ()
) -> float:
    """T of 1F1B: the worst window, its compute and inner round trips over its number of stages."""
    count = len(compute_s)
    return period_s(compute_s, round_trip_s, range(count, 0, -1), link_s)


def first_microbatch_s(stages: Sequence[StageTimes], cuts: Sequence[CutTimes]) -> float:
    """R_0: one microbatch down the whole chain and back."""
    return math.fsum(t.compute_s for t in stages) + math.fsum(cut.round_trip_s for cut in cuts)


def closed_form(
    schedule: str,
    microbatches: int,
    stages: Sequence[StageTimes],
    cuts: Sequence[CutTimes],
    warmups: Sequence[int | None] | None = None,
) -> tuple[float, float]:
    """Step time and period of a built-in schedule, without laying out a timeline.

    Where cuts share channels, T is a lower bound of the steady period (the channels' occupation is
    in it, waiting for each other in an unlucky order is not), and there is no upper bound of the
    step: `step_s` is then an estimate, that of the chain with its own links but no shorter than
    R_0 + (M - 1) T.

    Returns:
        `(step_s, period_s)`: a bound that `evaluate(...).step_s` never exceeds, and T.

    Raises:
        ScheduleError: A schedule without a closed form, or warm-ups that fit none.
    """
    depths = warmup_depths(schedule, len(stages), microbatches, warmups)
    weight_s: list[float] = []
    if schedule == "zb-h1":
        weight_s = [t.weight_s for t in stages]
        delays = weight_delays(len(stages), microbatches, warmups)
        stages = [
            replace(times, reduce_s=times.reduce_s + delay * times.weight_s)
            for times, delay in zip(stages, delays, strict=True)
        ]
        warmups = None
    forward_s = [t.forward_s for t in stages]
    backward_s = [t.backward_s for t in stages]
    down_s = [cut.forward_transfer_s for cut in cuts]
    back_s = [cut.backward_transfer_s for cut in cuts]
    compute_s = [t.compute_s for t in stages]
    round_trip_s = [cut.round_trip_s for cut in cuts]
    chain = (compute_s, round_trip_s, depths, microbatches)
    bound_s = min(
        _step_bound_s(forward_s, backward_s, down_s, back_s, *chain),
        _step_bound_s(backward_s, forward_s, back_s, down_s, *chain),
    )
    if schedule == "gpipe":
        period = max(forward_s + down_s) + max(backward_s + back_s)
    else:
        endless = warmup_depths(schedule, len(stages), sys.maxsize, warmups)  # T is a limit: no cap
        period = period_s(
            compute_s, round_trip_s, endless, [cut.busiest_s for cut in cuts], weight_s
        )
    shared = occupied_s(cuts)
    if shared:
        period = max(period, *shared.values())
        simple_s = first_microbatch_s(stages, cuts) + (microbatches - 1) * period
        bound_s = max(bound_s, simple_s)
    return bound_s + _commit_delay_s(stages, cuts), period


def _step_bound_s(
    there_s: Sequence[float],
    return_s: Sequence[float],
    there_link_s: Sequence[float],
    return_link_s: Sequence[float],
    compute_s: Sequence[float],
    round_trip_s: Sequence[float],
    depths: Sequence[int],
    microbatches: int,
) -> float:
    """R_1 + T_1 + ... + T_(M-1), see the module; "there" is forward, or backward read in reverse.

    Why it holds: call H_m the sum T_1 + ... + T_m. The backward of microbatch m on stage s starts
    no later than R_1 + H_m, less the way from s back to stage 0 and s's own backward; its forward
    no later than m times the slowest forward after the first while s warms up, and then than what
    backwards upstream and the way down allow. Each edge of the event graph keeps that: R_1 is
    chosen for those from warm-up to backward, windows for those from a backward to a later one,
    single ops and transfers for the rest.
    """
    first_s = path_s = slowest_s = 0.0
    for stage, depth in enumerate(depths):
        if stage:
            path_s += round_trip_s[stage - 1]
            slowest_s = max(slowest_s, there_link_s[stage - 1])
        path_s += compute_s[stage]
        slowest_s = max(slowest_s, there_s[stage])
        first_s = max(first_s, path_s + (depth - 1) * slowest_s)
    # From the last microbatch to the first: ever more stages have forwards left to run, and so
    # ever more windows count. A stage with all M in flight at once starts none.
    total_s = first_s
    slowest_s = max(*return_s, *return_link_s, 0.0)
    after = microbatches - 1
    for last in range(len(depths) - 1, -1, -1):
        if depths[last] >= microbatches:
            break
        until = microbatches - depths[last]
        total_s += (after - until) * slowest_s
        after = until
        if last == len(depths) - 1:
            slowest_s = max(slowest_s, *there_s, *there_link_s)
        window_s = 0.0
        for start in range(last, -1, -1):
            if depths[start] >= microbatches:
                break
            window_s += compute_s[start] + (round_trip_s[start] if start < last else 0.0)
            slowest_s = max(slowest_s, window_s / (depths[start] - depths[last] + 1))
    return total_s + after * slowest_s


def _commit_delay_s(stages: Sequence[StageTimes], cuts: Sequence[CutTimes]) -> float:
    """What updates and optimizer scalars add to a step, when the microbatches do not hide them."""
    late_update_s = late_scalars_s = 0.0
    down_s = back_s = 0.0  # by which the first microbatch, the last gradient give a stage time
    for index, times in enumerate(stages):
        late_update_s = max(late_update_s, times.update_s - down_s)
        late_scalars_s = max(late_scalars_s, times.reduce_s - back_s)
        if index < len(cuts):
            down_s += times.forward_s + cuts[index].forward_transfer_s
            back_s += times.backward_s + cuts[index].backward_transfer_s
    return late_update_s + late_scalars_s


def step_time_s(profile: ModelProfile, crowd: Crowd, plan: PipelinePlan) -> float:
    """The closed form of a plan's step time; `evaluate` never gives more in a full-duplex crowd.

    Under another medium it is an estimate, see `closed_form`.

    Raises:
        InvalidPlanError: The plan does not fit the profile or the crowd.
        ScheduleError: The plan's schedule has no closed form.
    """
    stages, cuts = stage_times(profile, crowd, plan), cut_times(profile, crowd, plan)
    warmups = [stage.warmup for stage in plan.stages]
    return closed_form(plan.schedule, plan.microbatches, stages, cuts, warmups)[0]


def predict(
    profile: ModelProfile,
    crowd: Crowd,
    plan: PipelinePlan,
    *,
    builders: Mapping[str, ScheduleBuilder] | None = None,
    compile_peak_bytes: int = COMPILE_PEAK_BYTES,
) -> Prediction:
    """Predicts time and memory of a plan, by `evaluate`. Does not judge whether it fits.

    Args:
        builders: Schedules beyond the built-in ones, by name.
        compile_peak_bytes: See `stage_memory`.

    Raises:
        InvalidPlanError: The plan does not fit the profile or the crowd.
        ScheduleError: The plan's schedule is unknown or cannot run.
    """
    stages, cuts = stage_times(profile, crowd, plan), cut_times(profile, crowd, plan)
    schedule = schedule_for(plan, builders=builders)
    timeline = evaluate(schedule, stages, cuts)
    first_s = first_microbatch_s(stages, cuts)
    if plan.schedule in BUILT_IN and plan.schedule not in (builders or {}):
        warmups = [stage.warmup for stage in plan.stages]
        closed_s, period = closed_form(plan.schedule, plan.microbatches, stages, cuts, warmups)
        if occupied_s(cuts):
            closed_s = timeline.step_s
    else:
        closed_s = timeline.step_s
        period = max(0.0, timeline.commit_s - first_s) / max(1, plan.microbatches - 1)
    predictions = []
    for index, (stage, times) in enumerate(zip(plan.stages, stages, strict=True)):
        in_flight = schedule.max_in_flight(index)
        awaiting_weight = schedule.max_awaiting_weight(index)
        cut = cuts[index] if index < len(cuts) else None
        predictions.append(
            StagePrediction(
                device=stage.device,
                first_layer=stage.first_layer,
                last_layer=stage.last_layer,
                forward_s=times.forward_s,
                backward_s=times.backward_s,
                update_s=times.update_s,
                memory=stage_memory(
                    profile,
                    stage,
                    stage_index=index,
                    num_stages=len(stages),
                    in_flight=in_flight,
                    awaiting_weight=awaiting_weight,
                    compile_peak_bytes=compile_peak_bytes,
                    rows_share=max(share for _, share in row_shares(profile, index, stage)),
                ),
                in_flight=in_flight,
                idle_share=timeline.bubble_share[index],
                cut_forward_s=cut.forward_s if cut else None,
                cut_backward_s=cut.backward_s if cut else None,
                weight_s=times.weight_s,
            )
        )
    return Prediction(
        step_s=timeline.step_s,
        period_s=period,
        first_microbatch_s=first_s,
        closed_form_step_s=closed_s,
        timeline=timeline,
        stages=tuple(predictions),
    )
