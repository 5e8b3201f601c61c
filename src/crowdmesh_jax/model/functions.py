"""Plain functions as layers: `f(x)`, or a pair of `init(key, x)` and `f(params, x)`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from ..errors import ModelError
from .layer import Layer


def optional_arguments(function: Callable[..., Any], known: tuple[str, ...]) -> set[str]:
    """Which of the known names the function takes as arguments."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return set()
    positional_only = inspect.Parameter.POSITIONAL_ONLY
    return {n for n in known if n in parameters and parameters[n].kind is not positional_only}


def function_name(function: Any, index: int) -> str:
    """A layer name from the function's own; `layer_3` for a lambda."""
    name = getattr(function, "__name__", "")
    return f"{name}_{index}" if re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) else f"layer_{index}"


def from_function(item: Any, name: str) -> Layer:
    """A layer without state from `f(x)` or `(init, f)`, `init(key, x) -> params`, `f(params, x)`.

    `f` may also take `key` or `train`, by those names. `x` in `init` has shapes and dtypes; its
    numbers must not be read.

    Raises:
        ModelError: Neither a function nor such a pair.
    """
    pair = isinstance(item, tuple) and len(item) == 2 and all(callable(part) for part in item)
    if not pair and not callable(item):
        raise ModelError(
            f"layer {name!r}: expected f(x), or a pair (init, f), got {type(item).__name__}"
        )
    function = item[1] if isinstance(item, tuple) else item
    takes = optional_arguments(function, ("key", "train"))

    def init(key: Any, x: Any) -> tuple[Any, Any]:
        return (item[0](key, x) if isinstance(item, tuple) else {}), {}

    def apply(params: Any, state: Any, x: Any, key: Any, train: bool) -> tuple[Any, Any, None]:
        extra = {n: v for n, v in (("key", key), ("train", train)) if n in takes}
        y = function(params, x, **extra) if isinstance(item, tuple) else function(x, **extra)
        return y, state, None

    return Layer(name, init, apply)
