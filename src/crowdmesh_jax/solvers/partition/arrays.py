"""The tables as arrays, for what looks at all segments and links at once. It knows no search."""

from __future__ import annotations

import numpy as np

from .tables import Tables

_CALL = 2500
"""Array elements whose work a call of numpy costs: all there is where layers are few."""


def table_work(tables: Tables, devices: int | None = None) -> float:
    """Steps that a table over (device set, cut, device) takes, for all devices or so many."""
    devices = len(tables.devices) if devices is None else devices
    return 2.0**devices * devices * (tables.num_layers**2 + _CALL)


class Costs:
    """The tables as arrays: seconds by (device, first, end) and by (source, target, cut)."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        count, layers = len(tables.devices), tables.num_layers
        self.compute = np.full((count, layers + 1, layers + 1), np.inf)
        shape = (max(1, tables.max_stages) + 1, *self.compute.shape)
        self.by_depth = np.full(shape, np.inf)
        """The same by the number of stages to the end, itself included: memory depends on it."""
        rows = [(s.device, s.first, s.end, s.max_depth, s.compute_s) for s in tables.segments]
        if rows:
            device, first, end, deepest = (
                np.array(column) for column in list(zip(*rows, strict=True))[:4]
            )
            seconds = np.array([row[4] for row in rows])
            np.minimum.at(self.compute, (device, first, end), seconds)
            for depth in range(1, shape[0]):
                fits = deepest >= depth
                at = (np.full(int(fits.sum()), depth), device[fits], first[fits], end[fits])
                np.minimum.at(self.by_depth, at, seconds[fits])
        self.round_trip = np.full((count, count, layers + 1), np.inf)
        self.busiest = np.full((count, count, layers + 1), np.inf)
        for source in range(count):
            for target in range(count):
                for layer in range(1, layers):
                    cut = tables.cut(source, target, layer)
                    if cut is not None:
                        self.round_trip[source, target, layer] = cut.round_trip_s
                        self.busiest[source, target, layer] = cut.busiest_s
