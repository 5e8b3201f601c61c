"""Hypothesis strategies for partition problems, shared by the tests of this folder."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import strategies as st

from crowdmesh_jax.core import (
    Crowd,
    DefaultLink,
    Device,
    DeviceId,
    LayerProfile,
    LayerSeconds,
    Link,
    ModelProfile,
)
from crowdmesh_jax.solvers import PartitionProblem


def random_profile(
    rng: random.Random,
    devices: list[str],
    num_layers: int,
    *,
    updates: bool = False,
    alike: bool = False,
) -> ModelProfile:
    """Seconds around 1, bytes of a handful, so that links and memory matter as much as compute.

    Few distinct values on purpose: ties, zeros and devices that are alike must come up.
    """

    def size() -> int:
        return rng.randint(0, 6)

    slowest = rng.choice([4, 16])
    one_way = rng.random() < 0.3  # nothing comes back: the cut's two directions differ

    def eighths() -> float:
        return rng.randint(1, slowest) / 8

    layers = tuple(
        LayerProfile(
            name=f"layer{index}",
            forward_flops=1.0,
            backward_flops=2.0,
            parameter_bytes=size(),
            optimizer_bytes=size(),
            output_bytes=size(),
            gradient_bytes=0 if one_way else size(),
            residual_bytes=size(),
        )
        for index in range(num_layers)
    )
    costs = [(eighths(), eighths()) for _ in range(num_layers)]
    seconds = {}
    for device in devices:
        slower = rng.choice([0.5, 1.0, 1.0, 1.0, 2.0, 4.0])
        odd = rng.randint(-num_layers, num_layers - 1)  # a layer it is slow at, if any
        if alike:
            slower, odd = 1.0, -1
        seconds[device] = tuple(
            LayerSeconds(
                forward_s=forward * slower * (3.0 if index == odd else 1.0),
                backward_s=backward * slower,
                update_s=eighths() if updates else 0.0,
            )
            for index, (forward, backward) in enumerate(costs)
        )
    return ModelProfile(
        layers=layers,
        microbatches=rng.choice([1, 4, 8, 16]),
        microbatch_size=1,
        input_bytes=size(),
        target_bytes=size(),
        seconds=seconds,
    )


def random_crowd(
    rng: random.Random, devices: list[str], num_layers: int, *, alike: bool = False
) -> Crowd:
    """Some pairs with links of their own, some without any; memory from too little to plenty."""
    scale = rng.choice([1_000, 1_000, 6, 9, 12])  # times the layers: plenty, or a few layers' worth

    rates = rng.choice([[5.0], [50.0], [5.0, 50.0, 50.0, 500.0]])

    def wire() -> dict[str, float]:
        rate = rng.choice(rates)
        return {"bandwidth_bytes_per_s": rate, "latency_s": rng.choice([0.0, 0.0, 0.0, 0.25])}

    pairs = [(a, b) for a in devices for b in devices if a != b]
    own = [pair for pair in pairs if rng.random() < 0.4 and not alike]
    default = DefaultLink(**wire())
    memory = [scale * num_layers * rng.randint(2, 8) // 2 for _ in devices]
    return Crowd(
        devices=tuple(
            Device(id=DeviceId(device), memory_bytes=memory[0] if alike else own_bytes)
            for device, own_bytes in zip(devices, memory, strict=True)
        ),
        links=tuple(Link(source=DeviceId(a), target=DeviceId(b), **wire()) for a, b in own),
        default_link=None if rng.random() < 0.15 else default,
    )


@st.composite
def problems(
    draw,
    max_layers: int = 6,
    max_devices: int = 3,
    *,
    objective: str = "closed_form",
    rules: bool = True,
    updates: bool = False,
    schedules: tuple[str, ...] = ("1f1b", "1f1b", "eager", "gpipe"),
) -> PartitionProblem:
    """Any small problem, infeasible ones included.

    Only sizes are drawn; the numbers come evenly from a seed, since Hypothesis' liking for small
    ones would make nearly every problem infeasible or one of a single stage.
    """
    num_devices = draw(st.integers(1, max_devices).map(lambda n: max_devices + 1 - n))
    num_layers = draw(st.integers(1, max_layers).map(lambda n: max_layers + 1 - n))
    rng = random.Random(draw(st.integers(0, 2**32 - 1)))
    devices = [f"d{index}" for index in range(num_devices)]
    alike = rng.random() < 0.25
    options: dict[str, Any] = {}
    if rules and rng.random() < 0.5:
        rule = rng.choice(["pin", "device ban", "layer ban", "requires", "min", "max"])
        device, layer = rng.choice(devices), rng.randrange(num_layers)
        options = {
            "pin": {"pins": {layer: device, rng.randrange(num_layers): rng.choice(devices)}},
            "device ban": {"bans": [device]},
            "layer ban": {"bans": [(layer, device), (rng.randrange(num_layers), device)]},
            "requires": {"requires": [device]},
            "min": {"min_stages": 2},
            "max": {"max_stages": 2},
        }[rule]
    return PartitionProblem(
        profile=random_profile(rng, devices, num_layers, updates=updates, alike=alike),
        crowd=random_crowd(rng, devices, num_layers, alike=alike),
        schedule=rng.choice(schedules),
        recompute=rng.choice(["never", "always", "auto"]),
        objective=objective,
        compile_peak_bytes=0,
        **options,
    )


def chain_profile(
    num_layers: int = 12, microbatches: int = 8, *, parameter_bytes: int = 1_000_000, **seconds
) -> ModelProfile:
    """A plain profile: layers that get heavier, timed by flops unless `seconds` are given."""
    return ModelProfile(
        layers=tuple(
            LayerProfile(
                name=f"block{index}",
                forward_flops=1e8 * (1 + index % 5),
                backward_flops=2e8 * (1 + index % 5),
                parameter_bytes=parameter_bytes,
                optimizer_bytes=2 * parameter_bytes,
                output_bytes=200_000 + 10_000 * (index % 3),
                gradient_bytes=200_000,
                residual_bytes=500_000,
                parameter_count=parameter_bytes // 4,
            )
            for index in range(num_layers)
        ),
        microbatches=microbatches,
        microbatch_size=8,
        input_bytes=100_000,
        target_bytes=64,
        seconds=seconds,
    )
