"""Hypothesis strategies for core values, shared by the tests of this folder."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import strategies as st

from crowdmesh_jax.core import (
    Crowd,
    CutTimes,
    DefaultLink,
    Device,
    DeviceId,
    LayerProfile,
    LayerSeconds,
    Link,
    ModelProfile,
    Op,
    OpKind,
    PipelinePlan,
    Schedule,
    Stage,
    StageTimes,
    make_schedule,
)

# Multiples of 1/8 are exact in floats, sums of them too: orders and equalities are not blurred.
seconds = st.integers(0, 24).map(lambda eighths: eighths / 8)
positive = st.floats(1e-6, 1e12, allow_nan=False)
sizes = st.integers(0, 2**40)
names = st.text(
    st.characters(min_codepoint=33, max_codepoint=0x2FF, categories=("L", "N")),
    min_size=1,
    max_size=12,
)


@st.composite
def schedules(draw, max_stages: int = 5, max_microbatches: int = 9) -> Schedule:
    """A built-in schedule; `eager` with any warm-ups that do not deadlock, or some left out."""
    name = draw(st.sampled_from(["gpipe", "1f1b", "eager"]))
    num_stages = draw(st.integers(1, max_stages))
    microbatches = draw(st.integers(1, max_microbatches))
    warmups = None
    if name == "eager" and draw(st.booleans()):
        depths = draw(st.lists(st.integers(1, 12), min_size=num_stages, max_size=num_stages))
        warmups = sorted(depths, reverse=True)
    return make_schedule(name, num_stages, microbatches, warmups)


@st.composite
def split_schedules(draw, max_stages: int = 4, max_microbatches: int = 6) -> Schedule:
    """A built-in schedule, or one whose backward is split on some stages, wherever that may be."""
    schedule = draw(schedules(max_stages, max_microbatches))
    if draw(st.integers(0, 3)) == 0:
        return make_schedule("zb-h1", schedule.num_stages, schedule.num_microbatches)
    found = []
    for ops in schedule.ops:
        if draw(st.booleans()):
            found.append(ops)
            continue
        mixed, due = [], []
        for op in ops:
            mixed.append(op)
            if op.kind is OpKind.BACKWARD:
                due.append(Op(OpKind.WEIGHT, op.microbatch))
            count = draw(st.integers(0, len(due)))
            mixed += due[:count]
            del due[:count]
        found.append((*mixed, *due))
    return Schedule(name="split", ops=tuple(found))


@st.composite
def times(draw, num_stages: int, *, updates: bool = True):
    """`(stages, cuts)` with arbitrary seconds, zeros included."""
    extra = seconds if updates else st.just(0.0)
    stages = []
    for _ in range(num_stages):
        weight_s = draw(seconds)
        stages.append(
            StageTimes(
                forward_s=draw(seconds),
                backward_s=weight_s + draw(seconds),
                update_s=draw(extra),
                reduce_s=draw(extra),
                weight_s=weight_s,
            )
        )
    cuts = tuple(
        CutTimes(
            forward_latency_s=draw(seconds),
            forward_transfer_s=draw(seconds),
            backward_latency_s=draw(seconds),
            backward_transfer_s=draw(seconds),
        )
        for _ in range(num_stages - 1)
    )
    return tuple(stages), cuts


@st.composite
def crowds(draw) -> Crowd:
    ids = draw(st.lists(names, min_size=1, max_size=4, unique=True))
    devices = tuple(
        Device(
            id=DeviceId(i),
            flops_per_s=draw(positive),
            memory_bytes=draw(st.integers(1, 2**50)),
            speed=draw(st.floats(0.01, 100)),
            address=draw(st.none() | st.just("127.0.0.1:9000")),
        )
        for i in ids
    )
    pairs = [(a, b) for a in ids for b in ids if a != b]
    chosen = draw(st.lists(st.sampled_from(pairs), unique=True, max_size=4)) if pairs else []
    links = tuple(
        Link(
            source=DeviceId(a),
            target=DeviceId(b),
            bandwidth_bytes_per_s=draw(positive),
            latency_s=draw(seconds),
        )
        for a, b in chosen
    )
    default = draw(
        st.none() | st.builds(DefaultLink, bandwidth_bytes_per_s=positive, latency_s=seconds)
    )
    return Crowd(devices=devices, links=links, default_link=default)


@st.composite
def profiles(draw) -> ModelProfile:
    count = draw(st.integers(1, 6))
    layers = tuple(
        LayerProfile(
            name=f"layer{i}",
            forward_flops=draw(positive),
            backward_flops=draw(positive),
            parameter_bytes=draw(sizes),
            optimizer_bytes=draw(sizes),
            state_bytes=draw(sizes),
            output_bytes=draw(sizes),
            gradient_bytes=draw(sizes),
            residual_bytes=draw(sizes),
            parameter_count=draw(sizes),
        )
        for i in range(count)
    )
    row = st.builds(LayerSeconds, forward_s=seconds, backward_s=seconds, update_s=seconds)
    rows = st.lists(row, min_size=count, max_size=count).map(tuple)
    return ModelProfile(
        layers=layers,
        microbatches=draw(st.integers(1, 12)),
        microbatch_size=draw(st.integers(1, 64)),
        input_bytes=draw(sizes),
        target_bytes=draw(sizes),
        globals_bytes=draw(sizes),
        seconds=draw(st.dictionaries(names, rows, max_size=2)),
        model_name=draw(st.just("") | names),
    )


@st.composite
def plans(draw) -> PipelinePlan:
    num_layers = draw(st.integers(1, 9))
    inner = st.sets(st.integers(1, num_layers - 1)) if num_layers > 1 else st.just(set())
    ends = [0, *sorted(draw(inner)), num_layers]
    stages = tuple(
        Stage(
            device=DeviceId(f"device-{i}"),
            first_layer=first,
            last_layer=end - 1,
            recompute=draw(st.booleans()),
            warmup=draw(st.none() | st.integers(1, 9)),
        )
        for i, (first, end) in enumerate(pairwise(ends))
    )
    return PipelinePlan(
        stages=stages,
        num_layers=num_layers,
        microbatches=draw(st.integers(1, 64)),
        schedule=draw(st.sampled_from(["gpipe", "1f1b", "eager"])),
    )
