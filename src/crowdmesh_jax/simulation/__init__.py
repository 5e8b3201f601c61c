"""Training runs in virtual time: one pipeline over a moving crowd, under one policy, from one seed.

    cm.simulation.compare_policies("calm", ["mobility", "neighbour"], range(1000, 1005))

The policies, costs, intervals and hand-overs are those of `propagation`; the movement, crashes and
noise those of `mobility`. docs/policies_compared.md has the model, its assumptions and the figures.
"""

from .body import Body
from .compare import Comparison, Mean, Row, compare_policies, simulate, summarise, tune
from .outcome import CAUSES, Outcome
from .setups import ABLATIONS, POLICIES, Setup, make_setup
from .tuned import INTERVAL_SCALES, TRIES, TUNING_SEEDS
from .world import World

__all__ = [
    "ABLATIONS",
    "CAUSES",
    "INTERVAL_SCALES",
    "POLICIES",
    "TRIES",
    "TUNING_SEEDS",
    "Body",
    "Comparison",
    "Mean",
    "Outcome",
    "Row",
    "Setup",
    "World",
    "compare_policies",
    "make_setup",
    "simulate",
    "summarise",
    "tune",
]
