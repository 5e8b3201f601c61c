"""Hypothesis strategies for partition problems, shared by the tests of this folder."""

from __future__ import annotations

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

# Few values on purpose: ties, zeros and devices that are alike must come up.
eighths = st.integers(1, 16).map(lambda n: n / 8)
small_bytes = st.integers(0, 6)


@st.composite
def profiles(draw, devices: list[str], num_layers: int, *, updates: bool = False) -> ModelProfile:
    """Seconds around 1, bytes of a handful, so that links and memory matter as much as compute."""
    layers = tuple(
        LayerProfile(
            name=f"layer{index}",
            forward_flops=1.0,
            backward_flops=2.0,
            parameter_bytes=draw(small_bytes),
            optimizer_bytes=draw(small_bytes),
            output_bytes=draw(small_bytes),
            gradient_bytes=draw(small_bytes),
            residual_bytes=draw(small_bytes),
        )
        for index in range(num_layers)
    )
    costs = [(draw(eighths), draw(eighths)) for _ in range(num_layers)]
    seconds = {}
    for device in devices:
        slower = draw(st.sampled_from([0.5, 1.0, 1.0, 2.0, 4.0]))
        odd = draw(st.integers(-num_layers, num_layers - 1))  # a layer it is slow at, if any
        seconds[device] = tuple(
            LayerSeconds(
                forward_s=forward * slower * (3.0 if index == odd else 1.0),
                backward_s=backward * slower,
                update_s=draw(eighths) if updates else 0.0,
            )
            for index, (forward, backward) in enumerate(costs)
        )
    return ModelProfile(
        layers=layers,
        microbatches=draw(st.sampled_from([1, 2, 4, 8])),
        microbatch_size=1,
        input_bytes=draw(small_bytes),
        target_bytes=draw(small_bytes),
        seconds=seconds,
    )


@st.composite
def crowds(draw, devices: list[str]) -> Crowd:
    """Some pairs with links of their own, some without any; memory from too little to plenty."""
    tight = draw(st.booleans())
    memory = st.integers(1, 60) if tight else st.just(10_000)
    rate = st.sampled_from([1.0, 4.0, 100.0])
    latency = st.sampled_from([0.0, 0.25])
    pairs = [(a, b) for a in devices for b in devices if a != b]
    own = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    default = DefaultLink(bandwidth_bytes_per_s=draw(rate), latency_s=draw(latency))
    return Crowd(
        devices=tuple(Device(id=DeviceId(d), memory_bytes=draw(memory)) for d in devices),
        links=tuple(
            Link(
                source=DeviceId(a),
                target=DeviceId(b),
                bandwidth_bytes_per_s=draw(rate),
                latency_s=draw(latency),
            )
            for a, b in own
        ),
        default_link=draw(st.sampled_from([default, default, default, None])),
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
    """Any small problem, infeasible ones included."""
    devices = [f"d{index}" for index in range(draw(st.integers(1, max_devices)))]
    num_layers = draw(st.integers(1, max_layers))
    layer, device = st.integers(0, num_layers - 1), st.sampled_from(devices)
    pins, bans, requires, min_stages, max_stages = {}, [], [], 1, None
    if rules:
        pins = draw(st.dictionaries(layer, device, max_size=1))
        bans = draw(st.lists(st.one_of(device, st.tuples(layer, device)), max_size=1))
        requires = draw(st.lists(device, max_size=1))
        min_stages = draw(st.sampled_from([1, 1, 1, 2]))
        max_stages = draw(st.sampled_from([None, None, 2]))
    return PartitionProblem(
        profile=draw(profiles(devices, num_layers, updates=updates)),
        crowd=draw(crowds(devices)),
        schedule=draw(st.sampled_from(schedules)),
        pins=pins,
        bans=bans,
        requires=requires,
        min_stages=min_stages,
        max_stages=max_stages,
        recompute=draw(st.sampled_from(["never", "always", "auto"])),
        objective=objective,
        compile_peak_bytes=0,
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
