"""Draws the pictures of concepts.md and recovery.md: schedules from the package's own `evaluate`.

pip install 'crowdmesh-jax[plot]'
python docs/diagrams.py [folder]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

from crowdmesh_jax.core import (
    CutTimes,
    OpKind,
    StageTimes,
    Timeline,
    evaluate,
    make_schedule,
)

BLUE, ORANGE, GREEN, GREY = "#4c78a8", "#f58518", "#54a24b", "#b8b0ac"
PINK, RED = "#cc79a7", "#b03030"
STAGE = StageTimes(forward_s=1.0, backward_s=2.0, update_s=0.6)
plt.rcParams.update(
    {
        "font.size": 9,
        "svg.hashsalt": "crowdmesh",
        "svg.fonttype": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
)


def save(figure: plt.Figure, folder: Path, name: str) -> None:
    """Without a date: the same picture gives the same bytes."""
    figure.savefig(folder / name, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


def stages(folder: Path) -> None:
    """Seven layers on three of four devices."""
    figure, axes = plt.subplots(figsize=(8, 2.6))
    widths = (1.4, 1.2, 1.6, 1.0, 0.7, 0.5, 0.4)
    cuts, colours = (0, 3, 5, 7), (BLUE, ORANGE, GREEN)
    devices = ("laptop", "board", "phone")
    left, starts = 0.0, [0.0]
    for index, width in enumerate(widths):
        stage = sum(index >= cut for cut in cuts[1:])
        axes.add_patch(Rectangle((left, 1), width - 0.08, 0.6, color=colours[stage]))
        axes.text(left + width / 2 - 0.04, 1.3, str(index), ha="center", va="center", color="w")
        left += width
        if index + 1 in cuts:
            starts.append(left)
    axes.text(-0.15, 1.3, "layers", ha="right", va="center")
    width, apart = 1.5, 1.1
    for stage, name in enumerate(devices):
        begin = stage * (width + apart)
        end = begin + width
        edge = {"fill": False, "ec": colours[stage], "lw": 2}
        axes.add_patch(Rectangle((begin, 0), width, 0.5, **edge))
        axes.text((begin + end) / 2, 0.25, f"stage {stage}\n{name}", ha="center", va="center")
        top, bottom = (starts[stage], starts[stage + 1] - 0.08), (begin, end)
        for above, below in zip(top, bottom, strict=True):
            axes.plot((above, below), (0.98, 0.52), color=colours[stage], lw=0.8, ls=":")
        if stage:
            here, there = begin - 0.05, begin - apart + 0.05
            for y, ends, what in (
                (0.36, (there, here), "activation"),
                (0.14, (here, there), "gradient"),
            ):
                tips = ((ends[0], y), (ends[1], y))
                axes.add_patch(FancyArrowPatch(*tips, arrowstyle="-|>", mutation_scale=8))
                place = y + 0.05 if what == "activation" else y - 0.16
                axes.text((here + there) / 2, place, what, ha="center", va="bottom", fontsize=8)
    begin = 3 * width + 2 * apart + 0.4
    axes.add_patch(Rectangle((begin, 0), 1.1, 0.5, fill=False, ec=GREY, lw=2, ls="--"))
    axes.text(begin + 0.55, 0.25, "slow phone\nleft out", ha="center", va="center", color="#777")
    axes.set_xlim(-0.9, begin + 1.3)
    axes.set_ylim(-0.25, 1.7)
    axes.axis("off")
    save(figure, folder, "concept_stages.svg")


def gantt(axes: Axes, timeline: Timeline, count: int) -> None:
    """A row per stage, first stage on top; the microbatch's number in each op."""
    for op in timeline.ops:
        colour = BLUE if op.kind is OpKind.FORWARD else ORANGE
        row, length = count - 1 - op.stage, op.end_s - op.start_s
        axes.barh(row, length, 0.8, op.start_s, color=colour, ec="white", lw=0.6)
        axes.text(
            op.start_s + length / 2, row, str(op.microbatch), ha="center", va="center", color="w",
            fontsize=7,
        )  # fmt: skip
    axes.set_yticks(range(count), [f"stage {count - 1 - row}" for row in range(count)])
    axes.tick_params(left=False)
    axes.spines["left"].set_visible(False)


