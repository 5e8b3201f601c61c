"""A stage's training programs as flat functions: forward, backward, loss, weights, evaluation.

Knows the chain and jaxprs; nothing of bytes, devices or optimizers. Each program takes only the
leaves that it reads: dead inputs are dropped.

What backward needs of forward ("residuals") is found on the traced forward with its linearisation:
values that are inputs already, repeats, and values that depend on parameters alone never travel;
the last are recomputed in backward. Source: PROGRAMS.md's experiments, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from ..errors import JobError
from ..model.job import TrainingJob
from ..programs.manifest import LeafSpec
from . import jaxpr as jp
from .chain import AUX, Carry, Chain, Key, LayerView, Path, apply_layer, refuse
from .flat import FlatProgram, abstract, leaf_spec
from .optimizer import gradient_dtype

Env = Mapping[Key, Any]
Outputs = list[tuple[Key, Any]]

SCALARS: tuple[LeafSpec, ...] = tuple(
    LeafSpec(role, "", "", "uint32", ()) for role in ("seed", "step", "microbatch")
)
INV_WEIGHT = LeafSpec("inv_weight", "", "", "float32", ())
_DONATED = ("grad", "tied_grad")


@dataclass(frozen=True)
class StageParts:
    """Layers `first..last` of a chain, with the leaves that the stage owns and borrows."""

    chain: Chain
    first: int
    last: int
    wire_in: str | None = None
    """What float32 values are cast to at the cut before the stage, and at the one after it. The
    casts are part of the programs: gradients are cast as the transpose of the activations' cast."""
    wire_out: str | None = None

    @property
    def views(self) -> tuple[LayerView, ...]:
        return self.chain.layers[self.first : self.last + 1]

    @property
    def before(self) -> Carry:
        return _on_the_wire(self.chain.carries[self.first], self.wire_in)

    @property
    def after(self) -> Carry:
        return _on_the_wire(self.chain.carries[self.last + 1], self.wire_out)

    @property
    def params(self) -> tuple[LeafSpec, ...]:
        return tuple(leaf for view in self.views for leaf in view.params)

    @property
    def state(self) -> tuple[LeafSpec, ...]:
        return tuple(leaf for view in self.views for leaf in view.state)

    @property
    def borrowed(self) -> tuple[LeafSpec, ...]:
        """Leaves of earlier stages that a layer here reads, in the owners' order."""
        wanted = {path for view in self.views for path in view.borrows.values()}
        return tuple(
            leaf_spec("borrowed", leaf.layer, leaf.path, abstract(leaf))
            for view in self.chain.layers[: self.first]
            for leaf in view.params
            if (leaf.layer, leaf.path) in wanted
        )

    @property
    def lends(self) -> tuple[Path, ...]:
        """Own leaves that a layer of a later stage reads."""
        wanted = {
            path for view in self.chain.layers[self.last + 1 :] for path in view.borrows.values()
        }
        return tuple((p.layer, p.path) for p in self.params if (p.layer, p.path) in wanted)

    @property
    def accumulators(self) -> tuple[LeafSpec, ...]:
        """Gradient sums: of own leaves, then of borrowed ones."""
        return tuple(
            LeafSpec(
                "grad" if leaf.role == "param" else "tied_grad",
                leaf.layer,
                leaf.path,
                gradient_dtype(leaf.dtype).name,
                leaf.shape,
            )
            for leaf in (*self.params, *self.borrowed)
        )

    @property
    def x(self) -> tuple[LeafSpec, ...]:
        return self.before.specs("x")

    @property
    def dx(self) -> tuple[LeafSpec, ...]:
        return self.before.specs("dx", active_only=True)

    @property
    def dy(self) -> tuple[LeafSpec, ...]:
        return self.after.specs("dy", active_only=True)

    @property
    def differentiated(self) -> tuple[LeafSpec, ...]:
        """Inputs with a gradient: own and borrowed parameters, then active boundary leaves."""
        active = {leaf.path for leaf in self.dx}
        return (*self.params, *self.borrowed, *(x for x in self.x if x.path in active))

    @property
    def reads(self) -> tuple[LeafSpec, ...]:
        """All that forward may read."""
        return (*self.params, *self.borrowed, *self.state, *self.x, *SCALARS)

    def apply(self, env: Env, *, train: bool) -> tuple[Any, Any, dict[Path, Any]]:
        """Runs the layers; returns y as a tree, the summed auxiliary loss or None, new state."""
        params = {(k[1], k[2]): v for k, v in env.items() if k[0] in ("param", "borrowed")}
        state = {(k[1], k[2]): v for k, v in env.items() if k[0] == "state"}
        computed = self.chain.carries[self.first].leaves
        x = [env["x", "", str(i)] for i in range(len(computed))]
        if self.wire_in:
            x = [leaf.astype(spec.dtype) for leaf, spec in zip(x, computed, strict=True)]
        total = env["x", "", AUX] if self.before.has_aux else None
        tree = self.before.tree
        scalars = [env[leaf.key] for leaf in SCALARS]
        y: Any = jax.tree.unflatten(tree, x)
        for view in self.views:
            with jax.named_scope(view.layer.name):
                y, new, aux = apply_layer(view, params, state, x, tree, scalars, train=train)
            state.update(new)
            x, tree = jax.tree.flatten(y)
            if aux is not None:
                total = aux if total is None else total + aux
        return y, total, state

    def boundary(self, y: Any, aux: Any) -> list[Any]:
        """The flat leaves that leave the stage, in the order of `after.specs`."""
        carried = [jnp.zeros((), jnp.float32) if aux is None else aux] if self.after.has_aux else []
        leaves = jax.tree.leaves(y)
        if self.wire_out:
            leaves = [y.astype(s.dtype) for y, s in zip(leaves, self.after.leaves, strict=True)]
        return [*leaves, *carried]


