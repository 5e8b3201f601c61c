"""A run's folder as one value, whatever state it is in.

A run that goes on, was killed, or whose files are partly damaged still has something to show: what
cannot be read is named in `problems` and left out, never guessed. Only what is no run's folder, or
was written by a newer release, is refused. Knows nothing of pictures.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..core import Crowd, PipelinePlan, Timeline, values
from ..errors import CrowdMeshError, RecordError
from ..record import (
    RecoveryEvent,
    RunFolder,
    RunPrediction,
    TraceEvent,
    journal_writer,
    read_sound_records,
    trace_events,
)

State = Literal["finished", "halted", "running", "killed"]
STEP_FIELDS = ("seq", "step", "version", "loss", "step_s", "eval")
"""Of a line of `metrics.jsonl`; other numbers are metrics."""
WARMUP_STEPS = 2
"""Left out of the measured step time, as in `TrainResult`: caches and queues fill."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """How the run ended, or that it has not."""

    state: State
    at_s: float | None = None
    """Unix time of the last record; None: it carries none."""
    code: str | None = None
    """Of the error that halted the run."""
    text: str = ""
    """That error's message, or what is known of a run without an end."""
    writer_pid: int | None = None
    """The process that still writes the journal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRow:
    """A committed step, as `metrics.jsonl` has it. Numbers that are not finite stay so."""

    step: int
    loss: float
    step_s: float | None
    """Since the commit before; None: it is the first, or an evaluation came between."""
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRow:
    """An evaluation after a step: name -> value."""

    step: int
    """The last one before it, counted from 0."""
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """Bytes of an agent's process above what it held idle."""

    predicted_bytes: float | None
    """From its programs' own arrays and the compiler's figures."""
    measured_bytes: float
    """Peak of the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """All that a report needs of a run. What the folder does not hold is empty or None."""

    name: str
    path: Path
    status: Status
    config: Mapping[str, Any]
    crowd: Crowd | None
    plan: PipelinePlan | None
    prediction: RunPrediction | None
    timeline: Timeline | None
    """The predicted step, op by op."""
    steps_planned: int | None
    rows: tuple[StepRow, ...]
    evals: tuple[EvalRow, ...]
    records: tuple[Mapping[str, Any], ...]
    """The journal, with `seq` and, where the release wrote it, `at_s`."""
    programs_s: Mapping[str, Mapping[str, float]]
    """Seconds per device and program, measured alone."""
    memory: Mapping[str, DeviceMemory]
    """Per device; empty where the run did not measure it."""
    recoveries: tuple[RecoveryEvent, ...]
    """In order, those of former starts of a resumed run, too."""
    events: tuple[TraceEvent, ...]
    problems: tuple[str, ...]

    @property
    def committed(self) -> int:
        """Steps that were committed, as far as the folder knows."""
        told = [r["step"] + 1 for r in self.records if r.get("kind") == "StepCommitted"]
        return max([*told, *(row.step + 1 for row in self.rows)], default=0)

    @property
    def measured_step_s(self) -> float | None:
        """Median time from commit to commit, after the first steps.

        Of a run that lost a device: of the steps before, which are what was predicted.
        """
        before = [event.base for event in self.recoveries if event.take_overs]
        rows = [row for row in self.rows if row.step < before[0]] if before else self.rows
        times = [row.step_s for row in rows or self.rows if row.step_s is not None]
        times = times[WARMUP_STEPS:] or times
        return statistics.median(times) if times else None

    @property
    def predicted_step_s(self) -> float | None:
        """From stage times that each device measured alone, just before the run."""
        return self.prediction.step_s if self.prediction else None

    @property
    def layer_names(self) -> tuple[str, ...]:
        return tuple(str(name) for name in _table(self.config, "job").get("layers", ()))


def read_run(path: str | Path) -> RunView:
    """Reads a run's folder.

    Raises:
        RecordError: There is no folder, it is no run's, a newer release wrote it, or it holds
            nothing that can be read.
    """
    folder = RunFolder.open(path)
    problems: list[str] = []
    config = _config(folder, problems)
    records = _records(folder.events_path, problems)
    lines = _records(folder.metrics_path, problems)
    if not (config or records or lines):
        raise RecordError("nothing of this run can be read:\n  " + "\n  ".join(problems))
    plan = _plan(folder, records, problems)
    prediction, timeline = _prediction(folder, plan, problems)
    rows, evals = _rows(lines, problems)
    decisions = [r for r in records if r.get("kind") == "Decision"]
    measured = [r for r in records if r.get("kind") == "MembersMeasured"]
    steps = decisions[-1].get("steps") if decisions else _table(config, "run").get("steps")
    return RunView(
        name=folder.name,
        path=folder.path,
        status=_status(folder, records, lines),
        config=config,
        crowd=_crowd(folder, config, problems),
        plan=plan,
        prediction=prediction,
        timeline=timeline,
        steps_planned=steps if isinstance(steps, int) else None,
        rows=rows,
        evals=evals,
        records=tuple(records),
        programs_s=_seconds(measured[-1].get("seconds")) if measured else {},
        memory=_memory(folder, problems),
        recoveries=_recoveries(folder, problems),
        events=_trace(folder, problems),
        problems=tuple(problems),
    )


def _table(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = config.get(name)
    return table if isinstance(table, Mapping) else {}


def _config(folder: RunFolder, problems: list[str]) -> Mapping[str, Any]:
    if not folder.config_path.exists():
        problems.append(f"{folder.config_path.name}: missing")
        return {}
    try:
        return folder.read_config()
    except RecordError as exc:
        if "is newer than" in exc.message:
            raise  # all other files may mean something else, too
        problems.append(exc.message)
        return {}


def _records(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    if not path.exists():
        problems.append(f"{path.name}: missing")
        return []
    try:
        records, damage = read_sound_records(path)
    except RecordError as exc:
        problems.append(exc.message)
        return []
    if damage is not None:
        problems.append(f"{damage} (shown is what stands before it)")
    return records


def _plan(
    folder: RunFolder, records: list[dict[str, Any]], problems: list[str]
) -> PipelinePlan | None:
    try:
        return folder.read_plan()
    except CrowdMeshError as exc:
        if folder.plan_path.exists():
            problems.append(exc.message)
    for record in reversed(records):
        if record.get("kind") == "Decision":
            try:
                return values.from_plain(PipelinePlan, record.get("plan"), "Decision.plan")
            except CrowdMeshError as exc:
                problems.append(exc.message)
    return None


def _prediction(
    folder: RunFolder, plan: PipelinePlan | None, problems: list[str]
) -> tuple[RunPrediction | None, Timeline | None]:
    if not folder.prediction_path.exists():
        return None, None
    try:
        prediction = folder.read_prediction()
    except RecordError as exc:
        problems.append(exc.message)
        return None, None
    if plan is None:
        return prediction, None
    try:
        return prediction, prediction.timeline(plan)
    except CrowdMeshError as exc:
        problems.append(f"{folder.prediction_path.name} does not fit the plan: {exc.message}")
        return prediction, None


def _crowd(folder: RunFolder, config: Mapping[str, Any], problems: list[str]) -> Crowd | None:
    if "crowd" not in config:
        return None
    try:
        return values.from_plain(Crowd, config["crowd"], f"{folder.config_path.name}.crowd")
    except CrowdMeshError as exc:
        problems.append(exc.message)
        return None


def _number(value: object) -> float | None:
    """Floats as journals write them: those that are not finite are strings."""
    if isinstance(value, str) and value in ("nan", "inf", "-inf"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value)


def _numbers(table: object) -> dict[str, float]:
    if not isinstance(table, Mapping):
        return {}
    found = {str(name): _number(value) for name, value in table.items()}
    return {name: value for name, value in found.items() if value is not None}


def _seconds(table: object) -> dict[str, dict[str, float]]:
    if not isinstance(table, Mapping):
        return {}
    return {str(device): _numbers(row) for device, row in table.items()}


def _rows(
    lines: list[dict[str, Any]], problems: list[str]
) -> tuple[tuple[StepRow, ...], tuple[EvalRow, ...]]:
    """Later lines of a step replace earlier ones: a resumed run makes some steps again."""
    rows: dict[int, StepRow] = {}
    evals: dict[int, EvalRow] = {}
    odd = 0
    for line in lines:
        step, loss = line.get("step"), _number(line.get("loss"))
        version = line.get("version")
        if step is None and isinstance(version, int):
            step = version - 1  # evaluated after that step
        if not isinstance(step, int):
            odd += 1
            continue
        evaluated = _numbers(line.get("eval"))
        if evaluated:
            evals[step] = EvalRow(step=step, values=evaluated)
        if loss is None:
            odd += not evaluated
            continue
        named = {k: v for k, v in line.items() if k not in STEP_FIELDS}
        step_s = _number(line.get("step_s"))
        is_time = step_s is not None and math.isfinite(step_s) and step_s > 0
        is_time = is_time and not line.get("has_evaluated")  # then it is not the step's own
        rows[step] = StepRow(
            step=step, loss=loss, step_s=step_s if is_time else None, metrics=_numbers(named)
        )
    if odd:
        problems.append(f"metrics.jsonl: {odd} lines without a step and a loss are left out")
    return (
        tuple(rows[step] for step in sorted(rows)),
        tuple(evals[step] for step in sorted(evals)),
    )


def _memory(folder: RunFolder, problems: list[str]) -> dict[str, DeviceMemory]:
    if not folder.memory_path.exists():
        return {}
    try:
        table = folder.read_memory()
    except RecordError as exc:
        problems.append(exc.message)
        return {}
    return {
        device: DeviceMemory(
            predicted_bytes=row.get("predicted_bytes"),
            measured_bytes=max(0.0, row["peak_bytes"] - row["idle_bytes"]),
        )
        for device, row in table.items()
        if "peak_bytes" in row and "idle_bytes" in row
    }


def _recoveries(folder: RunFolder, problems: list[str]) -> tuple[RecoveryEvent, ...]:
    path = folder.recoveries_path
    if not path.exists():
        return ()  # there was none
    found = []
    for line in _records(path, problems):
        plain = {name: value for name, value in line.items() if name != "seq"}
        try:
            found.append(values.from_plain(RecoveryEvent, plain, path.name))
        except CrowdMeshError as exc:
            problems.append(exc.message)
    return tuple(found)


def _trace(folder: RunFolder, problems: list[str]) -> tuple[TraceEvent, ...]:
    path = folder.trace_path
    if not path.exists():
        return ()  # written when the run ends: a killed one has none
    try:
        return trace_events(json.loads(path.read_bytes()), str(path))
    except (OSError, ValueError, RecursionError) as exc:
        problems.append(f"{path}: damaged: {exc}")
    except RecordError as exc:
        problems.append(exc.message)
    return ()


def _status(
    folder: RunFolder, records: list[dict[str, Any]], lines: list[dict[str, Any]]
) -> Status:
    at_s = next((r["at_s"] for r in reversed(records) if _number(r.get("at_s"))), None)
    for record in reversed(records):
        match record.get("kind"):
            case "Finish":
                return Status(state="finished", at_s=at_s)
            case "Halted":
                fault = _table(record, "fault")
                kind, text = str(fault.get("kind", "")), str(fault.get("text", ""))
                return Status(state="halted", at_s=at_s, code=_code(kind), text=text)
            case "Term":
                break  # a later coordinator went on with a run that had ended
    if at_s is None and (paths := [p for p in _files(folder) if p.exists()]):
        at_s = max(path.stat().st_mtime for path in paths)
    pid = journal_writer(folder.events_path)
    if pid is not None:
        return Status(state="running", at_s=at_s, text=f"process {pid} writes it", writer_pid=pid)
    why = "its journal has no end and no process writes it"
    return Status(state="killed", at_s=at_s, text=why)


def _files(folder: RunFolder) -> tuple[Path, ...]:
    return folder.events_path, folder.metrics_path, folder.config_path


def _code(kind: str) -> str | None:
    from .. import errors

    found = getattr(errors, kind, None)
    return getattr(found, "code", None)
