"""One call that chooses together: microbatches, schedule, recomputation, casts and cuts.

Each count of microbatches and schedule is a partition problem of its own; a solver answers it,
casts are decided on its plan, and the exact timeline compares the answers: the rows of a step are
the same, so their step times can be compared. It knows no search.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..core import (
    Crowd,
    ModelProfile,
    PipelinePlan,
    Prediction,
    cut_times,
    evaluate_step_s,
    schedule_for,
    stage_times,
)
from ..errors import InfeasibleError, InvalidValueError
from .problem import PartitionProblem, PartitionResult, PartitionSolver, Recompute, WireChoice
from .registry import make_solver, solve
from .units import format_seconds
from .wire import with_wire


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One combination that was tried, and what it would have given."""

    microbatches: int
    schedule: str
    step_s: float | None
    """Of the best plan found for it, casts included; None: no plan fits."""
    plain_step_s: float | None
    """Of the same plan without casts."""
    stages: int
    recomputed: int
    """Stages whose backward recomputes the forward."""
    casts: int
    """Cuts that cast what they send."""
    why_not: str = ""
    """Why no plan fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanChoice:
    """The best combination, and all that were tried. `cm.train(plan=...)` takes it."""

    result: PartitionResult
    choices: tuple[Choice, ...]
    """In the order asked for."""

    @property
    def plan(self) -> PipelinePlan:
        return self.result.plan

    @property
    def predicted(self) -> Prediction:
        return self.result.predicted

    @property
    def microbatches(self) -> int:
        """What the training job must have, too."""
        return self.result.plan.microbatches

    def explain(self) -> str:
        """The plan in words and numbers, then what each combination would have given."""
        lines = [self.result.explain(), "tried:"]
        chosen = (self.plan.microbatches, self.plan.schedule)
        for choice in self.choices:
            mark = "*" if (choice.microbatches, choice.schedule) == chosen else " "
            head = f"  {mark} {choice.microbatches} microbatches, {choice.schedule}: "
            if choice.step_s is None or choice.plain_step_s is None:
                lines.append(head + choice.why_not)
                continue
            tail = f"{format_seconds(choice.step_s)}, {choice.stages} stages"
            if choice.recomputed:
                tail += f", {choice.recomputed} recomputed"
            if choice.casts:
                tail += f", {choice.casts} casts (without {format_seconds(choice.plain_step_s)})"
            lines.append(head + tail)
        return "\n".join(lines)


def plan(
    profile: ModelProfile,
    crowd: Crowd,
    *,
    microbatches: int | Sequence[int] | None = None,
    schedule: str | Sequence[str] = "1f1b",
    recompute: Recompute = "never",
    wire_dtype: WireChoice | None = None,
    solver: str | PartitionSolver = "auto",
    **options: Any,
) -> PlanChoice:
    """Plans a model, and chooses what else it is told to choose.

    Args:
        profile: The model's costs, profiled for some count of microbatches.
        microbatches: Counts to try; None: that of the profile. Others are told from the profile by
            `ModelProfile.with_microbatches`: seconds and activations go with the rows of a
            microbatch, the rows of a step stay.
        schedule: Schedules to try, by name.
        recompute: "auto": the stages recompute where memory asks for it.
        wire_dtype: "bfloat16": every cut casts what it sends; "auto": those that are needed to make
            the step shorter by `WIRE_GAIN`, 2 %. It loses bits.
        solver: A name of `solvers()`, or an object with `solve(problem)`.
        options: Fields of `PartitionProblem` (pins, bans, devices, ...); the others go to the
            solver.

    Returns:
        The plan with the shortest step by `evaluate`, ties to the one asked for first, and what
        every combination would have given.

    Raises:
        InvalidValueError: Counts that do not divide the rows of a step, or nothing to try.
        InfeasibleError: No plan fits, under any combination; says why of each.
        As `solve`.
    """
    counts = _several(profile.microbatches if microbatches is None else microbatches)
    names = _several(schedule)
    for what, given in (("microbatches", counts), ("schedule", names)):
        if not given or len(set(given)) != len(given):
            raise InvalidValueError(f"{what}: give at least one, each once; got {given!r}")
    scaled = {count: profile.with_microbatches(count) for count in counts}  # refused before work
    fields = {item.name for item in dataclasses.fields(PartitionProblem)}
    asked = {name: value for name, value in options.items() if name in fields}
    others = {name: value for name, value in options.items() if name not in fields}
    make_solver(solver, **others)
    problems = [
        PartitionProblem(
            profile=scaled[count],
            crowd=crowd,
            schedule=name,
            recompute=recompute,
            wire_dtype=wire_dtype,
            **asked,
        )
        for count in counts
        for name in names
    ]
    best: PartitionResult | None = None
    choices: list[Choice] = []
    for problem in problems:
        try:
            found = solve(problem, solver=solver, **others)
        except InfeasibleError as exc:
            choices.append(_nothing(problem, exc))
            continue
        choices.append(_choice(problem, found))
        if best is None or found.predicted.step_s < best.predicted.step_s:
            best = found
    if best is None:
        reasons = "".join(
            f"  {c.microbatches:<4} microbatches, {c.schedule}: {c.why_not}\n" for c in choices
        )
        raise InfeasibleError(f"no plan fits under any combination that was asked for\n{reasons}")
    return PlanChoice(result=_told(best, profile), choices=tuple(choices))


def _several(given: Any) -> tuple[Any, ...]:
    return (given,) if isinstance(given, int | str) else tuple(given)


def _nothing(problem: PartitionProblem, why: InfeasibleError) -> Choice:
    return Choice(
        microbatches=problem.microbatches,
        schedule=problem.schedule,
        step_s=None,
        plain_step_s=None,
        stages=0,
        recomputed=0,
        casts=0,
        why_not=why.message.splitlines()[0],
    )


def _choice(problem: PartitionProblem, found: PartitionResult) -> Choice:
    made = found.plan
    casts = sum(stage.wire_dtype is not None for stage in made.stages)
    plain_step_s = found.predicted.step_s
    if casts:
        plain = with_wire(made, frozenset(), "bfloat16")
        plain_step_s = evaluate_step_s(
            schedule_for(plain),
            stage_times(problem.profile, problem.crowd, plain),
            cut_times(problem.profile, problem.crowd, plain),
        )
    return Choice(
        microbatches=made.microbatches,
        schedule=made.schedule,
        step_s=found.predicted.step_s,
        plain_step_s=plain_step_s,
        stages=len(made.stages),
        recomputed=sum(stage.recompute for stage in made.stages),
        casts=casts,
    )


def _told(found: PartitionResult, profile: ModelProfile) -> PartitionResult:
    """The result with what another count of microbatches means for whoever trains it."""
    count = found.plan.microbatches
    if count == profile.microbatches:
        return found
    scaled = (
        f"for a job with microbatches={count}; seconds are those of {profile.microbatches}"
        " microbatches, scaled by rows: profile that job before relying on them"
    )
    notes = [scaled]
    mixing = [layer.name for layer in profile.layers if layer.state_bytes]
    if mixing:
        rows = found.problem.profile.microbatch_size
        notes.append(
            f"layer {mixing[0]!r} takes statistics over the rows of a microbatch, now {rows}:"
            f" training differs from that with {profile.microbatch_size}"
        )
    return dataclasses.replace(found, notes=(*found.notes, *notes))
