"""Figures that crowds are drawn from, each with its source. docs/crowds.md has them as tables.

Fitted means: computed once from the measurements named, by the rule named; no row of them is here.
Estimates are marked as such.
"""

from __future__ import annotations

import math

from .spec import DataSpec, LinkClass, MachineClass
from .spreads import LogNormal, Quantiles

GIB = 2**30
MBIT_S = 1e6 / 8
"""Bytes per second."""


PHONE_SCORES = Quantiles(
    points=(
        (0.0015, 105.0), (0.05, 218.0), (0.1, 274.0), (0.25, 568.0), (0.5, 1548.0), (0.75, 2154.0),
        (0.9, 3414.0), (0.95, 3691.0), (0.99, 4185.0), (0.9985, 4310.0),
    )
)  # fmt: skip
"""Quantiles of the float CPU score of 333 phones of 2009-2019 (AI Benchmark ranking of early 2020,
as collected by Yang et al., FLASH, WWW 2021); the ends at 0.5 / 333. Largest over smallest: 41."""

PHONE_FLOPS_PER_S_PER_POINT = 1.5e10 / 1548
"""An estimate, and the least certain figure here: a phone of the median score (a Redmi Note 8, say)
reaches 15 GFLOP/s, a quarter of the peak of four Cortex-A73 at 2 GHz, as convolutions under XLA
usually do. FLASH measured 588 ms a batch of its femnist CNN on such a phone, with a Java framework:
8 times slower, if batches were of 10 (1 GFLOP). Linear in the score, since FLASH's times agree with
that: its upper two tiers are 1.3 to 3.3 apart, by model, and their scores 1.6 to 2.3, depending on
which phones they were."""

