"""What a layer is: two pure functions and a name. Knows nothing of flax, stages or devices."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ModelError

PyTree = Any
NAME_PATTERN = re.compile(r"^[A-Za-z][A-Za-z0-9_]*$")


@dataclass(frozen=True, eq=False)
class Layer:
    """One link of the chain.

    `init(key, x_spec) -> (params, state)` makes arrays from a key and the input's shapes alone.
    `apply(params, state, x, key, train) -> (y, state, aux)`: `x`, `y` are pytrees of arrays with
    static shapes; `state` keeps its shapes and dtypes and commits with the step; `aux` is a
    float32 scalar added to the loss, or None.

    `borrows` names read-only parameters of earlier layers (tied weights): local name ->
    (owner layer, path of the leaf in its params, "/" between keys). `apply` finds them in
    `params` under the local name, next to its own (params is then a dict).

    Layers with the same `init` and `apply` (one function object each) are one program, traced once
    for each shape of input: repeated blocks cost nothing more.
    """

    name: str
    init: Callable[[Any, PyTree], tuple[PyTree, PyTree]]
    apply: Callable[[PyTree, PyTree, PyTree, Any, bool], tuple[PyTree, PyTree, Any]]
    borrows: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not NAME_PATTERN.match(self.name):
            raise ModelError(
                f"layer name {self.name!r}: must start with a letter and hold letters, digits"
                " and _ only"
            )