def schedules(folder: Path) -> None:
    """Three schedules of one step, links that take a while."""
    figure, rows = plt.subplots(3, 1, figsize=(8, 4.6), sharex=True)
    cuts = [CutTimes(forward_latency_s=0.6, backward_latency_s=0.6)] * 2
    for axes, name in zip(rows, ("gpipe", "1f1b", "eager"), strict=True):
        timeline = evaluate(make_schedule(name, 3, 6), [STAGE] * 3, cuts)
        gantt(axes, timeline, 3)
        axes.set_title(f"{name}: step {timeline.step_s:.1f} s", loc="left", fontsize=9)
    rows[-1].set_xlabel("seconds (blue: forward 1 s, orange: backward 2 s, a hop 0.6 s each way)")
    figure.tight_layout()
    save(figure, folder, "concept_schedules.svg")


def links(folder: Path) -> None:
    """Two cuts of a chain: balanced with much to send, unbalanced with little."""
    figure, axes = plt.subplots(figsize=(6, 2.9))
    rates = [2**k for k in range(-2, 8)]
    plans = {
        "balanced stages, 8 MB each way": ((3.0, 3.0), 8.0, BLUE),
        "stages 1 : 2, 1 MB each way": ((2.0, 4.0), 1.0, ORANGE),
    }
    schedule = make_schedule("1f1b", 2, 8)
    for label, (seconds, size_mb, colour) in plans.items():
        times = []
        for rate in rates:
            pair = [StageTimes(forward_s=c / 3, backward_s=2 * c / 3) for c in seconds]
            cut = CutTimes(forward_transfer_s=size_mb / rate, backward_transfer_s=size_mb / rate)
            times.append(evaluate(schedule, pair, [cut]).step_s)
        axes.plot(rates, times, "o-", color=colour, label=label, ms=4)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis, ticks in ((axes.xaxis, (0.25, 1, 4, 16, 64)), (axes.yaxis, (32, 64, 128, 256))):
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlabel("bandwidth of the link, MB/s")
    axes.set_ylabel("step time, s")
    axes.legend(frameon=False)
    save(figure, folder, "concept_links.svg")


def commit(folder: Path) -> None:
    """The end of a step: last backwards, commit down, updates."""
    figure, axes = plt.subplots(figsize=(8, 2.4))
    hop_s = 0.5
    cuts = [CutTimes(forward_latency_s=hop_s, backward_latency_s=hop_s)] * 2
    timeline = evaluate(make_schedule("1f1b", 3, 3), [STAGE] * 3, cuts)
    gantt(axes, timeline, 3)
    point = timeline.commit_s
    for stage in range(3):
        begin = point + stage * hop_s
        axes.barh(2 - stage, STAGE.update_s, 0.8, begin, color=GREEN, ec="white")
        if stage:
            start, end = (begin - hop_s, 3 - stage - 0.42), (begin, 2 - stage + 0.42)
            axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9))
    axes.axvline(point, color="#444", lw=1, ls=":")
    axes.text(point - 0.08, 2.55, "commit point", ha="right", fontsize=8)
    axes.text(point + 2 * hop_s + 0.7, 0, "update", va="center", color=GREEN, fontsize=8)
    axes.set_xlabel("seconds")
    axes.set_ylim(-0.6, 2.9)
    save(figure, folder, "concept_commit.svg")


def rows_of(axes: Axes, names: tuple[str, ...], end: float) -> None:
    """A row per name, the first on top; no scale, since only the order matters."""
    axes.set_yticks(range(len(names)), names[::-1])
    axes.set_xlim(0, end)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xticks([])
    axes.tick_params(left=False)
    axes.spines[["left", "bottom"]].set_visible(False)


def box(axes: Axes, row: float, begin: float, length: float, text: str, **style: Any) -> None:
    """A piece of a row; dark text on pale colours."""
    style = {"color": BLUE, "ec": "white", "lw": 0.8, **style}
    axes.barh(row, length, style.pop("height", 0.62), begin, **style)
    colour = "#333" if style["color"] in (GREY, "none") or style.get("alpha") else "w"
    axes.text(begin + length / 2, row, text, ha="center", va="center", fontsize=7.5, color=colour)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], **style: Any) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, **style))


def waves(folder: Path) -> None:
    """Copies of one stage over time: two versions while a wave is open, one afterwards."""
    figure, axes = plt.subplots(figsize=(8, 2.7))
    rows_of(axes, ("owner trains", "owner keeps", "holder keeps", "neighbours' logs"), 25)
    for step in range(25):
        box(axes, 3, step, 1, str(step))
    for version, taken, complete, gone in ((8, 8, 10.5, 18.5), (16, 16, 18.5, 25)):
        for row in (1, 2):
            shift = 0.16 if version == 8 else -0.16
            begin = taken if row == 2 else taken + 0.4
            box(axes, row + shift, begin, complete - begin, "", color=GREEN, alpha=0.35, height=0.3)
            box(axes, row + shift, complete, gone - complete, f"version {version}", color=GREEN,
                height=0.3)  # fmt: skip
        arrow(axes, (taken + 0.2, 2 - 0.35), (taken + 0.9, 1 + 0.35))
        axes.axvline(complete, color="#444", lw=0.8, ls=":")
        axes.text(complete + 0.1, 3.42, f"wave {version} complete", fontsize=7.5)
    box(axes, 0, 8, 10.5, "what was sent in steps 8, 9, 10, ...", color=GREY)
    box(axes, 0, 18.5, 6.5, "steps 16, 17, ...", color=GREY)
    axes.text(0, 2, "pale: on its way", fontsize=7.5, va="center")
    axes.set_ylim(-0.6, 3.8)
    save(figure, folder, "concept_waves.svg")


