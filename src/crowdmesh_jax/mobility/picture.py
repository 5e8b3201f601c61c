"""Paths as one SVG: where devices went, where they are, who is in range of whom."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import InvalidValueError
from .checks import Floats
from .movement import Snapshot
from .neighbours import pairs_in_range

WIDTH = 640
MARGIN = 12
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2", "#97bbf5", "#9c6b4e")
MAX_POINTS = 400
"""A path of more is thinned: nobody sees the difference."""
MAX_PATHS = 500


def paths_svg(shots: Sequence[Snapshot], range_m: float, *, title: str = "") -> str:
    """The picture as SVG text: paths, the last places, links at the end as grey lines.

    Raises:
        InvalidValueError: Nothing to draw, or more devices than can be told apart.
    """
    if not shots:
        raise InvalidValueError("there is nothing to draw: no snapshots")
    last = shots[-1]
    if len(last.positions_m) > MAX_PATHS:
        raise InvalidValueError(
            f"{len(last.positions_m)} paths in one picture; draw at most {MAX_PATHS}"
        )
    every = max(1, -(-len(shots) // MAX_POINTS))
    kept = [*shots[:-1:every], last]
    seen = np.concatenate([shot.positions_m[shot.present] for shot in kept])
    if not len(seen):
        raise InvalidValueError("there is nothing to draw: nobody was present")
    low, high = seen.min(axis=0), seen.max(axis=0)
    span = np.maximum(high - low, 1e-9)
    scale = (WIDTH - 2 * MARGIN) / float(span.max())
    height = round(float(span[1]) * scale) + 2 * MARGIN + 18

    def shown(places_m: Floats) -> Floats:
        """North is up."""
        x = MARGIN + (places_m[..., 0] - low[0]) * scale
        y = MARGIN + (high[1] - places_m[..., 1]) * scale
        return np.round(np.stack([x, y], axis=-1), 1).astype(np.float64)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}">',
        "<style>text{font:12px sans-serif}</style>",
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    first, second = pairs_in_range(last.positions_m, range_m, present=last.present)
    ends = shown(last.positions_m)
    for a, b in zip(first.tolist(), second.tolist(), strict=True):
        (x1, y1), (x2, y2) = ends[a].tolist(), ends[b].tolist()
        parts.append(f'<path d="M{x1} {y1}L{x2} {y2}" stroke="#bbbbbb" stroke-width="0.7"/>')
    places = np.stack([shown(shot.positions_m) for shot in kept])
    present = np.stack([shot.present for shot in kept])
    who = np.stack([shot.occupants for shot in kept])
    for device in range(places.shape[1]):
        colour = COLOURS[device % len(COLOURS)]
        path, pen_down = [], False
        for step in range(len(kept)):
            there = bool(present[step, device])
            if there:
                same = pen_down and who[step, device] == who[step - 1, device]
                x, y = places[step, device].tolist()
                path.append(f"{'L' if same else 'M'}{x} {y}")
            pen_down = there
        if path:
            parts.append(
                f'<path d="{"".join(path)}" fill="none" stroke="{colour}" stroke-width="1.2"'
                ' stroke-opacity="0.7"/>'
            )
        if present[-1, device]:
            x, y = ends[device].tolist()
            parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"/>')
    bar = range_m * scale
    if bar <= WIDTH - 2 * MARGIN:
        y = height - 8
        parts.append(f'<path d="M{MARGIN} {y}h{bar:.1f}" stroke="#000000" stroke-width="2"/>')
        text = f"range {range_m:g} m" + (f" · {title}" if title else "")
        parts.append(f'<text x="{MARGIN + bar + 6:.1f}" y="{y + 4}">{_escaped(text)}</text>')
    else:
        parts.append(f'<text x="{MARGIN}" y="{height - 4}">{_escaped(title)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
