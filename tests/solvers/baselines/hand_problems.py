"""Problems small enough to work by hand."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from partition_problems import random_crowd, random_profile

from crowdmesh_jax.core import (
    Crowd,
    DefaultLink,
    Device,
    DeviceId,
    LayerProfile,
    LayerSeconds,
    ModelProfile,
)
from crowdmesh_jax.solvers import PartitionProblem

BASELINES = ("by_params", "cloud_device", "pipedream", "ftpipehd", "dapple", "asteroid")


def by_hand(
    seconds: Mapping[str, Sequence[tuple[float, float]]],
    *,
    microbatches: int = 4,
    rows: int = 1,
    cuts: Sequence[int] = (),
    back: bool = True,
    params: Sequence[int] = (),
    states: Sequence[int] = (),
    residuals: int = 0,
    rate: float = 10.0,
    links: Any = (),
    memory: Mapping[str, int] | int = 10**9,
    **options: Any,
) -> PartitionProblem:
    """A problem from (forward, backward) seconds per layer and device.

    Args:
        cuts: Bytes that leave each layer, and come back where `back`.
        rate: Bytes per second of every link that `links` does not name; no latency.
    """
    count = len(next(iter(seconds.values())))

    def of(values: Sequence[int], index: int) -> int:
        return values[index] if index < len(values) else 0

    layers = tuple(
        LayerProfile(
            name=f"layer{i}",
            forward_flops=1.0,
            backward_flops=1.0,
            parameter_bytes=of(params, i),
            state_bytes=of(states, i),
            output_bytes=of(cuts, i),
            gradient_bytes=of(cuts, i) if back else 0,
            residual_bytes=residuals,
        )
        for i in range(count)
    )
    profile = ModelProfile(
        layers=layers,
        microbatches=microbatches,
        microbatch_size=rows,
        input_bytes=0,
        seconds={
            device: tuple(LayerSeconds(forward_s=f, backward_s=b) for f, b in row)
            for device, row in seconds.items()
        },
    )
    crowd = Crowd(
        devices=tuple(
            Device(
                id=DeviceId(device),
                memory_bytes=memory if isinstance(memory, int) else memory[device],
            )
            for device in seconds
        ),
        links=tuple(links),
        default_link=DefaultLink(bandwidth_bytes_per_s=rate, latency_s=0.0) if rate else None,
    )
    return PartitionProblem(profile=profile, crowd=crowd, compile_peak_bytes=0, **options)


def any_problem(seed: int, *, max_layers: int = 7, max_devices: int = 4) -> PartitionProblem:
    """Any small problem, with and without shared stages, state, rules; infeasible ones too."""
    rng = random.Random(seed)
    devices = [f"d{i}" for i in range(rng.randint(1, max_devices))]
    layers = rng.randint(1, max_layers)
    profile = random_profile(rng, devices, layers, updates=True)
    profile = replace(profile, microbatch_size=rng.choice([1, 4, 8]))
    if rng.random() < 0.3:
        mixing = rng.randrange(layers)
        kept = list(profile.layers)
        kept[mixing] = replace(kept[mixing], state_bytes=1)
        profile = replace(profile, layers=tuple(kept))
    options: dict[str, Any] = rng.choice(
        [
            {},
            {},
            {},
            {"pins": {rng.randrange(layers): rng.choice(devices)}},
            {"bans": [rng.choice(devices)]},
            {"bans": [(rng.randrange(layers), rng.choice(devices))]},
            {"requires": [rng.choice(devices)]},
            {"min_stages": 2},
            {"max_stages": 2},
        ]
    )
    return PartitionProblem(
        profile=profile,
        crowd=random_crowd(rng, devices, layers),
        schedule=rng.choice(["1f1b", "eager", "gpipe"]),
        recompute=rng.choice(["never", "always", "auto"]),
        share=rng.random() < 0.6,
        compile_peak_bytes=0,
        **options,
    )


def lengths(plan) -> list[int]:
    return [len(stage.layers) for stage in plan.stages]
