"""Movement models by name: the built-in ones and those that other packages bring.

A package adds one through the entry point group `crowdmesh_jax.mobility_models`: a name and a class
(or function) that takes the options and returns an object with `start(devices, generator)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

from ..core.plugins import PlugIns
from .gauss_markov import GaussMarkov
from .group import GroupMovement
from .movement import MovementModel
from .static import Static
from .waypoint import RandomWaypoint

MODELS = PlugIns(
    group="crowdmesh_jax.mobility_models",
    kind="movement model",
    built_in=MappingProxyType(
        {
            "random_waypoint": (RandomWaypoint, "straight to a random place, a pause, and on"),
            "gauss_markov": (GaussMarkov, "velocities that remember themselves, borders reflect"),
            "group": (GroupMovement, "groups around centres that move as random waypoints"),
            "static": (Static, "nobody moves"),
        }
    ),
    method="start(devices, generator)",
)


def movement_models() -> Mapping[str, str]:
    """Name -> one line on it, built-in models first, then those of other packages."""
    return MODELS.listed()


def make_movement_model(model: str | MovementModel, **options: Any) -> MovementModel:
    """The model of that name with those options, or the object itself.

    Raises:
        InvalidValueError: No model of that name (names those known), an option that it does not
            take, or an object without `start`.
        MissingExtraError: The package that brings it cannot be imported.

    Example:
        >>> from crowdmesh_jax.mobility import Area, make_movement_model
        >>> make_movement_model("static", area=Area.square(50)).area.width_m
        50
    """
    return cast(MovementModel, MODELS.make(model, **options))
