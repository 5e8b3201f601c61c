"""Pipeline schedules as small op lists: in which order each stage runs its forwards and backwards.

A schedule knows stages, microbatches and order. It knows no seconds (`timeline` does) and no
programs; `builders` makes schedules by name. What follows a stage's last op is the same under every
schedule and so stands in no list: scalars ride up, stage 0 commits, `Commit` travels down, each
stage applies its update.

A backward may be split in two. On a stage whose list has `W` ops, `B m` computes the gradient of
the stage's input alone, which upstream stages wait for, and `W m` those of its weights, which
nobody waits for but the commit. A stage without `W` ops does both in `B m`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from ..errors import ScheduleError


class OpKind(enum.Enum):
    """What a stage does with one microbatch."""

    FORWARD = "F"
    BACKWARD = "B"
    WEIGHT = "W"
    """The weight gradients, where the backward is split."""


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

    def is_split(self, stage: int) -> bool:
        """Whether `stage` computes weight gradients in ops of their own."""
        ops = self.ops[stage]  # a stage that has weight parts ends with one
        return bool(ops) and ops[-1].kind is OpKind.WEIGHT

    def max_in_flight(self, stage: int) -> int:
        """The most microbatches at once that `stage` has forwarded and is not yet done with.

        It is done with one after the backward; where that is split, after the weight part.
        """
        done = OpKind.WEIGHT if self.is_split(stage) else OpKind.BACKWARD
        return self._most(stage, OpKind.FORWARD, done)

    def max_awaiting_weight(self, stage: int) -> int:
        """The most microbatches at once that wait on `stage` for the second half of a backward.

        0 where the backward is not split.
        """
        return self._most(stage, OpKind.BACKWARD, OpKind.WEIGHT) if self.is_split(stage) else 0

    def _most(self, stage: int, begin: OpKind, end: OpKind) -> int:
        now = most = 0
        for op in self.ops[stage]:
            now += (op.kind is begin) - (op.kind is end)
            most = max(most, now)
        return most


def check_schedule(schedule: Schedule) -> None:
    """Replays a schedule op by op, without times, and refuses what could not run.

    Each stage must run each microbatch forward once and backward once, and its weight part once if
    it has any; backwards and weight parts in the order of the microbatches (gradients are summed in
    that order, whatever the schedule), a weight part after its backward; and no stage may wait for
    ever.

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
                elif op.kind is OpKind.BACKWARD:
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
    due = dict.fromkeys(_AFTER, 0)
    for op in ops:
        if not 0 <= op.microbatch < microbatches:
            raise ScheduleError(f"{where}: {op} is outside microbatches 0..{microbatches - 1}")
        if op in seen:
            raise ScheduleError(f"{where}: {op} stands twice")
        seen.add(op)
        if op.kind is OpKind.FORWARD:
            continue
        before, its = _AFTER[op.kind]
        if Op(before, op.microbatch) not in seen:
            raise ScheduleError(f"{where}: {op} stands before its {its}")
        if op.microbatch != due[op.kind]:
            raise ScheduleError(
                f"{where}: {op} stands where {op.kind.value}{due[op.kind]} is due;"
                " gradients are summed in microbatch order"
            )
        due[op.kind] += 1
    kinds = [kind for kind in OpKind if kind is not OpKind.WEIGHT or due[OpKind.WEIGHT]]
    for microbatch in range(microbatches):
        for kind in kinds:
            if Op(kind, microbatch) not in seen:
                raise ScheduleError(f"{where}: {Op(kind, microbatch)} is missing")


_AFTER = {
    OpKind.BACKWARD: (OpKind.FORWARD, "forward"),
    OpKind.WEIGHT: (OpKind.BACKWARD, "backward"),
}
"""What must stand before an op of each kind, and what it is called there."""


def check_runnable(schedule: Schedule) -> None:
    """Refuses a schedule that can be planned, but that agents of this release do not run.

    They run whole backwards, and forwards in the order of the microbatches (statistics are taken
    over in that order).

    Raises:
        ScheduleError: Names the stage and the op.
    """
    for stage, ops in enumerate(schedule.ops):
        where = f"schedule {schedule.name!r}, stage {stage}"
        next_forward = 0
        for op in ops:
            if op.kind is OpKind.WEIGHT:
                raise ScheduleError(
                    f"{where} splits the backward ({op}): this release predicts such schedules and"
                    " does not run them; plan with schedule='1f1b' or 'eager'"
                )
            if op.kind is OpKind.FORWARD:
                if op.microbatch != next_forward:
                    raise ScheduleError(
                        f"{where}: {op} stands where F{next_forward} is due; agents run forwards in"
                        " the order of the microbatches"
                    )
                next_forward += 1
