"""`report`: from one or two run folders to a page and its plots."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InvalidValueError
from ..record import RunFolder, write_atomic
from ..record.files import record_errors
from .charts import Chart
from .compare import compare_page, compared_shares, differences
from .figures import (
    StepFigures,
    all_charts,
    gantt_chart,
    loss_chart,
    metric_charts,
    step_figures,
    step_time_chart,
)
from .page import run_page
from .png import draw_png
from .reading import RunView, State, read_run
from .steps import DeviceShares
from .svg import draw_file


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """What a report says of a run, as values. What the folder does not hold is None or empty."""

    name: str
    state: State
    """"finished", "halted" (by an error or Ctrl-C), "running" or "killed"."""
    code: str | None
    """Of the error that halted it."""
    steps: int
    """Committed."""
    loss: float | None
    """Of the last committed step."""
    predicted_step_s: float | None
    measured_step_s: float | None
    """Median from commit to commit, after the first two."""
    shown_step: int | None
    """The step whose ops are drawn."""
    measured_shares: tuple[DeviceShares, ...]
    predicted_shares: tuple[DeviceShares, ...]
    problems: tuple[str, ...]
    """What of the folder could not be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What `report` wrote, and the figures in it."""

    html: Path
    plots: tuple[Path, ...]
    runs: tuple[RunSummary, ...]
    differences: tuple[tuple[str, str, str], ...] = field(default=(), repr=False)
    """(path, in the first, in the second) of what differs in configuration and plan of two runs."""

    def __repr__(self) -> str:
        runs = ", ".join(f"{run.name!r} ({run.steps} steps, {run.state})" for run in self.runs)
        return f"Report({str(self.html)!r}, {runs})"


def report(
    run_dir: str | Path,
    other: str | Path | None = None,
    *,
    out: str | Path | None = None,
    step: int | None = None,
    png: bool = False,
) -> Report:
    """Makes a self-contained `report.html` and plots of a run, or a comparison of two.

    A run that goes on, was killed or is partly damaged is shown as far as it can be read, and
    marked. Nothing of the run's own files is changed.

    Args:
        run_dir: The run's folder, `TrainResult.run_dir` say.
        other: A second run, to be compared with the first.
        out: Folder for `report.html` and `plots/`, made where it is missing; by default the run's
            own, for a comparison `versus-OTHER` inside it.
        step: Draw this step instead of the one of median length.
        png: Write the plots as PNG, too; needs the extra `plot`.

    Raises:
        RecordError: A folder is no run's or of a newer release, nothing in it can be read, its
            trace does not hold `step`, or the report cannot be written.
        MissingExtraError: (`png=True`) matplotlib is not installed; nothing was written.
    """
    views = [read_run(path) for path in (run_dir, other) if path is not None]
    if step is not None and (isinstance(step, bool) or not isinstance(step, int) or step < 0):
        raise InvalidValueError(f"step must be an integer >= 0, got {step!r}")
    figures = [step_figures(view, step) for view in views]
    if len(views) == 1:
        page = run_page(views[0], figures[0])
        charts = all_charts(views[0], figures[0])
        differ = ()
        target = views[0].path
    else:
        pair, both = (views[0], views[1]), (figures[0], figures[1])
        page, charts = compare_page(pair, both), _compared_charts(views, figures)
        differ = differences(*pair)
        target = views[0].path / f"versus-{views[1].name}"
    files = {chart_path(chart): draw_file(chart).encode() for chart in charts}
    if png:
        files |= {chart_path(chart, ".png"): draw_png(chart) for chart in charts}
    target = RunFolder(Path(out).absolute() if out is not None else target).path
    with record_errors(target, "make the folder"):
        (target / "plots").mkdir(parents=True, exist_ok=True)
    write_atomic(target / "report.html", page.encode())
    for name, data in files.items():
        write_atomic(target / name, data)
    return Report(
        html=target / "report.html",
        plots=tuple(target / name for name in files),
        runs=tuple(_summary(v, f) for v, f in zip(views, figures, strict=True)),
        differences=differ,
    )


def chart_path(chart: Chart, ending: str = ".svg") -> Path:
    """`plots/NAME.svg`, whatever a metric is called."""
    return Path("plots") / (re.sub(r"[^A-Za-z0-9._-]+", "_", chart.name) + ending)


def _compared_charts(views: Sequence[RunView], figures: Sequence[StepFigures]) -> tuple[Chart, ...]:
    gantts = (
        gantt_chart(view, of, f"gantt-{letter}")
        for letter, view, of in zip("AB", views, figures, strict=True)
    )
    found = (
        loss_chart(views),
        *metric_charts(views),
        step_time_chart(views),
        compared_shares((figures[0], figures[1])),
        *(
            dataclasses.replace(chart, title=f"{chart.title} ({view.name})") if chart else None
            for chart, view in zip(gantts, views, strict=True)
        ),
    )
    return tuple(chart for chart in found if chart is not None)


def _summary(view: RunView, figures: StepFigures) -> RunSummary:
    return RunSummary(
        name=view.name,
        state=view.status.state,
        code=view.status.code,
        steps=view.committed,
        loss=view.rows[-1].loss if view.rows else None,
        predicted_step_s=view.predicted_step_s,
        measured_step_s=view.measured_step_s,
        shown_step=figures.window.step if figures.window else None,
        measured_shares=figures.measured_shares,
        predicted_shares=figures.predicted_shares,
        problems=view.problems,
    )
