"""Recorded rates of links: what a link carried over time, and when a transfer over it would end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from ..errors import DataError, DataFileError, InvalidValueError
from . import checks
from .checks import Floats
from .opening import MAX_BYTES, MAX_ROWS, decimal, opened, rows_of

UNITS = {
    "bytes_per_s": 1.0, "kbyte_per_s": 1e3, "kbps": 125.0, "kbit_per_s": 125.0,
    "mbps": 125_000.0, "mbit_per_s": 125_000.0,
}  # fmt: skip
"""How a column's name ends -> bytes per second of one of its units."""
MAHIMAHI_BYTES = 1500


class RateTrace:
    """A rate that changes in steps, repeated when it ends."""

    def __init__(
        self, times_s: ArrayLike, rates_bytes_per_s: ArrayLike, *, end_s: float | None = None,
        where: str = "rate trace",
    ) -> None:  # fmt: skip
        """From each time on, its rate holds until the next.

        Args:
            times_s: `[rows]`, ascending; told from 0 on, so the first is taken off.
            end_s: When the last rate ends and the first comes again; None: after the mean step.

        Raises:
            DataError: Times that do not ascend, nothing in it, a link that never carries anything.
            InvalidValueError: A value that is not finite or below 0.
        """
        times = checks.array(f"{where}: times_s", times_s)
        rates = checks.at_least_zero(f"{where}: rates_bytes_per_s", rates_bytes_per_s)
        if times.ndim != 1 or times.shape != rates.shape or not len(times):
            raise DataError(
                f"{where}: needs as many times as rates, got {times.shape} and {rates.shape}"
            )
        if (np.diff(times) <= 0).any():
            row = int(np.flatnonzero(np.diff(times) <= 0)[0])
            raise DataError(
                f"{where}: times must ascend, got {times[row]:g} then {times[row + 1]:g} s"
            )
        if not rates.any():
            raise DataError(f"{where}: every rate is 0; nothing would ever arrive")
        span_s = float(times[-1] - times[0])
        if end_s is None:
            end_s = float(times[-1]) + (span_s / (len(times) - 1) if len(times) > 1 else 1.0)
        if not float(times[-1]) < end_s < float("inf"):
            raise DataError(f"{where}: end_s must be after {times[-1]:g} s, got {end_s}")
        self._edges_s = checks.frozen(np.append(times, end_s) - times[0])
        self.times_s = self._edges_s[:-1]
        self.rates_bytes_per_s = checks.frozen(rates)
        self.duration_s = float(self._edges_s[-1])
        self._carried = np.concatenate([[0.0], np.cumsum(rates * np.diff(self._edges_s))])

    @property
    def mean_bytes_per_s(self) -> float:
        """Over one time through."""
        return float(self._carried[-1]) / self.duration_s

    def at(self, time_s: ArrayLike) -> Floats:
        """Bytes per second at those times (>= 0), of any shape."""
        inside = np.mod(checks.at_least_zero("time_s", time_s), self.duration_s)
        rows = np.searchsorted(self._edges_s, inside, "right") - 1
        return self.rates_bytes_per_s[np.minimum(rows, len(self.rates_bytes_per_s) - 1)]

    def carried_bytes(self, time_s: ArrayLike) -> Floats:
        """Bytes that go through from 0 to those times."""
        rounds, inside = np.divmod(checks.at_least_zero("time_s", time_s), self.duration_s)
        return rounds * self._carried[-1] + np.interp(inside, self._edges_s, self._carried)

    def transfer_s(self, size_bytes: ArrayLike, start_s: ArrayLike = 0.0) -> Floats:
        """Seconds that so many bytes take if they have the link from `start_s` on."""
        size = checks.at_least_zero("size_bytes", size_bytes)
        goal = self.carried_bytes(start_s) + size
        rounds, inside = np.divmod(goal, self._carried[-1])
        # Where the rate is 0 many times have carried the same: the first of them is the end.
        row = np.searchsorted(self._carried, inside, "left")
        row = np.clip(row, 1, len(self._carried) - 1)
        rate = self.rates_bytes_per_s[row - 1]
        short = np.where(rate > 0, (self._carried[row] - inside) / np.where(rate > 0, rate, 1), 0)
        # A goal at a whole round ended in the round before, as soon as its last byte was through.
        last = int(np.flatnonzero(self.rates_bytes_per_s)[-1]) + 1
        at_round = inside <= 0
        ended_s = np.where(
            at_round,
            (rounds - 1) * self.duration_s + self._edges_s[last],
            rounds * self.duration_s + self._edges_s[row] - short,
        )
        return np.where(size > 0, np.maximum(ended_s - np.asarray(start_s, np.float64), 0.0), 0.0)


