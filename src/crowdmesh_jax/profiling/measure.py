"""Measures this machine: its flops per second, and the seconds each layer takes here.

Compiles and runs; times are medians, compilation left out. Knows nothing of other devices but
their speed relative to this machine.
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core.crowd import Crowd
from ..core.profile import LayerSeconds
from ..errors import ProfileCacheError
from ..export.chain import build_chain
from ..model import TrainingJob
from ..model.randomness import layer_key
from ..model.trees import count
from .cache import LayerMeasure, ProfileCache, load_calibration, open_cache, save_calibration
from .compiled import LayerPrograms, UpdateProgram
from .costs import trace_layer
from .roofline import Calibration

logger = logging.getLogger(__name__)

PyTree = Any
MATRIX = 256
STREAMED_FLOATS = 4 * 2**20
"""16 MB an array: beyond a cache."""
IMAGES, SIDE, CHANNELS, WINDOW = 8, 16, 32, 3


def calibrate(*, seconds: float = 0.5) -> float:
    """Float32 operations per second of this process, as training sees them.

    The mean time per operation over a matrix product (256 x 256) and a 3x3 convolution (8 images of
    16 x 16, 32 channels), forward and backward; each the median of runs in half the time given.

    Args:
        seconds: For both together, without compilation.
    """
    matrix = jnp.full((MATRIX, MATRIX), 0.01, jnp.float32)
    images = jnp.full((IMAGES, SIDE, SIDE, CHANNELS), 0.01, jnp.float32)
    kernel = jnp.full((WINDOW, WINDOW, CHANNELS, CHANNELS), 0.01, jnp.float32)

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(a @ b))

    def convolution(x: jax.Array, w: jax.Array) -> jax.Array:
        y = jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.sum(jnp.square(y))

    # Forward and both gradients: three times the forward's operations.
    product_flops = 3 * 2.0 * MATRIX**3
    convolution_flops = 3 * 2.0 * IMAGES * SIDE**2 * CHANNELS**2 * WINDOW**2
    mixes = (
        (product, (matrix, matrix), product_flops),
        (convolution, (images, kernel), convolution_flops),
    )
    per_flop = []
    for function, arguments, flops in mixes:
        run = jax.jit(jax.value_and_grad(function, argnums=(0, 1)))
        took = _median_s(lambda run=run, given=arguments: run(*given), seconds / len(mixes))
        per_flop.append(took / flops)
    return 1.0 / statistics.fmean(per_flop)


def kept_calibration(folder: Path | None) -> Calibration:
    """The rates that were measured here before; measured and kept where there are none.

    So calls of one machine plan alike, and a start does not pay for it again. None: nowhere.
    """
    if folder is None:
        return calibrate_machine()
    try:
        found = load_calibration(folder)
    except ProfileCacheError as exc:
        logger.warning("%s; measuring again", exc)
        found = None
    if found is None:
        found = calibrate_machine()
        save_calibration(folder, found)
    return found


def calibrate_machine(*, seconds: float = 1.0) -> Calibration:
    """What this machine can do: `calibrate`, the rate of streaming, the cost of a call.

    Args:
        seconds: For all three together, without compilation (about two seconds more).
    """
    one = jnp.ones(STREAMED_FLOATS, jnp.float32)
    two = jnp.full(STREAMED_FLOATS, 2.0, jnp.float32)
    blend = jax.jit(lambda a, b: 0.9 * a + 0.1 * b)
    tiny = jnp.ones(8, jnp.float32)
    add = jax.jit(lambda x: x + 1.0)
    return Calibration(
        flops_per_s=calibrate(seconds=seconds / 2),
        bytes_per_s=3 * one.nbytes / _median_s(lambda: blend(one, two), seconds / 4),
        call_s=_median_s(lambda: add(tiny), seconds / 4),
    )


def crowd_with_calibration(crowd: Crowd, flops_per_s: float) -> Crowd:
    """The crowd with `flops_per_s` times `speed` for each device without an address.

    Devices with an address keep theirs: they were not measured here.
    """
    devices = tuple(
        dataclasses.replace(device, flops_per_s=flops_per_s * device.speed)
        if device.address is None
        else device
        for device in crowd.devices
    )
    return dataclasses.replace(crowd, devices=devices)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledNeeds:
    """What compiled programs take beside their arrays, in the order of the layers."""

    temp_bytes: tuple[int, ...]
    """See `LayerProfile.temp_bytes`."""
    ops: tuple[int, ...]
    """Instructions of forward and backward."""
    update_temp_bytes: int
    """Of the whole model's update."""
    update_ops: int


@dataclass(frozen=True, slots=True)
class MeasuredLayers:
    """What this machine found of a model, in the order of its layers."""

    seconds: tuple[LayerSeconds, ...]
    needs: CompiledNeeds


