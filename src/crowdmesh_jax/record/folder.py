"""The folder that a run leaves behind.

    runs/NAME/
        config.toml     the job, crowd and options, resolved
        plan.json       the plan that ran
        prediction.json what a step was predicted to take, before the first one
        events.jsonl    every event and action of the coordinator, checksummed
        metrics.jsonl   a line per committed step
        policy.jsonl    where the run recovers: what the policy was told and wanted
        recoveries.jsonl
                        a `RecoveryEvent` a line, checksummed; no file: there was none. It says what
                        the journal (Epoch, Decision, Wave, Resumed) cannot: how long each part
                        took, what was compiled and moved
        trace.json      opens in Perfetto
        memory.json     bytes that each device was predicted to hold, and held
        checkpoint/     safetensors shards and manifest.json
        config.1.toml   where the run was resumed: what stood there before, the first start's; then
                        config.2.toml, ... and plan.1.json, ... of plans that were others

Knows the files' names and how to write them whole; not what a run does.
"""

from __future__ import annotations

import itertools
import json
import re
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core import PipelinePlan, values
from ..errors import FormatError, RecordError
from .checkpoint import Checkpoint, Key, load_checkpoint, save_checkpoint
from .files import read_bytes, record_errors, sync_folder, write_atomic
from .journal import Journal
from .prediction import FORMAT_VERSION as PREDICTION_VERSION
from .prediction import RunPrediction
from .recovery import RecoveryEvent

