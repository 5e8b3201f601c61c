"""One call of `train` once everything fits: what the agents get, what the news say, the result.

Keeps the run's folder and tells the caller. Knows nothing of plans being made or agents launched.
"""

from __future__ import annotations

import logging
import math
import queue
import secrets
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack
from typing import Any

import numpy as np

from ..control import ControlTerms
from ..core import PipelinePlan, Prediction, Timeline, schedule_for
from ..core.crowd import DeviceId
from ..data import DataSource
from ..errors import RecordError
from ..export import assemble
from ..model import TrainingJob
from ..programs import StageBundle
from ..protocol import coordinator_events as ev
from ..protocol import record_to_plain, records
from ..protocol.common import BestRule, NonFinitePolicy, Tie
from ..protocol.coordinator_events import Deadlines, RecoveryTerms
from ..protocol.evidence import LayerHolders
from ..protocol.owners import CopyRoom, ring_holders
from ..record import Journal, RunFolder, read_manifest
from .callbacks import Control
from .crew import Crew
from .evaluation import EvaluationSet
from .memory import MemoryReport, memory_table
from .outfit import Outfitter
from .placing import Placer, copy_room, unprotected
from .policy import Planner
from .predict import predict_run
from .recovery import Recovery, RecoveryEvent, logged_bytes
from .result import (
    BestEvent,
    CheckpointEvent,
    EvaluationEvent,
    MeasuredEvent,
    PhaseEvent,
    RunEvent,
    StepEvent,
    TrainResult,
)
from .resume import Resumed, Unfinished, job_meta, rewind_metrics
from .run import Outcome, Run
from .tracing import TraceWriter

logger = logging.getLogger(__name__)

Key = tuple[str, str, str]
MEASURE_REPEATS = 5
WARMUP_STEPS = 2
"""Left out of the measured step time: caches and queues fill."""
FAR_FROM_PLAN = 1.5
"""Timed stages that are so much slower than planned are worth a warning."""
ATTACH_S = 10.0
"""A coordinator that started again waits so long for its members, who dial it all the time."""
ABORT_S = 10.0
"""For a run that is told to stop at once, since the caller's own code raised: it waits for no step,
only for its own tasks and files."""


