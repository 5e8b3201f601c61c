"""A model as a chain of layers: how it is built, what its shapes are, and how it is run.

Knows layers and keys. Knows nothing of stages, devices, losses or optimizers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jax.interpreters import partial_eval

from ..errors import CrowdMeshError, ModelError
from . import tracing
from .functions import from_function, function_name
from .layer import Layer
from .linen import from_linen, is_linen
from .nnx import from_nnx, is_factory, is_nnx
from .randomness import init_key, key_spec, layer_key
from .specs import LayerSpecs, ModelSpecs
from .trees import count, describe, get_leaf, signature, spec_of

PyTree = Any
Borrows = Mapping[str, Mapping[str, tuple[str, str]]]

LARGE_LAYER = 2_000_000
"""Parameters from which on optimised code pays: random numbers are dear to compile, and below this
unoptimised code is 2-10 times faster in all."""


@dataclass(frozen=True, eq=False)
class StagedModel:
    """A chain of layers; each takes what the one before returns.

    Raises:
        ModelError: No layers, two of one name, or a borrow from a layer that does not come before.
    """

    layers: tuple[Layer, ...]
    name: str = "model"
    _specs: dict[Any, ModelSpecs] = field(init=False, repr=False, default_factory=dict)
    _traces: dict[Any, tracing.InitTrace] = field(init=False, repr=False, default_factory=dict)
    _inits: dict[Any, Callable[..., Any]] = field(init=False, repr=False, default_factory=dict)
    """Compiled initialisation, by what it computes."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers:
            raise ModelError(f"model {self.name!r} has no layers")
        known: dict[str, int] = {}
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, Layer):
                raise ModelError(
                    f"layer {index} of model {self.name!r} is a {type(layer).__name__}, no Layer;"
                    " use StagedModel.from_linen, from_nnx or from_functions"
                )
            if layer.name in known:
                raise ModelError(
                    f"layers {known[layer.name]} and {index} are both called {layer.name!r};"
                    " give each its own name (names=[...])"
                )
            for local, (owner, path) in layer.borrows.items():
                if owner not in known:
                    raise ModelError(
                        f"layer {index} {layer.name!r} borrows {local!r} = {owner}/{path}, but"
                        f" {owner!r} is no earlier layer; known: {', '.join(known) or 'none'}"
                    )
            known[layer.name] = index

    @classmethod
    def from_linen(
        cls,
        modules: Sequence[Any],
        names: Sequence[str] | None = None,
        *,
        borrows: Borrows | None = None,
        name: str = "model",
    ) -> StagedModel:
        """A chain of linen modules; plain functions and `Layer`s may stand between them.

        A module that stands in several places is traced once; each place has its own parameters.

        Args:
            names: One per layer; by default the module's own name, else `Dense_0`, `Conv_1`, ...
            borrows: Per layer name, {parameter of the module: (owner layer, path of the leaf)}.
        """
        shared = dict(borrows or {})
        adapted: dict[int, Layer] = {}

        def adapt(item: Any, own_name: str) -> Layer:
            if not is_linen(item):
                return from_function(item, own_name)
            borrowed = shared.pop(own_name, None)
            if borrowed:
                return from_linen(item, own_name, borrowed)
            if id(item) not in adapted:
                adapted[id(item)] = from_linen(item, own_name)
            return dataclasses.replace(adapted[id(item)], name=own_name)

        model = cls(_adapt(modules, names, adapt), name)
        if shared:
            known = ", ".join(layer.name for layer in model.layers)
            raise ModelError(f"borrows: no linen layer {next(iter(shared))!r}; known: {known}")
        return model

    @classmethod
    def from_nnx(
        cls, modules: Sequence[Any], names: Sequence[str] | None = None, *, name: str = "model"
    ) -> StagedModel:
        """A chain of nnx modules, or of functions of `rngs` that make them.

        Plain functions (without an argument `rngs`) and `Layer`s may stand between them.
        """

        def adapt(item: Any, own_name: str) -> Layer:
            if is_nnx(item) or is_factory(item):
                return from_nnx(item, own_name)
            return from_function(item, own_name)

        return cls(_adapt(modules, names, adapt), name)

    @classmethod
    def from_functions(
        cls, functions: Sequence[Any], names: Sequence[str] | None = None, *, name: str = "model"
    ) -> StagedModel:
        """A chain of `f(x)` and `(init(key, x) -> params, f(params, x))`; see `from_function`."""
        return cls(_adapt(functions, names, from_function), name)

    def index(self, layer: str) -> int:
        """Position of the layer of that name.

        Raises:
            ModelError: There is none.
        """
        for position, own in enumerate(self.layers):
            if own.name == layer:
                return position
        known = ", ".join(own.name for own in self.layers)
        raise ModelError(f"model {self.name!r} has no layer {layer!r}; known: {known}")

    def specs(self, x_spec: PyTree, *, train: bool = True) -> ModelSpecs:
        """Shapes of all inputs, outputs, parameters and state; makes no array.

        Args:
            x_spec: Tree of anything with shape and dtype, for one microbatch.

        Raises:
            ShapeMismatchError: A layer cannot take what the one before returns.
            UnsupportedLayerError: A layer that cannot be cut out or exported; says why.
            ModelError: A layer fails when traced, or borrows a leaf that does not exist.
        """
        x = spec_of(x_spec)
        key = (signature(x), train)
        if key not in self._specs:
            self._specs[key] = self._make_specs(x, train)
        return self._specs[key]

    def _make_specs(self, x: PyTree, train: bool) -> ModelSpecs:
        rows: list[LayerSpecs] = []
        applied: dict[Any, tuple[PyTree, bool, int]] = {}
        for index, layer in enumerate(self.layers):
            before = self.layers[index - 1].name if index else None
            place = tracing.Place(index, layer.name, before, x)
            trace = self._init_trace(index, x, place)
            params = {row.name: row.params for row in rows}
            borrowed = {
                local: _borrowed_spec(place, local, owner, path, params[owner])
                for local, (owner, path) in layer.borrows.items()
            }
            merged = _with_borrowed(place.title, trace.params, borrowed)
            program = (layer.init, layer.apply, signature(x), signature(borrowed))
            if program not in applied:
                applied[program] = tracing.trace_apply(
                    lambda p, s, v, k, layer=layer: call_layer(layer, p, s, v, k, train),
                    place, merged, trace.state, x, key_spec(),
                )  # fmt: skip
            y, has_aux, macs = applied[program]
            rows.append(
                LayerSpecs(
                    name=layer.name, x=x, y=y, params=trace.params, state=trace.state,
                    borrowed=borrowed, has_aux=has_aux, macs=macs,
                )
            )  # fmt: skip
            x = y
        return ModelSpecs(layers=tuple(rows))

    def _init_trace(self, index: int, x: PyTree, place: tracing.Place) -> tracing.InitTrace:
        key = (self.layers[index].init, signature(x))
        if key not in self._traces:
            self._traces[key] = tracing.trace_init(self.layers[index].init, place, key_spec(), x)
        return self._traces[key]

    def init(self, seed: int, x_spec: PyTree) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
        """Initial parameters and state, {layer name: tree}. One compilation per distinct layer.

        Two machine types may differ in the last bit: make parameters in one place and ship them.

        Raises:
            As `specs`.
        """
        specs = self.specs(x_spec)
        params, state = {}, {}
        for index, (layer, row) in enumerate(zip(self.layers, specs.layers, strict=True)):
            trace = self._traces[layer.init, signature(row.x)]
            if not trace.structure.num_leaves:
                params[row.name], state[row.name] = jax.tree.unflatten(trace.structure, ())
                continue
            if trace.identity not in self._inits:
                quick = count(row.params) < LARGE_LAYER
                options = {"xla_backend_optimization_level": 0} if quick else None
                function = _init_function(trace.closed)
                self._inits[trace.identity] = jax.jit(function, compiler_options=options)
            leaves = self._inits[trace.identity](init_key(seed, index))
            tree = jax.tree.unflatten(trace.structure, leaves)
            params[row.name], state[row.name] = tree
        return params, state

    def apply(
        self,
        params: Mapping[str, PyTree],
        state: Mapping[str, PyTree],
        x: PyTree,
        *,
        seed: Any,
        step: Any,
        microbatch: Any,
        train: bool,
    ) -> tuple[PyTree, dict[str, PyTree], jax.Array | None]:
        """Runs the whole chain: (output, new state, auxiliary losses summed as float32 or None)."""
        return self.apply_layers(
            0, len(self.layers) - 1, params, state, x,
            seed=seed, step=step, microbatch=microbatch, train=train,
        )  # fmt: skip

    def predict(
        self, params: Mapping[str, PyTree], state: Mapping[str, PyTree], x: PyTree
    ) -> PyTree:
        """The output in evaluation mode: dropout off, statistics as they are. Pure; jit it."""
        y, _, _ = self.apply(params, state, x, seed=0, step=0, microbatch=0, train=False)
        return y

    def predict_rows(
        self,
        params: Mapping[str, PyTree],
        state: Mapping[str, PyTree],
        inputs: PyTree,
        *,
        batch_size: int = 256,
    ) -> PyTree:
        """`predict`, compiled, for any number of rows: some at a time, as NumPy arrays.

        Args:
            params, state: As `cm.train` returns them.
            inputs: Any number of rows on the leading axis of each leaf.
            batch_size: Rows at a time; bounds the memory.

        Returns:
            NumPy arrays with as many rows.

        Raises:
            ShapeMismatchError: A layer cannot take what it gets with these parameters; names it,
                the shape given, and the shape it was trained on if this model has seen it.
        """
        leaves, structure = jax.tree.flatten(inputs)
        rows = len(leaves[0])
        batch_size = min(batch_size, rows)
        parts, like = [], None
        for first in range(0, rows, batch_size):
            # The last part begins earlier rather than being shorter: one shape, one compilation.
            begin = min(first, rows - batch_size)
            part = [leaf[begin : begin + batch_size] for leaf in leaves]
            x = jax.tree.unflatten(structure, part)
            try:
                outputs = self._predict(params, state, x)
            except CrowdMeshError:
                raise
            except Exception:
                self._check_fit(params, state, x)
                raise
            parts.append([np.asarray(leaf)[first - begin :] for leaf in jax.tree.leaves(outputs)])
            like = jax.tree.structure(outputs)
        return jax.tree.unflatten(like, [np.concatenate(leaf) for leaf in zip(*parts, strict=True)])

    def _check_fit(
        self, params: Mapping[str, PyTree], state: Mapping[str, PyTree], x: PyTree
    ) -> None:
        """Goes through the layers by shapes alone and tells of the first that cannot take its x."""
        known = next(reversed(self._specs.values())).layers if self._specs else None
        x = spec_of(x)
        for index, layer in enumerate(self.layers):
            before = self.layers[index - 1].name if index else None
            place = tracing.Place(index, layer.name, before, x, known and known[index].x)
            try:
                x, _, _ = jax.eval_shape(
                    lambda x, index=index: self.apply_layers(
                        index, index, params, state, x,
                        seed=0, step=0, microbatch=0, train=False,
                    ),
                    x,
                )  # fmt: skip
            except CrowdMeshError:
                raise
            except Exception as exc:
                raise place.failure("apply", exc) from exc

    @functools.cached_property
    def _predict(self) -> Any:
        """Compiled once for each shape, not once for each call."""
        return jax.jit(self.predict)

    def apply_layers(
        self,
        first: int,
        last: int,
        params: Mapping[str, PyTree],
        state: Mapping[str, PyTree],
        x: PyTree,
        *,
        seed: Any,
        step: Any,
        microbatch: Any,
        train: bool,
        borrowed: Mapping[tuple[str, str], Any] | None = None,
    ) -> tuple[PyTree, dict[str, PyTree], jax.Array | None]:
        """Runs layers `first .. last` (both inside); pure, so it can be traced and jitted.

        Args:
            params, state: {layer name: tree} of these layers at least.
            seed, step, microbatch: ints or uint32 scalars.
            borrowed: {(owner, path): value} for leaves whose owner is not in `params`.

        Returns:
            The last output; the state of these layers (unchanged unless `train`); the sum of
            their auxiliary losses, None where no layer has one.
        """
        total: jax.Array | None = None
        after: dict[str, PyTree] = {}
        given = borrowed or {}
        for index in range(first, last + 1):
            layer = self.layers[index]
            values = {
                local: given[owner, path]
                if (owner, path) in given
                else get_leaf(params[owner], path)
                for local, (owner, path) in layer.borrows.items()
            }
            own = _with_borrowed(f"layer {index} {layer.name!r}", params[layer.name], values)
            key = layer_key(seed, step, microbatch, index)
            with jax.named_scope(layer.name):
                x, after[layer.name], aux = call_layer(layer, own, state[layer.name], x, key, train)
            if aux is not None:
                total = aux if total is None else total + aux
        return x, after, total


