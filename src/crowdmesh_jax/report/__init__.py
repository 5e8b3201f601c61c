"""Reports of runs: a self-contained page, plots, comparisons, from a run's folder alone."""

from .reading import RunView, read_run
from .write import Report, RunSummary, report

__all__ = ["Report", "RunSummary", "RunView", "read_run", "report"]
