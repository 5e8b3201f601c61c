"""Why a partition problem has no answer, in terms of its layers, devices, links and rules.

Called once a solver has found (or proven) that nothing fits. Simple reasons are read off the
problem; the rest by relaxing one kind of limit at a time and asking whether that helps.
"""

from __future__ import annotations

from collections.abc import Callable

from ...core import DeviceId, MemoryBreakdown, Stage, search_schedule, stage_memory, warmup_depths
from ...errors import InfeasibleError
from ..problem import PartitionProblem
from ..units import format_bytes
from .tables import Tables

IsFeasible = Callable[[Tables], bool]


def infeasible(problem: PartitionProblem, is_feasible: IsFeasible | None = None) -> InfeasibleError:
    """The error that says why nothing fits.

    Args:
        is_feasible: Whether tables with a limit relaxed have any chain; None: do not ask.
    """
    text = (
        _too_many_stages(problem)
        or _rules_clash(problem)
        or _layer_too_large(problem)
        or _not_enough_memory(problem)
    )
    if text is None and is_feasible is not None:
        if is_feasible(Tables(problem, ignore_links=True)):
            text = _links(problem)
        elif is_feasible(Tables(problem, ignore_memory=True)):
            text = _memory_together(problem)
        elif is_feasible(Tables(problem, ignore_rules=True)):
            text = _rules(problem)
    return InfeasibleError(text or _anything(problem))


def _layer(problem: PartitionProblem, index: int) -> str:
    return f"layer {index} {problem.profile.layers[index].name!r}"


def _too_many_stages(problem: PartitionProblem) -> str | None:
    least = max(problem.min_stages, len(set(problem.requires)))
    if least > problem.num_layers:
        return (
            f"{least} stages for {problem.num_layers} layers: each stage needs a layer\n"
            "  try      fewer stages, or a model with finer layers"
        )
    count = len(problem.allowed_devices)
    if count == 0:
        return "no device may be used\n  try      fewer bans"
    if least > count:
        return (
            f"{least} stages on {count} devices: each device holds one stage\n"
            f"  devices  {', '.join(problem.allowed_devices)}\n"
            "  try      fewer stages, or more devices"
        )
    if problem.max_stages is not None and least > problem.max_stages:
        return f"{least} devices must have a stage, but max_stages is {problem.max_stages}"
    return None


def _rules_clash(problem: PartitionProblem) -> str | None:
    for device in problem.requires:
        if device not in problem.allowed_devices:
            return f"device {device!r} must have a stage, but may not be used"
    for layer, device in problem.layer_pins.items():
        if device not in problem.allowed_devices or not problem.allows(device, layer):
            return (
                f"{_layer(problem, layer)} is pinned to {device!r}, which may not run it\n"
                "  try      drop the pin, or the ban of the device"
            )
    for layer in range(problem.num_layers):
        if not any(problem.allows(device, layer) for device in problem.allowed_devices):
            return f"no device may run {_layer(problem, layer)}\n  try      fewer bans"
    # A device has one stage, so between two of its pins there may be no pin to another one.
    last_of: dict[str, int] = {}
    previous: str | None = None
    for layer, device in problem.layer_pins.items():
        if device != previous and device in last_of:
            return (
                f"{_layer(problem, last_of[device])} and {_layer(problem, layer)} are pinned to"
                f" {device!r}, but a layer between them is pinned to {previous!r}; each device"
                " holds one stage of consecutive layers\n  try      drop one of these pins"
            )
        last_of[device] = layer
        previous = device
    return None


def memory_of(
    problem: PartitionProblem, first: int, end: int, *, in_flight: int, recompute: bool = False
) -> MemoryBreakdown:
    """The breakdown for layers `first .. end - 1` as one stage of a longer pipeline."""
    index, count = (0, 2) if first == 0 else (1, 3)
    if end == problem.num_layers:
        count = index + 1
    return stage_memory(
        problem.profile,
        Stage(device=DeviceId("any"), first_layer=first, last_layer=end - 1, recompute=recompute),
        stage_index=index,
        num_stages=count,
        in_flight=in_flight,
        snapshots=problem.snapshots,
        log_steps=problem.log_steps,
        compile_peak_bytes=problem.compile_peak_bytes,
    )


