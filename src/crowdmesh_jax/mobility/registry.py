"""Movement models by name: the built-in ones and those that other packages bring.

A package adds one through the entry point group `crowdmesh_jax.mobility`: a name and a class (or
function) that takes the options and returns an object with `start(devices, generator)`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from importlib import metadata
from types import MappingProxyType
from typing import Any, cast

from ..errors import InvalidValueError
from .gauss_markov import GaussMarkov
from .group import GroupMovement
from .movement import MovementModel
from .static import Static
from .waypoint import RandomWaypoint

ENTRY_POINT_GROUP = "crowdmesh_jax.mobility"

_BUILT_IN: Mapping[str, tuple[Callable[..., Any], str]] = MappingProxyType(
    {
        "random_waypoint": (RandomWaypoint, "straight to a random place, a pause, and on"),
        "gauss_markov": (GaussMarkov, "velocities that remember themselves, borders that reflect"),
        "group": (GroupMovement, "groups around centres that move as random waypoints"),
        "static": (Static, "nobody moves"),
    }
)


def movement_models() -> Mapping[str, str]:
    """Name -> one line on it, built-in models first, then those of other packages."""
    found = {name: line for name, (_, line) in _BUILT_IN.items()}
    for point in sorted(metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda p: p.name):
        found.setdefault(point.name, f"from {point.value}")
    return MappingProxyType(found)


def make_movement_model(model: str | MovementModel, **options: Any) -> MovementModel:
    """The model of that name with those options, or the object itself.

    Raises:
        InvalidValueError: No model of that name (names those known), an option that it does not
            take, or an object without `start`.

    Example:
        >>> from crowdmesh_jax.mobility import Area, make_movement_model
        >>> make_movement_model("static", area=Area.square(50)).area.width_m
        50
    """
    if isinstance(model, str):
        if model in _BUILT_IN:
            factory: Any = _BUILT_IN[model][0]
        else:
            points = {p.name: p for p in metadata.entry_points(group=ENTRY_POINT_GROUP)}
            if model not in points:
                close = difflib.get_close_matches(model, movement_models(), n=1, cutoff=0.5)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise InvalidValueError(
                    f"no movement model {model!r}{hint}\n  known    {', '.join(movement_models())}"
                )
            factory = points[model].load()
        try:
            made = factory(**options)
        except TypeError as exc:
            raise InvalidValueError(
                f"movement model {model!r} does not take these options: {exc}"
            ) from exc
    else:
        if options:
            raise InvalidValueError(
                f"options {', '.join(sorted(options))} come with a model's name; a model object is"
                " made with its own"
            )
        made = model
    if not callable(getattr(made, "start", None)):
        raise InvalidValueError(
            f"{made!r} is no movement model: it has no start(devices, generator)"
        )
    return cast(MovementModel, made)
