"""A crowd in a few figures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..core import Crowd


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """How one figure is spread over the devices that have it."""

    figure: str
    """The field of `Device` or `Access`; `rows`; `label_skew`: total variation distance between the
    device's mix of classes and the crowd's, 0 (the same) to 1."""
    devices: int
    """How many have it."""
    least: float
    p10: float
    median: float
    p90: float
    most: float


def summarise(crowd: Crowd) -> tuple[Summary, ...]:
    """Quantiles of speeds, memory, links, data and hazards; what nobody has is left out."""
    devices = crowd.devices
    ways = [device.access for device in devices if device.access is not None]
    columns = {
        "flops_per_s": [device.flops_per_s for device in devices],
        "memory_bytes": [device.memory_bytes for device in devices],
        "uplink_bytes_per_s": [way.uplink_bytes_per_s for way in ways],
        "downlink_bytes_per_s": [way.downlink_bytes_per_s for way in ways],
        "latency_s": [way.latency_s for way in ways],
        "rows": [device.rows for device in devices if device.label_counts],
        "label_skew": _skews(crowd),
        "leave_hazard_per_s": [d.leave_hazard_per_s for d in devices if d.leave_hazard_per_s],
    }
    found = []
    for figure, column in columns.items():
        if not column:
            continue
        least, p10, median, p90, most = np.quantile(column, [0, 0.1, 0.5, 0.9, 1]).tolist()
        found.append(
            Summary(
                figure=figure, devices=len(column),
                least=least, p10=p10, median=median, p90=p90, most=most,
            )
        )  # fmt: skip
    return tuple(found)


def _skews(crowd: Crowd) -> list[float]:
    """Of each device with rows. Devices of a crowd file may count different numbers of classes."""
    counted = [device.label_counts for device in crowd.devices if device.rows]
    if not counted:
        return []
    table = np.zeros((len(counted), max(map(len, counted))))
    for row, counts in zip(table, counted, strict=True):
        row[: len(counts)] = counts
    mixes = table / table.sum(axis=1, keepdims=True)
    return (np.abs(mixes - table.sum(axis=0) / table.sum()).sum(axis=1) / 2).tolist()
