"""`train`: from a job, a crowd and data to a trained model, over real agents.

Puts together what other rooms know: programs are exported here (the planner's side), placed by a
plan, installed by the coordinator and run by agents. Decides nothing about the protocol.
"""

from __future__ import annotations

import json
import logging
import queue
import secrets
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..core import Crowd, PipelinePlan, Prediction, Timeline, predict, schedule_for
from ..data import DataSource, ShippableSource, checked_batch, known_targets
from ..errors import InvalidCrowdError, InvalidPlanError, JobError
from ..export import assemble, build_bundles, initial_arrays
from ..model import TrainingJob
from ..programs import StageBundle, bundle_to_arrays
from ..protocol import coordinator_events as ev
from ..protocol.common import BestRule, NonFinitePolicy, Tie
from ..record import Journal, RunFolder
from .callbacks import Callback, Control
from .crew import Crew, TransportName
from .evaluation import EvaluationSet, best_rule, evaluated_names, prepare_evaluation
from .memory import MemoryReport, memory_table
from .predict import predict_run
from .result import (
    BestEvent,
    CheckpointEvent,
    EvaluationEvent,
    MeasuredEvent,
    OnEvent,
    PhaseEvent,
    RunEvent,
    StepEvent,
    TrainResult,
)
from .resume import Resumed, job_meta, read_resumed, rewind_metrics
from .run import Outcome, Run, StageInstall
from .tracing import TraceWriter

if TYPE_CHECKING:
    from ..solvers import PartitionResult

logger = logging.getLogger(__name__)

Key = tuple[str, str, str]
MEASURE_REPEATS = 5
WARMUP_STEPS = 2
"""Left out of the measured step time: caches and queues fill."""


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
    measure: bool = True,
    on_event: OnEvent | None = None,
    notes: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Trains a model over the devices of a crowd.

    Args:
        crowd: A crowd, whose agents are launched for this run, or a `Crew` from `launch`.
        data: `batch(step)` gives the step's inputs and targets, `job.batch_size` rows each.
        steps: Updates to make in all; with `resume`, those made before count.
        plan: Who runs which layers; "auto" profiles the job and asks `solver`. What `solve`
            returned may stand here too: the run's record then holds what it predicted.
        solver: For `plan="auto"`: a name or an object, see `partition`.
        schedule: For `plan="auto"`: "gpipe", "1f1b" or "eager".
        transport: "grpc": one process per device; "memory": all in this process.
        runs_dir: Where the run's folder is made; `name` its name there.
        checkpoint_every: Steps between checkpoints; the last version is always kept.
        evaluate: An evaluation set: an `ArraySource`, a pair of arrays, or `Evaluation(source,
            every=50)`. The devices evaluate it between two steps, on their own parameters;
            training is bit-equal with and without.
        keep_best: "loss", "accuracy" or (metric, "min" or "max"): the state of the best evaluation
            stays in the run's folder `best/`, beside `checkpoint/`.
        callbacks: Called in this thread with (event, `Control`): they may stop the run or ask for a
            checkpoint, see `crowdmesh_jax.callbacks`. What one raises ends the run.
        resume: A run's folder: goes on from its newest checkpoint, in the same folder. The crowd
            and the plan may be others; with plan="auto" its own plan is used if the crowd has its
            devices.
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
            resumed = read_resumed(folder, events, job, arrays, steps=steps, rule=rule)
            arrays = resumed.arrays
        if isinstance(crowd, Crew):
            crew = crowd
            crew.check_alive()
        else:
            crew = Crew(crowd, transport=transport)
            stack.callback(crew.close)
        prediction = None
        own = _own_plan(resumed, job, crew.crowd) if plan == "auto" else None
        if own is not None:
            plan = own
        elif not isinstance(plan, str | PipelinePlan):
            prediction = getattr(plan, "predicted", None)
            plan = getattr(plan, "plan", plan)
        elif isinstance(plan, str):
            if plan != "auto":
                raise JobError(f"plan must be a PipelinePlan or 'auto', got {plan!r}")
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
        bundles = build_bundles(job, plan, inputs_spec, targets_spec)
        if folder is None or events is None:
            folder = RunFolder.create(runs_dir, name)
            events = stack.enter_context(folder.events())
        if crew is not crowd:
            tell(PhaseEvent(phase="launch", detail=crew.emulation.describe()))
            crew.log_dir = folder.path / "logs"
            crew.start()
        session = _Session(
            job=job,
            crew=crew,
            data=data,
            evaluation=evaluation,
            rule=rule,
            resumed=resumed,
            plan=plan,
            bundles=bundles,
            folder=folder,
            steps=steps,
            tell=tell,
            control=control,
            prediction=prediction,
            notes=notes,
        )
        return session.run(
            arrays, inputs_spec, events, checkpoint_every=checkpoint_every, measure=measure
        )


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