def _on_the_wire(carry: Carry, dtype: str | None) -> Carry:
    """The carry as it crosses a cut: float32 leaves cast, the auxiliary loss as it is."""
    if dtype is None:
        return carry
    leaves = tuple(
        jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)) if leaf.dtype == jnp.float32 else leaf
        for leaf in carry.leaves
    )
    return replace(carry, leaves=leaves)


def flat_program(
    fn: Callable[[Env], Outputs], inputs: Sequence[LeafSpec], *, donate: Sequence[str] = ()
) -> FlatProgram:
    """Traces a function of an environment and drops the inputs that it does not read.

    A state leaf that comes out as it went in is no output: the worker has it.
    """
    keys: list[Key] = []

    def run(*arrays: Any) -> list[Any]:
        pairs = fn({s.key: a for s, a in zip(inputs, arrays, strict=True)})
        keys[:] = [key for key, _ in pairs]
        return [value for _, value in pairs]

    closed = jp.trace(run, [abstract(leaf) for leaf in inputs])
    return from_jaxpr(closed, inputs, keys, donate=donate)


def from_jaxpr(
    closed: Any, inputs: Sequence[LeafSpec], keys: Sequence[Key], *, donate: Sequence[str] = ()
) -> FlatProgram:
    """The program of a traced function whose outputs are known by `keys`."""
    by_var = dict(zip(closed.jaxpr.invars, inputs, strict=True))
    outs = [
        i
        for i, (key, var) in enumerate(zip(keys, closed.jaxpr.outvars, strict=True))
        if not (key[0] == "state" and _is_input(var, by_var, key))
    ]
    small, used = jp.select(closed, outs)
    taken = tuple(inputs[i] for i in used)
    outputs = tuple(
        leaf_spec(*keys[i], aval) for i, aval in zip(outs, small.out_avals, strict=True)
    )
    return FlatProgram(
        fn=jp.as_function(small),
        inputs=taken,
        outputs=outputs,
        donate=tuple(i for i, leaf in enumerate(taken) if leaf.role in donate),
    )


def _is_input(var: Any, by_var: Mapping[Any, LeafSpec], key: Key) -> bool:
    if not jp.is_variable(var):
        return False
    return var in by_var and by_var[var].key == key


def forward_and_backward(parts: StageParts, *, recompute: bool) -> tuple[FlatProgram, FlatProgram]:
    """The two programs of a stage that is not the last."""
    return _recomputing(parts) if recompute else _keeping(parts)


