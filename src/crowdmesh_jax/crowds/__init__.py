"""Realistic crowds from a seed: named presets, and your own specification.

    crowd = cm.crowds.campus(200, seed=7)

Speeds, memories, links, amounts and mixes of data, hazards of leaving and places, drawn from what
was fitted to published measurements; docs/crowds.md has each figure with its source.
"""

from .generate import generate
from .presets import (
    CAMPUS,
    LAB_SHELF,
    PRESETS,
    TWO_CELLS,
    VEHICULAR,
    campus,
    lab_shelf,
    preset,
    two_cells,
    vehicular,
)
from .spec import CrowdSpec, DataSpec, Group, LinkClass, MachineClass
from .spreads import LogNormal, Quantiles
from .summary import Summary, summarise

__all__ = [
    "CAMPUS",
    "LAB_SHELF",
    "PRESETS",
    "TWO_CELLS",
    "VEHICULAR",
    "CrowdSpec",
    "DataSpec",
    "Group",
    "LinkClass",
    "LogNormal",
    "MachineClass",
    "Quantiles",
    "Summary",
    "campus",
    "generate",
    "lab_shelf",
    "preset",
    "summarise",
    "two_cells",
    "vehicular",
]
