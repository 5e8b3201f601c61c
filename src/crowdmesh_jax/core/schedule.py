"""Pipeline schedules as small op lists: in which order each stage runs its forwards and backwards.

A schedule knows stages, microbatches and order. It knows no seconds (`timeline` does) and no
programs. What follows a stage's last op is the same under every schedule and so stands in no list:
scalars ride up, stage 0 commits, `Commit` travels down, each stage applies its update.

All built-in schedules have one shape: a stage runs `depth` forwards, then one backward and one
forward in turn, then the backwards that are left. Only the depth differs.

| schedule | depth of stage `s` of `S` (at most `M`) | source |
| --- | --- | --- |
| `gpipe` | `M` | Huang et al., NeurIPS 2019 |
| `1f1b` | `S - s` | PipeDream-flush (Narayanan et al., ICML 2021) |
| `eager` | as told, else `2 (S - s) - 1` | more in flight hides the links |
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from ..errors import ScheduleError
from .plan import PipelinePlan


class OpKind(enum.Enum):
    """What a stage does with one microbatch."""

    FORWARD = "F"
    BACKWARD = "B"


@dataclass(frozen=True, slots=True)
class Op:
    """One program call of one stage: `F3` or `B0`."""

    kind: OpKind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind.value}{self.microbatch}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Per stage, its ops of one step in the order they run. `check_schedule` judges it."""

    name: str
    ops: tuple[tuple[Op, ...], ...]

    @property
    def num_stages(self) -> int:
        return len(self.ops)

    @property
    def num_microbatches(self) -> int:
        return sum(op.kind is OpKind.FORWARD for op in self.ops[0]) if self.ops else 0

    def max_in_flight(self, stage: int) -> int:
        """The most microbatches that `stage` has forwarded and not yet taken backward at once."""
        now = most = 0
        for op in self.ops[stage]:
            now += 1 if op.kind is OpKind.FORWARD else -1
            most = max(most, now)
        return most


ScheduleBuilder = Callable[[int, int, Sequence[int | None]], Schedule]
"""`(num_stages, microbatches, warmups) -> Schedule`; `warmups` has one entry per stage."""


def warmup_depths(
    name: str, num_stages: int, microbatches: int, warmups: Sequence[int | None] | None = None
) -> tuple[int, ...]:
    """Forwards that each stage runs before its first backward, under a built-in schedule.

    Args:
        name: "gpipe", "1f1b" or "eager".
        warmups: For "eager" only, per stage; None: the rule of the schedule, but never more than
            the stage before has, which would deadlock.

    Returns:
        One depth per stage, at most `microbatches`. It is the most microbatches in flight.

    Raises:
        ScheduleError: Bad sizes; a warm-up under another schedule, below 1, or deeper than that
            of the stage before (which would wait for each other for ever).
    """
    given = _sizes(name, num_stages, microbatches, warmups)
    if name not in ("gpipe", "1f1b", "eager"):
        raise ScheduleError(f"unknown schedule {name!r}; known: 1f1b, eager, gpipe")
    if name != "eager":
        for stage, depth in enumerate(given):
            if depth is not None:
                raise ScheduleError(
                    f"schedule {name!r} takes no warm-ups, but stage {stage} asks for {depth};"
                    " use schedule 'eager' or leave warmup out"
                )
        if name == "gpipe":
            return (microbatches,) * num_stages
        return tuple(min(num_stages - stage, microbatches) for stage in range(num_stages))
    depths: list[int] = []
    for stage, depth in enumerate(given):
        before = depths[-1] if depths else microbatches
        if depth is None:
            depth = min(2 * (num_stages - stage) - 1, before)
        elif depth < 1:
            raise ScheduleError(f"stage {stage}: warm-up must be >= 1, got {depth}")
        elif min(depth, microbatches) > before:
            raise ScheduleError(
                f"stage {stage} would wait for {depth} forwards before its first backward, but"
                f" stage {stage - 1} sends only {before}: deadlock; give stage {stage} at most"
                f" {before}"
            )
        depths.append(min(depth, microbatches))
    return tuple(depths)


def _sizes(
    name: str, num_stages: int, microbatches: int, warmups: Sequence[int | None] | None
) -> Sequence[int | None]:
    if num_stages < 1:
        raise ScheduleError(f"schedule {name!r}: num_stages must be >= 1, got {num_stages}")
    if microbatches < 1:
        raise ScheduleError(f"schedule {name!r}: microbatches must be >= 1, got {microbatches}")
    if warmups is None:
        return (None,) * num_stages
    if len(warmups) != num_stages:
        raise ScheduleError(
            f"schedule {name!r}: {len(warmups)} warm-ups for {num_stages} stages; give one each"
        )
    return warmups


def _stage_ops(depth: int, microbatches: int) -> tuple[Op, ...]:
    ops = [Op(OpKind.FORWARD, microbatch) for microbatch in range(depth)]
    for microbatch in range(microbatches):
        ops.append(Op(OpKind.BACKWARD, microbatch))
        if microbatch + depth < microbatches:
            ops.append(Op(OpKind.FORWARD, microbatch + depth))
    return tuple(ops)


