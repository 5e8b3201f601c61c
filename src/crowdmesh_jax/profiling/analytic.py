"""Profiles of a job: per layer flops and bytes, from shapes alone, and who owns optimizer state.

Knows models, jobs and crowds. Knows nothing of plans: a profile serves any cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from ..core.crowd import Crowd
from ..core.folders import cache_folder
from ..core.profile import LayerProfile, LayerSeconds, ModelProfile
from ..export.chain import AUX, Carry, build_chain
from ..model import Layer, LayerSpecs, TrainingJob
from ..model.trees import count, key_text, size_bytes
from .costs import Counter, LayerCosts
from .measure import CompiledNeeds, compiled_needs, kept_calibration, measure_layers
from .roofline import predict_layers

PyTree = Any

OPS_PER_EQUATION, UPDATE_OPS_PER_LEAF = 0.75, 7
"""Instructions that XLA makes of a traced equation, and of a parameter's Adam update: measured on
six models of the zoo (0.66-1.5, 7)."""


def profile(
    job: TrainingJob,
    crowd: Crowd,
    example_batch: tuple[PyTree, PyTree],
    *,
    calibrate: bool = False,
    measure: bool = False,
    memory: bool = False,
    cache_dir: str | Path | None = "default",
) -> ModelProfile:
    """Per layer flops and bytes of one microbatch; by default nothing is compiled or run.

    Seconds follow from flops and each device's `flops_per_s`, unless they are asked for:

    Args:
        example_batch: (inputs, targets) of one step; only shapes and dtypes count, but for
            `measure`.
        calibrate: Measure this machine's arithmetic, memory and calls for a second or two, unless
            that was done before, and predict from them (`roofline`), divided by `speed`, for each
            device that a launcher would start here (those without an address).
        measure: Run each layer here instead and take its seconds, divided by `speed`, for these.
            Agents do not measure their own: one that is emulated here has this processor.
        memory: Compile each layer and take what XLA says that it needs while it runs; `measure`
            does so too. Otherwise it is estimated from the sizes of arrays.
        cache_dir: Where measured layers and this machine's rates are kept between calls; None:
            nowhere. Times of another machine are refused, with a warning, and measured again.

    Raises:
        ModelError, JobError: As `TrainingJob.check`.
    """
    inputs, targets = job.microbatch_specs(example_batch)
    job.check(inputs, targets)
    specs = job.model.specs(inputs)
    carries = build_chain(job.model, inputs).carries
    optimizer_bytes, globals_bytes = optimizer_sizes(job.optimizer, specs.params)
    counter = Counter()
    costs = [
        counter.layer(layer, row, _leaves_active(before), _leaves_active(after))
        for layer, row, before, after in zip(
            job.model.layers, specs.layers, carries[:-1], carries[1:], strict=True
        )
    ]
    layers = tuple(
        LayerProfile(
            name=row.name,
            forward_flops=cost.forward_flops,
            backward_flops=cost.backward_flops,
            parameter_bytes=size_bytes(row.params),
            optimizer_bytes=optimizer_bytes[row.name],
            state_bytes=size_bytes(row.state),
            output_bytes=_carry_bytes(after, active_only=False),
            gradient_bytes=_carry_bytes(after, active_only=True),
            residual_bytes=_residual_bytes(cost, row.y, following),
            output_float32_bytes=_float32_bytes(after, active_only=False),
            gradient_float32_bytes=_float32_bytes(after, active_only=True),
            parameter_count=count(row.params),
            temp_bytes=_temp_bytes(row, after),
            program_ops=round(OPS_PER_EQUATION * cost.equations)
            + UPDATE_OPS_PER_LEAF * len(jax.tree.leaves(row.params)),
            borrows=_borrows(layer, row.borrowed),
        )
        for layer, row, cost, after, following in zip(
            job.model.layers, specs.layers, costs, carries[1:], [*costs[1:], None], strict=True
        )
    )
    made = ModelProfile(
        layers=layers,
        microbatches=job.microbatches,
        microbatch_size=job.microbatch_size,
        input_bytes=size_bytes(inputs),
        target_bytes=size_bytes(targets),
        globals_bytes=globals_bytes,
        model_name=job.model.name,
    )
    local = {device.id: device.speed for device in crowd.devices if device.address is None}
    chosen = cache_folder("profile") if cache_dir == "default" else cache_dir
    folder = None if chosen is None else Path(chosen)
    if measure:
        own = measure_layers(job, example_batch, cache_dir=folder)
        seconds = {device: _at_speed(own.seconds, speed) for device, speed in local.items()}
        made = with_compiled(made, own.needs)
        return dataclasses.replace(made, seconds=seconds, source="measured")
    if memory:
        made = with_compiled(made, compiled_needs(job, inputs))
    if calibrate:
        own = predict_layers(made, kept_calibration(folder))
        seconds = {device: _at_speed(own, speed) for device, speed in local.items()}
        return dataclasses.replace(made, seconds=seconds)
    return made


def with_compiled(profile: ModelProfile, needs: CompiledNeeds) -> ModelProfile:
    """The profile with the compiler's figures, the update's shared out by parameters.

    The update's instructions go by what was estimated of each layer, which counts its leaves.
    """
    total = max(sum(layer.parameter_count for layer in profile.layers), 1)
    owning = [layer.program_ops if layer.parameter_count else 0 for layer in profile.layers]
    guessed = max(sum(owning), 1)
    changed = tuple(
        dataclasses.replace(
            layer,
            temp_bytes=temp_bytes,
            update_temp_bytes=needs.update_temp_bytes * layer.parameter_count // total,
            program_ops=ops + needs.update_ops * own // guessed,
        )
        for layer, temp_bytes, ops, own in zip(
            profile.layers, needs.temp_bytes, needs.ops, owning, strict=True
        )
    )
    return dataclasses.replace(profile, layers=changed, memory_source="compiled")


def _temp_bytes(row: LayerSpecs, after: Carry) -> int:
    """An estimate: new gradients before they are added up, and an output and its cotangent."""
    return size_bytes(row.params) + 2 * _carry_bytes(after, active_only=False)


def _borrows(layer: Layer, borrowed: PyTree) -> tuple[tuple[str, int], ...]:
    return tuple((owner, size_bytes(borrowed[k])) for k, (owner, _) in layer.borrows.items())


def optimizer_sizes(optimizer: Any, params: Mapping[str, PyTree]) -> tuple[dict[str, int], int]:
    """Bytes of optimizer state: ({layer: bytes}, bytes that no layer owns).

    A leaf belongs to the layer whose parameter's path occurs in its own path.

    Args:
        params: {layer: tree of `jax.ShapeDtypeStruct`}.
    """
    owners = {
        tuple(key_text(key) for key in keys): key_text(keys[0])
        for keys, _ in jax.tree_util.tree_flatten_with_path(dict(params))[0]
    }
    lengths = sorted({len(path) for path in owners}, reverse=True)
    sizes, shared = dict.fromkeys(params, 0), 0
    state = jax.eval_shape(optimizer.init, dict(params))
    for keys, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        path = tuple(key_text(key) for key in keys)
        parts = (
            path[start : start + length]
            for length in lengths
            for start in range(len(path) - length + 1)
        )
        owner = next((owners[part] for part in parts if part in owners), None)
        if owner is None:
            shared += size_bytes(leaf)
        else:
            sizes[owner] += size_bytes(leaf)
    return sizes, shared


def _leaves_active(carry: Carry) -> tuple[bool, ...]:
    """Without the auxiliary loss, which is no leaf of the layer's own x or y."""
    return carry.active[: len(carry.leaves)]