def breakdown_line(memory: MemoryBreakdown, in_flight: int) -> str:
    """`params 96 MB + grads 96 MB + ...`, the terms that are not nothing."""
    if memory.compile_peak_bytes > memory.training_bytes:
        return f"compiling a stage's programs; training takes {format_bytes(memory.training_bytes)}"
    several = "microbatches" if in_flight > 1 else "microbatch"
    terms = (
        ("params", memory.parameter_bytes),
        ("grads", memory.gradient_bytes),
        ("optimizer", memory.optimizer_bytes),
        ("statistics", memory.state_bytes),
        (f"{in_flight} {several} in flight", memory.stash_bytes),
        ("frames", memory.credit_bytes),
        ("snapshots", memory.snapshot_bytes),
        ("logs", memory.log_bytes),
        ("hosted", memory.hosted_bytes),
        ("running programs", memory.working_bytes),
        ("compiled programs", memory.program_bytes),
    )
    return " + ".join(f"{name} {format_bytes(size)}" for name, size in terms if size)


def _layer_too_large(problem: PartitionProblem) -> str | None:
    """The layer that no device can hold even alone, under the gentlest conditions there are."""
    devices = [problem.crowd.device(device) for device in problem.allowed_devices]
    roomiest = max(devices, key=lambda device: (device.memory_bytes, device.id))
    if problem.compile_peak_bytes > roomiest.memory_bytes:
        return (
            "no device has the memory to compile a stage's programs\n"
            f"  needs    {format_bytes(problem.compile_peak_bytes)}   whatever the stage\n"
            f"  largest  {format_bytes(roomiest.memory_bytes)}   device {roomiest.id!r}\n"
            "  try      a device with more memory, a measured compile_peak_bytes, or check"
            f" {roomiest.id}'s memory_bytes"
        )
    last = problem.num_layers - 1
    for layer in range(problem.num_layers):
        able = [device for device in devices if problem.allows(device.id, layer)]
        largest = max(able, key=lambda device: (device.memory_bytes, device.id))
        # In the middle of a chain at least one more stage follows, under 1f1b with one in flight.
        in_flight = _in_flight(problem, 1 if layer == last else 2)
        memory = memory_of(
            problem,
            layer,
            layer + 1,
            in_flight=in_flight,
            recompute=problem.recompute != "never",
        )
        if memory.total_bytes <= largest.memory_bytes or _fits_within_more(
            problem, layer, [device.memory_bytes for device in able]
        ):
            continue
        remedies = _remedies(problem, memory, largest.memory_bytes, layer, largest.id)
        return (
            f"no device can hold {_layer(problem, layer)} while training\n"
            f"  needs    {format_bytes(memory.total_bytes)}   {breakdown_line(memory, in_flight)}\n"
            f"  largest  {format_bytes(largest.memory_bytes)}   device {largest.id!r}\n"
            f"  try      {remedies}"
        )
    return None


def _fits_within_more(problem: PartitionProblem, layer: int, limits: list[int]) -> bool:
    """Whether some longer stage with this layer fits (its frames or its place may cost less)."""
    limit = max(limits)
    recompute = problem.recompute != "never"
    for first in range(layer + 1):
        for end in range(layer + 1, problem.num_layers + 1):
            depth = 1 if end == problem.num_layers else 2
            memory = memory_of(
                problem, first, end, in_flight=_in_flight(problem, depth), recompute=recompute
            )
            if memory.total_bytes <= limit:
                return True
    return False


def _in_flight(problem: PartitionProblem, depth: int) -> int:
    return warmup_depths(search_schedule(problem.schedule), depth, problem.microbatches)[0]