def _builder(name: str) -> ScheduleBuilder:
    def build(num_stages: int, microbatches: int, warmups: Sequence[int | None]) -> Schedule:
        depths = warmup_depths(name, num_stages, microbatches, warmups)
        return Schedule(name=name, ops=tuple(_stage_ops(depth, microbatches) for depth in depths))

    return build


BUILT_IN: Mapping[str, ScheduleBuilder] = MappingProxyType(
    {name: _builder(name) for name in ("gpipe", "1f1b", "eager")}
)


def make_schedule(
    name: str,
    num_stages: int,
    microbatches: int,
    warmups: Sequence[int | None] | None = None,
    *,
    builders: Mapping[str, ScheduleBuilder] | None = None,
) -> Schedule:
    """Builds a schedule by name.

    Args:
        warmups: Per stage, the most microbatches in flight under "eager"; None: its own rule.
        builders: Further schedules by name. What they build is checked, the built-in ones are
            right by construction.

    Raises:
        ScheduleError: No schedule of that name (names those known), or sizes that fit none.

    Example:
        >>> for ops in make_schedule("1f1b", 2, 3).ops:
        ...     print(*ops)
        F0 F1 B0 F2 B1 B2
        F0 B0 F1 B1 F2 B2
    """
    given = _sizes(name, num_stages, microbatches, warmups)
    if builders is not None and name in builders:
        schedule = builders[name](num_stages, microbatches, given)
        if (schedule.num_stages, schedule.num_microbatches) != (num_stages, microbatches):
            raise ScheduleError(
                f"schedule {name!r} built {schedule.num_stages} stages x"
                f" {schedule.num_microbatches} microbatches, asked for"
                f" {num_stages} x {microbatches}"
            )
        check_schedule(schedule)
        return schedule
    if name not in BUILT_IN:
        known = ", ".join(sorted({*BUILT_IN, *(builders or {})}))
        raise ScheduleError(f"unknown schedule {name!r}; known: {known}")
    return BUILT_IN[name](num_stages, microbatches, given)


def schedule_for(
    plan: PipelinePlan, *, builders: Mapping[str, ScheduleBuilder] | None = None
) -> Schedule:
    """The schedule that a plan names, with the warm-ups of its stages.

    Raises:
        ScheduleError: As `make_schedule`.
    """
    return make_schedule(
        plan.schedule,
        len(plan.stages),
        plan.microbatches,
        tuple(stage.warmup for stage in plan.stages),
        builders=builders,
    )


def check_schedule(schedule: Schedule) -> None:
    """Replays a schedule op by op, without times, and refuses what could not run.

    Each stage must run each microbatch forward once and backward once, backwards in the order of
    the microbatches (gradients are summed in that order, whatever the schedule), and no stage may
    wait for ever.

    Raises:
        ScheduleError: Names the stage and the op.
    """
    name, stages = schedule.name, schedule.num_stages
    if stages == 0:
        raise ScheduleError(f"schedule {name!r} has no stages")
    microbatches = schedule.num_microbatches
    if microbatches == 0:
        raise ScheduleError(f"schedule {name!r} has no forward on stage 0")
    for stage, ops in enumerate(schedule.ops):
        _check_stage(name, stage, ops, microbatches)
    position = [0] * stages
    forwarded = [-1] * microbatches  # per microbatch, the last stage that ran it forward
    returned = [stages] * microbatches  # and the last that ran it backward
    progress = True
    while progress:
        progress = False
        for stage, ops in enumerate(schedule.ops):
            while position[stage] < len(ops):
                op = ops[position[stage]]
                if op.kind is OpKind.FORWARD:
                    if forwarded[op.microbatch] != stage - 1:
                        break
                    forwarded[op.microbatch] = stage
                else:
                    if returned[op.microbatch] != stage + 1 or forwarded[op.microbatch] < stage:
                        break
                    returned[op.microbatch] = stage
                position[stage] += 1
                progress = True
    for stage, ops in enumerate(schedule.ops):
        if position[stage] < len(ops):
            waiting = ", ".join(
                f"stage {s} at {schedule.ops[s][position[s]]}"
                for s in range(stages)
                if position[s] < len(schedule.ops[s])
            )
            raise ScheduleError(f"schedule {name!r} deadlocks: {waiting} wait for each other")


def _check_stage(name: str, stage: int, ops: tuple[Op, ...], microbatches: int) -> None:
    where = f"schedule {name!r}, stage {stage}"
    seen: set[Op] = set()
    next_backward = 0
    for op in ops:
        if not 0 <= op.microbatch < microbatches:
            raise ScheduleError(f"{where}: {op} is outside microbatches 0..{microbatches - 1}")
        if op in seen:
            raise ScheduleError(f"{where}: {op} stands twice")
        seen.add(op)
        if op.kind is OpKind.BACKWARD:
            if Op(OpKind.FORWARD, op.microbatch) not in seen:
                raise ScheduleError(f"{where}: {op} stands before its forward")
            if op.microbatch != next_backward:
                raise ScheduleError(
                    f"{where}: {op} stands where B{next_backward} is due;"
                    " gradients are summed in microbatch order"
                )
            next_backward += 1
    for microbatch in range(microbatches):
        for kind in OpKind:
            if Op(kind, microbatch) not in seen:
                raise ScheduleError(f"{where}: {Op(kind, microbatch)} is missing")