def _carry_bytes(carry: Carry, *, active_only: bool) -> int:
    role = "dy" if active_only else "y"
    leaves = carry.specs(role, active_only=active_only)
    return sum(size_bytes(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)) for leaf in leaves)


def _float32_bytes(carry: Carry, *, active_only: bool) -> int | None:
    """Bytes of a carry that a cut may cast: float32 leaves but the auxiliary loss; None: all."""
    leaves = carry.specs("dy" if active_only else "y", active_only=active_only)
    sizes = [size_bytes(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)) for leaf in leaves]
    own = [
        size
        for leaf, size in zip(leaves, sizes, strict=True)
        if leaf.dtype == "float32" and leaf.path != AUX
    ]
    return None if sum(own) == sum(sizes) else sum(own)


def _residual_bytes(cost: LayerCosts, y: PyTree, following: LayerCosts | None) -> int:
    """Own residuals, and the outputs that only the next layer's backward reads."""
    if following is None:
        return cost.own_residual_bytes
    return cost.own_residual_bytes + sum(
        size_bytes(leaf)
        for leaf, kept, read in zip(
            jax.tree.leaves(y), cost.kept_outputs, following.reads_input, strict=True
        )
        if read and not kept
    )


def _at_speed(rows: Sequence[LayerSeconds], speed: float) -> tuple[LayerSeconds, ...]:
    return tuple(
        LayerSeconds(
            forward_s=row.forward_s / speed,
            backward_s=row.backward_s / speed,
            update_s=row.update_s / speed,
        )
        for row in rows
    )
