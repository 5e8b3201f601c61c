"""What the reports come to: live stages, the version to start at, runs to replay (section 7, 1-6).

Why nobody needs to know beforehand whether the step at work was committed: stage 0's last backward
needs everyone's, so if any stage has applied step t, or a copy of version t+1 exists, every stage
is Full(t) or beyond. Knows nothing of who takes what was lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..core.crowd import DeviceId
from .common import StepVerdict
from .evidence import Copy, Evidence, Past, Source, StageReport, Trusted
from .owners import OwnersNeed


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """A stage whose owner goes on from what it has."""

    stage: int
    device: DeviceId
    version: int
    is_full: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Adjacent lost stages `first_stage .. last_stage`, restored at `version`, replayed to T."""

    first_stage: int
    last_stage: int
    version: int

    @property
    def stages(self) -> range:
        return range(self.first_stage, self.last_stage + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What the reports come to, before owners are found."""

    past: Past
    base: int
    """T; of a rollback, if `is_rollback`."""
    head: int
    """Highest version of a live stage; `base` where there is none."""
    live: tuple[Live, ...]
    lost_stages: tuple[int, ...]
    runs: tuple[Run, ...]
    is_rollback: bool
    rollback: int | None
    """Newest version of which every layer has a copy, at least the durable one; None: none."""
    missing_layers: tuple[int, ...]
    """Layers without a copy at the durable version: why there is no rollback."""
    sources: tuple[Source, ...]
    """All valid copies, live states among them."""
    verdicts: tuple[StepVerdict, ...]
    cannot_hear: tuple[tuple[DeviceId, DeviceId], ...]
    reasons: tuple[str, ...]

    @property
    def must_halt(self) -> bool:
        """No base to go on from."""
        return self.is_rollback and self.rollback is None

    def need(self, devices: tuple[DeviceId, ...]) -> OwnersNeed:
        """What is asked of a policy."""
        copies_of: dict[str, tuple[int, ...]] = {}
        versions = {index: run.version for run in self.runs for index in run.stages}
        for index in self.lost_stages:
            layers = set(self.past.plan.stages[index].layers)
            for source in self.sources:
                at = versions.get(index, self.base)
                if source.copy.version == at and layers & set(source.copy.layers):
                    have = copies_of.get(source.device, ())
                    copies_of[source.device] = (*have, index) if index not in have else have
        return OwnersNeed(
            epoch=self.past.epoch,
            plan=self.past.plan,
            lost_stages=self.lost_stages,
            devices=devices,
            copies_of=copies_of,
            is_still=not self.lost_stages and all(x.version == self.base for x in self.live),
            cannot_hear=self.cannot_hear,
        )


def weigh(past: Past, reports: Mapping[str, Evidence]) -> Judgement:
    """Items 1-6: what is live, where the epoch can start, what must be replayed."""
    trusted = Trusted.of(past, reports)
    live = find_live(past, trusted)
    head = max((entry.version for entry in live), default=None)
    if head is not None:
        live = tuple(entry for entry in live if is_in_step(entry, head))
    base = choose_base(live, head)
    sources = all_sources(trusted)
    lost = tuple(
        index for index in range(len(past.plan.stages)) if index not in {x.stage for x in live}
    )
    reasons = [_say_live(live, base, head)]
    rollback = common_version(past, sources, at_most=None if head is None else base)
    runs: list[Run] = []
    is_rollback = head is None
    if head is None:
        reasons.append("no stage is live")
    for first, last in group(lost) if not is_rollback else ():
        version = newest_start(past, trusted, live, sources, first, last, base)
        if version is None:
            is_rollback = True
            reasons.append(f"stages {first}-{last}: no copy from which the logs reach {base}")
            break
        runs.append(Run(first_stage=first, last_stage=last, version=version))
        reasons.append(_say_run(past, first, last, version, base))
    missing: tuple[int, ...] = ()
    if is_rollback:
        runs = []
        missing = missing_layers(past, sources)
        if rollback is not None:
            base = rollback
            reasons.append(f"rollback to {rollback}, the newest version with a copy of each layer")
    return Judgement(
        past=past,
        base=base,
        head=base if head is None else head,
        live=live,
        lost_stages=lost,
        runs=tuple(runs),
        is_rollback=is_rollback,
        rollback=rollback,
        missing_layers=missing,
        sources=sources,
        verdicts=tuple(StepVerdict(step=s, verdict=v) for s, v in sorted(trusted.verdicts.items())),
        cannot_hear=tuple(
            (DeviceId(device), speaker)
            for device, evidence in trusted.evidence.items()
            for speaker in evidence.cannot_hear
        ),
        reasons=tuple(reason for reason in reasons if reason),
    )


def find_live(past: Past, trusted: Trusted) -> tuple[Live, ...]:
    """Item 1: stages whose owner under the standing plan reports them, whole and valid."""
    live = []
    for index, stage in enumerate(past.plan.stages):
        evidence = trusted.evidence.get(stage.device)
        report = evidence.stage if evidence is not None else None
        if report is None or report.is_restoring or report.layers != stage.layers:
            continue
        entry = Live(
            stage=index, device=stage.device, version=report.version, is_full=report.is_full
        )
        live.append(entry)
    return tuple(live)


def is_in_step(entry: Live, head: int) -> bool:
    """Item 2: at the head, or one behind with the gradient that leads there."""
    return entry.version == head or (entry.version == head - 1 and entry.is_full)


def choose_base(live: tuple[Live, ...], head: int | None) -> int:
    """Item 3: T. If all live stages have the whole gradient of the head, it counts as committed:
    stage 0 may have committed it, and its Done may have been shown."""
    if head is None:
        return 0
    if all(entry.version == head and entry.is_full for entry in live):
        return head + 1
    return head


def group(lost: tuple[int, ...]) -> list[tuple[int, int]]:
    """Runs of adjacent stages, as (first, last)."""
    runs: list[tuple[int, int]] = []
    for index in lost:
        if runs and runs[-1][1] == index - 1:
            runs[-1] = runs[-1][0], index
        else:
            runs.append((index, index))
    return runs


def all_sources(trusted: Trusted) -> tuple[Source, ...]:
    """Valid copies, and valid live states: before such a state is replaced it becomes a copy."""
    found: list[Source] = []
    for device, evidence in trusted.evidence.items():
        owner = DeviceId(device)
        found.extend(Source(device=owner, copy=copy) for copy in evidence.copies)
        stage = evidence.stage
        if stage is not None and not stage.is_restoring:
            found.append(Source(device=owner, copy=state_copy(stage, evidence.verdicts)))
    return tuple(found)


def state_copy(stage: StageReport, verdicts: tuple[StepVerdict, ...]) -> Copy:
    """The copy that a live state would make."""
    verdict = next((v.verdict for v in verdicts if v.step == stage.version - 1), None)
    return Copy(
        first_layer=stage.first_layer,
        last_layer=stage.last_layer,
        tag=stage.tag,
        version=stage.version,
        verdict=verdict,
    )


def cover(sources: tuple[Source, ...], layers: range, version: int) -> set[int]:
    """Which of `layers` have a copy at `version`."""
    have: set[int] = set()
    for source in sources:
        if source.copy.version == version:
            have |= set(source.copy.layers) & set(layers)
    return have


def is_covered(sources: tuple[Source, ...], layers: range, version: int) -> bool:
    return cover(sources, layers, version) == set(layers)


def common_version(
    past: Past, sources: tuple[Source, ...], *, at_most: int | None = None
) -> int | None:
    """Item 5: newest version of which every layer has a copy, none older than the durable one."""
    layers = range(past.plan.num_layers)
    versions = {source.copy.version for source in sources}
    for version in sorted(versions, reverse=True):
        if version < past.durable:
            return None
        if (at_most is None or version <= at_most) and is_covered(sources, layers, version):
            return version
    return None


def missing_layers(past: Past, sources: tuple[Source, ...]) -> tuple[int, ...]:
    """Layers of which no copy at the durable version is here."""
    layers = range(past.plan.num_layers)
    return tuple(sorted(set(layers) - cover(sources, layers, past.durable)))


def newest_start(
    past: Past,
    trusted: Trusted,
    live: tuple[Live, ...],
    sources: tuple[Source, ...],
    first: int,
    last: int,
    base: int,
) -> int | None:
    """Item 4: newest v <= T at which the whole run has copies and from which both edges' logs, the
    rows and the verdicts reach T."""
    plan = past.plan
    layers = range(plan.stages[first].first_layer, plan.stages[last].last_layer + 1)
    versions = {source.copy.version for source in sources if source.copy.version <= base}
    for version in sorted(versions, reverse=True):
        if not is_covered(sources, layers, version):
            continue
        if version == base:
            return version
        if not can_replay(past, trusted, live, first, last, version, base):
            return None  # logs that do not reach from here reach from no older version
        return version
    return None


def can_replay(
    past: Past,
    trusted: Trusted,
    live: tuple[Live, ...],
    first: int,
    last: int,
    version: int,
    base: int,
) -> bool:
    """Whether steps `version .. base` - 1 can be computed again by this run alone."""
    plan = past.plan
    layers = range(plan.stages[first].first_layer, plan.stages[last].last_layer + 1)
    owners = {entry.stage: entry.device for entry in live}
    if first > 0 and not has_log(
        trusted, owners[first - 1], "forward", layers.start, version, base
    ):
        return False
    if last + 1 < len(plan.stages) and not has_log(
        trusted, owners[last + 1], "backward", layers.stop, version, base
    ):
        return False
    reads_rows = first == 0 or last + 1 == len(plan.stages)
    if reads_rows and version < past.data_from:
        return False
    known = trusted.verdicts
    if any(step not in known for step in range(version, base - 1)):
        return False
    # What is lent to the run or through it: made by the step before the one that needs it.
    is_lent_to = any(
        tie.owner_layer < layers.start <= max(tie.borrower_layers, default=-1) for tie in past.ties
    )
    above = owners[first - 1] if first > 0 else ""
    return not is_lent_to or has_log(trusted, above, "tied", layers.start, version - 1, base - 1)


def has_log(
    trusted: Trusted, device: str, direction: str, cut: int, first_step: int, stop_step: int
) -> bool:
    """Whether a live neighbour logged all of these steps at this very cut."""
    need = set(range(first_step, stop_step))
    for span in trusted.evidence[device].logs:
        if (span.direction, span.cut) == (direction, cut):
            need -= set(range(span.first_step, span.stop_step))
    return not need


def _say_live(live: tuple[Live, ...], base: int, head: int | None) -> str:
    if head is None:
        return ""
    if base > head:
        return (
            f"all {len(live)} live stages hold the whole gradient of step {head}: it is committed"
        )
    behind = [str(entry.stage) for entry in live if entry.version < head]
    if behind:
        return f"head {head}; stages {', '.join(behind)} apply step {head - 1}"
    return f"head {head}; partial work on step {head} is dropped"


def _say_run(past: Past, first: int, last: int, version: int, base: int) -> str:
    names = f"stage {first}" if first == last else f"stages {first}-{last}"
    if version == base:
        return f"{names}: a copy of version {base}"
    return f"{names}: replay of steps {version}-{base - 1} from a copy of version {version}"
