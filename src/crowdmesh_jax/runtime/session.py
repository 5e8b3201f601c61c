"""One call of `train` once everything fits: what the run is started with, and its result.

Knows nothing of plans being made or agents launched.
"""

from __future__ import annotations

import logging
import queue
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack
from typing import Any

import numpy as np

from ..control import ControlTerms
from ..core import PipelinePlan, Prediction, schedule_for
from ..data import DataSource
from ..errors import RecordError
from ..export import assemble
from ..model import TrainingJob
from ..programs import StageBundle
from ..protocol import coordinator_events as ev
from ..protocol import record_to_plain, records
from ..protocol.common import BestRule, NonFinitePolicy, Tie
from ..protocol.coordinator_events import Deadlines
from ..record import Journal, RunFolder, read_manifest
from .callbacks import Control
from .crew import Crew
from .evaluation import EvaluationSet
from .outfit import Outfitter
from .placing import Placer
from .policy import Planner
from .protection import Protection
from .recovery import Recovery
from .result import PhaseEvent, RunEvent, TrainResult
from .resume import Resumed, Unfinished, job_meta, rewind_metrics
from .run import Outcome, Run
from .showing import Showing

logger = logging.getLogger(__name__)

Key = tuple[str, str, str]
MEASURE_REPEATS = 5
ABORT_S = 10.0
"""For a run that is told to stop at once, since the caller's own code raised: it waits for no step,
only for its own tasks and files."""


class Session:
    """Of one call."""

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
        """In force as this call begins."""
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
        self.base = resumed.version if resumed is not None else 0
        self.taken_up = resumed.unfinished if resumed is not None else None
        """A run that goes on where it is."""
        self.first_step = self.base
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
        protection = self._protection()
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
            recovery=protection and protection.recovery_terms(self._warn_of_protection),
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
            lines = stack.enter_context(folder.metrics())
            showing = self._showing(lines)
            if self.taken_up is not None:
                self._show_what_was_not_shown(self.taken_up, lines, showing)
            else:
                rewind_metrics(lines, self.base)
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
                terms=protection.control_terms() if protection is not None else ControlTerms(),
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
                final = self._await(run, showing)
            finally:
                showing.finish()
        trained = assemble(job, inputs_spec, final.arrays)
        return TrainResult(
            losses=np.asarray(showing.losses, np.float32),
            params=trained.params,
            state=trained.state,
            opt_state=trained.opt_state,
            metrics={name: np.asarray(row) for name, row in showing.metrics.items()},
            plan=plan,
            prediction=self.prediction,
            predicted_step_s=showing.predicted_step_s,
            measured_step_s=showing.measured_step_s,
            first_step=self.first_step,
            evaluations=showing.evaluations,
            evaluated_rows=self.evaluation.rows if self.evaluation is not None else 0,
            left_out_rows=self.evaluation.left_out_rows if self.evaluation is not None else 0,
            best_version=showing.best_version,
            stopped=final.reason or None,
            recoveries=tuple(showing.recoveries),
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

    def _protection(self) -> Protection | None:
        if self.recovery is None:
            return None
        return Protection(
            recovery=self.recovery,
            crew=self.crew,
            job=self.job,
            plan=self.plan,
            bundles=self.bundles,
            hazards=self.hazards,
            placer=self.placer,
            planned_step_s=self.prediction.step_s if self.prediction is not None else 1.0,
        )

    def _warn_of_protection(self, detail: str) -> None:
        self.tell(PhaseEvent(phase="protection", detail=detail))

    def _deadlines(self) -> Deadlines:
        if self.recovery is None:
            return Deadlines()
        return Deadlines(heartbeat_floor_s=self.recovery.silence_s)

    def _showing(self, lines: Journal) -> Showing:
        return Showing(
            folder=self.folder,
            lines=lines,
            tell=self.tell,
            crew=self.crew,
            outfitter=self.outfitter,
            plan=self.plan,
            bundles=self.bundles,
            steps=self.steps,
            rows=self.evaluation.rows if self.evaluation is not None else 0,
            prediction=self.prediction,
            recovers=self.recovery is not None,
            best_version=self.resumed.best_version if self.resumed is not None else None,
        )

    def _show_what_was_not_shown(
        self, taken_up: Unfinished, lines: Journal, showing: Showing
    ) -> None:
        """The journal is ahead of what the process before could show."""
        rows = lines.records
        steps = [row["step"] for row in rows if isinstance(row.get("step"), int)]
        self.first_step = max(steps, default=taken_up.base - 1) + 1
        for record in taken_up.records:
            if isinstance(record, records.StepCommitted) and record.step >= self.first_step:
                news = ev.StepShown(
                    step=record.step, verdict=record.verdict, values=record.values, step_s=None
                )
                showing.show_step(news)

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

    # News ----------------------------------------------------------------------------------------

    def _await(self, run: Run, showing: Showing) -> Outcome:
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
                showing.show(news)
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