def call_layer(
    layer: Layer, params: PyTree, state: PyTree, x: PyTree, key: Any, train: bool
) -> tuple[PyTree, PyTree, jax.Array | None]:
    """Runs one layer: outputs and state as arrays of definite dtype, aux as a float32 scalar.

    Weak types end here: they depend on what was traced together, so a cut would change dtypes.
    """
    y, after, aux = layer.apply(params, state, x, key, train)
    if aux is not None:
        aux = lax.convert_element_type(jnp.asarray(aux), jnp.float32)
    return _definite(y), (_definite(after) if train else state), aux


def _definite(tree: PyTree) -> PyTree:
    def strong(leaf: Any) -> jax.Array:
        array = jnp.asarray(leaf)
        if jnp.issubdtype(array.dtype, jax.dtypes.extended):
            return array  # a key; `specs` refuses it by name
        return lax.convert_element_type(array, array.dtype)

    return jax.tree.map(strong, tree)


def _adapt(
    items: Sequence[Any], names: Sequence[str] | None, adapt: Callable[[Any, str], Layer]
) -> tuple[Layer, ...]:
    if names is not None and len(names) != len(items):
        raise ModelError(f"{len(names)} names for {len(items)} layers; give one for each")
    layers = []
    for index, item in enumerate(items):
        if isinstance(item, Layer):
            layers.append(item)
            continue
        if names is not None:
            own_name = names[index]
        elif is_linen(item) or is_nnx(item):
            own_name = getattr(item, "name", None) or f"{type(item).__name__}_{index}"
        else:
            own_name = function_name(item, index)
        layers.append(adapt(item, own_name))
    return tuple(layers)


def _borrowed_spec(
    place: tracing.Place, local: str, owner: str, path: str, params: PyTree
) -> jax.ShapeDtypeStruct:
    try:
        return get_leaf(params, path)
    except ModelError as exc:
        raise ModelError(
            f"{place.title} borrows {local!r} = {owner}/{path}, but {owner!r} has {exc.message}"
        ) from exc


def _with_borrowed(title: str, params: PyTree, borrowed: Mapping[str, Any]) -> PyTree:
    if not borrowed:
        return params
    if not isinstance(params, Mapping):
        raise ModelError(
            f"{title} borrows {', '.join(borrowed)}: its parameters must be a dict,"
            f" got {describe(spec_of(params))}"
        )
    twice = sorted(set(params) & set(borrowed))
    if twice:
        raise ModelError(f"{title} borrows {twice[0]!r} and has a parameter of that name")
    return {**params, **borrowed}


def _init_function(closed: core.ClosedJaxpr) -> Callable[[Any], list[Any]]:
    """`init` without its inputs: `tracing` has proved that nothing depends on them."""
    outputs = [True] * len(closed.jaxpr.outvars)
    keep = [True] + [False] * (len(closed.jaxpr.invars) - 1)
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, outputs, instantiate=keep)
    return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, closed.consts))
