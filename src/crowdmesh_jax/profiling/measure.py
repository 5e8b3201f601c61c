"""Measures this machine: its flops per second, and the seconds each layer takes here.

Compiles and runs; times are medians, compilation left out. Knows nothing of other devices but
their speed relative to this machine.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core.crowd import Crowd
from ..core.profile import LayerSeconds
from ..export.chain import build_chain
from ..model import TrainingJob
from ..model.randomness import layer_key
from ..model.trees import count, get_leaf
from .costs import LayerTrace, split_leaves, trace_layer

PyTree = Any
MATRIX = 256
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
    return Crowd(devices=devices, links=crowd.links, default_link=crowd.default_link)


def measure_layers(
    job: TrainingJob, example_batch: tuple[PyTree, PyTree], *, seconds_per_layer: float = 0.1
) -> tuple[LayerSeconds, ...]:
    """Seconds of each layer on this machine, one microbatch: forward, backward, and its update.

    Makes the parameters, and compiles each layer twice. The update is timed for the whole model
    and shared out by parameters.
    """
    inputs_spec, _ = job.microbatch_specs(example_batch)
    specs = job.model.specs(inputs_spec)
    carries = build_chain(job.model, inputs_spec).carries
    params, state = job.model.init(job.seed, inputs_spec)
    rows = job.microbatch_size
    x = jax.tree.map(lambda leaf: jnp.asarray(leaf[:rows]), example_batch[0])
    total = max(specs.parameter_count, 1)
    update_s = _update_s(job, params, seconds_per_layer)
    measured = []
    for index, (layer, row) in enumerate(zip(job.model.layers, specs.layers, strict=True)):
        before, after = carries[index], carries[index + 1]
        x_active = before.active[: len(before.leaves)]
        y_active = after.active[: len(after.leaves)]
        own: Any = params[layer.name]
        if layer.borrows:
            borrowed = {k: get_leaf(params[o], path) for k, (o, path) in layer.borrows.items()}
            own = {**own, **borrowed}
        trace = trace_layer(layer, row, x_active, y_active)
        chosen, others = split_leaves(x, x_active)
        key = layer_key(job.seed, 0, 0, index)
        given = (own, chosen, others, state[layer.name], key)
        forward_s, backward_s, outputs = _time_layer(trace, given, seconds_per_layer)
        share = count(row.params) / total
        measured.append(
            LayerSeconds(forward_s=forward_s, backward_s=backward_s, update_s=update_s * share)
        )
        active, rest = (iter(part) for part in outputs)
        leaves = [next(active) if on else next(rest) for on in y_active]
        x = jax.tree.unflatten(jax.tree.structure(row.y), leaves)
    return tuple(measured)


def _time_layer(trace: LayerTrace, given: tuple[Any, ...], seconds: float) -> Any:
    forward = jax.jit(trace.forward)
    (out, aux), (rest, after), vjp = forward(*given)
    del after
    forward_s = _median_s(lambda: forward(*given), seconds / 2)
    if not (jax.tree.leaves(given[0]) or given[1]):
        return forward_s, 0.0, (out, rest)
    backward = jax.jit(trace.backward)
    dy = jax.tree.map(jnp.ones_like, (out, aux))
    return forward_s, _median_s(lambda: backward(vjp, dy), seconds / 2), (out, rest)


def _update_s(job: TrainingJob, params: PyTree, seconds: float) -> float:
    def update(params: PyTree, grads: PyTree, state: PyTree) -> Any:
        updates, state = job.optimizer.update(grads, state, params)
        return jax.tree.map(lambda p, u: p + u.astype(p.dtype), params, updates), state

    run = jax.jit(update)
    state = job.optimizer.init(params)
    grads = jax.tree.map(lambda p: jnp.full(p.shape, 1e-3, p.dtype), params)
    return _median_s(lambda: run(params, grads, state), seconds)


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