def _forward_with_vjp(parts: StageParts, env: Env) -> tuple[list[Any], dict[Path, Any], Any]:
    """Forward and its linearisation: boundary leaves, new state, vjp of the active leaves."""
    active = parts.after.active
    inputs = [env[leaf.key] for leaf in parts.differentiated]

    def run(values: list[Any]) -> tuple[list[Any], tuple[list[Any], dict[Path, Any]]]:
        replaced = {leaf.key: v for leaf, v in zip(parts.differentiated, values, strict=True)}
        y, aux, state = parts.apply({**env, **replaced}, train=True)
        leaves = parts.boundary(y, aux)
        flowing = [v for v, a in zip(leaves, active, strict=True) if a]
        rest = [v for v, a in zip(leaves, active, strict=True) if not a]
        return flowing, (rest, state)

    flowing, vjp, (rest, state) = jax.vjp(run, inputs, has_aux=True)
    merged = [flowing.pop(0) if a else rest.pop(0) for a in active]
    return merged, state, vjp


def _keeping(parts: StageParts) -> tuple[FlatProgram, FlatProgram]:
    reads, y_specs, dy_specs = parts.reads, parts.after.specs("y"), parts.dy
    trees: list[Any] = []

    def whole(*arrays: Any) -> list[Any]:
        env = {leaf.key: a for leaf, a in zip(reads, arrays, strict=True)}
        y, state, vjp = _forward_with_vjp(parts, env)
        leaves, tree = jax.tree.flatten(vjp)
        trees[:] = [tree]
        return [*y, *(state[s.layer, s.path] for s in parts.state), *map(jnp.asarray, leaves)]

    closed = jp.trace(whole, [abstract(leaf) for leaf in reads])
    front = len(y_specs) + len(parts.state)
    kept, sources = _residuals(closed, reads, front, rebuild_casts=parts.wire_in is not None)
    keys: list[Key] = [leaf.key for leaf in (*y_specs, *parts.state)]
    keys += [("residual", "", f"r{i}") for i in range(len(kept))]
    outs = [*range(front), *kept]
    chosen, used = jp.select(closed, outs)
    forward = from_jaxpr(chosen, [reads[i] for i in used], keys)
    residuals = [leaf for leaf in forward.outputs if leaf.role == "residual"]

    again = [i for i, source in enumerate(sources) if source is None]
    rebuild, rebuild_used = jp.select(closed, [front + i for i in again])
    rebuild_fn = jp.as_function(rebuild)

    def backward(env: Env) -> Outputs:
        rebuilt = dict(
            zip(again, rebuild_fn(*(env[reads[i].key] for i in rebuild_used)), strict=True)
        )
        leaves = [rebuilt[i] if source is None else env[source] for i, source in enumerate(sources)]
        vjp = jax.tree.unflatten(trees[0], leaves)
        (cotangents,) = vjp([env[leaf.key] for leaf in dy_specs])
        return _accumulate(parts, env, cotangents)

    inputs = (*_without(reads, "state"), *residuals, *dy_specs, *parts.accumulators)
    return forward, flat_program(backward, inputs, donate=_DONATED)


def _without(leaves: Sequence[LeafSpec], role: str) -> tuple[LeafSpec, ...]:
    return tuple(leaf for leaf in leaves if leaf.role != role)


def _residuals(
    closed: Any, reads: Sequence[LeafSpec], front: int, *, rebuild_casts: bool
) -> tuple[list[int], list[Key | None]]:
    """Decides for each residual where backward gets it from.

    Args:
        rebuild_casts: What is a boundary leaf but for a cast is cast again in backward: the leaf is
            at hand as it came, and both would take more memory than without a cast on the wire.

    Returns:
        Indices of the outputs to keep, without repeats; per residual the key under which backward
        finds it, None where it is recomputed, from parameters or such a leaf.
    """
    by_var = dict(zip(closed.jaxpr.invars, reads, strict=True))
    data = 0
    for i, leaf in enumerate(reads):
        if leaf.role not in ("param", "borrowed"):
            data |= 1 << i
    masks = jp.dependence(closed)
    casts = {
        equation.outvars[0]
        for equation in closed.jaxpr.eqns
        if rebuild_casts
        and equation.primitive.name == "convert_element_type"
        and jp.is_variable(equation.invars[0])
        and (read := by_var.get(equation.invars[0])) is not None
        and read.role == "x"
    }
    kept: list[int] = []
    found: dict[Any, Key] = {}
    sources: list[Key | None] = []
    for index in range(front, len(masks)):
        var = closed.jaxpr.outvars[index]
        if not masks[index] & data or var in casts:
            sources.append(None)
            continue
        source = by_var.get(var)
        if source is not None and source.role != "state":
            sources.append(source.key)
            continue
        if var not in found:
            # State moves on before backward runs, so that even an input must be kept here.
            found[var] = ("residual", "", f"r{len(kept)}")
            kept.append(index)
        sources.append(found[var])
    return kept, sources