def read_rate_trace(
    path: str | Path,
    *,
    rate: str = "rate_bytes_per_s",
    time: str = "t_s",
    where: Mapping[str, str] | None = None,
    max_bytes: int = MAX_BYTES,
    max_rows: int = MAX_ROWS,
) -> RateTrace:
    """A link's rates from a csv file, plain or gzip's; the first line names the columns.

    Args:
        rate: The column to read; its unit is how it ends: `bytes_per_s`, `kbyte_per_s`, `kbps` or
            `kbit_per_s`, `mbps` or `mbit_per_s` (bits are decimal, eight to a byte).
        time: The column of seconds, ascending; rows of the same time are averaged.
        where: Columns and what they must say, `{"trace": "7"}`, for files of many traces.

    Raises:
        DataFileError: Missing, damaged, without such columns or rows, values that are none.
        InvalidValueError: A column whose unit is not known.

    Example:
        `read_rate_trace("traces.csv.gz", rate="dl_kbps", where={"trace": "12"})`
    """
    path = Path(path)
    unit = max((u for u in UNITS if rate.endswith(f"_{u}") or rate == u), key=len, default=None)
    if unit is None:
        raise InvalidValueError(
            f"the unit of column {rate!r} is not known; its name must end in one of"
            f" {', '.join(UNITS)}"
        )
    asked = dict(where or {})
    times_s: list[float] = []
    rates: list[float] = []
    counts: list[int] = []
    with opened(path, max_bytes) as stream:
        for number, cells in rows_of(stream, path, (time, rate, *asked), max_rows):
            if any(
                cell.strip() != value for cell, value in zip(cells[2:], asked.values(), strict=True)
            ):
                continue
            place = f"line {number}"
            now_s = decimal(path, place, time, cells[0])
            now = decimal(path, place, rate, cells[1])
            if now < 0:
                raise DataFileError(f"{path}, {place}: {rate} must be >= 0, got {now:g}")
            if times_s and now_s < times_s[-1]:
                raise DataFileError(
                    f"{path}, {place}: times must ascend, got {now_s:g} after {times_s[-1]:g} s;"
                    " if the file holds several traces, choose one with `where`"
                )
            if times_s and now_s == times_s[-1]:
                rates[-1] += now
                counts[-1] += 1
            else:
                times_s.append(now_s)
                rates.append(now)
                counts.append(1)
    if not times_s:
        told = f" with {asked}" if asked else ""
        raise DataFileError(f"{path}: no rows{told}")
    means = np.array(rates) / np.array(counts) * UNITS[unit]
    return _told_by_file(path, times_s, means)


def read_mahimahi(
    path: str | Path, *, bin_s: float = 0.1, max_bytes: int = MAX_BYTES, max_rows: int = MAX_ROWS
) -> RateTrace:
    """A link's rates from a Mahimahi trace, the format of many recorded cellular links.

    Each line is a millisecond at which 1,500 bytes may pass; counted here in bins of `bin_s`.

    Source: Netravali et al., "Mahimahi", USENIX ATC 2015.

    Raises:
        DataFileError: Missing, damaged, a line that is no ascending whole number.
    """
    path = Path(path)
    bin_s = checks.number("bin_s", bin_s, above=True)
    stamps: list[int] = []
    with opened(path, max_bytes) as stream:
        for number, line in enumerate(stream.lines(), start=1):
            text = line.strip()
            if not text:
                continue
            if not text.isascii() or not text.isdigit() or len(text) > 12:
                raise DataFileError(
                    f"{path}, line {number}: expected a whole number of ms, got {text[:40]!r}"
                )
            if stamps and int(text) < stamps[-1]:
                raise DataFileError(f"{path}, line {number}: times must ascend, got {text}")
            stamps.append(int(text))
            if len(stamps) > max_rows:
                raise DataFileError(f"{path}: more than {max_rows} rows; raise max_rows")
    if not stamps:
        raise DataFileError(f"{path}: no rows")
    # Mahimahi repeats a trace after its last time stamp, so that one is in the last bin.
    bins = max(1, int(np.ceil(stamps[-1] / 1e3 / bin_s - 1e-9)))
    if bins > max_rows:
        raise DataFileError(f"{path}: {bins} bins of {bin_s:g} s; raise bin_s")
    places = np.minimum((np.array(stamps) / 1e3 / bin_s).astype(np.int64), bins - 1)
    counts = np.bincount(places, minlength=bins)
    edges_s = np.arange(bins) * bin_s
    return _told_by_file(path, edges_s, counts * MAHIMAHI_BYTES / bin_s, end_s=bins * bin_s)


def _told_by_file(
    path: Path, times_s: ArrayLike, rates: ArrayLike, end_s: float | None = None
) -> RateTrace:
    try:
        return RateTrace(times_s, rates, end_s=end_s, where=str(path))
    except DataError as exc:
        raise DataFileError(exc.message) from exc
