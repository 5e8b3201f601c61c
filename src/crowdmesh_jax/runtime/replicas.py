"""Who holds which copies in a run, from its folder alone, also while it goes on.

Counts what the journal promises: copies of complete waves at devices that are still there. Waves on
their way, and copies that owners keep of stages they handed over, are not counted, so the truth is
never worse than what is told here, as far as the logs' memory reaches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..core import Crowd, DeviceId, PipelinePlan, values
from ..errors import CrowdMeshError, RecordError
from ..propagation import HazardGroups, Holding, ReplicaReport, replica_report
from ..protocol import records
from ..protocol.records import record_from_plain
from ..record import RunFolder, journal_writer, read_manifest, read_sound_records

KINDS = ("Decision", "Epoch", "StepCommitted", "Wave")
"""Records that say who has what."""


def read_replicas(run_dir: str | Path, *, now_s: float | None = None) -> ReplicaReport:
    """The replica report of a run.

    Args:
        run_dir: The run's folder; the run may go on meanwhile.
        now_s: Unix time that ages are counted to. None: now where a process writes the journal,
            else the time of its last record.

    Raises:
        RecordError: No run's folder, a damaged one, or a run that has no plan yet.
    """
    folder = RunFolder.open(run_dir)
    lines, damage = read_sound_records(folder.events_path)
    if damage is not None:
        raise RecordError(damage)
    if now_s is None:
        is_written = journal_writer(folder.events_path) is not None
        now_s = time.time() if is_written else _last_time(lines)
    state = _Standing()
    for line in lines:
        if line.get("kind") in KINDS:
            state.take(record_from_plain(line), line.get("at_s"))
    if state.plan is None:
        raise RecordError(f"{folder.path}: the run has no plan yet; ask again when it trains")
    config = folder.read_config()
    terms = config.get("run", {}).get("recovery", {})
    terms = terms if isinstance(terms, Mapping) else {}
    try:
        groups = _groups(config, terms)
    except CrowdMeshError as exc:
        raise RecordError(f"{folder.config_path}: damaged: {exc.message}") from exc
    sizes = _layer_bytes(folder, config, state.plan)
    return state.report(sizes, terms.get("log_steps"), groups, now_s)


def _last_time(lines: Sequence[Mapping[str, Any]]) -> float:
    times = [line["at_s"] for line in lines if isinstance(line.get("at_s"), (int, float))]
    return float(times[-1]) if times else math.nan


class _Standing:
    """Folds the journal: who has what at its end."""

    def __init__(self) -> None:
        self.plan: PipelinePlan | None = None
        self.head = self.cuts_since = 0
        self.checkpoint: int | None = 0  # before step 0 there is one
        self.copies: dict[tuple[str, int, int], int] = {}
        """(device, first layer, last layer) -> version."""
        self.made_s: dict[int, float] = {}
        """Version -> when it was committed."""
        self.sent_bytes = 0

    def take(self, record: records.Record, at_s: float | None) -> None:
        match record:
            case records.Epoch(lost=lost):
                self.copies = {k: v for k, v in self.copies.items() if k[0] not in lost}
            case records.Decision(base=base, plan=plan):
                if self.plan is None or _cuts(plan) != _cuts(self.plan):
                    self.cuts_since = base  # logs serve at the cuts they were made at only
                self.plan, self.head = plan, base
                self.copies = {k: v for k, v in self.copies.items() if v <= base}
                self.made_s.setdefault(base, at_s if at_s is not None else math.nan)
            case records.StepCommitted(step=step):
                self.head = max(self.head, step + 1)
                self.made_s[step + 1] = at_s if at_s is not None else math.nan
            case records.Wave(version=version, ledger=ledger, sent_bytes=sent_bytes) if ledger:
                self.copies = {
                    (str(device), part.first_layer, part.last_layer): version
                    for part in ledger
                    for device in part.devices
                }
                self.sent_bytes += sent_bytes
            case records.Wave(version=version):
                self.checkpoint = version

    def report(
        self,
        layer_bytes: Sequence[int],
        log_steps: int | None,
        groups: HazardGroups,
        now_s: float,
    ) -> ReplicaReport:
        assert self.plan is not None
        durable = min(self.copies.values(), default=self.head)
        logs_from = max(durable, self.cuts_since)
        if log_steps is not None:
            logs_from = max(logs_from, self.head - log_steps)

        def size(first: int, last: int) -> int:
            return sum(layer_bytes[first : last + 1])

        holdings = [
            Holding(
                device=DeviceId(device),
                first_layer=first,
                last_layer=last,
                version=version,
                age_s=_age(now_s, self.made_s.get(version)),
                size_bytes=size(first, last),
            )
            for (device, first, last), version in self.copies.items()
        ]
        return replica_report(
            self.plan,
            holdings,
            head_version=self.head,
            groups=groups,
            logs_from=logs_from,
            checkpoint_version=self.checkpoint,
            sent_bytes=self.sent_bytes,
        )


def _age(now_s: float, made_s: float | None) -> float:
    age_s = now_s - made_s if made_s is not None else 0.0
    return max(0.0, age_s) if math.isfinite(age_s) else 0.0


def _cuts(plan: PipelinePlan) -> tuple[int, ...]:
    return tuple(stage.first_layer for stage in plan.stages)


def _layer_bytes(folder: RunFolder, config: Mapping[str, Any], plan: PipelinePlan) -> list[int]:
    """Bytes of each layer's state, by the checkpoint's manifest; what all layers share (a step
    count) goes with each copy and is left out."""
    names = list(config.get("job", {}).get("layers", ()))
    sizes = [0] * plan.num_layers
    for entry in read_manifest(folder.checkpoint_path).arrays:
        if entry.layer in names:
            try:
                item_bytes = np.dtype(entry.dtype).itemsize
            except TypeError:
                import ml_dtypes

                item_bytes = np.dtype(getattr(ml_dtypes, entry.dtype)).itemsize
            sizes[names.index(entry.layer)] += math.prod(entry.shape) * item_bytes
    return sizes


def _groups(config: Mapping[str, Any], terms: Mapping[str, Any]) -> HazardGroups:
    """The hazards that the run knew: its crowd's cells, and those that its user named."""
    if "crowd" not in config:
        return HazardGroups()
    crowd = values.from_plain(Crowd, config["crowd"], "crowd")
    return HazardGroups.of(crowd, terms.get("groups"))