def _own_plan(resumed: Resumed | None, job: TrainingJob, crowd: Crowd) -> PipelinePlan | None:
    """A resumed run's own plan, if it can run on this crowd."""
    if resumed is None or resumed.plan is None:
        return None
    try:
        _check_plan(resumed.plan, job, crowd)
    except (InvalidPlanError, InvalidCrowdError) as exc:
        logger.warning("the run's own plan does not fit this crowd (%s): planning anew", exc)
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
    for device in plan.devices:
        crowd.device(device)
    for upper, lower in zip(plan.devices, plan.devices[1:], strict=False):
        if crowd.link(upper, lower) is None or crowd.link(lower, upper) is None:
            raise InvalidPlanError(f"the plan joins {upper!r} and {lower!r}, which have no link")


class _Session:
    """One call of `train` once everything fits: what the news say, until the result."""

    def __init__(
        self,
        *,
        job: TrainingJob,
        crew: Crew,
        data: DataSource,
        evaluation: EvaluationSet | None,
        rule: BestRule | None,
        resumed: Resumed | None,
        plan: PipelinePlan,
        bundles: Sequence[StageBundle],
        folder: RunFolder,
        steps: int,
        tell: Callable[[RunEvent], None],
        control: Control,
        prediction: Prediction | None,
        notes: Mapping[str, Any] | None,
    ) -> None:
        self.job, self.crew, self.data, self.plan = job, crew, data, plan
        self.bundles, self.folder, self.steps, self.tell = bundles, folder, steps, tell
        self.evaluation, self.rule, self.resumed = evaluation, rule, resumed
        self.control, self.prediction, self.notes = control, prediction, notes
        self.base = resumed.version if resumed is not None else 0
        self.evaluations: dict[int, Mapping[str, float]] = {}
        self.best_version: int | None = None
        self.losses: list[float] = []
        self.metrics: dict[str, list[float]] = {}
        self.step_times: list[float] = []
        self.timeline: Timeline | None = None
        self.memory: dict[str, MemoryReport] = {}
        self.trace = TraceWriter(plan)
        self._news: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run(
        self,
        arrays: Mapping[Key, np.ndarray],
        inputs_spec: Any,
        events: Journal,
        *,
        checkpoint_every: int | None,
        measure: bool,
    ) -> TrainResult:
        job, folder, plan, resumed = self.job, self.folder, self.plan, self.resumed
        meta = {**job_meta(job, arrays), "plan": plan.digest(), "steps": self.steps}
        digest = meta["job_sha256"]
        folder.write_config(self._config(digest, checkpoint_every))
        folder.write_plan(plan)
        if resumed is None:
            # Version 0 must be safe before step 0: it is what every rollback can fall back on.
            folder.save_checkpoint(0, arrays, meta)
        keeps_state = self.rule is not None
        start = ev.Start(
            plan=plan,
            schedule=schedule_for(plan),
            steps=self.steps,
            base=self.base,
            evaluation=self.evaluation and self.evaluation.plan(keeps_state=keeps_state),
            keep_best=self.rule,
            best=resumed.best if resumed is not None else None,
            ties=_ties(job),
            layer_names=tuple(layer.name for layer in job.model.layers),
            on_nonfinite=NonFinitePolicy(job.on_nonfinite),
            snapshot_every=checkpoint_every,
            measure_repeats=MEASURE_REPEATS if measure else 0,
            config_sha256=digest,
        )
        with folder.metrics() as self.metric_lines:
            rewind_metrics(self.metric_lines, self.base)
            run = Run(
                self.crew,
                folder,
                events,
                start,
                run=f"{folder.name}-{secrets.token_hex(4)}",
                term=resumed.term if resumed is not None else 0,
                epoch=resumed.epoch if resumed is not None else 0,
                installs=[self._install(bundle, arrays) for bundle in self.bundles],
                source=self.data,
                eval_source=self.evaluation.source if self.evaluation is not None else None,
                on_news=self._news.put,
                on_spans=self._news.put,
                on_memory=self._news.put,
                meta=meta,
            )
            try:
                final = self._await(run)
            finally:
                folder.write_trace(self.trace.finish())
                if self.crew.transport_name != "memory":  # there all devices are one process
                    manifests = [bundle.manifest for bundle in self.bundles]
                    folder.write_memory(memory_table(plan, manifests, self.memory))
        trained = assemble(job, inputs_spec, final.arrays)
        measured = self.step_times[WARMUP_STEPS:] or self.step_times
        return TrainResult(
            losses=np.asarray(self.losses, np.float32),
            params=trained.params,
            state=trained.state,
            opt_state=trained.opt_state,
            metrics={name: np.asarray(row) for name, row in self.metrics.items()},
            plan=plan,
            prediction=self.prediction,
            predicted_step_s=self.timeline.step_s if self.timeline else float("nan"),
            measured_step_s=statistics.median(measured) if measured else float("nan"),
            first_step=self.base,
            evaluations=self.evaluations,
            evaluated_rows=self.evaluation.rows if self.evaluation is not None else 0,
            left_out_rows=self.evaluation.left_out_rows if self.evaluation is not None else 0,
            best_version=self.best_version,
            stopped=final.reason or None,
            run_dir=folder.path,
        )

    def _config(self, digest: str, checkpoint_every: int | None) -> dict[str, Any]:
        job = self.job
        return {
            "job": {
                "model": job.model.name,
                "layers": [layer.name for layer in job.model.layers],
                "batch_size": job.batch_size,
                "microbatches": job.microbatches,
                "seed": job.seed,
                "on_nonfinite": job.on_nonfinite,
                "sha256": digest,
            },
            "run": {
                "steps": self.steps,
                "checkpoint_every": checkpoint_every,
                "transport": self.crew.transport_name,
                "data": repr(self.data),
                "evaluate": self._evaluation_config(),
                "keep_best": None if self.rule is None else [self.rule.metric, self.rule.mode],
                "resumed_at": self.base or None,
            },
            "notes": self.notes,
            "crowd": self.crew.crowd,
        }

    def _evaluation_config(self) -> dict[str, Any] | None:
        evaluation = self.evaluation
        if evaluation is None:
            return None
        return {
            "every": evaluation.every,
            "rows": evaluation.rows,
            "left_out_rows": evaluation.left_out_rows,
        }

    def _install(self, bundle: StageBundle, arrays: Mapping[Key, np.ndarray]) -> StageInstall:
        """What one stage gets: programs, its part of the state, its part of the data."""
        manifest = bundle.manifest
        text, programs = bundle_to_arrays(bundle)
        group: dict[Key, Any] = {("program", name, ""): data for name, data in programs.items()}
        for leaf in manifest.resident:
            role = "param" if leaf.role == "borrowed" else leaf.role
            group[leaf.key] = arrays[role, leaf.layer, leaf.path]
        extra: dict[str, Any] = {"manifest": text, "links": self._links(manifest.stage)}
        first, last = manifest.stage == 0, manifest.stage == manifest.num_stages - 1
        sources = {"data": self.data, "eval_data": self.evaluation and self.evaluation.source}
        for role, source in sources.items():
            if (first or last) and isinstance(source, ShippableSource):
                extra[role] = json.dumps(source.spec())
                for name, array in source.arrays(inputs=first, targets=last).items():
                    group[role, name, ""] = array
        return StageInstall(arrays=group, extra=extra)

    def _links(self, stage: int) -> dict[str, list[float]]:
        """Links to emulate: those of the plan that are slower than the loopback."""
        from ..core.crowd import LOOPBACK_BYTES_PER_S, LOOPBACK_LATENCY_S

        me = self.plan.devices[stage]
        links = {}
        for other in (stage - 1, stage + 1):
            if not 0 <= other < len(self.plan.stages):
                continue
            link = self.crew.crowd.link(me, self.plan.devices[other])
            assert link is not None, "checked against the crowd"
            real = link.bandwidth_bytes_per_s >= LOOPBACK_BYTES_PER_S
            if not (real and link.latency_s <= LOOPBACK_LATENCY_S):
                links[link.target] = [link.bandwidth_bytes_per_s, link.latency_s]
        return links

    # News ----------------------------------------------------------------------------------------

    def _await(self, run: Run) -> Outcome:
        """Shows news in the caller's thread until the run ends; Ctrl-C asks it to stop."""
        ended = object()
        future: Future[Outcome] = self.crew.begin(run.run())
        self.control.bind(lambda event: self.crew.soon(lambda: run.ask(event)))
        future.add_done_callback(lambda _: self._news.put(ended))
        while True:
            try:
                news = self._news.get()
                if news is ended:
                    return future.result()
                self._show(news)
            except KeyboardInterrupt:
                logger.warning("stopping after this step; Ctrl-C again stops now")
                self.crew.soon(run.interrupt)
            except BaseException:
                # The user's callback raised: end the run before the error goes up.
                self.crew.soon(run.interrupt)
                self.crew.soon(run.interrupt)
                future.exception(timeout=10.0)
                raise

    def _show(self, news: Any) -> None:
        match news:
            case list():
                self.trace.add(news)
            case MemoryReport():
                self.memory[news.device] = news
            case ev.PhaseChanged(phase=phase, devices=devices):
                self.tell(PhaseEvent(phase=phase, detail=", ".join(devices)))
            case ev.StageTimes(seconds=seconds):
                manifests = [bundle.manifest for bundle in self.bundles]
                prediction, self.timeline = predict_run(
                    self.plan, manifests, self.crew.crowd, seconds, self.prediction
                )
                self.folder.write_prediction(prediction)
                self.trace.predicted = self.timeline
                self.tell(MeasuredEvent(prediction_s=self.timeline.step_s, programs_s=seconds))
            case ev.StepShown():
                self._show_step(news)
            case ev.EvaluationShown(version=version, values=values):
                self._show_evaluation(version, values)
            case ev.CheckpointKept(version=version):
                path = self.folder.checkpoint_path
                self.tell(CheckpointEvent(version=version, path=path))
            case ev.BestKept(version=version, metric=metric, value=value):
                self.best_version = version
                path = self.folder.best_path
                self.tell(BestEvent(version=version, metric=metric, value=value, path=path))

    def _show_evaluation(self, version: int, values: Mapping[str, float]) -> None:
        assert self.evaluation is not None
        self.evaluations[version] = dict(values)
        row = {name: _jsonable(value) for name, value in values.items()}
        self.metric_lines.append({"version": version, "eval": row})
        self.tell(EvaluationEvent(version=version, values=values, rows=self.evaluation.rows))

    def _show_step(self, news: ev.StepShown) -> None:
        values = dict(news.values)
        loss = values.pop("loss")
        self.losses.append(loss)
        for name, value in values.items():
            self.metrics.setdefault(name, []).append(value)
        if news.step_s is not None and not news.has_evaluated:
            self.step_times.append(news.step_s)
        self.metric_lines.append(
            {"step": news.step, "loss": _jsonable(loss), "step_s": news.step_s}
            | {name: _jsonable(value) for name, value in values.items()}
            | ({"has_evaluated": True} if news.has_evaluated else {})
        )
        for event in self.trace.device_events(news.step, news.step_s):
            self.tell(event)
        self.tell(
            StepEvent(
                step=news.step, steps=self.steps, loss=loss, step_s=news.step_s, metrics=values
            )
        )


def _jsonable(value: float) -> float | str:
    return value if np.isfinite(value) else str(value)


def _ties(job: TrainingJob) -> tuple[Tie, ...]:
    index = {layer.name: i for i, layer in enumerate(job.model.layers)}
    borrowers: dict[int, list[int]] = {}
    for i, layer in enumerate(job.model.layers):
        for owner, _ in layer.borrows.values():
            borrowers.setdefault(index[owner], []).append(i)
    return tuple(
        Tie(owner_layer=owner, borrower_layers=tuple(sorted(set(layers))))
        for owner, layers in sorted(borrowers.items())
    )
