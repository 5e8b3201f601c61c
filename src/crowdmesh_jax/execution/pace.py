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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from ..programs import LoadedStage
from ..programs.manifest import LeafSpec, ProgramSpec

T = TypeVar("T")
Key = tuple[str, str, str]

COPIED_UPDATE_BYTES = 16 * 2**20
"""An update that donates more is not run on made-up arrays when a stage is measured."""
STREAMED_FLOATS = 2 * 2**20
"""8 MB an array: beyond the caches of the devices in question."""


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


def measure_programs(
    loaded: LoadedStage,
    pace: Pace,
    *,
    repeats: int = 5,
    given: Mapping[Key, Any] | None = None,
    scratch: dict[Key, Any] | None = None,
) -> Mapping[str, float]:
    """Median seconds of each program of a stage at this pace, on made-up inputs.

    Compiles first, so that no compilation is timed. What a program donates is made once: its
    outputs take the place of the donated inputs in the next call, so nothing is held twice.

    Args:
        given: Arrays of the stage that programs may read in place of made-up ones.
        scratch: Arrays that they may also overwrite, accumulators say; what they left is put back.
            What a program donates and is not here is made up.

    A large `update` is not run: its inputs would be a second copy of parameters and optimizer
    state, more than training needs. It moves every byte once, so its bytes by this device's own
    streaming rate stand in. Forward and backward run in turns, as in a step: a program called again
    and again finds everything in the caches, and takes less than in a run.
    """
    seconds: dict[str, float] = {}
    turns: list[_Measured] = []
    given, scratch = given or {}, {} if scratch is None else scratch
    for program in loaded.manifest.programs:
        if program.name == "eval_forward":
            continue
        if program.name == "update":
            if _donated_bytes(program) > COPIED_UPDATE_BYTES:
                moved_bytes = sum(leaf.size_bytes for leaf in (*program.inputs, *program.outputs))
                seconds["update"] = moved_bytes / _stream_bytes_per_s(pace, repeats)
                continue
            alone = _Measured(loaded, program, given, scratch)
            for _ in range(repeats + 1):
                alone.run(pace)
            seconds["update"] = alone.median_s
            del alone
            continue
        turns.append(_Measured(loaded, program, given, scratch))
    for _ in range(repeats + 1):
        for each in turns:
            each.run(pace)
    seconds.update({each.program.name: each.median_s for each in turns})
    return seconds


class _Measured:
    """One program on made-up inputs, called again and again."""

    def __init__(
        self,
        loaded: LoadedStage,
        program: ProgramSpec,
        given: Mapping[Key, Any],
        scratch: dict[Key, Any],
    ) -> None:
        import jax

        self.loaded, self.program, self._scratch = loaded, program, scratch
        self._rng = np.random.default_rng(0)
        self._donated = {program.inputs[i].key for i in program.donate}
        usable = {key: value for key, value in given.items() if key not in self._donated}
        self._env = {
            spec.key: usable[spec.key]
            if spec.key in usable
            else jax.device_put(_sample(spec, self._rng))
            for spec in program.inputs
            if spec.key not in scratch
        }
        self._times: list[float] = []

    @property
    def median_s(self) -> float:
        return statistics.median(self._times[1:])  # the first compiles, or touches fresh memory

    def run(self, pace: Pace) -> None:
        import jax

        for spec in self.program.inputs:
            if spec.key in self._scratch:  # programs share it, and each may overwrite it
                self._env[spec.key] = self._scratch[spec.key]
        timed = pace.run(lambda: self.loaded.run(self.program.name, self._env))
        self._times.append(timed.end_s - timed.start_s)
        for key in self._donated:
            # An accumulator comes back under its own key; what does not is made anew.
            back = timed.result.get(key)
            if back is None:
                spec = next(leaf for leaf in self.program.inputs if leaf.key == key)
                back = jax.device_put(_sample(spec, self._rng))
            self._env[key] = back
            if key in self._scratch:
                self._scratch[key] = back


def _donated_bytes(program: ProgramSpec) -> int:
    return sum(program.inputs[index].size_bytes for index in program.donate)


def _stream_bytes_per_s(pace: Pace, repeats: int) -> float:
    """How fast this device reads and writes arrays that no cache holds."""
    import jax

    blend = jax.jit(lambda a, b: 0.9 * a + 0.1 * b)
    one = jax.numpy.zeros(STREAMED_FLOATS, "float32")
    two = jax.numpy.ones(STREAMED_FLOATS, "float32")
    jax.block_until_ready(blend(one, two))
    times = []
    for _ in range(repeats):
        timed = pace.run(lambda: blend(one, two))
        times.append(timed.end_s - timed.start_s)
    return 3 * one.nbytes / statistics.median(times)


def _sample(spec: LeafSpec, rng: np.random.Generator) -> np.ndarray:
    """Values that keep a program on its usual path: small normals, zeros for integers."""
    dtype = spec.numpy_dtype
    if dtype.kind in "iub":
        return np.zeros(spec.shape, dtype)
    if spec.role in ("opt", "grad", "tied_grad", "cut", "state"):
        return np.full(spec.shape, 1e-3, dtype)
    if spec.role in ("inv_weight", "shared", "global"):
        return np.ones(spec.shape, dtype)
    return (0.1 * rng.standard_normal(spec.shape, np.float32)).astype(dtype, copy=False)