def _remedies(
    problem: PartitionProblem, memory: MemoryBreakdown, limit: int, layer: int, device: str
) -> str:
    ideas = []
    if memory.optimizer_bytes:
        without = memory.training_bytes - memory.optimizer_bytes
        ideas.append(f"optax.sgd ({format_bytes(without)})")
    if problem.recompute == "never" and memory.stash_bytes > memory.training_bytes // 5:
        ideas.append('recompute="auto"')
    if memory.stash_bytes > memory.training_bytes // 5:
        ideas.append("smaller microbatches")
    ideas.append(f"a finer split of {problem.profile.layers[layer].name}")
    return ", ".join(ideas) + f", or check {device}'s memory_bytes"


def _not_enough_memory(problem: PartitionProblem) -> str | None:
    """More bytes of parameters and optimizer state than all devices have together."""
    profile = problem.profile
    needed = sum(
        2 * layer.parameter_bytes + layer.optimizer_bytes + 2 * layer.state_bytes
        for layer in profile.layers
    )
    devices = [problem.crowd.device(device) for device in problem.allowed_devices]
    if needed <= sum(device.memory_bytes for device in devices):
        return None
    return _memory_text(problem, needed)


def _memory_together(problem: PartitionProblem) -> str:
    whole = memory_of(problem, 0, problem.num_layers, in_flight=1)
    return _memory_text(problem, whole.training_bytes)


def _memory_text(problem: PartitionProblem, needed: int) -> str:
    devices = [problem.crowd.device(device) for device in problem.allowed_devices]
    total = sum(device.memory_bytes for device in devices)
    largest = max(devices, key=lambda device: (device.memory_bytes, device.id))
    layers = range(problem.num_layers)
    heavy = max(layers, key=lambda i: memory_of(problem, i, i + 1, in_flight=1).training_bytes)
    alone = memory_of(problem, heavy, heavy + 1, in_flight=1).training_bytes
    recompute = 'recompute="auto", ' if problem.recompute == "never" else ""
    return (
        f"no assignment of {problem.num_layers} layers to {len(devices)} devices fits in memory\n"
        f"  needs    at least {format_bytes(needed)} in all; largest {_layer(problem, heavy)} with"
        f" {format_bytes(alone)}\n"
        f"  has      {format_bytes(total)} in all; largest {format_bytes(largest.memory_bytes)},"
        f" device {largest.id!r}\n"
        f"  try      {recompute}smaller microbatches, an optimizer with less state, more devices,"
        " or check their memory_bytes"
    )


def _links(problem: PartitionProblem) -> str:
    devices = list(problem.allowed_devices)
    groups: list[set[str]] = []
    for device in devices:
        joined = {device}
        for group in [g for g in groups if any(_linked(problem, device, other) for other in g)]:
            joined |= group
            groups.remove(group)
        groups.append(joined)
    names = " | ".join(", ".join(sorted(group)) for group in groups)
    return (
        "no chain of linked devices can hold the model; neighbours need links both ways\n"
        f"  linked   {names}\n"
        "  try      add the missing links or a default_link to the crowd"
    )


def _linked(problem: PartitionProblem, left: str, right: str) -> bool:
    crowd = problem.crowd
    return crowd.link(left, right) is not None and crowd.link(right, left) is not None


def _rules_words(problem: PartitionProblem) -> str:
    words = [f"layer {layer} on {device}" for layer, device in problem.layer_pins.items()]
    words += [
        f"not {ban}" if isinstance(ban, str) else f"layer {ban[0]} not on {ban[1]}"
        for ban in problem.bans
    ]
    if problem.devices is not None:
        words.append(f"only {', '.join(problem.devices)}")
    words += [f"a stage on {device}" for device in problem.requires]
    return "; ".join(words)


def _rules(problem: PartitionProblem) -> str:
    return (
        "pins, bans and limits leave no plan\n"
        f"  asked    {_rules_words(problem)}\n"
        "  try      drop one of them"
    )


def _anything(problem: PartitionProblem) -> str:
    rules = _rules_words(problem)
    return (
        f"no plan for {problem.num_layers} layers on {len(problem.allowed_devices)} devices meets"
        " memory, links, pins and stage limits together\n"
        + (f"  asked    {rules}\n" if rules else "")
        + "  try      relax one of them"
    )
