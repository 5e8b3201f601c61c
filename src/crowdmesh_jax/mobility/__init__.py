"""How devices move, what their links carry, how long links last, when devices leave.

    movement = cm.mobility.Movement(cm.mobility.scenario("waypoint").model(), 24, seed=1)

The world's truth is `Movement` and its `Snapshot`s; what a policy may know is `Sightings`, past and
noisy, from an `Observer`. Everything is vectorised over devices and drawn from seeds.
docs/mobility.md has the models with their sources.
"""

from .departures import Crashes, draw_crashes
from .gauss_markov import GaussMarkov
from .group import GroupMovement
from .hazard import (
    GammaPrior,
    combined_hazard_per_s,
    crossing_hazard_per_s,
    exponential_hazard_per_s,
    leave_probability,
    movement_hazard_per_s,
    time_to_leave_area_s,
    time_to_leave_disc_s,
    weibull_hazard_per_s,
    weibull_shape,
)
from .heartbeats import HeartbeatLog, Sessions
from .lifetime import link_lifetime_s, pairwise_lifetime_s, relative_lifetime_s
from .links import crowd_at
from .movement import Area, Movement, MovementModel, Snapshot, Walk
from .neighbours import pairs_in_range
from .picture import paths_svg
from .radio import (
    WIFI_N_20MHZ,
    DiscRadio,
    LogDistanceRadio,
    Radio,
    RateTable,
    TruncatedShannon,
)
from .rates import RateTrace, read_mahimahi, read_rate_trace
from .recorded import Recorded, Seats, Trace
from .registry import make_movement_model, movement_models
from .scenario import REPORTING_SEED, Scenario, scenario, scenarios
from .sightings import Observer, Sightings
from .smoothing import Smoother
from .static import Static
from .summary import MovementSummary, watch
from .traces import read_csv_trace, read_sumo_fcd
from .waypoint import RandomWaypoint

__all__ = [
    "REPORTING_SEED",
    "WIFI_N_20MHZ",
    "Area",
    "Crashes",
    "DiscRadio",
    "GammaPrior",
    "GaussMarkov",
    "GroupMovement",
    "HeartbeatLog",
    "LogDistanceRadio",
    "Movement",
    "MovementModel",
    "MovementSummary",
    "Observer",
    "Radio",
    "RandomWaypoint",
    "RateTable",
    "RateTrace",
    "Recorded",
    "Scenario",
    "Seats",
    "Sessions",
    "Sightings",
    "Smoother",
    "Snapshot",
    "Static",
    "Trace",
    "TruncatedShannon",
    "Walk",
    "combined_hazard_per_s",
    "crossing_hazard_per_s",
    "crowd_at",
    "draw_crashes",
    "exponential_hazard_per_s",
    "leave_probability",
    "link_lifetime_s",
    "make_movement_model",
    "movement_hazard_per_s",
    "movement_models",
    "pairs_in_range",
    "pairwise_lifetime_s",
    "paths_svg",
    "read_csv_trace",
    "read_mahimahi",
    "read_rate_trace",
    "read_sumo_fcd",
    "relative_lifetime_s",
    "scenario",
    "scenarios",
    "time_to_leave_area_s",
    "time_to_leave_disc_s",
    "watch",
    "weibull_hazard_per_s",
    "weibull_shape",
]
