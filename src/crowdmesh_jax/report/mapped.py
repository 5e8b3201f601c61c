"""The picture of a coalition structure: devices where they stand, coloured by coalition.

Takes values of `core` and the rounds' seconds; knows no solver and no run. Coalitions are numbered
by their round, the slowest first, so that colours need not be told apart alone.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ..core import CoalitionStructure, Crowd
from . import units
from .svg import file_style

WIDTH, MAP, LEGEND = 900, 640, 236
MIN_HEIGHT, MAX_HEIGHT = 200, 640
MARGIN = 26
LISTED = 30
"""Coalitions that the legend names; the slowest, where there are more."""
NUMBERED = 150
"""Devices up to which each dot bears its coalition's number."""
ROUNDS = 60
"""Of moving dots apart."""
GOLDEN = 0.6180339887498949
"""Steps of hue that keep any few neighbours far apart."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a device is drawn, in pixels."""

    x: float
    y: float


def draw_coalitions(
    crowd: Crowd, structure: CoalitionStructure, rounds_s: Sequence[float], *, title: str = ""
) -> str:
    """The structure as an SVG file.

    Each coalition has a line from every member to its fastest one, the fastest a ring. Devices
    without a position stand in a row below the others.

    Args:
        rounds_s: Of the coalitions, in the order of `structure.coalitions`.
        title: Above the picture; "": the number of coalitions and the slowest round.

    Raises:
        InvalidCoalitionError: The structure is not one of this crowd.
    """
    structure.check(crowd)
    order = sorted(
        range(len(structure)), key=lambda place: (-rounds_s[place], structure.coalitions[place])
    )
    legend, tall = _legend(structure, order, rounds_s)
    places, height, note = _layout(crowd, tall)
    count = len(structure.devices)
    title = title or (
        f"{len(structure)} coalitions of {count} devices;"
        f" the slowest round takes {units.seconds(max(rounds_s))}"
    )
    radius = 9.0 if count <= NUMBERED else max(2.0, 110 / math.sqrt(count))
    if count <= NUMBERED and _part(places, 2 * radius + 5, height):
        note += "; dots that lay upon each other are moved apart"
    lines, dots = [], []
    for number, place in enumerate(order, start=1):
        colour, members = _colour(number - 1), structure.coalitions[place]
        fastest = max(members, key=lambda name: (crowd.device(name).flops_per_s, name))
        hub = places[fastest]
        for name in members:
            at = places[name]
            if name != fastest:
                lines.append(
                    f'<path d="M{at.x:.1f} {at.y:.1f}L{hub.x:.1f} {hub.y:.1f}" stroke="{colour}"'
                    ' stroke-width="2" stroke-opacity=".6"/>'
                )
            ring = ' stroke="#2b3440" stroke-width="2"' if name == fastest else ""
            tip = f"{name}: coalition {number}, round {units.seconds(rounds_s[place])}"
            dots.append(
                f'<circle cx="{at.x:.1f}" cy="{at.y:.1f}" r="{radius:.1f}" fill="{colour}"{ring}>'
                f"<title>{escape(tip)}</title></circle>"
            )
            if count <= NUMBERED:
                dots.append(
                    f'<text class="inside" x="{at.x:.1f}" y="{at.y + 3.5:.1f}">{number}</text>'
                )
    height = max(height, tall)
    body = (
        f'<text class="title" x="0" y="16">{escape(title)}</text>'
        f'<g transform="translate(0 30)">{"".join(lines)}{"".join(dots)}</g>'
        f'<g transform="translate({MAP + 24} 34)">{legend}</g>'
        f'<text class="quiet" x="0" y="{height + 48}">{escape(note)}</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-12 -8 {WIDTH + 24} {height + 76}"'
        f' width="{WIDTH + 24}" height="{height + 76}" role="img"><title>{escape(title)}</title>'
        f"<style>{file_style()}</style>"
        f'<rect class="paper" x="-12" y="-8" width="{WIDTH + 24}" height="{height + 76}"/>'
        f"{body}</svg>\n"
    )


