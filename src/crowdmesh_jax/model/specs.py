"""Shapes of a model, layer by layer. Values only; `StagedModel.specs` makes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ModelError
from .trees import count

PyTree = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpecs:
    """One layer; all trees hold `jax.ShapeDtypeStruct`."""

    name: str
    x: PyTree
    y: PyTree
    params: PyTree
    """Its own parameters, without borrowed ones."""
    state: PyTree
    borrowed: Mapping[str, Any]
    """Local name -> spec of each borrowed leaf."""
    has_aux: bool
    """Whether it adds an auxiliary loss in this mode."""
    macs: int = 0
    """Multiply-accumulates of its convolutions and matrix products, forward, for this input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpecs:
    """All layers of a model for one input."""

    layers: tuple[LayerSpecs, ...]

    @property
    def x(self) -> PyTree:
        return self.layers[0].x

    @property
    def y(self) -> PyTree:
        return self.layers[-1].y

    @property
    def params(self) -> dict[str, PyTree]:
        """{layer name: tree}."""
        return {layer.name: layer.params for layer in self.layers}

    @property
    def state(self) -> dict[str, PyTree]:
        """{layer name: tree}."""
        return {layer.name: layer.state for layer in self.layers}

    @property
    def has_aux(self) -> bool:
        return any(layer.has_aux for layer in self.layers)

    @property
    def parameter_count(self) -> int:
        """Borrowed parameters count once, at their owner."""
        return sum(count(layer.params) for layer in self.layers)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one forward pass, for this input."""
        return sum(layer.macs for layer in self.layers)

    def layer(self, name: str) -> LayerSpecs:
        """The layer of that name.

        Raises:
            ModelError: There is none.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise ModelError(
            f"no layer {name!r}; known: {', '.join(layer.name for layer in self.layers)}"
        )
