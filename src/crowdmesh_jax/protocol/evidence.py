"""What a decision is made from: copies, logs, reports of fenced devices, and what the journal says.

Everything is named by layers and cuts, never by stage number, so that it outlives a plan. Knows the
one test of what may still be trusted (`is_valid`), and nothing of what is made of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..core.crowd import DeviceId
from ..core.plan import PipelinePlan
from .common import StepVerdict, Tie, Verdict

Direction = Literal["forward", "backward"]
Logged = Literal["forward", "backward", "tied"]
"""What is logged at a cut: activations, gradients, and values of lent leaves; a "tied" step is that
after which the values were lent."""
"""Which way a boundary's arrays went: F down, B up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """Epoch `epoch` was decided to start at version `base`."""

    epoch: int
    base: int


def is_valid(tag: int, version: int, bases: Iterable[Base]) -> bool:
    """Whether what was made in epoch `tag` at `version` is of the history that was kept.

    The same test for copies and live state; a full gradient of step n passes as version n + 1.
    """
    return all(version <= entry.base for entry in bases if entry.epoch > tag)


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """State of layers `first_layer .. last_layer` after `version` steps, made in epoch `tag`."""

    first_layer: int
    last_layer: int
    tag: int
    version: int
    verdict: Verdict | None = None
    """Of step `version` - 1, from its manifest; None at version 0."""

    @property
    def layers(self) -> range:
        return range(self.first_layer, self.last_layer + 1)

    @property
    def name(self) -> tuple[int, int, int, int]:
        """Layers, tag, version: equal names, equal bytes."""
        return self.first_layer, self.last_layer, self.tag, self.version


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a copy can be had."""

    device: DeviceId
    copy: Copy


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSpan:
    """What a device sent across `cut` in steps `first_step .. stop_step` - 1, all microbatches."""

    direction: Logged
    cut: int
    first_step: int
    stop_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageReport:
    """A stage that a device owns, as it was when the device stopped."""

    first_layer: int
    last_layer: int
    version: int
    tag: int
    is_full: bool = False
    """It holds the whole gradient of step `version`, ready."""
    is_restoring: bool = False
    """An install of it had not ended."""

    @property
    def layers(self) -> range:
        return range(self.first_layer, self.last_layer + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepValues:
    """Loss and metrics of a step, as the last stage told them."""

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What one fenced device says of itself; nothing of it changes until Install (R6)."""

    stage: StageReport | None = None
    copies: tuple[Copy, ...] = ()
    logs: tuple[LogSpan, ...] = ()
    verdicts: tuple[StepVerdict, ...] = ()
    losses: tuple[StepValues, ...] = ()
    cannot_hear: tuple[DeviceId, ...] = ()
    """Peers whose channel to it broke while its own to the coordinator stands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """What the journal says, as far as a decision needs it."""

    epoch: int
    """To be decided."""
    plan: PipelinePlan
    """Of the last decision."""
    bases: tuple[Base, ...] = ()
    """Of all decided epochs."""
    durable: int = 0
    """Newest version of which a wave, or a checkpoint, is complete."""
    checkpoint: int = 0
    """Newest version on the coordinator's disk, whole."""
    coordinator: DeviceId | None = None
    """It reports its checkpoint like a device, and takes no stage."""
    data_from: int = 0
    """First step whose rows (inputs and targets) can be read again."""
    ties: tuple[Tie, ...] = ()
    layer_names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerHolders:
    """Who keeps copies of layers `first_layer .. last_layer`, beside their owner."""

    first_layer: int
    last_layer: int
    devices: tuple[DeviceId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trusted:
    """Reports with everything taken out that is not valid, or whose device is lost."""

    evidence: Mapping[str, Evidence] = field(default_factory=dict)

    @classmethod
    def of(cls, past: Past, reports: Mapping[str, Evidence]) -> Trusted:
        """Judges all reports by validity (7.1); zombies' data need no other test (R8)."""
        return cls(
            evidence={device: _valid_part(past, reports[device]) for device in sorted(reports)}
        )

    @property
    def verdicts(self) -> dict[int, Verdict]:
        """Step -> verdict, from stages that know it. (One that only a copy's manifest knows is
        told by whoever restores that copy.)"""
        return {
            entry.step: entry.verdict
            for evidence in self.evidence.values()
            for entry in evidence.verdicts
        }


def _valid_part(past: Past, evidence: Evidence) -> Evidence:
    stage = evidence.stage
    if stage is not None:
        if not is_valid(stage.tag, stage.version, past.bases):
            stage = None
        elif not is_valid(stage.tag, stage.version + 1, past.bases):
            stage = StageReport(
                first_layer=stage.first_layer,
                last_layer=stage.last_layer,
                version=stage.version,
                tag=stage.tag,
                is_full=False,
                is_restoring=stage.is_restoring,
            )
    # A log or verdict of a step that a rollback took back is of a history that is over. Its epoch
    # is not recorded, but Install purged it on every device that was there (section 7).
    return Evidence(
        stage=stage,
        copies=tuple(c for c in evidence.copies if is_valid(c.tag, c.version, past.bases)),
        logs=evidence.logs,
        verdicts=evidence.verdicts,
        losses=evidence.losses,
        cannot_hear=evidence.cannot_hear,
    )
