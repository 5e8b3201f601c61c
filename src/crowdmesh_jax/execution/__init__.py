"""Runs stage programs on one device."""

from .pace import Pace, Timed, measure_programs
from .worker import StageWorker, StepTotals, warm_up

__all__ = ["Pace", "StageWorker", "StepTotals", "Timed", "measure_programs", "warm_up"]
