"""`train`: from a job, a crowd and data to a trained model, over real agents.

Puts together what other rooms know: programs are exported here (the planner's side), placed by a
plan, installed by the coordinator and run by agents. Decides nothing about the protocol.
"""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..core import (
    Crowd,
    ModelProfile,
    PipelinePlan,
    check_runnable,
    make_schedule,
    predict,
    schedule_for,
)
from ..data import DataSource, checked_batch, known_targets
from ..errors import InvalidCrowdError, InvalidPlanError, JobError, ScheduleError
from ..export import build_bundles, initial_arrays
from ..model import TrainingJob
from ..propagation.budget import move_s
from ..record import RunFolder
from .callbacks import Callback, Control
from .crew import Crew, TransportName
from .evaluation import best_rule, evaluated_names, prepare_evaluation
from .placing import Placer, known_hazards, room_bytes
from .policy import Planned, Planner
from .recovery import Recovery
from .result import OnEvent, PhaseEvent, RunEvent, TrainResult
from .resume import Resumed, read_resumed
from .session import Session

if TYPE_CHECKING:
    from ..solvers import PartitionResult

logger = logging.getLogger(__name__)


def train(
    job: TrainingJob,
    crowd: Crowd | Crew,
    data: DataSource,
    *,
    steps: int,
    plan: PipelinePlan | PartitionResult | Literal["auto"] = "auto",
    solver: Any = "ilp",
    schedule: str = "1f1b",
    transport: TransportName = "grpc",
    runs_dir: str | Path = "runs",
    name: str | None = None,
    checkpoint_every: int | None = None,
    evaluate: Any = None,
    keep_best: Any = None,
    callbacks: Sequence[Callback] = (),
    resume: str | Path | None = None,
    recovery: Recovery | bool = False,
    measure: bool = True,
    on_event: OnEvent | None = None,
    notes: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Trains a model over the devices of a crowd.

    Args:
        crowd: A crowd, whose agents are launched for this run, or a `Crew` from `launch`; one that
            is not started yet is started here, and stays the caller's to close.
        data: `batch(step)` gives the step's inputs and targets, `job.batch_size` rows each.
        steps: Updates to make in all; with `resume`, those made before count.
        plan: Who runs which layers; "auto" profiles the job and asks `solver`. What `solve`
            returned may stand here too: the run's record then holds what it predicted.
        solver: For `plan="auto"`: a name or an object, see `partition`.
        schedule: For `plan="auto"`: "gpipe", "1f1b", "eager", or one that an installed package
            brings, if its ops are whole forwards and backwards.
        transport: "grpc": one process per device; "memory": all in this process.
        runs_dir: Where the run's folder is made; `name` its name there.
        checkpoint_every: Steps between checkpoints; the last version is always kept.
        evaluate: An evaluation set: an `ArraySource`, a pair of arrays, or `Evaluation(source,
            every=50)`. The devices evaluate it between two steps, on their own parameters;
            training is bit-equal with and without.
        keep_best: "loss", "accuracy" or (metric, "min" or "max"): the state of the best evaluation
            stays in the run's folder `best/`, beside `checkpoint/`.
        callbacks: Called in this thread with (event, `Control`): they may stop the run, ask for a
            checkpoint or say that a device will leave, see `crowdmesh_jax.callbacks`. What one
            raises ends the run.
        resume: A run's folder: goes on from its newest checkpoint, in the same folder. The crowd
            and the plan may be others; with plan="auto" its own plan is used if the crowd has its
            devices.
        recovery: Go on when devices are lost: copies of each stage's state are kept on other
            devices, and another takes the stage over. True: the default terms of `Recovery`.
            False: a loss ends the run.
        measure: Time each stage alone before the run, to predict the step.
        on_event: Called in this thread with what happens (see `RunEvent`).
        notes: JSON-able, written into the run's `config.toml`.

    Returns:
        Losses, the trained trees, and where the run's folder is.

    Raises:
        InputError: Job, plan, crowd or data do not fit together; nothing was started.
        InfeasibleError: (`plan="auto"`) no assignment fits.
        RecordError: (`resume`) no checkpoint, or a damaged one, of a newer format or another job.
        AgentLostError: A device died; its name, what it held, how far the run is.
        NonFiniteLossError: The loss is not finite; parameters from before it are kept.
        InterruptedRunError: Ctrl-C; the last committed version is kept.
    """
    if not isinstance(steps, int) or steps < 1:
        raise JobError(f"steps must be an integer >= 1, got {steps!r}")
    # What costs nothing to check comes before what takes seconds.
    RunFolder.check_name(runs_dir, name)
    if isinstance(plan, str):
        _check_solving(plan, solver, schedule)
    example = checked_batch(data, 0, job.batch_size)
    inputs_spec, targets_spec = job.microbatch_specs(example)
    job.check(inputs_spec, targets_spec)
    job.check_targets(inputs_spec, *known_targets(data, example))
    evaluation = prepare_evaluation(evaluate, job, inputs_spec, targets_spec)
    if evaluation is not None:
        held_out = evaluation.source
        known, where = known_targets(held_out, held_out.batch(0))
        job.check_targets(inputs_spec, known, f"evaluation {where}")
    rule = best_rule(keep_best, job)
    if rule is not None and evaluation is None:
        raise JobError("keep_best needs an evaluation: give evaluate=")
    if resume is not None and name is not None:
        raise JobError(f"resume goes on in its own folder: leave out name={name!r}")
    control = Control(evaluated_names(job) if evaluation is not None else ())
    tell = _teller(on_event, callbacks, control)
    with ExitStack() as stack:
        arrays = initial_arrays(job, inputs_spec)
        resumed, folder, events = None, None, None
        if resume is not None:
            folder = RunFolder.open(resume)
            events = stack.enter_context(folder.events())
            take_up = bool(recovery) and isinstance(crowd, Crew) and crowd.is_joined
            resumed = read_resumed(
                folder, events, job, arrays, steps=steps, rule=rule, take_up=take_up
            )
            arrays = resumed.arrays
        taken_up = resumed.unfinished if resumed is not None else None
        if isinstance(crowd, Crew):
            crew = crowd
            given = plan if isinstance(plan, str | PipelinePlan) else getattr(plan, "plan", plan)
            crew.check_alive(given.devices if isinstance(given, PipelinePlan) else None)
            if crew.is_joined and taken_up is None:
                crew.await_hellos()
            is_own = not (crew.is_started or crew.is_joined)
        else:
            crew = Crew(crowd, transport=transport)
            stack.callback(crew.close)
            is_own = True
        terms = (Recovery() if recovery else None) if isinstance(recovery, bool) else recovery
        hazards = known_hazards(crew.crowd, terms.groups) if terms is not None else {}
        prediction = None
        if taken_up is not None:
            plan = taken_up.plan
        own = _own_plan(resumed, job, crew.crowd) if plan == "auto" else None
        if own is not None:
            plan = own
        elif not isinstance(plan, str | PipelinePlan):
            prediction = getattr(plan, "predicted", None)
            plan = getattr(plan, "plan", plan)
        elif isinstance(plan, str):
            # Imported here: a run with a plan of its own needs no solver.
            from ..profiling import profile
            from ..solvers import partition

            tell(PhaseEvent(phase="plan"))
            profiled = profile(job, crew.crowd, example, calibrate=True)
            plan = partition(profiled, crew.crowd, solver=solver, schedule=schedule)
            prediction = predict(profiled, crew.crowd, plan)
        if not isinstance(plan, PipelinePlan):
            raise JobError(f"plan must be a PipelinePlan, what solve returned, or 'auto': {plan!r}")
        _check_plan(plan, job, crew.crowd)
        tell(PhaseEvent(phase="export", detail=f"{len(plan.stages)} stages"))
        is_new = folder is None
        if folder is None or events is None:
            folder = RunFolder.create(runs_dir, name)
            events = stack.enter_context(folder.events())
        try:
            if is_own:
                crew.log_dir = crew.log_dir or folder.path / "logs"
                crew.spawn()  # they import JAX while this process exports
            bundles = build_bundles(job, plan, inputs_spec, targets_spec)
            known = [(plan, bundles)]
            if taken_up is not None and taken_up.plan_now != plan:
                now = taken_up.plan_now
                known.append((now, build_bundles(job, now, inputs_spec, targets_spec)))
        except BaseException:
            if is_new:  # no run has been
                shutil.rmtree(folder.path, ignore_errors=True)
            raise
        if is_own:
            tell(PhaseEvent(phase="launch", detail=crew.emulation.describe()))
            crew.await_hellos()
        session = Session(
            job=job,
            crew=crew,
            data=data,
            evaluation=evaluation,
            rule=rule,
            resumed=resumed,
            plan=plan,
            known=known,
            folder=folder,
            steps=steps,
            tell=tell,
            control=control,
            prediction=prediction,
            notes=notes,
            recovery=terms,
            hazards=hazards,
            placer=_placer(terms, job, crew, example),
            planner=_planner(job, crew, example, (inputs_spec, targets_spec), solver, schedule),
        )
        return session.run(
            arrays, inputs_spec, events, checkpoint_every=checkpoint_every, measure=measure
        )


def _placer(terms: Recovery | None, job: TrainingJob, crew: Crew, example: Any) -> Placer | None:
    """Asks a replication policy where copies go, if the terms name one."""
    if terms is None or terms.policy is None:
        return None
    from ..propagation import make_replication_policy

    @functools.cache
    def profiled() -> ModelProfile:
        from ..profiling import profile

        return profile(job, crew.crowd, example)

    return Placer(
        make_replication_policy(terms.policy),
        crew.crowd,
        profiled,
        copies=terms.copies,
        crash_per_s=terms.crash_per_s,
        detect_s=terms.silence_s,
        watch=terms.watch,
        range_m=terms.range_m,
        groups=terms.groups,
        room_bytes=lambda: room_bytes(crew.hellos),
    )


def _planner(
    job: TrainingJob,
    crew: Crew,
    example: Any,
    specs: tuple[Any, Any],
    solver: Any,
    schedule: str,
) -> Planner:
    """Plans for the devices that are left, as for the run's first plan."""

    def plan_for(devices: Sequence[str], standing: PipelinePlan) -> Planned:
        from ..profiling import profile
        from ..solvers import partition

        left = crew.crowd.only(devices)
        profiled = profile(job, crew.crowd, example)
        plan = partition(profiled, left, solver=solver, schedule=schedule)
        return Planned(
            plan=plan,
            bundles=build_bundles(job, plan, *specs),
            step_s=predict(profiled, crew.crowd, plan).step_s,
            standing_step_s=predict(profiled, crew.crowd, standing).step_s,
            move_s=move_s(profiled, crew.crowd, standing, plan),
        )

    return plan_for


def _teller(
    on_event: OnEvent | None, callbacks: Sequence[Callback], control: Control
) -> Callable[[RunEvent], None]:
    callbacks = tuple(callbacks)

    def tell(event: RunEvent) -> None:
        if on_event is not None:
            on_event(event)
        for callback in callbacks:
            callback(event, control)

    return tell


def _check_solving(plan: str, solver: Any, schedule: str) -> None:
    if plan != "auto":
        raise JobError(f"plan must be a PipelinePlan or 'auto', got {plan!r}")
    from ..solvers import make_solver

    make_solver(solver)
    check_runnable(make_schedule(schedule, 2, 4))


def _own_plan(resumed: Resumed | None, job: TrainingJob, crowd: Crowd) -> PipelinePlan | None:
    """A resumed run's own plan, if it can run on this crowd."""
    if resumed is None or resumed.plan is None:
        return None
    try:
        _check_plan(resumed.plan, job, crowd)
    except (InvalidPlanError, InvalidCrowdError, ScheduleError) as exc:
        logger.warning(
            "planning anew, since the plan that the run had does not fit this crowd: %s",
            exc.message,
        )
        return None
    return resumed.plan


def _check_plan(plan: PipelinePlan, job: TrainingJob, crowd: Crowd) -> None:
    if plan.num_layers != len(job.model.layers):
        raise InvalidPlanError(
            f"the plan cuts {plan.num_layers} layers, the model has {len(job.model.layers)}"
        )
    if plan.microbatches != job.microbatches:
        raise InvalidPlanError(
            f"the plan has {plan.microbatches} microbatches, the job {job.microbatches}"
        )
    for index, stage in enumerate(plan.stages):
        if stage.shares:
            raise InvalidPlanError(
                f"stage {index} is shared by {', '.join(stage.devices)}: this release predicts"
                " shared stages and does not run them; solve with share=False"
            )
    check_runnable(schedule_for(plan))
    for device in plan.devices:
        crowd.device(device)
    for upper, lower in zip(plan.devices, plan.devices[1:], strict=False):
        if crowd.link(upper, lower) is None or crowd.link(lower, upper) is None:
            raise InvalidPlanError(f"the plan joins {upper!r} and {lower!r}, which have no link")