PHONE = MachineClass(
    name="phone",
    flops_per_s=PHONE_SCORES.times(PHONE_FLOPS_PER_S_PER_POINT),
    ram_bytes=(
        (GIB // 2, 10.0), (3 * GIB // 4, 4.0), (GIB, 40.0), (3 * GIB // 2, 7.0), (2 * GIB, 18.0),
        (3 * GIB, 13.0), (4 * GIB, 96.0), (6 * GIB, 78.0), (8 * GIB, 57.0), (10 * GIB, 1.0),
        (12 * GIB, 9.0),
    ),
    memory_share=1 / 3,
    rank_correlation=0.87,
)  # fmt: skip
"""RAM: how many of the same 333 phones have each size. Correlation: Spearman's 0.859 of score and
RAM, as 2 sin(pi r / 6). A third of the RAM for one program: an estimate of what Android leaves."""

LAPTOP = MachineClass(
    name="laptop",
    flops_per_s=LogNormal(median=1.2e11, sigma=0.5, low=3e10, high=5e11),
    ram_bytes=((8 * GIB, 4.0), (16 * GIB, 5.0), (32 * GIB, 1.0)),
    memory_share=0.5,
    rank_correlation=0.5,
)
"""Estimates: 4 to 16 cores with AVX2 at a quarter of their peak."""


def _board(name: str, flops_per_s: float, ram: dict[float, float], share: float) -> MachineClass:
    """A board that is sold in one speed: 8 % either way for cooling and supply."""
    return MachineClass(
        name=name,
        flops_per_s=LogNormal(
            median=flops_per_s, sigma=0.08, low=0.8 * flops_per_s, high=1.2 * flops_per_s
        ),
        ram_bytes=tuple((int(gib * GIB), weight) for gib, weight in ram.items()),
        memory_share=share,
    )


WORKSTATION = _board("workstation", 2.0e11, {16: 1.0}, 0.5)
JETSON = _board("jetson", 4.5e10, {8: 1.0}, 0.6)
PI5 = _board("pi5", 4.0e10, {4: 1.0, 8: 2.0}, 0.7)
PI4 = _board("pi4", 1.2e10, {2: 1.0, 4: 1.0}, 0.65)
"""Estimates from cores x clock x operations per cycle: examples/crowds/shelf.toml has the sums."""


_WIFI_SIGMA = 0.48
"""Between users: standard deviation of log mean downlink over the 19 users of FLASH."""
_WIFI_UPLINK = LogNormal(median=0.71, sigma=0.09, low=0.3, high=1.0)
"""Median up / down of the same users; sigma: quartile range of its log, over 1.349."""
_WIFI_LATENCY = LogNormal(median=0.002, sigma=0.4, low=0.001, high=0.01)
"""An estimate; a busy channel takes longer."""


def _wifi(name: str, median_mbit_s: float, most_mbit_s: float) -> LinkClass:
    return LinkClass(
        name=name,
        downlink_bytes_per_s=LogNormal(
            median=median_mbit_s * MBIT_S,
            sigma=_WIFI_SIGMA,
            low=0.1 * median_mbit_s * MBIT_S,
            high=most_mbit_s * MBIT_S,
        ),
        uplink_share=_WIFI_UPLINK,
        latency_s=_WIFI_LATENCY,
        cell_devices=25,
        reach_m=20.0,
    )


WIFI_5 = _wifi("wifi5", 153.0, 360.0)
"""Median of 153 Mbit/s: Wi-Fi of China in late 2021, where the line behind it often was the limit
(reports of bandwidth testers, told by Yang et al. on APNIC's blog of their SIGCOMM 2022 study). At
most 360: two antennas, 80 MHz, 10 m (duckware.com, "Wi-Fi 4/5/6", 2019)."""
WIFI_4 = _wifi("wifi4", 153.0 * 300 / 867, 200.0)
WIFI_6 = _wifi("wifi6", 153.0 * 1201 / 867, 360.0 * 1201 / 867)
"""As Wi-Fi 5 in proportion to the standards' link rates with two antennas: 300, 867, 1,201 Mbit/s.
802.11n carries at most 200 Mbit/s of payload in 40 MHz (a vendor's figure, Duxtel)."""

NR_STATIC = LinkClass(
    name="5g",
    downlink_bytes_per_s=Quantiles(
        points=(
            (0.01, 0.23), (0.05, 5.14), (0.1, 13.0), (0.25, 24.3), (0.5, 50.2), (0.75, 109.0),
            (0.9, 145.0), (0.95, 158.0), (0.99, 181.0),
        )
    ).times(MBIT_S),
    uplink_share=LogNormal(median=0.13, sigma=0.65, low=0.03, high=1.0),
    latency_s=LogNormal(median=0.01, sigma=0.3, low=0.005, high=0.04),
    cell_devices=40,
    reach_m=230.0,
)  # fmt: skip
"""Downlink: quantiles of means over 30 s of the downloads that stood still in an Irish 5G network
(575 windows of 5 traces; Raca et al., MMSys 2020). Uplink: 31.3 of 241.6 Mbit/s (Cellsmart, 51
countries, 2022), since the traces have acknowledgements only; its sigma: of log (up / down) over
the 19 users of FLASH. Latency: an estimate, half of 20 ms to and fro."""

NR_DRIVE = LinkClass(
    name="5g-drive",
    downlink_bytes_per_s=Quantiles(
        points=(
            (0.01, 0.15), (0.05, 1.77), (0.1, 2.5), (0.25, 5.46), (0.5, 9.72), (0.75, 29.2),
            (0.9, 88.4), (0.95, 119.0), (0.99, 183.0),
        )
    ).times(MBIT_S),
    uplink_share=LogNormal(median=0.2, sigma=0.65, low=0.03, high=1.0),
    latency_s=LogNormal(median=0.018, sigma=0.4, low=0.008, high=0.1),
    cell_devices=12,
    reach_m=230.0,
)  # fmt: skip
"""Downlink: the same, of downloads in a moving car (953 windows of 16 traces; half of the samples
are on 5G, the rest on LTE or older). Uplink: between 0.13 of 5G and 0.36 of 4G (Cellsmart). Reach:
half of the 460 m of road that a car drives in `DRIVE_STAY_S`. Latency: an estimate."""

ETHERNET = LinkClass(
    name="ethernet",
    downlink_bytes_per_s=LogNormal(median=1.17e8, sigma=0.0, low=1.17e8, high=1.17e8),
    uplink_share=LogNormal(median=1.0, sigma=0.0, low=1.0, high=1.0),
    latency_s=LogNormal(median=0.00025, sigma=0.0, low=0.00025, high=0.00025),
    cell_devices=48,
    reach_m=2.0,
)
"""A gigabit switch: 940 Mbit/s of payload."""

DRIVE_STAY_S = LogNormal(median=52.5, sigma=0.17, low=25.0, high=110.0)
"""A car changes its cell after 52.5 s on average (2,060 changes in 108,230 s of driving in the same
traces, at 31.5 km/h). Sigma: from the 10 % and 90 % quantiles of a trace's mean speed."""
STATIC_STAY_S = LogNormal(median=1810.0, sigma=0.5, low=300.0, high=14_400.0)
"""A phone that stands still changes its cell after 1,810 s (51 changes in 92,317 s of those
traces). Sigma: an estimate."""
VISIT_STAY_S = LogNormal(median=5400.0, sigma=0.5, low=600.0, high=28_800.0)
"""Estimate: somebody with a laptop stays for a lecture of 90 minutes."""


def _rows(mean: float, deviation: float) -> LogNormal:
    """The log-normal of that mean and standard deviation."""
    variance = math.log(1 + (deviation / mean) ** 2)
    median = mean / math.exp(variance / 2)
    return LogNormal(median=median, sigma=math.sqrt(variance), low=1.0, high=100 * mean)


WRITERS = _rows(226.83, 88.94)
"""Rows per user of FEMNIST (LEAF, Caldas et al. 2018, its table; not re-checked)."""
POSTERS = _rows(34.07, 62.95)
"""Rows per user of Reddit (the same table): many have few, few have very many."""


def data(alpha: float, rows: LogNormal) -> DataSpec:
    """Ten classes, as the digits and most small sets have."""
    return DataSpec(classes=10, alpha=alpha, rows=rows)