FORMAT_VERSION = 1
"""Of the folder as a whole: its files, and what is in them."""
NAME_PATTERN = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """One run's folder. Files appear whole or not at all; journals grow by whole records."""

    path: Path

    @classmethod
    def create(cls, root: str | Path = "runs", name: str | None = None) -> RunFolder:
        """Makes `root/name`; without a name, one of the date and time.

        Raises:
            RecordError: The name is taken or no file name, or the folder cannot be made.
        """
        root = Path(root)
        cls.check_name(root, name)
        with record_errors(root, "make the folder"):
            root.mkdir(parents=True, exist_ok=True)
            for path in cls._candidates(root, name):
                try:
                    path.mkdir()
                except FileExistsError:
                    if name is not None:  # made since it was checked
                        raise _taken(path) from None
                else:
                    sync_folder(root)
                    return cls(path.absolute())
        raise AssertionError("candidates never end")

    @staticmethod
    def check_name(root: str | Path, name: str | None) -> None:
        """Whether `create` could make `root/name`; without a name it always can.

        Raises:
            RecordError: The name is taken or no file name.
        """
        if name is None:
            return
        if not NAME_PATTERN.match(name):
            raise RecordError(
                f"run name {name!r}: use letters, digits, '.', '_' and '-', at most 100"
            )
        path = Path(root) / name
        if path.exists() or path.is_symlink():
            raise _taken(path)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """An existing run's folder.

        Raises:
            RecordError: There is no folder, or it is no run's.
        """
        folder = cls(Path(path).absolute())
        if not folder.path.is_dir():
            raise RecordError(f"{path}: no such run folder")
        if not (folder.config_path.exists() or folder.events_path.exists()):
            raise RecordError(f"{path}: no run's folder: neither config.toml nor events.jsonl")
        return folder

    @staticmethod
    def _candidates(root: Path, name: str | None):
        if name is not None:
            yield root / name
            return
        stamp = time.strftime("%Y%m%d-%H%M%S")
        yield root / stamp
        yield from (root / f"{stamp}-{again}" for again in itertools.count(2))

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config_path(self) -> Path:
        return self.path / "config.toml"

    @property
    def plan_path(self) -> Path:
        return self.path / "plan.json"

    @property
    def prediction_path(self) -> Path:
        return self.path / "prediction.json"

    @property
    def events_path(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def policy_path(self) -> Path:
        return self.path / "policy.jsonl"

    @property
    def recoveries_path(self) -> Path:
        return self.path / "recoveries.jsonl"

    @property
    def trace_path(self) -> Path:
        return self.path / "trace.json"

    @property
    def memory_path(self) -> Path:
        return self.path / "memory.json"

    @property
    def checkpoint_path(self) -> Path:
        return self.path / "checkpoint"

    @property
    def best_path(self) -> Path:
        return self.path / "best"

    def write_config(self, config: Any) -> None:
        """Writes `config.toml` from a dataclass or mapping; None fields are left out.

        Another one that is there stays as `config.1.toml`, or the next number that is free.
        """
        import tomli_w

        plain = {"format_version": FORMAT_VERSION, **_without_none(values.to_plain(config))}
        self._replace(self.config_path, tomli_w.dumps(plain).encode())

    def read_config(self) -> dict[str, Any]:
        """What `config.toml` holds, as plain values.

        Raises:
            RecordError: It is missing or damaged, or a newer release wrote it.
        """
        try:
            config = tomllib.loads(read_bytes(self.config_path).decode())
        except ValueError as exc:  # not UTF-8, not TOML
            raise RecordError(f"{self.config_path}: damaged: {exc}") from exc
        _check_version(self.config_path, config.get("format_version", 1), FORMAT_VERSION)
        return config

    def write_plan(self, plan: PipelinePlan) -> None:
        """Writes `plan.json`. Another one that is there stays as `plan.1.json`, or the next."""
        self._replace(self.plan_path, (values.to_json(plan, indent=1) + "\n").encode())

    def _replace(self, path: Path, data: bytes) -> None:
        """Writes a file; one of another content that is there stays under a number."""
        before = read_bytes(path) if path.exists() else data
        if before != data:
            for number in itertools.count(1):
                former = path.with_suffix(f".{number}{path.suffix}")
                if not former.exists():
                    write_atomic(former, before)
                    break
        write_atomic(path, data)

    def read_plan(self) -> PipelinePlan:
        """The plan that ran.

        Raises:
            FormatError: There is none, or the file is damaged.
        """
        return values.load(PipelinePlan, self.plan_path)

    def write_prediction(self, prediction: RunPrediction) -> None:
        """Writes `prediction.json`."""
        write_atomic(self.prediction_path, (values.to_json(prediction, indent=1) + "\n").encode())

    def read_prediction(self) -> RunPrediction:
        """What a step was predicted to take.

        Raises:
            RecordError: There is none, it is damaged, or a newer release wrote it.
        """
        path = self.prediction_path
        try:
            plain = json.loads(read_bytes(path))
            told = plain.get("format_version") if isinstance(plain, dict) else None
            _check_version(path, told, PREDICTION_VERSION)
            return values.from_plain(RunPrediction, plain, str(path))
        except RecursionError as exc:
            raise RecordError(f"{path}: damaged: nested too deep") from exc
        except FormatError as exc:
            raise RecordError(f"damaged: {exc.message}") from exc
        except ValueError as exc:  # not JSON, or times that make no sense
            raise RecordError(f"{path}: damaged: {exc}") from exc

    def write_trace(self, trace: Mapping[str, Any]) -> None:
        """Writes `trace.json` (see `chrome_trace`)."""
        write_atomic(self.trace_path, json.dumps(trace, separators=(",", ":")).encode())

    def write_memory(self, table: Mapping[str, Mapping[str, int]]) -> None:
        """Writes `memory.json`: {device: {"predicted_bytes", "idle_bytes", "peak_bytes", ...}}.

        `idle_bytes`, `loading_peak_bytes` and `peak_bytes` are resident bytes of the device's
        process: before it had a stage, at most until the stage was in place, and at most since
        then; `predicted_bytes` is for what the last is above the first.
        """
        write_atomic(self.memory_path, (json.dumps(table, indent=1) + "\n").encode())

    def read_memory(self) -> dict[str, dict[str, float]]:
        """What `write_memory` wrote; fields that are no numbers are left out.

        Raises:
            RecordError: There is none, or it is damaged.
        """
        try:
            table = json.loads(read_bytes(self.memory_path))
            return {
                str(device): {k: float(v) for k, v in row.items() if isinstance(v, int | float)}
                for device, row in table.items()
            }
        except (ValueError, AttributeError, RecursionError) as exc:
            raise RecordError(f"{self.memory_path}: damaged: {exc}") from exc

    def events(self) -> Journal:
        """The run's events, for appending: one process at a time."""
        return Journal(self.events_path)

    def metrics(self) -> Journal:
        """The run's metrics, for appending: one process at a time."""
        return Journal(self.metrics_path)

    def policy(self) -> Journal:
        """What the policy was told and wanted, for appending: one process at a time."""
        return Journal(self.policy_path)

    def add_recovery(self, event: RecoveryEvent) -> None:
        """Appends to `recoveries.jsonl`.

        Raises:
            RecordError: It cannot be written, or another process writes it.
        """
        with Journal(self.recoveries_path) as lines:
            lines.append(values.to_plain(event), durable=True)

    def save_checkpoint(
        self, version: int, arrays: Mapping[Key, np.ndarray], meta: Mapping[str, Any] | None = None
    ) -> Path:
        """Replaces the run's checkpoint; see `crowdmesh_jax.record.save_checkpoint`."""
        return save_checkpoint(self.checkpoint_path, version, arrays, meta)

    def save_best(
        self, version: int, arrays: Mapping[Key, np.ndarray], meta: Mapping[str, Any] | None = None
    ) -> Path:
        """Replaces the run's best checkpoint, beside the newest one."""
        return save_checkpoint(self.best_path, version, arrays, meta)

    def load_checkpoint(self, *, job_sha256: str | None = None) -> Checkpoint:
        """The run's checkpoint; see `crowdmesh_jax.record.load_checkpoint`."""
        return load_checkpoint(self.checkpoint_path, job_sha256=job_sha256)


def _taken(path: Path) -> RecordError:
    return RecordError(f"{path}: a run of that name is there; choose another name")


def _check_version(path: Path, told: object, newest: int) -> None:
    if not isinstance(told, int) or told < 1:
        raise RecordError(f"{path}: damaged: format version {told!r}")
    if told > newest:
        raise RecordError(
            f"{path}: format version {told} is newer than {newest}, the newest that this release"
            " reads; upgrade crowdmesh-jax"
        )


def _without_none(plain: Any) -> Any:
    if isinstance(plain, dict):
        return {key: _without_none(item) for key, item in plain.items() if item is not None}
    if isinstance(plain, list):
        return [_without_none(item) for item in plain if item is not None]
    return plain
