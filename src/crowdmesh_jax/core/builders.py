"""Schedules by name: the built-in ones and those that other packages bring.

All built-in schedules have one shape: a stage runs `depth` forwards, then one backward and one
forward in turn, then the backwards that are left. Only the depth differs, and where weight
gradients are computed.

| schedule | depth of stage `s` of `S` (at most `M`) | source |
| --- | --- | --- |
| `gpipe` | `M` | Huang et al., NeurIPS 2019 |
| `1f1b` | `S - s` | PipeDream-flush (Narayanan et al., ICML 2021) |
| `eager` | as told, else `2 (S - s) - 1` | more in flight hides the links |
| `zb-h1` | `S - s`, backward split | ZB-H1 of zero bubble pipelines (Qi et al., ICLR 2024) |

Under `zb-h1` stage `s` computes the weight part of microbatch `m - k` right after the input part of
microbatch `m`, before the next forward; the last `k` weight parts fill the bubble at the end. With
`k = s` each stage has at most `S` microbatches in flight, as the first stage of `1f1b` has. A
stage's warm-up is its limit in flight, `depth + k`: with `S - s` (so `k = 0`) no op of the step
starts later than under `1f1b`, whatever the seconds. A larger `k` starts no backward later either,
but up to `k` weight parts more may be left when the last one has begun, so that a stage that waits
long for its last gradients and has dear weights can be late by these.

A package adds a schedule through the entry point group `crowdmesh_jax.schedules`: a name and a
`ScheduleBuilder`. What it builds is checked each time. Nothing is loaded before it is asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from types import MappingProxyType
from typing import cast

from ..errors import MissingExtraError, ScheduleError
from .plan import PipelinePlan
from .schedule import Op, OpKind, Schedule, check_schedule

ENTRY_POINT_GROUP = "crowdmesh_jax.schedules"

ScheduleBuilder = Callable[[int, int, Sequence[int | None]], Schedule]
"""`(num_stages, microbatches, warmups) -> Schedule`; `warmups` has one entry per stage."""


def warmup_depths(
    name: str, num_stages: int, microbatches: int, warmups: Sequence[int | None] | None = None
) -> tuple[int, ...]:
    """Forwards that each stage runs before its first backward, under a built-in schedule.

    Args:
        name: "gpipe", "1f1b", "eager" or "zb-h1".
        warmups: For "eager" and "zb-h1" only, per stage; None: the rule of the schedule, but never
            more than the stage before has, which would deadlock.

    Returns:
        One depth per stage, at most `microbatches`. It is the most microbatches in flight, except
        under "zb-h1", see `weight_delays`.

    Raises:
        ScheduleError: Bad sizes; a warm-up under another schedule, below 1, or deeper than that
            of the stage before (which would wait for each other for ever).
    """
    given = _sizes(name, num_stages, microbatches, warmups)
    if name not in BUILT_IN:
        raise ScheduleError(
            f"no depths are known of schedule {name!r}; only of {', '.join(BUILT_IN)}"
        )
    if name == "zb-h1":
        weight_delays(num_stages, microbatches, warmups)  # raises where a limit is too low
        name, given = "1f1b", (None,) * num_stages
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


def weight_delays(
    num_stages: int, microbatches: int, warmups: Sequence[int | None] | None = None
) -> tuple[int, ...]:
    """Under "zb-h1", by how many microbatches each stage's weight parts lag behind.

    Args:
        warmups: Per stage, the most microbatches in flight; None: as many as stages.

    Raises:
        ScheduleError: Bad sizes, or a limit below the depth of 1F1B.
    """
    given = _sizes("zb-h1", num_stages, microbatches, warmups)
    delays = []
    for stage, limit in enumerate(given):
        depth = num_stages - stage
        if limit is not None and limit < min(depth, microbatches):
            raise ScheduleError(
                f"schedule 'zb-h1', stage {stage}: at most {limit} in flight are asked for, it"
                f" needs {min(depth, microbatches)}; give it at least as many, or leave warmup out"
            )
        lag = stage if limit is None else limit - depth
        delays.append(max(0, min(lag, microbatches - 1)))
    return tuple(delays)


def _zero_bubble(num_stages: int, microbatches: int, warmups: Sequence[int | None]) -> Schedule:
    depths = warmup_depths("1f1b", num_stages, microbatches)
    found = []
    for depth, delay in zip(depths, weight_delays(num_stages, microbatches, warmups), strict=True):
        ops = [Op(OpKind.FORWARD, microbatch) for microbatch in range(depth)]
        for microbatch in range(microbatches):
            ops.append(Op(OpKind.BACKWARD, microbatch))
            if microbatch >= delay:
                ops.append(Op(OpKind.WEIGHT, microbatch - delay))
            if microbatch + depth < microbatches:
                ops.append(Op(OpKind.FORWARD, microbatch + depth))
        ops += [Op(OpKind.WEIGHT, m) for m in range(microbatches - delay, microbatches)]
        found.append(tuple(ops))
    return Schedule(name="zb-h1", ops=tuple(found))


_DESCRIBED: Mapping[str, tuple[ScheduleBuilder, str]] = MappingProxyType(
    {
        "gpipe": (_builder("gpipe"), "all forwards, then all backwards; keeps all microbatches"),
        "1f1b": (_builder("1f1b"), "one forward, one backward in turn, as few in flight as can be"),
        "eager": (_builder("eager"), "1f1b with more in flight, which hides links"),
        "zb-h1": (_zero_bubble, "1f1b with split backward, which fills bubbles; not run yet"),
    }
)

BUILT_IN: Mapping[str, ScheduleBuilder] = MappingProxyType(
    {name: builder for name, (builder, _) in _DESCRIBED.items()}
)

_SEARCHED = ("gpipe", "1f1b", "eager")


def schedules() -> Mapping[str, str]:
    """Name -> one line on it, built-in schedules first, then those of other packages."""
    found = {name: description for name, (_, description) in _DESCRIBED.items()}
    for name, point in sorted(_entry_points().items()):
        if name not in found:
            found[name] = f"from {_distribution(point)} ({point.value})"
    return MappingProxyType(found)


def search_schedule(name: str) -> str:
    """The schedule whose closed form and depths stand for `name` while solvers search.

    That is 1F1B for schedules that have no closed form of their own in solvers; plans are then
    ranked, and their memory checked, by the schedule itself.

    Raises:
        ScheduleError: No schedule of that name.
    """
    if name in _SEARCHED:
        return name
    builder_of(name)
    return "1f1b"


def builder_of(name: str) -> ScheduleBuilder:
    """The builder of a built-in schedule, or of one that an installed package brings.

    Raises:
        ScheduleError: No schedule of that name; names those known.
        MissingExtraError: The package that brings it cannot be imported.
    """
    return BUILT_IN[name] if name in BUILT_IN else _loaded(name)


@functools.cache  # solvers make schedules by the thousand; an exception is not kept
def _loaded(name: str) -> ScheduleBuilder:
    point = _entry_points().get(name)
    if point is None:
        raise ScheduleError(f"unknown schedule {name!r}; known: {', '.join(sorted(schedules()))}")
    try:
        builder = point.load()
    except (ImportError, AttributeError) as exc:
        raise MissingExtraError(
            f"schedule {name!r} of {_distribution(point)} cannot be imported: {exc}\n"
            f"  try      pip install {_distribution(point)} with its extras"
        ) from exc
    if not callable(builder):
        raise ScheduleError(
            f"schedule {name!r} of {_distribution(point)} is no builder: {point.value} cannot be"
            " called with (num_stages, microbatches, warmups)"
        )
    return cast(ScheduleBuilder, builder)


def _entry_points() -> dict[str, metadata.EntryPoint]:
    return {point.name: point for point in metadata.entry_points(group=ENTRY_POINT_GROUP)}


def _distribution(point: metadata.EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.module


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
        warmups: Per stage, the most microbatches in flight under "eager" and "zb-h1"; None: the
            schedule's own rule.
        builders: Further schedules by name, before those of installed packages. What either builds
            is checked, the built-in ones are right by construction.

    Raises:
        ScheduleError: No schedule of that name (names those known), or sizes that fit none.
        MissingExtraError: The package that brings it cannot be imported.

    Example:
        >>> for ops in make_schedule("1f1b", 2, 3).ops:
        ...     print(*ops)
        F0 F1 B0 F2 B1 B2
        F0 B0 F1 B1 F2 B2
    """
    given = _sizes(name, num_stages, microbatches, warmups)
    if builders is not None and name in builders:
        builder = builders[name]
    elif name in BUILT_IN:
        return BUILT_IN[name](num_stages, microbatches, given)
    else:
        try:
            builder = _loaded(name)
        except ScheduleError:
            if not builders:
                raise
            known = ", ".join(sorted({*schedules(), *builders}))
            raise ScheduleError(f"unknown schedule {name!r}; known: {known}") from None
    schedule = builder(num_stages, microbatches, given)
    if not isinstance(schedule, Schedule):
        raise ScheduleError(
            f"schedule {name!r}: its builder gave a {type(schedule).__name__}, not a Schedule"
        )
    if (schedule.num_stages, schedule.num_microbatches) != (num_stages, microbatches):
        raise ScheduleError(
            f"schedule {name!r} built {schedule.num_stages} stages x"
            f" {schedule.num_microbatches} microbatches, asked for"
            f" {num_stages} x {microbatches}"
        )
    check_schedule(schedule)
    return schedule


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
