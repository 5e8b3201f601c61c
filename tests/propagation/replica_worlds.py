"""Small crowds, profiles and views that the tests of this folder share."""

from __future__ import annotations

from typing import Any

import numpy as np

from crowdmesh_jax.core import (
    Crowd,
    DefaultLink,
    Device,
    DeviceId,
    LayerProfile,
    ModelProfile,
    PipelinePlan,
    Replica,
    ReplicaPlan,
    ReplicaRange,
)
from crowdmesh_jax.mobility import Sightings
from crowdmesh_jax.propagation import Budget, Costs, PolicyView

RATE = 1_000_000.0


def profile(layers: int = 6, *, parameter_bytes: int = 1000, microbatches: int = 4) -> ModelProfile:
    """Layers that take 1 s forward and 2 s backward at 1e6 flops/s; 3 x parameters of state."""
    return ModelProfile(
        layers=tuple(
            LayerProfile(
                name=f"layer{i}",
                forward_flops=1e6,
                backward_flops=2e6,
                parameter_bytes=parameter_bytes,
                optimizer_bytes=2 * parameter_bytes,
                output_bytes=10,
                gradient_bytes=10,
                residual_bytes=10,
            )
            for i in range(layers)
        ),
        microbatches=microbatches,
        microbatch_size=2,
        input_bytes=10,
    )


def crowd(
    names: str = "a b c d e",
    *,
    memory_bytes: int = 2_000_000_000,
    flops: dict[str, float] | None = None,
    memory: dict[str, int] | None = None,
    hazard: dict[str, float] | None = None,
    rate: float = RATE,
) -> Crowd:
    return Crowd(
        devices=tuple(
            Device(
                id=DeviceId(name),
                flops_per_s=(flops or {}).get(name, 1e6),
                memory_bytes=(memory or {}).get(name, memory_bytes),
                leave_hazard_per_s=(hazard or {}).get(name, 0.0),
            )
            for name in names.split()
        ),
        default_link=DefaultLink(bandwidth_bytes_per_s=rate, latency_s=0.0),
    )


def plan(devices: str = "a b c", layers: int = 6, microbatches: int = 4) -> PipelinePlan:
    return PipelinePlan.even(layers, devices.split(), microbatches=microbatches)


def copies(made: PipelinePlan, holders: dict[str, str], keep: str = "memory") -> ReplicaPlan:
    """Owner -> names of holders."""
    return ReplicaPlan(
        ranges=tuple(
            ReplicaRange(
                owner=s.device,
                first_layer=s.first_layer,
                last_layer=s.last_layer,
                replicas=tuple(
                    Replica(device=DeviceId(h), interval_steps=10, keep=keep)  # pyright: ignore
                    for h in holders.get(s.device, "").split()
                ),
            )
            for s in made.stages
        ),
        num_layers=made.num_layers,
    )


def sightings(
    places: dict[str, tuple[float, float]],
    velocities: dict[str, tuple[float, float]] | None = None,
    *,
    now_s: float = 100.0,
    sd: float = 0.0,
) -> Sightings:
    names = list(places)
    return Sightings(
        now_s=now_s,
        seen_s=np.full(len(names), now_s),
        positions_m=np.array([places[n] for n in names], float),
        velocities_m_per_s=np.array([(velocities or {}).get(n, (0.0, 0.0)) for n in names], float),
        velocity_sd_m_per_s=np.full(len(names), sd),
        occupants=np.arange(len(names)),
    )


def view(**more: Any) -> PolicyView:
    there = more.pop("crowd", None) or crowd()
    options: dict[str, Any] = {
        "plan": plan(),
        "profile": profile(),
        "crowd": there,
        "costs": Costs(step_s=1.0),
        "ids": tuple(d.id for d in there.devices),
        "budget": Budget(),
    }
    return PolicyView(**{**options, **more})
