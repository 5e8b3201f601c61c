"""Chains timed by a schedule for which another one stands in while solvers search.

The closed form and the depths that solvers know are those of the stand-in (`search_schedule`). Here
a finished chain is timed, and its memory counted, by the schedule that was asked for; under `zb-h1`
the microbatches in flight are chosen, too. It knows no search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from ...core import CutTimes, Schedule, StageTimes, evaluate_step_s, make_schedule

if TYPE_CHECKING:
    from .tables import Chain, Segment

Warmups = tuple[int | None, ...]


class OwnSchedule:
    """The problem's own schedule.

    Args:
        holds: Whether a segment's device has memory for (microbatches in flight, those among them
            that await their weight part).
    """

    def __init__(
        self, name: str, microbatches: int, holds: Callable[[Segment, int, int], bool]
    ) -> None:
        self._name, self._microbatches, self._holds = name, microbatches, holds

    def best(
        self, chain: Chain, stages: Sequence[StageTimes], cuts: Sequence[CutTimes]
    ) -> tuple[float, Warmups]:
        """Step time and the warm-ups that reach it; infinity where memory holds none."""
        found: tuple[float, Warmups] = (math.inf, (None,) * len(chain))
        for warmups in self._warmups(chain):
            schedule = make_schedule(self._name, len(chain), self._microbatches, warmups)
            if all(self._fits(segment, schedule, index) for index, segment in enumerate(chain)):
                step_s = evaluate_step_s(schedule, stages, cuts)
                if step_s < found[0]:
                    found = step_s, warmups
        return found

    def _fits(self, segment: Segment, schedule: Schedule, stage: int) -> bool:
        in_flight, awaiting = schedule.max_in_flight(stage), schedule.max_awaiting_weight(stage)
        return self._holds(segment, in_flight, awaiting)

    def _warmups(self, chain: Chain) -> Iterator[Warmups]:
        """What is worth trying: under `zb-h1` as many in flight as it asks for or as memory holds,
        and as few as 1F1B has, which is never slower than that."""
        count = len(chain)
        if self._name != "zb-h1":
            yield (None,) * count
            return
        fitting: list[int | None] = []
        for index, segment in enumerate(chain):
            depth = count - index
            most = count
            while most > depth and not self._holds(
                segment,
                min(most, self._microbatches),
                min(most - depth + 1, self._microbatches),
            ):
                most -= 1
            fitting.append(None if most == count else most)
        yield tuple(fitting)
        yield tuple(range(count, 0, -1))