def measure_layers(
    job: TrainingJob,
    example_batch: tuple[PyTree, PyTree],
    *,
    seconds_per_layer: float = 0.1,
    cache_dir: Path | None = None,
) -> MeasuredLayers:
    """Runs each layer on this machine, one microbatch: forward, backward, and its update.

    Layers of equal programs are measured once, on made-up parameters and inputs: no weights are
    made. The update is timed for the whole model and shared out by parameters.

    Args:
        cache_dir: Where measures are kept between calls (`profiling.cache`); None: nowhere. What
            is found there is neither compiled nor run.
    """
    inputs_spec, _ = job.microbatch_specs(example_batch)
    specs = job.model.specs(inputs_spec)
    cache = open_cache(cache_dir) or ProfileCache(Path())
    found = []
    for programs in layer_programs(job, inputs_spec):
        measure = cache.get(programs.key)
        if measure is None:
            measure = _time_layer(programs, seconds_per_layer)
            cache.put(programs.key, measure)
        found.append(measure)
    update = UpdateProgram.of(job.optimizer, specs.params)
    measure = cache.get(update.key)
    if measure is None:
        run_s = _time_update(update, seconds_per_layer)
        measure = LayerMeasure(
            forward_s=run_s, backward_s=0.0, temp_bytes=update.temp_bytes, ops=update.ops
        )
        cache.put(update.key, measure)
    if cache_dir is not None:
        cache.save()
    total = max(specs.parameter_count, 1)
    return MeasuredLayers(
        seconds=tuple(
            LayerSeconds(
                forward_s=each.forward_s,
                backward_s=each.backward_s,
                update_s=measure.forward_s * count(row.params) / total,
            )
            for each, row in zip(found, specs.layers, strict=True)
        ),
        needs=CompiledNeeds(
            temp_bytes=tuple(each.temp_bytes for each in found),
            ops=tuple(each.ops for each in found),
            update_temp_bytes=measure.temp_bytes,
            update_ops=measure.ops,
        ),
    )


def compiled_needs(job: TrainingJob, inputs_spec: PyTree) -> CompiledNeeds:
    """What XLA says that each layer, and the whole update, need while they run. Runs nothing."""
    known: dict[str, tuple[int, int]] = {}
    layers = []
    for programs in layer_programs(job, inputs_spec):
        if programs.key not in known:
            known[programs.key] = (programs.temp_bytes, programs.ops)
        layers.append(known[programs.key])
    update = UpdateProgram.of(job.optimizer, job.model.specs(inputs_spec).params)
    return CompiledNeeds(
        temp_bytes=tuple(temp_bytes for temp_bytes, _ in layers),
        ops=tuple(ops for _, ops in layers),
        update_temp_bytes=update.temp_bytes,
        update_ops=update.ops,
    )


def layer_programs(job: TrainingJob, inputs_spec: PyTree) -> Iterator[LayerPrograms]:
    """The programs of each layer, lowered and not compiled."""
    specs = job.model.specs(inputs_spec)
    carries = build_chain(job.model, inputs_spec).carries
    for index, (layer, row) in enumerate(zip(job.model.layers, specs.layers, strict=True)):
        before, after = carries[index], carries[index + 1]
        x_active = before.active[: len(before.leaves)]
        y_active = after.active[: len(after.leaves)]
        yield LayerPrograms.of(trace_layer(layer, row, x_active, y_active))


def _time_layer(programs: LayerPrograms, seconds: float) -> LayerMeasure:
    given = made_up(programs.trace.forward_inputs)
    (out, aux), _, vjp = programs.forward(*given)
    forward_s = _median_s(lambda: programs.forward(*given), seconds / 2)
    backward_s = 0.0
    if programs.backward is not None:
        dy = jax.tree.map(jnp.ones_like, (out, aux))
        backward_s = _median_s(lambda: programs.backward(vjp, dy), seconds / 2)
    return LayerMeasure(
        forward_s=forward_s,
        backward_s=backward_s,
        temp_bytes=programs.temp_bytes,
        ops=programs.ops,
    )


def _time_update(update: UpdateProgram, seconds: float) -> float:
    params, state, grads = made_up(update.inputs)

    def run() -> Any:
        # What is donated comes back: the state is in memory once.
        nonlocal params, state
        params, state = update.compiled(params, state, grads)
        return params

    return _median_s(run, seconds)


def made_up(specs: PyTree) -> PyTree:
    """Arrays of the specs' shapes, with values that keep a program on its usual path."""
    rng = np.random.default_rng(0)

    def make(spec: Any) -> Any:
        if jnp.issubdtype(spec.dtype, jax.dtypes.prng_key):
            return layer_key(0, 0, 0, 0)
        if not jnp.issubdtype(spec.dtype, jnp.inexact):
            return jnp.zeros(spec.shape, spec.dtype)
        # Positive: variances and second moments are among them.
        return jnp.asarray(0.02 + 0.01 * rng.random(spec.shape, np.float32), spec.dtype)

    return jax.tree.map(make, specs)


def _median_s(run: Callable[[], Any], seconds: float, *, least: int = 3) -> float:
    """Median seconds of a call; the first two, which compile and warm up, do not count."""
    for _ in range(2):
        jax.block_until_ready(run())
    took: list[float] = []
    end = time.perf_counter() + seconds
    while len(took) < least or time.perf_counter() < end:
        start = time.perf_counter()
        jax.block_until_ready(run())
        took.append(time.perf_counter() - start)
    return float(np.median(took))
