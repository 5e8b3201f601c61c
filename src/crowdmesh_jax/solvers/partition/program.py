"""The partition problem as a mixed-integer program.

Variables: `z[d,i,j]`, device `d` runs layers `i .. j-1`; `w[d,e,j]`, it hands over to `e` at
cut `j`; `T`, the steady period. Flow conservation at each (device, cut) makes a path, each device
is used at most once and may be left out. `T` is held to the window condition in its recursive form

    E_s >= C_s - T,    E_s >= C_s - T + 2 c_s + E_{s+1},    E_s <= 0

whose `E` travel over the used links as flow variables. Under `eager` a window's divisor grows by
two for each further stage, so `2 c_s - T` stands for `2 c_s`; under `gpipe` T is the slowest
forward plus the slowest backward. Memory depends on how many stages follow, and that number
travels over the links in the same way.

It knows rows and columns; which segments and links are worth a variable is decided elsewhere.

Source: design, section 7; 1F1B (PipeDream, Narayanan et al., SOSP 2019).
"""

from __future__ import annotations

import math
from collections import defaultdict

from ...errors import SolverError
from ..backends import Mip
from .tables import Chain, Segment, Tables


class Program:
    """Least R_0 + (M - 1) T over chains of the given segments and links.

    Args:
        links: Round-trip seconds by (source, target, cut).
        period_s: Least and largest period T, as far as it is known.
        cap_s: Dearer chains are of no interest.
    """

    def __init__(
        self,
        tables: Tables,
        segments: list[Segment],
        links: dict[tuple[int, int, int], float],
        period_s: tuple[float, float],
        cap_s: float,
    ) -> None:
        self.tables = tables
        self.segments = segments
        self.mip = mip = Mip()
        # Backends keep absolute tolerances, so programs are scaled to times around 1.
        self.unit_s = unit_s = max(1e-12, period_s[1])
        count = len(tables.devices)
        devices = range(count)
        self.z = [mip.column(s.compute_s / unit_s, binary=True) for s in segments]
        w = {key: mip.column(cost_s / unit_s, binary=True) for key, cost_s in links.items()}
        of = [[(z, s) for z, s in zip(self.z, segments, strict=True) if s.device == d]
              for d in devices]  # fmt: skip
        pairs: dict[tuple[int, int], list[tuple[int, float]]] = defaultdict(list)
        for (source, target, _), column in w.items():
            pairs[source, target].append((column, 1.0))

        mip.row([(z, 1.0) for z, s in zip(self.z, segments, strict=True) if s.first == 0], "==", 1)
        balance_out: dict[tuple[int, int], list[tuple[int, float]]] = defaultdict(list)
        balance_in: dict[tuple[int, int], list[tuple[int, float]]] = defaultdict(list)
        for (source, target, layer), column in w.items():
            balance_out[source, layer].append((column, -1.0))
            balance_in[target, layer].append((column, -1.0))
        for z, s in zip(self.z, segments, strict=True):
            if s.end < tables.num_layers:
                balance_out[s.device, s.end].append((z, 1.0))
            if s.first > 0:
                balance_in[s.device, s.first].append((z, 1.0))
        for terms in [*balance_out.values(), *balance_in.values()]:
            mip.row(terms, "==", 0.0)
        for device in devices:
            used = [(z, 1.0) for z, _ in of[device]]
            if device in tables.required:
                mip.row(used, "==", 1.0)
            elif used:
                mip.row(used, "<=", 1.0)
        everything = [(z, 1.0) for z in self.z]
        if tables.max_stages < count:
            mip.row(everything, "<=", tables.max_stages)
        if tables.min_stages > 1:
            mip.row([(z, -1.0) for z in self.z], "<=", -tables.min_stages)
        if tables.microbatches > 1:
            least, most = period_s[0] / unit_s, period_s[1] / unit_s
            period = mip.column(tables.microbatches - 1.0, min(least, most), most)
            if tables.schedule == "gpipe":
                self._flow_lines(of, links, w, period, most)
            else:
                self._windows(of, links, w, pairs, period, most)
        self._depths(of, pairs)
        self._symmetry(of)
        if cap_s < math.inf:
            costs = [(column, cost) for column, cost in enumerate(mip.costs) if cost]
            mip.row(costs, "<=", cap_s / unit_s)

    def _windows(self, of, links, w, pairs, period: int, most: float) -> None:
        mip, unit_s = self.mip, self.unit_s
        # T where a device is used, 0 where not.
        owed = []
        for own in of:
            column = mip.column(0.0, 0.0, most)
            owed.append(column)
            mip.row([(column, 1.0), (period, -1.0)], "<=", 0.0)
            mip.row([(column, 1.0), *((z, -most) for z, _ in own)], "<=", 0.0)
        carried = {}
        for (source, target), terms in pairs.items():
            # E of the stage on `target`, told to `source`; 0 where the link is not used.
            column = mip.column(0.0, -most, 0.0)
            carried[source, target] = column
            mip.row([(column, -1.0), *((link, -most) for link, _ in terms)], "<=", 0.0)
        # Between two stages a window grows by the round trip; under `eager` its divisor does, too.
        again = -1.0 if self.tables.schedule == "eager" else 0.0
        for device, own in enumerate(of):
            if not own:
                continue
            compute = [*((z, s.compute_s / unit_s) for z, s in own), (owed[device], -1.0)]
            told = [(c, -1.0) for (_, target), c in carried.items() if target == device]
            heard = [(c, 1.0) for (source, _), c in carried.items() if source == device]
            hops = [(w[key], cost_s / unit_s) for key, cost_s in links.items() if key[0] == device]
            mip.row([*compute, *told], "<=", 0.0)
            if heard and again:
                # The second T counts only where a stage follows.
                more = mip.column(0.0, 0.0, most)
                mip.row([(more, 1.0), (period, -1.0)], "<=", 0.0)
                mip.row([(more, 1.0), *((w[k], -most) for k in links if k[0] == device)], "<=", 0.0)
                heard.append((more, again))
            if heard:
                mip.row([*compute, *hops, *heard, *told], "<=", 0.0)
        for (source, target, layer), column in w.items():
            cut = self.tables.cut(source, target, layer)
            if cut is not None and cut.busiest_s > 0:
                mip.row([(column, cut.busiest_s / unit_s), (period, -1.0)], "<=", 0.0)

    def _flow_lines(self, of, links, w, period: int, most: float) -> None:
        """GPipe: T is the slowest forward plus the slowest backward, links among both."""
        mip, unit_s = self.mip, self.unit_s
        down, back = mip.column(0.0, 0.0, most), mip.column(0.0, 0.0, most)
        mip.row([(down, 1.0), (back, 1.0), (period, -1.0)], "<=", 0.0)
        for own in of:
            if own:
                mip.row([*((z, s.forward_s / unit_s) for z, s in own), (down, -1.0)], "<=", 0.0)
                mip.row([*((z, s.backward_s / unit_s) for z, s in own), (back, -1.0)], "<=", 0.0)
        for (source, target, layer), column in w.items():
            cut = self.tables.cut(source, target, layer)
            if cut is not None:
                mip.row([(column, cut.down_s / unit_s), (down, -1.0)], "<=", 0.0)
                mip.row([(column, cut.back_s / unit_s), (back, -1.0)], "<=", 0.0)

    def _depths(self, of, pairs) -> None:
        """Memory by position: stages to the end, counted over the links, within what fits."""
        deepest = self.tables.max_stages
        if all(segment.max_depth >= deepest for segment in self.segments):
            return
        mip = self.mip
        counted = {}
        for pair, terms in pairs.items():
            column = mip.column(0.0, 0.0, max(0, deepest - 1))
            counted[pair] = column
            mip.row([(column, 1.0), *((w_, -(deepest - 1.0)) for w_, _ in terms)], "<=", 0.0)
        for device in range(len(self.tables.devices)):
            below = [(c, 1.0) for (source, _), c in counted.items() if source == device]
            above = [(c, -1.0) for (_, target), c in counted.items() if target == device]
            limits = [(z, 1.0 - min(s.max_depth, deepest)) for z, s in of[device]]
            if limits:
                mip.row([*limits, *below], "<=", 0.0)
            # A stage with a predecessor tells it its own depth.
            told = [(z, 0.0 if s.first else -float(deepest)) for z, s in of[device]]
            depth = [(z, 1.0 + shift) for (z, _), (_, shift) in zip(of[device], told, strict=True)]
            if depth:
                mip.row([*depth, *below, *above], "<=", 0.0)

    def _symmetry(self, of) -> None:
        """Devices that could change places do so by id: the lower one is used first."""
        layers = self.tables.num_layers
        for left, right in interchangeable(self.tables):
            used = [*((z, -1.0) for z, _ in of[left]), *((z, 1.0) for z, _ in of[right])]
            if not used:
                continue
            self.mip.row(used, "<=", 0.0)
            # start of left <= start of right, where right is used at all
            order = [(z, float(s.first)) for z, s in of[left] if s.first]
            order += [(z, float(layers - s.first)) for z, s in of[right]]
            self.mip.row(order, "<=", layers)

    def chain(self, values: tuple[float, ...]) -> Chain:
        """The chain that a solution stands for, its rounding undone."""
        chosen = [s for z, s in zip(self.z, self.segments, strict=True) if values[z] > 0.5]
        chosen.sort(key=lambda segment: segment.first)
        made = self.tables.chain([(segment.device, segment.end) for segment in chosen])
        if made is None:
            raise SolverError(
                "the backend's solution is no plan: "
                + "; ".join(
                    f"{self.tables.devices[s.device]} {s.first}-{s.end - 1}" for s in chosen
                )
                + "\n  try      another backend: IlpSolver(backend='highs' or 'cbc')"
            )
        return made


def interchangeable(tables: Tables) -> list[tuple[int, int]]:
    """Neighbouring pairs of devices (in id order) that could change places without a difference."""
    problem, crowd = tables.problem, tables.problem.crowd

    def own(index: int):
        device = tables.devices[index]
        return (
            crowd.device(device).memory_bytes,
            problem.profile.layer_seconds(crowd, device),
            [problem.allows(device, layer) for layer in range(tables.num_layers)],
            index in tables.required,
        )

    def wire(source: str, target: str) -> tuple[float, float] | None:
        link = crowd.link(source, target)
        return link and (link.bandwidth_bytes_per_s, link.latency_s)

    def alike(left: int, right: int) -> bool:
        a, b = tables.devices[left], tables.devices[right]
        if own(left) != own(right) or wire(a, b) != wire(b, a):
            return False
        others = [device for device in tables.devices if device not in (a, b)]
        return all(wire(a, c) == wire(b, c) and wire(c, a) == wire(c, b) for c in others)

    found, taken = [], set()
    for left in range(len(tables.devices)):
        for right in range(left + 1, len(tables.devices)):
            if right not in taken and alike(left, right):
                found.append((left, right))
                taken.add(right)
                break
    return found