def _recomputing(parts: StageParts) -> tuple[FlatProgram, FlatProgram]:
    stash = {leaf.key: ("residual", leaf.layer, leaf.path) for leaf in parts.state}
    stash_specs = [
        leaf_spec("residual", leaf.layer, leaf.path, abstract(leaf)) for leaf in parts.state
    ]

    def backward(env: Env) -> Outputs:
        old = {key: env[kept] for key, kept in stash.items()}
        _, _, vjp = _forward_with_vjp(parts, {**env, **old})
        (cotangents,) = vjp([env[leaf.key] for leaf in parts.dy])
        return _accumulate(parts, env, cotangents)

    inputs = (*_without(parts.reads, "state"), *stash_specs, *parts.dy, *parts.accumulators)
    second = flat_program(backward, inputs, donate=_DONATED)
    read_state = {leaf.key for leaf in second.inputs if leaf.role == "residual"}

    def forward(env: Env) -> Outputs:
        y, aux, state = parts.apply(env, train=True)
        leaves = zip(parts.after.specs("y"), parts.boundary(y, aux), strict=True)
        return [
            *((leaf.key, value) for leaf, value in leaves),
            *((s.key, state[s.layer, s.path]) for s in parts.state),
            *((kept, env[key]) for key, kept in stash.items() if kept in read_state),
        ]

    return flat_program(forward, parts.reads), second


def _accumulate(parts: StageParts, env: Env, cotangents: Sequence[Any]) -> Outputs:
    """Adds parameter cotangents to their sums; names those of boundary leaves."""
    sums: Outputs = []
    count = len(parts.accumulators)
    for leaf, cotangent in zip(parts.accumulators, cotangents[:count], strict=True):
        sums.append((leaf.key, env[leaf.key] + cotangent.astype(leaf.dtype)))
    upstream = zip(parts.dx, cotangents[count:], strict=True)
    return [*((leaf.key, value) for leaf, value in upstream), *sums]


def loss_backward(parts: StageParts, job: TrainingJob, targets: Targets) -> FlatProgram:
    """Forward, loss share and backward of the last stage as one program."""
    share = jnp.float32(1.0 / job.microbatches)

    def run(env: Env) -> Outputs:
        def loss_of(values: list[Any]) -> tuple[Any, tuple[Any, list[tuple[Key, Any]]]]:
            replaced = {leaf.key: v for leaf, v in zip(parts.differentiated, values, strict=True)}
            y, aux, state = parts.apply({**env, **replaced}, train=True)
            wanted = targets.read(env)
            values_, weights = job.loss_fn(y, wanted)
            loss = weighted_sum(values_, weights) * env[INV_WEIGHT.key]
            if aux is not None:
                loss = loss + aux * share
            return loss, (state, metric_sums(job, y, wanted))

        inputs = [env[leaf.key] for leaf in parts.differentiated]
        loss, vjp, (state, metrics) = jax.vjp(loss_of, inputs, has_aux=True)
        (cotangents,) = vjp(jnp.ones((), loss.dtype))
        return [
            *_accumulate(parts, env, cotangents),
            *((s.key, state[s.layer, s.path]) for s in parts.state),
            (("loss", "", ""), loss),
            *metrics,
        ]

    inputs = (*parts.reads, *targets.specs, INV_WEIGHT, *parts.accumulators)
    return flat_program(run, inputs, donate=_DONATED)


@dataclass(frozen=True)
class Targets:
    """Targets of one microbatch as flat leaves."""

    specs: tuple[LeafSpec, ...]
    tree: Any

    @classmethod
    def of(cls, targets_spec: Any) -> Targets:
        leaves, tree = jax.tree.flatten(targets_spec)
        return cls(tuple(leaf_spec("target", "", str(i), x) for i, x in enumerate(leaves)), tree)

    def read(self, env: Env) -> Any:
        return jax.tree.unflatten(self.tree, [env[leaf.key] for leaf in self.specs])