class Session:
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
        known: Sequence[tuple[PipelinePlan, Sequence[StageBundle]]],
        folder: RunFolder,
        steps: int,
        tell: Callable[[RunEvent], None],
        control: Control,
        prediction: Prediction | None,
        notes: Mapping[str, Any] | None,
        recovery: Recovery | None,
        hazards: Mapping[str, tuple[str, ...]],
        planner: Planner,
        placer: Placer | None,
    ) -> None:
        self.job, self.crew, self.data, self.first_plan = job, crew, data, plan
        self.plan, self.bundles = known[-1]
        """In force; a recovery may bring others."""
        self.folder, self.steps, self.tell = folder, steps, tell
        self.evaluation, self.rule, self.resumed = evaluation, rule, resumed
        self.control, self.prediction, self.notes = control, prediction, notes
        self.recovery, self.hazards = recovery, hazards
        held_out = evaluation.source if evaluation is not None else None
        self.outfitter = Outfitter(crew.crowd, data, held_out)
        for its_plan, bundles in known:
            self.outfitter.learn(its_plan, bundles)
        self.planner, self.placer = planner, placer
        self._records: tuple[records.Record, ...] = ()
        """Of a run that is taken up."""
        self._lost_rows = 0
        self.recoveries: list[RecoveryEvent] = []
        self.base = resumed.version if resumed is not None else 0
        self.taken_up = resumed.unfinished if resumed is not None else None
        """A run that goes on where it is."""
        self.first_step = self.base
        self.evaluations: dict[int, Mapping[str, float]] = {}
        self.best_version = resumed.best_version if resumed is not None else None
        self.losses: list[float] = []
        self.metrics: dict[str, list[float]] = {}
        self.step_times: list[float] = []
        self.planned_times: int | None = None
        """How many of them are of the plan that the run began with; None: all."""
        self.timeline: Timeline | None = None
        self.memory: dict[str, MemoryReport] = {}
        self.memory_rows: dict[str, dict[str, int]] = {}
        self.trace = TraceWriter(self.plan)
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
        job, folder, plan, resumed = self.job, self.folder, self.first_plan, self.resumed
        meta = {**job_meta(job, arrays, inputs_spec), "plan": plan.digest(), "steps": self.steps}
        digest = meta["job_sha256"]
        if self.taken_up is None:
            folder.write_config(self._config(digest, checkpoint_every))
            folder.write_plan(plan)
        else:
            self._note_unrecorded_checkpoint(events)
        if resumed is None:
            # Version 0 must be safe before step 0: it is what every rollback can fall back on.
            folder.save_checkpoint(0, arrays, meta)
        keeps_state = self.rule is not None
        start = ev.Start(
            plan=plan,
            schedule=schedule_for(plan),
            steps=self.steps,
            base=self.base if self.taken_up is None else self.taken_up.base,
            evaluation=self.evaluation and self.evaluation.plan(keeps_state=keeps_state),
            keep_best=self.rule,
            best=resumed.best if resumed is not None else None,
            ties=_ties(job),
            layer_names=tuple(layer.name for layer in job.model.layers),
            on_nonfinite=NonFinitePolicy(job.on_nonfinite),
            snapshot_every=checkpoint_every,
            measure_repeats=MEASURE_REPEATS if measure else 0,
            config_sha256=digest,
            heartbeat_s=self.recovery.heartbeat_s if self.recovery is not None else 0.5,
            deadlines=self._deadlines(),
            recovery=self._terms(),
        )

        def load_state(version: int) -> Mapping[Key, np.ndarray]:
            if version == self.base and self.taken_up is None:
                return arrays
            kept = folder.load_checkpoint()
            if kept.version != version:
                raise RecordError(
                    f"{folder.checkpoint_path}: holds version {kept.version}, {version} is needed"
                )
            return kept.arrays

        with ExitStack() as stack:
            self.metric_lines = stack.enter_context(folder.metrics())
            if self.taken_up is not None:
                self._show_what_was_not_shown(self.taken_up)
            else:
                rewind_metrics(self.metric_lines, self.base)
            run = Run(
                self.crew,
                folder,
                events,
                start,
                run=self._run_id(),
                restart=self._records,
                term=resumed.term if resumed is not None else 0,
                epoch=resumed.epoch if resumed is not None else 0,
                outfitter=self.outfitter,
                load_state=load_state,
                terms=self._control_terms(),
                planner=self.planner,
                placer=self.placer,
                policy_log=stack.enter_context(folder.policy()) if self.recovery else None,
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
                    self._note_memory()
                    folder.write_memory(self.memory_rows)
        trained = assemble(job, inputs_spec, final.arrays)
        planned = self.step_times[: self.planned_times] or self.step_times
        measured = planned[WARMUP_STEPS:] or planned
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
            first_step=self.first_step,
            evaluations=self.evaluations,
            evaluated_rows=self.evaluation.rows if self.evaluation is not None else 0,
            left_out_rows=self.evaluation.left_out_rows if self.evaluation is not None else 0,
            best_version=self.best_version,
            stopped=final.reason or None,
            recoveries=tuple(self.recoveries),
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
                "recovery": self.recovery and self.recovery.to_record(),
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

    def _run_id(self) -> str:
        if self.taken_up is not None:
            return self.taken_up.run
        return f"{self.folder.name}-{secrets.token_hex(4)}"

    def _show_what_was_not_shown(self, taken_up: Unfinished) -> None:
        """The journal is ahead of what the process before could show."""
        rows = self.metric_lines.records
        steps = [row["step"] for row in rows if isinstance(row.get("step"), int)]
        self.first_step = max(steps, default=taken_up.base - 1) + 1
        for record in taken_up.records:
            if isinstance(record, records.StepCommitted) and record.step >= self.first_step:
                news = ev.StepShown(
                    step=record.step, verdict=record.verdict, values=record.values, step_s=None
                )
                self._show_step(news)

    def _note_unrecorded_checkpoint(self, events: Journal) -> None:
        """The coordinator before may have ended between a checkpoint and its record. Nothing was
        decided since: a decision waits for the disk."""
        assert self.taken_up is not None
        kept = read_manifest(self.folder.checkpoint_path)
        on_disk = [r for r in self.taken_up.records if isinstance(r, records.Wave) and not r.ledger]
        known = max((r.version for r in on_disk), default=self.taken_up.base)
        epoch = kept.meta.get("epoch")
        self._records = self.taken_up.records
        if kept.version > known and isinstance(epoch, int):
            wave = records.Wave(epoch=epoch, version=kept.version)
            events.append({"at_s": round(time.time(), 3), **record_to_plain(wave)}, durable=True)
            self._records = (*self._records, wave)

    def _terms(self) -> RecoveryTerms | None:
        if self.recovery is None:
            return None
        planned = [str(device) for device in self.plan.devices]
        spares = [device for device in self.crew.hellos if device not in planned]
        return RecoveryTerms(
            holders=self._first_holders(sorted([*planned, *spares])),
            wave_every=self.recovery.first_wave_every,
            log_steps=self._log_steps(self.recovery),
            return_s=self.recovery.return_s,
            attach_s=ATTACH_S,
        )

    def _first_holders(self, party: list[str]) -> tuple[LayerHolders, ...]:
        """Who keeps which copies at first; what stays without one is said before training."""
        assert self.recovery is not None
        if self.placer is None:
            devices, room = [DeviceId(device) for device in party], self._room()
            holders = ring_holders(
                self.plan, devices, copies=self.recovery.copies, room=room, hazards=self.hazards
            )
            notes = unprotected(self.plan, holders, room, self.hazards)
        else:
            for device in party:
                self.placer.presence.joined(device)
            planned_s = self.prediction.step_s if self.prediction is not None else 1.0
            decision = self.placer.decide(self.plan, planned_s)
            holders = self.placer.holders(decision, self.plan, party, room=self._room())
            bare = {entry.first_layer for entry in holders if not entry.devices}
            notes = [
                f"layers {item.first_layer}-{item.last_layer} of {item.owner} have no copy:"
                f" {item.detail}"
                for item in decision.unprotected
                if item.first_layer in bare
            ]
        if notes:
            rest = "a loss there takes everyone back to the newest checkpoint"
            detail = "; ".join([*notes, rest])
            logger.warning("%s", detail)
            self.tell(PhaseEvent(phase="protection", detail=detail))
        return holders

    def _room(self) -> CopyRoom:
        leaves = [bundle.manifest.resident for bundle in self.bundles]
        names = [layer.name for layer in self.job.model.layers]
        return copy_room(leaves, self.crew.hellos, names)

    def _log_steps(self, recovery: Recovery) -> int:
        manifests = [bundle.manifest for bundle in self.bundles]
        return recovery.logged_steps(logged_bytes(manifests, self.plan.microbatches))

    def _control_terms(self) -> ControlTerms:
        if self.recovery is None:
            return ControlTerms()
        crowd = self.crew.crowd
        crash_per_s = self.recovery.crash_per_s
        rates = {str(d.id): d.leave_hazard_per_s + crash_per_s for d in crowd.devices}
        return ControlTerms(
            copies=self.recovery.copies,
            room=self._room(),
            is_ring=self.placer is None,
            learn_interval=self.recovery.wave_every is None,
            loss_per_s=math.fsum(rates[device] for device in self.plan.devices),
            losses_per_s=rates,
            hazards=self.hazards,
            most_steps=max(1, self._log_steps(self.recovery) // 2),
            standby=self.recovery.standby,
            replan=self.recovery.replan,
            speeds={str(device.id): device.speed for device in crowd.devices},
        )

    def _deadlines(self) -> Deadlines:
        if self.recovery is None:
            return Deadlines()
        return Deadlines(heartbeat_floor_s=self.recovery.silence_s)

    # News ----------------------------------------------------------------------------------------

    def _await(self, run: Run) -> Outcome:
        """Shows news in the caller's thread until the run ends; Ctrl-C asks it to stop."""
        ended = object()
        future: Future[Outcome] = self.crew.begin(run.run())
        self.control.bind(
            lambda event: self.crew.soon(lambda: run.ask(event)),
            [str(device.id) for device in self.crew.crowd.devices],
        )
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
                _, still_on = wait([future], timeout=ABORT_S)
                if still_on:
                    logger.warning("the run did not end within %g s of an error here", ABORT_S)
                    future.cancel()
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
                self.trace.predict(self.timeline)
                self._warn_if_planned_short(self.timeline.step_s)
                self.tell(MeasuredEvent(prediction_s=self.timeline.step_s, programs_s=seconds))
            case ev.StepShown():
                self._show_step(news)
            case ev.CheckpointMissed(version=version, fault=fault):
                logger.error("no checkpoint of version %d: %s; the older one stands", version,
                             fault.text)  # fmt: skip
            case ev.EvaluationShown(version=version, values=values):
                self._show_evaluation(version, values)
            case RecoveryEvent():
                self._show_recovery(news)
            case ev.CheckpointKept(version=version):
                path = self.folder.checkpoint_path
                self.tell(CheckpointEvent(version=version, path=path))
            case ev.BestKept(version=version, metric=metric, value=value):
                self.best_version = version
                path = self.folder.best_path
                self.tell(BestEvent(version=version, metric=metric, value=value, path=path))

    def _show_recovery(self, event: RecoveryEvent) -> None:
        self.recoveries.append(event)
        try:
            self.folder.add_recovery(event)
        except RecordError as exc:
            logger.error("%s; this recovery is in no file", exc.message)
        self.trace.recovered(event)
        logger.info("%s", event.line())
        if event.plan is not None and event.plan != self.plan:
            if self.planned_times is None:
                self.planned_times = max(0, len(self.step_times) - 1)  # the last holds the loss
            self._note_memory()
            self.plan = event.plan
            self.bundles = self.outfitter.bundles(event.plan)
            self.trace.replan(event.plan, event.opened_s)
        self.tell(event)

    def _note_memory(self) -> None:
        """Of a device that has lost its stage its last stage's figures stay."""
        manifests = [bundle.manifest for bundle in self.bundles]
        self.memory_rows |= memory_table(self.plan, manifests, self.memory)

    def _warn_if_planned_short(self, timed_s: float) -> None:
        planned_s = self.prediction.step_s if self.prediction is not None else math.inf
        if timed_s > FAR_FROM_PLAN * planned_s:
            logger.warning(
                "a step takes %.1f ms by the stages' own times, %.1f times what the plan was made"
                " by: another plan may be faster. Small layers are calls and hops more than"
                " arithmetic. Plan from measured layers (cm.profile(..., measure=True);"
                " --measure), take larger microbatches, or compare with solver='single_best'",
                1e3 * timed_s,
                timed_s / planned_s,
            )

    def _show_evaluation(self, version: int, values: Mapping[str, float]) -> None:
        assert self.evaluation is not None
        self.evaluations[version] = dict(values)
        row = {name: _jsonable(value) for name, value in values.items()}
        self._write_row({"version": version, "eval": row})
        self.tell(EvaluationEvent(version=version, values=values, rows=self.evaluation.rows))

    def _write_row(self, row: Mapping[str, Any]) -> None:
        """A row of metrics; where the run recovers, a full disk costs rows, not the run."""
        try:
            self.metric_lines.append(row)
        except RecordError as exc:
            if self.recovery is None:
                raise
            if not self._lost_rows:
                logger.error("%s; rows of metrics are lost until there is room", exc.message)
            self._lost_rows += 1

    def _show_step(self, news: ev.StepShown) -> None:
        values = dict(news.values)
        loss = values.pop("loss")
        self.losses.append(loss)
        for name, value in values.items():
            self.metrics.setdefault(name, []).append(value)
        if news.step_s is not None and not news.has_evaluated:
            self.step_times.append(news.step_s)
        self._write_row(
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
