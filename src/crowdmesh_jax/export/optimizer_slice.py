"""Decides what of an optimizer runs where: per layer before the exchange, in `reduce`, or after it.

Knows labels and owners, not optax and not jaxprs. One exchange per step is allowed:

    local (each layer) -> cut scalars -> reduce (stage 0) -> globals and shared -> local

The cut depends on the model only, never on the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UnsupportedOptimizerError
from .optimizer_graph import GLOBAL, REDUCED, Graph, Kind, Label, Operation, Source, Value

PACKED_ELEMENTS = 1024
"""Longest vector of scalars that counts as scalars: `jnp.array` of many packs them in chunks."""
REMEDY = (
    "Use transforms that work leaf by leaf, or that mix layers through one scalar per leaf once "
    "per step (clip_by_global_norm, apply_if_finite)."
)


def join(
    labels: Sequence[Label],
    sizes: Sequence[int],
    out_sizes: Sequence[int],
    primitive: str,
    source: Source,
) -> Label:
    """The label of what an operation makes of values with `labels` and `sizes` (elements).

    A scalar of one layer that meets a reduced one counts as reduced: it may be the next term of a
    sum over layers. `settle` takes back what turns out to be that layer's own affair.

    Raises:
        UnsupportedOptimizerError: Layers mix other than through scalars, or a second time.
    """
    layers = {label.layer for label in labels} - {None}
    kinds = {label.kind for label in labels}
    if not layers:
        return REDUCED if Kind.REDUCED in kinds else GLOBAL
    scalars = all(
        n == 1 or (label.is_packed and n <= PACKED_ELEMENTS)
        for label, n in zip(labels, sizes, strict=True)
        if label.layer
    )
    if len(layers) == 1:
        layer = next(iter(layers))
        if kinds <= {Kind.GLOBAL, Kind.LOCAL}:
            return Label(Kind.LOCAL, layer, is_packed=scalars)
        if Kind.FINAL in kinds or not scalars or max(out_sizes) > PACKED_ELEMENTS:
            return Label(Kind.FINAL, layer)
        return REDUCED
    where = f"{primitive!r}" + (f" in {name}" if (name := source()) else "")
    if not scalars:
        raise UnsupportedOptimizerError(
            f"the optimizer cannot be cut by layer: operation {where} mixes arrays of layers "
            f"{_names(layers)} (sizes {[n for n in sizes if n > 1]}). {REMEDY}"
        )
    if Kind.FINAL in kinds:
        raise UnsupportedOptimizerError(
            f"the optimizer needs more than one exchange per step: operation {where} mixes "
            f"scalars of layers {_names(layers)} that already depend on an earlier mixture. "
            f"{REMEDY} If two transforms each look at all layers, keep one of them or nest them "
            "(apply_if_finite(chain(clip_by_global_norm, ...)))."
        )
    return REDUCED


def _names(layers: set[str | None]) -> str:
    names = sorted(str(layer) for layer in layers)
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What crosses between layers in one step."""

    cut: tuple[Value, ...]
    """Scalars of single layers, or short vectors of them, that `reduce` reads, in layer order."""
    shared: tuple[Value, ...]
    """What `update` cannot make from its own leaves and globals."""
    mixers: tuple[str, ...]
    """Sources of the operations that mix layers, in order of first use."""


def place(
    graph: Graph,
    owners: Sequence[str | None],
    layers: Sequence[str],
) -> Placement:
    """Chooses cut and shared values.

    Args:
        graph: As built with `join`; labels of operations that turn out to be one layer's own are
            changed from REDUCED to FINAL.
        owners: The layer of each output of the graph, None for a global.
        layers: All layers, in model order.

    Raises:
        UnsupportedOptimizerError: A global or a leaf of another layer depends on an update.
    """
    _settle(graph, owners)
    for value, owner in zip(graph.outputs, owners, strict=True):
        _check_output(graph, value, owner)
    shared = _shared(graph, owners)
    new_globals = [v for v, owner in zip(graph.outputs, owners, strict=True) if owner is None]

    def is_local(value: Value) -> bool:
        return graph.labels[value].kind is Kind.LOCAL

    operations, ends = graph.needed([*new_globals, *shared], is_local)
    rank = {layer: i for i, layer in enumerate(layers)}
    cut = sorted(filter(is_local, ends), key=lambda v: (rank[graph.labels[v].layer or ""], v))
    mixers = dict.fromkeys(
        op.source() or op.primitive for op in operations if any(map(is_local, op.inputs))
    )
    return Placement(cut=tuple(cut), shared=tuple(shared), mixers=tuple(mixers))


def _settle(graph: Graph, owners: Sequence[str | None]) -> None:
    """Gives REDUCED operations back to the one layer that alone uses them.

    A bias of one element times a clipping factor looks like a term of a reduction; that its
    result is read by one layer only shows that it is none.
    """
    users: dict[Value, set[str | None]] = {}
    for value, owner in zip(graph.outputs, owners, strict=True):
        users.setdefault(value, set()).add(owner)
    for op in reversed(graph.operations):
        sites = set().union(*(users.get(v, set()) for v in op.outputs))
        label = graph.labels[op.outputs[0]]
        if label.kind is Kind.REDUCED and len(sites) == 1 and None not in sites:
            own = {graph.labels[v].layer for v in op.inputs} - {None}
            if own <= sites:
                label = Label(Kind.FINAL, next(iter(sites)))
                for value in op.outputs:
                    graph.labels[value] = label
        if not sites:
            continue
        # GLOBAL operations are repeated wherever they are read and constrain nobody.
        site = label.layer if label.kind is not Kind.REDUCED else None
        if label.kind is not Kind.GLOBAL:
            for value in op.inputs:
                users.setdefault(value, set()).add(site)


def _check_output(graph: Graph, value: Value, owner: str | None) -> None:
    label = graph.labels[value]
    if label.layer in (None, owner):
        return
    if label.kind is Kind.FINAL or (owner is not None and graph.size(value) != 1):
        what = "a global value" if owner is None else f"a leaf of layer {owner!r}"
        raise UnsupportedOptimizerError(
            f"the optimizer cannot be cut by layer: the new value of {what} is made from leaves "
            f"of layer {label.layer!r}. {REMEDY}"
        )


def _shared(graph: Graph, owners: Sequence[str | None]) -> list[Value]:
    """The frontier between `reduce` and `update`.

    What follows from shared scalars alone is repeated in every update: one sum of squares
    crosses, rather than the norm, its comparison with the limit and a cast of it per leaf.
    """
    shared: set[Value] = set()
    wanted: set[Value] = set()

    def repeatable(op: Operation) -> bool:
        if any(graph.labels[v].layer is not None for v in op.inputs):
            return False
        sizes = [graph.size(v) for v in op.inputs if graph.labels[v].kind is Kind.REDUCED]
        return all(n == 1 for n in sizes) or any(graph.size(v) > 1 for v in op.outputs)

    for value, owner in zip(graph.outputs, owners, strict=True):
        if owner is not None:
            foreign = graph.labels[value].layer not in (None, owner)
            (shared if foreign else wanted).add(value)
    for op in reversed(graph.operations):
        used = wanted.intersection(op.outputs)
        if not used:
            continue
        if graph.labels[op.outputs[0]].kind is Kind.REDUCED and not repeatable(op):
            shared |= used
        else:
            wanted.update(op.inputs)
    return sorted(shared)