def weighted_sum(values: Any, weights: Any) -> Any:
    """sum(values * weights) of what `TrainingJob.loss_fn` returns, in float32."""
    return jnp.sum(values * weights)


def metric_sums(job: TrainingJob, outputs: Any, targets: Any) -> Outputs:
    """(sum, count) of each of the job's metrics as float32 scalars."""
    pairs: Outputs = []
    for name, metric in job.metric_functions.items():
        for part, value in zip(("sum", "count"), metric(outputs, targets), strict=True):
            pairs.append((("metric", "", f"{name}/{part}"), jnp.asarray(value, jnp.float32)))
    return pairs


def weigh(job: TrainingJob, outputs: Carry, targets: Targets) -> FlatProgram:
    """The sum of a microbatch's loss weights from its targets alone (`TrainingJob.check`)."""
    tree = jax.tree.unflatten(outputs.tree, list(outputs.leaves))

    def run(env: Env) -> Outputs:
        return [(("weight", "", ""), jnp.sum(job.weights(tree, targets.read(env))))]

    return flat_program(run, targets.specs)


def merge(parts: StageParts) -> FlatProgram | None:
    """Adds the borrowers' gradient sums to the owner's; None where nothing is lent."""
    lent = [
        leaf
        for leaf in parts.accumulators
        if leaf.role == "grad" and (leaf.layer, leaf.path) in parts.lends
    ]
    if not lent:
        return None
    tied = [leaf_spec("tied_grad", s.layer, s.path, abstract(s)) for s in lent]

    def run(env: Env) -> Outputs:
        return [(s.key, env[s.key] + env[t.key]) for s, t in zip(lent, tied, strict=True)]

    return flat_program(run, (*lent, *tied), donate=("grad",))


def eval_forward(parts: StageParts, job: TrainingJob, targets: Targets | None) -> FlatProgram:
    """Forward in evaluation mode; on the last stage (targets given) loss, weight and metrics too.

    The loss is sum(values * weights), not divided; auxiliary losses do not count.
    """

    def run(env: Env) -> Outputs:
        y, aux, _ = parts.apply(env, train=False)
        if targets is None:
            leaves = zip(parts.after.specs("y"), parts.boundary(y, aux), strict=True)
            return [(leaf.key, value) for leaf, value in leaves]
        wanted = targets.read(env)
        values, weights = job.loss_fn(y, wanted)
        return [
            (("loss", "", ""), weighted_sum(values, weights)),
            (("weight", "", ""), jnp.sum(weights)),
            *metric_sums(job, y, wanted),
            *((("y", "", str(i)), leaf) for i, leaf in enumerate(jax.tree.leaves(y))),
        ]

    program = flat_program(run, (*parts.reads, *(targets.specs if targets else ())))
    _check_eval_boundary(parts, program, targets is None)
    return program


def _check_eval_boundary(parts: StageParts, program: FlatProgram, inner: bool) -> None:
    wanted = parts.after.specs("y")
    got = tuple(leaf for leaf in program.outputs if leaf.role == "y")
    if inner and got != wanted:
        raise JobError(
            f"layer {parts.views[-1].layer.name!r} has outputs {got} in evaluation and {wanted} in"
            " training; shapes and dtypes must agree"
        )


def check_loss(job: TrainingJob, outputs: Carry, targets: Targets) -> None:
    """Traces loss and metrics alone, so that what they do wrong bears their name.

    Raises:
        UnsupportedLayerError: They call back into Python or close over a large array.
    """
    inputs = (*outputs.specs("y"), *targets.specs)

    def run(*arrays: Any) -> list[Any]:
        env = {leaf.key: a for leaf, a in zip(inputs, arrays, strict=True)}
        y = [env["y", "", str(i)] for i in range(len(outputs.leaves))]
        tree, wanted = jax.tree.unflatten(outputs.tree, y), targets.read(env)
        values, weights = job.loss_fn(tree, wanted)
        return [values, weights, *(v for _, v in metric_sums(job, tree, wanted))]

    refuse(jp.trace(run, [abstract(leaf) for leaf in inputs]), "the loss or a metric")