def replay(folder: Path) -> None:
    """A stage is lost in step 11; the spare replays 8, 9, 10 from what the neighbours had sent."""
    figure, axes = plt.subplots(figsize=(8, 3.0))
    rows_of(axes, ("stage 0", "stage 1: device-1", "stage 2", "spare device-4"), 22)
    for row in (1, 2, 3):
        for index, step in enumerate((8, 9, 10)):
            box(axes, row, 2 * index, 2, f"step {step}")
    for row, end in ((3, 1.6), (1, 1.0)):
        box(axes, row, 6, end, "11", color=GREY, height=0.4)
    axes.plot([6.3], [2], marker="x", ms=11, mew=3, color=RED)
    axes.text(6.8, 2, "killed", color=RED, va="center", fontsize=8)
    for row in (1, 3):
        box(axes, row, 8, 6.6, "stopped; serves its log", color=GREY, alpha=0.45)
    box(axes, 0, 0, 8, "has version 8 and the programs", color=GREEN, alpha=0.35)
    for index, step in enumerate((8, 9, 10)):
        begin = 9 + 1.8 * index
        box(axes, 0, begin, 1.8, f"step {step}", color=PINK)
        arrow(axes, (begin + 0.5, 3 - 0.32), (begin + 0.5, 0.34), color=BLUE, lw=0.9)
        arrow(axes, (begin + 1.2, 1 - 0.32), (begin + 1.2, 0.34), color=ORANGE, lw=0.9)
    told = "blue: activations, orange: gradients, out of the neighbours' logs"
    axes.text(11.7, -0.55, told, fontsize=7.5, ha="center")
    for row in (0, 1, 3):
        for index, step in enumerate((11, 12, 13)):
            box(axes, row, 15 + 2 * index, 2, f"step {step}")
    for at, name in ((8, "all stopped"), (9, "decided"), (14.8, "ready")):
        axes.axvline(at, color="#444", lw=0.8, ls=":")
        side = "right" if name == "all stopped" else "left"
        axes.text(at + (0.1 if side == "left" else -0.1), 3.45, name, fontsize=7.5, ha=side)
    axes.set_ylim(-0.8, 3.8)
    save(figure, folder, "concept_replay.svg")


def handover(folder: Path) -> None:
    """A stage moves before its device leaves: at a step's end, nothing is done twice."""
    figure, axes = plt.subplots(figsize=(8, 2.6))
    rows_of(axes, ("other stages", "device-1 (will leave)", "spare device-4"), 20)
    for row, last in ((2, 6), (1, 6)):
        for step in range(last):
            box(axes, row, 1.6 * step, 1.6, f"{20 + step}")
    box(axes, 0, 1.6, 5.4, "programs made ready", color=GREEN, alpha=0.35)
    axes.text(0.1, 0.42, "depart(...)", fontsize=8)
    arrow(axes, (0.6, 0.62), (0.6, 0.68))
    axes.axvline(9.6, color="#444", lw=0.8, ls=":")
    axes.text(9.5, 2.45, "stop mark: all at version 26", fontsize=7.5, ha="right")
    arrow(axes, (9.7, 1 - 0.33), (10.9, 0.33), color=PINK, lw=1.6)
    axes.text(10.6, 0.5, "state of version 26", fontsize=8, color=PINK)
    for row in (2, 0):
        for index in range(5):
            box(axes, row, 11.4 + 1.6 * index, 1.6, f"{26 + index}")
    box(axes, 1, 11.4, 4.2, "keeps a copy", color=GREY, alpha=0.45)
    axes.plot([17.2], [1], marker="x", ms=9, mew=2.5, color="#777")
    axes.text(17.6, 1, "leaves", color="#555", va="center", fontsize=8)
    axes.set_ylim(-0.6, 2.8)
    save(figure, folder, "concept_handover.svg")


def main() -> None:
    """Writes all pictures."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for draw in (stages, schedules, links, commit, waves, replay, handover):
        draw(folder)


if __name__ == "__main__":
    main()
