"""What every benchmark shares: interleaved timing, figures with their range, the result file.

A *figure* is one claim: a median, its range, how often it was measured, and what is asked of it.
Scripts print figures and write them with everything needed to take them again; `render.py` puts
them into the documentation. Nothing here knows what is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("crowdmesh-jax", "jax", "jaxlib", "flax", "optax", "numpy", "grpcio")
MIN_REPEATS = 7


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of a piece of work."""

    wall_s: float
    cpu_s: float
    """Of this process, all threads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured claim."""

    name: str
    value: float
    """Median of the repeats."""
    low: float
    high: float
    repeats: int
    unit: str = "x"
    at_most: float | None = None
    at_least: float | None = None

    @property
    def asked(self) -> str:
        """What is asked of it, in words; empty where nothing is."""
        bounds = {"at least": self.at_least, "at most": self.at_most}
        return ", ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)

    @property
    def is_met(self) -> bool | None:
        """None where nothing is asked."""
        if self.at_most is None and self.at_least is None:
            return None
        return (self.at_most is None or self.value <= self.at_most) and (
            self.at_least is None or self.value >= self.at_least
        )

    def line(self) -> str:
        """For the terminal."""
        verdict = {None: "", True: f"  ({self.asked})", False: f"  MISSED: {self.asked}"}
        return (
            f"{self.name:58s} {self.value:9.3f} {self.unit:6s} [{self.low:.3f}, {self.high:.3f}]"
            f" {self.repeats} repeats{verdict[self.is_met]}"
        )


def figure(
    name: str,
    values: Sequence[float],
    *,
    unit: str = "x",
    at_most: float | None = None,
    at_least: float | None = None,
) -> Figure:
    """The median of repeats, with the smallest and the largest."""
    return Figure(
        name=name,
        value=float(f"{statistics.median(values):.4g}"),
        low=float(f"{min(values):.4g}"),
        high=float(f"{max(values):.4g}"),
        repeats=len(values),
        unit=unit,
        at_most=at_most,
        at_least=at_least,
    )


def ratio(name: str, ours: Sequence[float], theirs: Sequence[float], **asked: Any) -> Figure:
    """Ours over theirs, pair by pair: what disturbs the machine disturbs both of a pair."""
    return figure(name, [a / b for a, b in zip(ours, theirs, strict=True)], **asked)


def interleave(
    works: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 2
) -> dict[str, list[Sample]]:
    """Runs all works in turns, so that a slow moment of the machine hits all alike."""
    samples: dict[str, list[Sample]] = {name: [] for name in works}
    for repeat in range(warmup + repeats):
        for name, work in works.items():
            cpu_s, start_s = time.process_time(), time.perf_counter()
            work()
            wall_s = time.perf_counter() - start_s
            if repeat >= warmup:
                samples[name].append(Sample(wall_s, time.process_time() - cpu_s))
    return samples


def walls(samples: Sequence[Sample]) -> list[float]:
    """Seconds on the wall."""
    return [sample.wall_s for sample in samples]


def cpu_per_wall(name: str, samples: Sequence[Sample]) -> Figure:
    """How many cores the work kept busy: 1 proves that it had one and used it."""
    return figure(f"{name}: cpu / wall", [s.cpu_s / s.wall_s for s in samples])


def arguments(doc: str | None, *, repeats: int = MIN_REPEATS, **more: Any) -> argparse.Namespace:
    """The options that all scripts have, and `more`, each name with its default."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=repeats, help=f"default {repeats}")
    parser.add_argument(
        "--quick", action="store_true", help="tiny and once: does it run? Writes no result"
    )
    for name, default in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parsed = parser.parse_args()
    if parsed.quick:
        parsed.repeats = 1
    elif parsed.repeats < MIN_REPEATS:
        parser.error(f"--repeats must be at least {MIN_REPEATS}, or use --quick")
    return parsed


def _without_folder(argument: str) -> str:
    """An argument as anyone would give it: where a file lay on this machine is left out."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def report(
    name: str,
    what: str,
    figures: Sequence[Figure],
    *,
    quick: bool,
    settings: Mapping[str, Any] | None = None,
    details: Any = None,
    versions: Mapping[str, str] | None = None,
) -> None:
    """Prints the figures and writes them to `results/NAME.json`, unless it was a quick try.

    Args:
        settings: Sizes that the figures hold for.
        details: What the figures were made of.
        versions: Of packages outside this environment.
    """
    for each in figures:
        print(each.line())
    if quick:
        print(f"{name}: a quick try, no result written")
        return
    script = Path(sys.argv[0])
    found = {package: importlib.metadata.version(package) for package in PACKAGES}
    given = map(_without_folder, sys.argv[1:])
    result = {
        "command": " ".join(("python", f"benchmarks/{script.name}", *given)),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "what": what,
        "machine": machine(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "versions": {"python": platform.python_version(), **found, **(versions or {})},
        "settings": dict(settings or {}),
        "figures": [{**dataclasses.asdict(each), "is_met": each.is_met} for each in figures],
        "details": details,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def machine() -> str:
    """Architecture, processor, cores that this process may use, system."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor()
    system = f"{platform.system()} {platform.release().split('-')[0]}"
    return f"{platform.machine()}, {processor}, {cores} cores, {system}"


def read_figures(result: Mapping[str, Any]) -> list[Figure]:
    """The figures of a result file."""
    names = {field.name for field in dataclasses.fields(Figure)}
    return [Figure(**{k: v for k, v in row.items() if k in names}) for row in result["figures"]]


def like_an_agent() -> None:
    """One core, one XLA thread and an agent's way with memory. Call it before importing JAX.

    Starts this process anew, with the environment that a launcher gives to agents.
    """
    from crowdmesh_jax.agent.memory import ENVIRONMENT, return_freed_memory

    wanted = {**ENVIRONMENT, "NPROC": "1", "JAX_PLATFORMS": "cpu"}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.environ.update(wanted)
        os.execv(sys.executable, [sys.executable, *sys.argv])
    return_freed_memory()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
