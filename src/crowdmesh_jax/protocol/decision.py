"""The decision: where an epoch starts, and what becomes of each stage. Section 7 of the protocol.

    Past (journal), reports --weigh--> Judgement --owners (a policy), conclude--> Decision | Halt

Pure functions of values: asked again with the same reports, they answer the same. Nothing here has
a memory, so a recovery that is interrupted at any point is decided afresh.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from ..core.crowd import DeviceId
from ..core.plan import PipelinePlan
from ..errors import ProtocolError
from .common import StepVerdict, Verdict
from .evidence import Evidence, LayerHolders, Past, Source
from .judgement import Judgement, Run, missing_layers, weigh
from .owners import OwnersChoice, OwnersNeed

Act = Literal["keep", "apply", "restore"]
Owners = Callable[[OwnersNeed], OwnersChoice]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageAction:
    """What becomes of a stage of the new plan on its owner."""

    stage: int
    device: DeviceId
    act: Act
    version: int
    """The state is at this version when the install begins to replay or apply."""
    sources: tuple[Source, ...] = ()
    """Of `restore`: copies that together hold all its layers at `version`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Epoch `epoch` starts at version `base`."""

    epoch: int
    base: int
    plan: PipelinePlan
    actions: tuple[StageAction, ...]
    """Per stage of the plan."""
    runs: tuple[Run, ...] = ()
    verdicts: tuple[StepVerdict, ...] = ()
    """Known ones, of all steps that will be replayed or applied."""
    verdict_pending: bool = False
    """Nobody knows the verdict of step `base` - 1: stage 0 makes it anew from all parts."""
    is_rollback: bool = False
    holders: tuple[LayerHolders, ...] = ()
    reason: str = ""
    """In words, for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Halt:
    """No decision is possible with who is here. A wait: who returns may bring what is missing."""

    reason: str
    missing_layers: tuple[int, ...]
    checkpoint: int


def decide(past: Past, reports: Mapping[str, Evidence], owners: Owners) -> Decision | Halt:
    """The whole of section 7, with the policy called in between.

    Args:
        reports: Of fenced devices that are not lost, by device; the coordinator may report its
            checkpoint as a copy of all layers.
    """
    judgement = weigh(past, reports)
    if judgement.must_halt:
        return no_base(judgement)
    return conclude(judgement, owners(judgement.need(_devices(past, reports))))


def _devices(past: Past, reports: Mapping[str, Evidence]) -> tuple[DeviceId, ...]:
    return tuple(DeviceId(device) for device in sorted(reports) if device != past.coordinator)


def conclude(judgement: Judgement, choice: OwnersChoice) -> Decision | Halt:
    """Items 7 and 8: owners are known; what each stage does.

    Raises:
        ProtocolError: The policy moved a live stage, or gave one to a device that is not there.
    """
    past = judgement.past
    if choice.plan is None:
        return Halt(
            reason=f"{'; '.join(judgement.reasons)}; {choice.reason}",
            missing_layers=(),
            checkpoint=past.checkpoint,
        )
    recut = cuts(choice.plan) != cuts(past.plan)
    is_still = judgement.need(()).is_still
    if (recut or judgement.is_rollback) and judgement.rollback is None:
        return no_base(judgement)
    # With everyone at the base, states can move as they are: nothing is taken back.
    is_rollback = judgement.is_rollback or (recut and not is_still)
    base = judgement.rollback if is_rollback and judgement.rollback is not None else judgement.base
    reasons = list(judgement.reasons)
    if recut and is_rollback and not judgement.is_rollback:
        reasons.append(f"other cuts: rollback to {base}, as logs serve at the old cuts only")
    if choice.reason:
        reasons.append(choice.reason)
    versions = {i: run.version for run in judgement.runs for i in run.stages}
    live = {} if recut else {entry.stage: entry for entry in judgement.live}
    actions = []
    for index, stage in enumerate(choice.plan.stages):
        entry = live.get(index)
        if entry is not None and entry.device != stage.device and is_still:
            entry = None  # handed over, as it is
        elif entry is not None and entry.device != stage.device:
            raise ProtocolError(
                f"the policy gave stage {index} to {stage.device}; {entry.device} holds it, live"
            )
        if entry is not None and entry.version == base:
            act: Act = "keep"
        elif entry is not None and not is_rollback and entry.version == base - 1:
            act = "apply"
        else:
            version = base if is_rollback or is_still else versions[index]
            found = choose_sources(judgement.sources, stage.layers, version, stage.device)
            actions.append(
                StageAction(
                    stage=index,
                    device=stage.device,
                    act="restore",
                    version=version,
                    sources=found,
                )
            )
            continue
        actions.append(
            StageAction(stage=index, device=stage.device, act=act, version=entry.version)
        )
    known = {entry.step: entry.verdict for entry in judgement.verdicts}
    runs = () if is_rollback else judgement.runs
    steps_needed = {k for run in runs for k in range(run.version, base)}
    steps_needed |= {base - 1} if base > 0 else set()
    waits = any(action.act == "apply" or action.version < base for action in actions)
    return Decision(
        epoch=past.epoch,
        base=base,
        plan=choice.plan,
        actions=tuple(actions),
        runs=runs,
        verdicts=tuple(
            StepVerdict(step=step, verdict=known[step])
            for step in sorted(steps_needed)
            if step in known
        ),
        verdict_pending=waits and base - 1 not in known,
        is_rollback=is_rollback,
        holders=choice.holders,
        reason="; ".join(reasons),
    )


def cuts(plan: PipelinePlan) -> tuple[int, ...]:
    return tuple(stage.first_layer for stage in plan.stages)


def choose_sources(
    sources: tuple[Source, ...], layers: range, version: int, owner: str
) -> tuple[Source, ...]:
    """Copies that together hold `layers` at `version`: few, and the owner's own ones first."""
    here = [source for source in sources if source.copy.version == version]
    chosen: list[Source] = []
    layer = layers.start
    while layer < layers.stop:
        fitting = [source for source in here if layer in source.copy.layers]
        if not fitting:
            raise ProtocolError(f"no copy of layer {layer} at version {version}")
        best = max(
            fitting,
            key=lambda s: (
                min(s.copy.last_layer, layers.stop - 1),
                s.device == owner,
                s.copy.tag,
            ),
        )
        chosen.append(best)
        layer = best.copy.last_layer + 1
    return tuple(chosen)


def no_base(judgement: Judgement) -> Halt:
    """Names what is missing, and what a person can start again from."""
    past = judgement.past
    layers = judgement.missing_layers or missing_layers(past, judgement.sources)
    names = [
        f"{layer} ({past.layer_names[layer]})" if layer < len(past.layer_names) else str(layer)
        for layer in layers
    ]
    return Halt(
        reason=(
            f"no valid copy at version {past.durable} or later of layers {', '.join(names)}:"
            f" {'; '.join(judgement.reasons)}. Newest checkpoint: version {past.checkpoint}"
        ),
        missing_layers=layers,
        checkpoint=past.checkpoint,
    )


def known_verdict(decision: Decision, step: int) -> Verdict | None:
    """The verdict of `step`, where someone knows it."""
    return next((v.verdict for v in decision.verdicts if v.step == step), None)