def _colour(index: int) -> str:
    """Dark enough for a white number."""
    hue = (0.58 + index * GOLDEN) % 1.0
    light = (0.40, 0.30, 0.48)[index % 3]
    red, green, blue = colorsys.hls_to_rgb(hue, light, 0.62)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def _legend(
    structure: CoalitionStructure, order: Sequence[int], rounds_s: Sequence[float]
) -> tuple[str, int]:
    """A line per coalition, and how tall they are together."""
    out = ['<text class="quiet" x="0" y="8">round of each coalition, and devices</text>']
    for number, place in enumerate(order[:LISTED], start=1):
        y = 8 + 19 * number
        size = len(structure.coalitions[place])
        words = f"{units.seconds(rounds_s[place])}, {size} device{'s' if size > 1 else ''}"
        out.append(
            f'<circle cx="8" cy="{y - 4}" r="8" fill="{_colour(number - 1)}"/>'
            f'<text class="inside" x="8" y="{y - 0.5}">{number}</text>'
            f'<text x="24" y="{y}">{escape(words)}</text>'
        )
    left = len(order) - LISTED
    if left > 0:
        y = 8 + 19 * (LISTED + 1)
        slowest = units.seconds(rounds_s[order[LISTED]])
        out.append(f'<text class="quiet" x="0" y="{y}">{left} more, {slowest} or less</text>')
    return "".join(out), 27 + 19 * min(len(order), LISTED + 1)


def _part(places: dict[str, _Place], apart: float, height: float) -> bool:
    """Moves dots that lie upon each other apart, each pair by half; says whether any moved."""
    names = sorted(places)
    at = [[places[name].x, places[name].y] for name in names]
    has_moved = False
    for turn in range(ROUNDS):
        is_quiet = True
        for left in range(len(at)):
            for right in range(left):
                across, down = at[left][0] - at[right][0], at[left][1] - at[right][1]
                away = math.hypot(across, down)
                if away >= apart - 0.01:
                    continue
                is_quiet = False
                if away < 1e-6:  # the same place: any direction, but always the same
                    angle = 2 * math.pi * GOLDEN * (left + turn)
                    across, down, away = math.cos(angle), math.sin(angle), 1.0
                half = (apart - min(away, apart)) / 2 / away
                for dot, sign in ((left, half), (right, -half)):
                    at[dot][0] = min(max(at[dot][0] + sign * across, MARGIN), MAP - MARGIN)
                    at[dot][1] = min(max(at[dot][1] + sign * down, MARGIN), height - MARGIN)
        if is_quiet:
            break
        has_moved = True
    places.update({name: _Place(x, y) for name, (x, y) in zip(names, at, strict=True)})
    return has_moved


def _layout(crowd: Crowd, least: int) -> tuple[dict[str, _Place], int, str]:
    """Where each device is drawn, how tall that is, and what the reader should know of it.

    Args:
        least: A flat crowd may be stretched to so many pixels, which the legend takes anyway.
    """
    placed = {d.id: d.position_m for d in crowd.devices if d.position_m is not None}
    lost = [d.id for d in crowd.devices if d.position_m is None]
    places: dict[str, _Place] = {}
    height, note = 0.0, ""
    if placed:
        xs, ys = zip(*placed.values(), strict=True)
        wide, tall = max(xs) - min(xs), max(ys) - min(ys)
        inner = MAP - 2 * MARGIN
        across = inner / wide if wide > 0 else 0.0
        height = tall * across + 2 * MARGIN
        if height < MIN_HEIGHT:
            height = max(MIN_HEIGHT, least)
        height = min(MAX_HEIGHT, height)
        up = (height - 2 * MARGIN) / tall if tall > 0 else 0.0
        stretched = across > 0 and up > 0
        across_m, tall_m = _length(wide), _length(tall)
        note = f"{across_m} from left to right, {tall_m} from top to bottom"
        if stretched and not 0.99 < up / across < 1.01:
            if up < across:  # too tall for the picture: to scale, with room at the sides
                across = up
            else:
                note += " (stretched)"
        side = (MAP - across * wide) / 2
        for name, (x, y) in placed.items():
            places[name] = _Place(
                side + (x - min(xs)) * across,
                height - MARGIN - (y - min(ys)) * up if tall > 0 else height / 2,
            )
    if lost:
        columns = 24
        step = (MAP - 2 * MARGIN) / (columns - 1)
        for index, name in enumerate(lost):
            row, column = divmod(index, columns)
            places[name] = _Place(MARGIN + step * column, height + MARGIN + 26 * row)
        height += 26 * (1 + (len(lost) - 1) // columns) + MARGIN
        words = f"{len(lost)} devices without a position stand below"
        note = f"{note}; {words}" if note else "no device has a position"
    return places, math.ceil(height), note


def _length(length_m: float) -> str:
    """A length in words."""
    return f"{length_m / 1000:.1f} km" if length_m >= 1000 else f"{length_m:.0f} m"
