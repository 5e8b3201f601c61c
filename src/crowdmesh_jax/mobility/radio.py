"""What a link between two devices carries, from their distance: rate, loss, range.

`DiscRadio` is the textbook's: one rate up to the range, nothing beyond. `LogDistanceRadio` knows
path loss and shadowing; the rate follows from the received power by a standard's table or by a
truncated Shannon bound. docs/mobility.md has the sources.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike

from ..errors import InvalidValueError
from . import checks
from .checks import Floats

MBIT_S = 1e6 / 8
"""Bytes per second."""


class Radio(Protocol):
    """Distance to rate, loss and range; all vectorised."""

    @property
    def range_m(self) -> float:
        """Beyond it there is no link."""
        ...

    def rate_bytes_per_s(self, distance_m: ArrayLike) -> Floats:
        """What a link of that length carries; 0 out of range."""
        ...

    def loss(self, distance_m: ArrayLike) -> Floats:
        """Probability that it is down; 1 out of range."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscRadio:
    """One rate within a disc."""

    range_m: float
    in_range_bytes_per_s: float
    in_range_loss: float = 0.0

    def __post_init__(self) -> None:
        checks.number("radio: range_m", self.range_m, above=True)
        checks.number("radio: in_range_bytes_per_s", self.in_range_bytes_per_s, above=True)
        if checks.number("radio: in_range_loss", self.in_range_loss) > 1:
            raise InvalidValueError(f"radio: in_range_loss must be <= 1, got {self.in_range_loss}")

    def rate_bytes_per_s(self, distance_m: ArrayLike) -> Floats:
        """The rate, or 0."""
        near = checks.at_least_zero("distance_m", distance_m) <= self.range_m
        return np.where(near, self.in_range_bytes_per_s, 0.0)

    def loss(self, distance_m: ArrayLike) -> Floats:
        """The loss, or 1."""
        near = checks.at_least_zero("distance_m", distance_m) <= self.range_m
        return np.where(near, self.in_range_loss, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RateTable:
    """Rates by the least power that a receiver needs for each."""

    steps: tuple[tuple[float, float], ...]
    """(dBm, bytes per second), both increasing."""

    def __post_init__(self) -> None:
        if not self.steps:
            raise InvalidValueError("a rate table needs at least one step")
        for power, rate in self.steps:
            checks.number("rate table: power", power, least=-1e4)
            checks.number("rate table: rate", rate, above=True)
        for (power, rate), (higher, faster) in pairwise(self.steps):
            if not (power < higher and rate < faster):
                raise InvalidValueError(
                    f"rate table: powers and rates must increase, got {higher} dBm for {faster} B/s"
                    f" after {power} dBm for {rate} B/s"
                )

    @property
    def least_dbm(self) -> float:
        """Below it nothing is received."""
        return self.steps[0][0]

    def rate_bytes_per_s(self, received_dbm: Floats) -> Floats:
        """The best rate that the power allows."""
        powers = np.array([power for power, _ in self.steps])
        rates = np.array([0.0, *(rate for _, rate in self.steps)])
        return rates[np.searchsorted(powers, received_dbm, "right")]


@dataclass(frozen=True, slots=True, kw_only=True)
class TruncatedShannon:
    """`efficiency` of Shannon's bound between a least SNR and a ceiling.

    Source: 3GPP TR 36.942, annex A.1 (downlink: 0.6, -10 dB, 4.4 bit/s/Hz); remembered.
    """

    bandwidth_hz: float = 20e6
    noise_figure_db: float = 7.0
    efficiency: float = 0.6
    snr_min_db: float = -10.0
    most_bit_per_s_hz: float = 4.4

    def __post_init__(self) -> None:
        for name in ("bandwidth_hz", "efficiency", "most_bit_per_s_hz"):
            checks.number(f"shannon: {name}", getattr(self, name), above=True)
        for name in ("noise_figure_db", "snr_min_db"):
            checks.number(f"shannon: {name}", getattr(self, name), least=-1e4)

    @property
    def noise_dbm(self) -> float:
        """Thermal noise at 290 K, -174 dBm/Hz, over the band, and the receiver's own."""
        return -174.0 + 10 * math.log10(self.bandwidth_hz) + self.noise_figure_db

    @property
    def least_dbm(self) -> float:
        """Below it nothing is received."""
        return self.noise_dbm + self.snr_min_db

    def rate_bytes_per_s(self, received_dbm: Floats) -> Floats:
        """Bytes per second at that power."""
        snr = 10 ** ((received_dbm - self.noise_dbm) / 10)
        bits = np.minimum(self.efficiency * np.log2(1 + snr), self.most_bit_per_s_hz)
        return np.where(received_dbm >= self.least_dbm, bits * self.bandwidth_hz / 8, 0.0)


WIFI_N_20MHZ = RateTable(
    steps=tuple(
        (float(power), 0.65 * rate * MBIT_S)
        for power, rate in (
            (-82, 6.5), (-79, 13.0), (-77, 19.5), (-74, 26.0),
            (-70, 39.0), (-66, 52.0), (-65, 58.5), (-64, 65.0),
        )
    )
)  # fmt: skip
"""802.11n, one antenna, 20 MHz, long guard interval: rates of MCS 0 to 7 and the least sensitivity
that the standard asks of a receiver for each (IEEE 802.11-2020, HT PHY; remembered). 65 % of the
rate is payload, an estimate: acknowledgements, gaps and headers take the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogDistanceRadio:
    """Received power falls with the logarithm of the distance, and shadows scatter it.

    power = `tx_power_dbm` - `reference_loss_db` - 10 `exponent` log10(d / 1 m) - shadow; shadows
    are normal in dB (Rappaport, "Wireless Communications", ch. 4). Defaults: ns-3's for Wi-Fi
    (16 dBm, 46.68 dB at 1 m and 5.15 GHz, exponent 3); measured around offices: exponents 3.3
    outside and 4.0 inside, below 8 dB of shadowing (Faria, Stanford TR-KP06-0118, 2005).
    """

    tx_power_dbm: float = 16.0
    reference_loss_db: float = 46.68
    exponent: float = 3.0
    shadowing_db: float = 6.0
    """Standard deviation over places; 0: none."""
    rates: RateTable | TruncatedShannon = WIFI_N_20MHZ

    def __post_init__(self) -> None:
        checks.number("radio: tx_power_dbm", self.tx_power_dbm, least=-1e4)
        checks.number("radio: reference_loss_db", self.reference_loss_db)
        checks.number("radio: exponent", self.exponent, above=True)
        checks.number("radio: shadowing_db", self.shadowing_db)

    @property
    def range_m(self) -> float:
        """Where the mean power is just enough for the lowest rate."""
        spare_db = self.tx_power_dbm - self.reference_loss_db - self.rates.least_dbm
        return 10 ** (spare_db / (10 * self.exponent))

    def received_dbm(self, distance_m: ArrayLike, shadow_db: ArrayLike = 0.0) -> Floats:
        """Power at that distance; within a metre it stays what it is at one."""
        distance = np.maximum(checks.at_least_zero("distance_m", distance_m), 1.0)
        lost_db = self.reference_loss_db + 10 * self.exponent * np.log10(distance)
        return self.tx_power_dbm - lost_db - checks.array("shadow_db", shadow_db)

    def rate_bytes_per_s(self, distance_m: ArrayLike, shadow_db: ArrayLike = 0.0) -> Floats:
        """What a link of that length carries, given its shadow; 0 where too little arrives."""
        return self.rates.rate_bytes_per_s(self.received_dbm(distance_m, shadow_db))

    def loss(self, distance_m: ArrayLike) -> Floats:
        """Probability that a shadow takes the link down: Q(margin / shadowing); 1/2 at `range_m`.

        Beyond `range_m` there is no link by definition, so it is 1 there.
        """
        distance = checks.at_least_zero("distance_m", distance_m)
        margin_db = self.received_dbm(distance) - self.rates.least_dbm
        if self.shadowing_db == 0:
            return np.where(margin_db >= 0, 0.0, 1.0)
        outage = _upper_tail(margin_db / self.shadowing_db)
        return np.where(margin_db >= 0, outage, 1.0)

    def draw_shadows_db(self, count: int, generator: Generator) -> Floats:
        """Shadows of `count` links. A link has the same one in both directions."""
        return self.shadowing_db * generator.standard_normal(count)

    def move_shadows_db(
        self,
        shadow_db: ArrayLike,
        moved_m: ArrayLike,
        generator: Generator,
        *,
        correlation_m: float = 20.0,
    ) -> Floats:
        """Shadows after the ends have moved relative to each other: exp(-moved / correlation).

        Source: Gudmundson, Electronics Letters 27(23), 1991; 20 m are a city's, remembered.
        """
        before = checks.array("shadow_db", shadow_db)
        moved = checks.at_least_zero("moved_m", moved_m)
        kept = np.exp(-moved / checks.number("correlation_m", correlation_m, above=True))
        fresh = np.sqrt((1 - kept) * (1 + kept))
        return kept * before + fresh * self.shadowing_db * generator.standard_normal(before.shape)


def _upper_tail(score: Floats) -> Floats:
    """Q(z) of the standard normal; numpy has no erfc, and these arrays are of thousands."""
    flat = [0.5 * math.erfc(z / math.sqrt(2)) for z in np.asarray(score).ravel().tolist()]
    return np.array(flat).reshape(np.shape(score))
