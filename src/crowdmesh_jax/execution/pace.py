"""Runs ops at an emulated device's pace and times them.

An op of a device of speed v ends at start + (thread CPU seconds) / v; what the CPU does not need
is slept. So a device at 0.25 takes four times as long as the machine, and time that the operating
system gave to other processes does not count as the device's own, as long as all speeds together
fit the cores (the launcher sees to that). Needs synchronous dispatch
(`jax_cpu_enable_async_dispatch=False`): else XLA computes on another thread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from ..programs import LoadedStage
from ..programs.manifest import LeafSpec

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Timed:
    """What an op returned, and when it ran (seconds of `time.monotonic`)."""

    result: Any
    start_s: float
    end_s: float


class Pace:
    """Times calls, stretched to an emulated speed (1.0: the machine's own)."""

    def __init__(self, speed: float = 1.0) -> None:
        self.speed = speed

    def run(self, call: Callable[[], T]) -> Timed:
        """Runs `call` to its end, results ready, then sleeps off what the emulated device owes."""
        import jax

        start_s = time.monotonic()
        cpu_s = time.thread_time()
        result = jax.block_until_ready(call())
        cpu_s = time.thread_time() - cpu_s
        if self.speed < 1.0:
            left_s = start_s + cpu_s / self.speed - time.monotonic()
            if left_s > 0:
                time.sleep(left_s)
        return Timed(result, start_s, time.monotonic())


def measure_programs(loaded: LoadedStage, pace: Pace, *, repeats: int = 5) -> Mapping[str, float]:
    """Median seconds of each program of a stage at this pace, on made-up inputs.

    Compiles first, so that no compilation is timed. Donated inputs are fresh for each call.
    """
    import jax

    rng = np.random.default_rng(0)
    seconds: dict[str, float] = {}
    for program in loaded.manifest.programs:
        if program.name == "eval_forward":
            continue
        inputs = {spec.key: _sample(spec, rng) for spec in program.inputs}
        donated = {program.inputs[i].key for i in program.donate}

        def fresh(inputs: dict[Any, Any] = inputs, donated: set[Any] = donated) -> dict[Any, Any]:
            return {
                k: jax.device_put(np.array(v)) if k in donated else v for k, v in inputs.items()
            }

        inputs = {k: v if k in donated else jax.device_put(v) for k, v in inputs.items()}
        name = program.name
        loaded.run(name, fresh(inputs))
        times = []
        for _ in range(repeats):
            env = fresh(inputs)
            timed = pace.run(lambda name=name, env=env: loaded.run(name, env))
            times.append(timed.end_s - timed.start_s)
        seconds[name] = statistics.median(times)
    return seconds


def _fresh(inputs: Mapping[Any, Any], donated: Set[Any]) -> dict[Any, Any]:
    """The same environment with buffers of its own where the program donates them."""
    import jax

    return {k: jax.device_put(np.array(v)) if k in donated else v for k, v in inputs.items()}


def _sample(spec: LeafSpec, rng: np.random.Generator) -> np.ndarray:
    """Values that keep a program on its usual path: small normals, zeros for integers."""
    dtype = spec.numpy_dtype
    if dtype.kind in "iub":
        return np.zeros(spec.shape, dtype)
    if spec.role in ("opt", "grad", "tied_grad", "cut", "state"):
        return np.full(spec.shape, 1e-3, dtype)
    if spec.role in ("inv_weight", "shared", "global"):
        return np.ones(spec.shape, dtype)
    return (0.1 * rng.standard_normal(spec.shape)).astype(dtype)
