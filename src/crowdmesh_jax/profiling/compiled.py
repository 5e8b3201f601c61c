"""A layer's programs, and the update, as XLA compiled them: to be timed, and for their memory.

Compiles on shapes alone: no weights are made. Knows one layer at a time.

XLA's analysis of a program (`compiled.memory_analysis()`) tells its arguments, outputs and
temporaries in bytes. The first two the planner knows from shapes; the temporaries it cannot.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jaxlib.version

from ..core.memory import program_ops
from ..model.trees import size_bytes
from .costs import LayerTrace

PyTree = Any


@dataclass(frozen=True)
class LayerPrograms:
    """Both programs of a layer, lowered; compiled when asked for."""

    trace: LayerTrace
    lowered_forward: Any
    lowered_backward: Any
    """None where there is nothing to differentiate."""

    @classmethod
    def of(cls, trace: LayerTrace) -> LayerPrograms:
        """Lowers the programs of a traced layer."""
        forward = jax.jit(trace.forward).lower(*trace.forward_inputs)
        params, chosen, *_ = trace.forward_inputs
        if not (jax.tree.leaves(params) or chosen):
            return cls(trace, forward, None)
        dy, _, vjp = trace.forward_outputs
        return cls(trace, forward, jax.jit(trace.backward).lower(vjp, dy))

    @cached_property
    def key(self) -> str:
        """Equal for equal programs under one jaxlib: what a cache of their figures goes by."""
        return _key(self.lowered_forward, self.lowered_backward)

    @cached_property
    def forward(self) -> Any:
        return self.lowered_forward.compile()

    @cached_property
    def backward(self) -> Any:
        return None if self.lowered_backward is None else self.lowered_backward.compile()

    @cached_property
    def ops(self) -> int:
        """See `instructions`."""
        return instructions(self.forward) + (instructions(self.backward) if self.backward else 0)

    @cached_property
    def temp_bytes(self) -> int:
        """What a stage needs while it runs this layer, beyond what it keeps anyway.

        In backward: the program's temporaries, its gradients before they are added to the step's,
        and the cotangents on both sides. In forward: its temporaries.
        """
        forward_bytes = temp_bytes(self.forward)
        if self.backward is None:
            return forward_bytes
        params, chosen, *_ = self.trace.forward_inputs
        dy, *_ = self.trace.forward_outputs
        beside = size_bytes((params, chosen, dy))
        return max(forward_bytes, temp_bytes(self.backward) + beside)


def instructions(compiled: Any) -> int:
    """See `program_ops`; 0 where the backend does not print its programs."""
    return program_ops(compiled.as_text() or "")


def temp_bytes(compiled: Any) -> int:
    """Temporaries of a compiled program; 0 where the backend does not tell."""
    analysis = compiled.memory_analysis()
    return 0 if analysis is None else int(analysis.temp_size_in_bytes)


@dataclass(frozen=True)
class UpdateProgram:
    """The whole model's update, parameters and optimizer state donated."""

    inputs: tuple[Any, Any, Any]
    """Specs of parameters, optimizer state, gradients."""
    lowered: Any

    @classmethod
    def of(cls, optimizer: Any, params: Mapping[str, PyTree]) -> UpdateProgram:
        """Lowers it.

        Args:
            params: {layer: tree of `jax.ShapeDtypeStruct`}.
        """

        def update(params: PyTree, state: PyTree, grads: PyTree) -> Any:
            updates, state = optimizer.update(grads, state, params)
            return jax.tree.map(lambda p, u: p + u.astype(p.dtype), params, updates), state

        tree = dict(params)
        state = jax.eval_shape(optimizer.init, tree)
        lowered = jax.jit(update, donate_argnums=(0, 1)).lower(tree, state, tree)
        return cls((tree, state, tree), lowered)

    @cached_property
    def key(self) -> str:
        """As of `LayerPrograms`."""
        return _key(self.lowered)

    @cached_property
    def compiled(self) -> Any:
        return self.lowered.compile()

    @cached_property
    def ops(self) -> int:
        """See `instructions`."""
        return instructions(self.compiled)

    @cached_property
    def temp_bytes(self) -> int:
        return temp_bytes(self.compiled)


def _key(*lowered: Any) -> str:
    digest = hashlib.sha256(jaxlib.version.__version__.encode())
    for program in lowered:
        digest.update(b"\0" if program is None else program.as_text().encode())
    return digest.hexdigest()
