"""What goes with an Install, beside the message: programs, rows, state, links to emulate.

Knows the programs of every set of cuts that was exported so far; which device runs a stage makes no
difference to its programs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..agent.envelope import Group, Key
from ..core import Crowd, PipelinePlan, values
from ..core.crowd import LOOPBACK_BYTES_PER_S, LOOPBACK_LATENCY_S
from ..data import DataSource, ShippableSource
from ..programs import StageBundle, bundle_to_arrays


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOutfit:
    """What goes with one stage's Install."""

    arrays: Group = field(repr=False)
    extra: Mapping[str, Any] = field(repr=False)


class Outfitter:
    """Makes what stages need, for any plan whose cuts it knows.

    Args:
        data: Goes with the first and last stages where it can be shipped.
        eval_data: The same of the evaluation set; None: there is no evaluation.
    """

    def __init__(self, crowd: Crowd, data: DataSource, eval_data: DataSource | None) -> None:
        self._crowd = crowd
        self._sources = {"data": data, "eval_data": eval_data}
        self._evaluates = eval_data is not None
        self._bundles: dict[Any, Sequence[StageBundle]] = {}

    def learn(self, plan: PipelinePlan, bundles: Sequence[StageBundle]) -> None:
        """These are the programs of the plan's cuts."""
        self._bundles[_cuts(plan)] = tuple(bundles)

    def knows(self, plan: PipelinePlan) -> bool:
        """Whether the programs of the plan's cuts were exported."""
        return _cuts(plan) in self._bundles

    def bundles(self, plan: PipelinePlan) -> Sequence[StageBundle]:
        """The programs of a plan that it knows."""
        return self._bundles[_cuts(plan)]

    def key(self, plan: PipelinePlan, stage: int) -> str:
        """Tells what a device must have to run the stage: equal keys, equal programs and rows."""
        manifest = self.bundles(plan)[stage].manifest
        digests = "".join(f"{program.name}{program.sha256}" for program in manifest.programs)
        place = f"{stage == 0:d}{stage == len(plan.stages) - 1:d}"
        layers = f"{manifest.first_layer}-{manifest.last_layer}"
        return f"{layers}:{hashlib.sha256((place + digests).encode()).hexdigest()[:16]}"

    def kit(self, plan: PipelinePlan, stage: int) -> StageOutfit:
        """Programs and rows of a stage: what stays the same at every version."""
        bundle = self.bundles(plan)[stage]
        text, programs = bundle_to_arrays(bundle)
        group: dict[Key, Any] = {("program", name, ""): data for name, data in programs.items()}
        first, last = stage == 0, stage == len(plan.stages) - 1
        extra: dict[str, Any] = {
            "manifest": text,
            "evaluates": self._evaluates,
            "kit": self.key(plan, stage),
        }
        for role, source in self._sources.items():
            if (first or last) and isinstance(source, ShippableSource):
                extra[role] = json.dumps(source.spec())
                for name, array in source.arrays(inputs=first, targets=last).items():
                    group[role, name, ""] = array
        return StageOutfit(arrays=group, extra=extra)

    def state(self, plan: PipelinePlan, stage: int, arrays: Mapping[Key, np.ndarray]) -> Group:
        """A stage's part of the whole state."""
        group: dict[Key, Any] = {}
        for leaf in self.bundles(plan)[stage].manifest.resident:
            role = "param" if leaf.role == "borrowed" else leaf.role
            group[leaf.key] = arrays[role, leaf.layer, leaf.path]
        return group

    def addressed(self, plan: PipelinePlan, stage: int) -> dict[str, Any]:
        """What depends on who runs the stages beside this one."""
        manifest = replace(self.bundles(plan)[stage].manifest, plan_sha256=plan.digest())
        return {
            "manifest": values.to_json(manifest),
            "kit": self.key(plan, stage),
            "links": self._links(plan, stage),
        }

    def _links(self, plan: PipelinePlan, stage: int) -> dict[str, list[float]]:
        """Links to emulate: those of the plan that are slower than the loopback."""
        me = plan.devices[stage]
        links = {}
        for other in (stage - 1, stage + 1):
            if not 0 <= other < len(plan.stages):
                continue
            link = self._crowd.link(me, plan.devices[other])
            assert link is not None, "checked against the crowd"
            real = link.bandwidth_bytes_per_s >= LOOPBACK_BYTES_PER_S
            if not (real and link.latency_s <= LOOPBACK_LATENCY_S):
                links[link.target] = [link.bandwidth_bytes_per_s, link.latency_s]
        return links


def _cuts(plan: PipelinePlan) -> tuple[Any, ...]:
    stages = tuple((s.first_layer, s.last_layer, s.recompute) for s in plan.stages)
    return (plan.microbatches, *stages)
