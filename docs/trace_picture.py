"""Draws one step of a run's trace.json: a row per device, predicted below measured.

pip install 'crowdmesh-jax[plot]'
python docs/trace_picture.py runs/NAME docs/trace.svg [--step 10]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

COLOURS = {"forward": "#4c78a8", "backward": "#f58518", "update": "#54a24b"}
OTHER = "#b8b0ac"


def slices(trace: dict[str, Any], step: int) -> Iterable[tuple[str, str, float, float]]:
    """(row, kind, start ms, length ms) of what was computed or predicted in a step."""
    rows = {
        e["tid"]: e["args"]["name"]
        for e in trace["traceEvents"]
        if e["ph"] == "M" and e["name"] == "thread_name"
    }
    for event in trace["traceEvents"]:
        row = rows.get(event.get("tid"), "")
        if event["ph"] != "X" or event["args"]["step"] != step:
            continue
        if not row.endswith(("send", "receive")) and "(" not in row:
            yield row, event["name"].split()[0], event["ts"] / 1e3, event["dur"] / 1e3


def draw(trace: dict[str, Any], step: int, target: Path) -> None:
    """Writes the picture in the format of the file's ending."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = list(slices(trace, step))
    if not found:
        raise SystemExit(f"the trace holds no step {step}: it keeps the run's first and last ones")
    origin = min(start for _, _, start, _ in found)
    names = sorted({row for row, *_ in found}, reverse=True)
    figure, axes = plt.subplots(figsize=(10, 0.36 * len(names) + 0.9))
    for row, kind, start, length in found:
        predicted = row.endswith("predicted")
        axes.broken_barh(
            [(start - origin, length)],
            (names.index(row) - 0.4, 0.8),
            facecolors=COLOURS.get(kind, OTHER),
            alpha=0.45 if predicted else 1.0,
            edgecolor="white",
            linewidth=0.4,
        )
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel(f"ms since step {step} began")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    axes.legend(handles, COLOURS, ncols=3, frameon=False, loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(target, dpi=130, metadata={"Date": None} if target.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--step", type=int, default=6)
    arguments = parser.parse_args()
    trace = json.loads((arguments.run / "trace.json").read_text())
    draw(trace, arguments.step, arguments.target)


if __name__ == "__main__":
    main()
