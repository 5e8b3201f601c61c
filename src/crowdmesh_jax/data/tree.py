"""Trees of arrays as plain structure and leaves, so that a structure travels as JSON.

Dicts with string keys, lists, tuples and None; dict keys in sorted order, so leaves come in the
order in which JAX flattens them. Knows nothing of what the leaves hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..errors import DataError

LEAF = "*"
MAX_DEPTH = 32


def leaves(value: Any, *, where: str = "tree") -> list[tuple[str, Any]]:
    """All leaves with their paths, `where['image'][0]` say.

    Raises:
        DataError: A container that cannot travel, or a dict key that is no string.
    """
    if value is None:
        return []
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise DataError(f"{where}: dict keys must be strings, got {key!r}")
        return [x for key in sorted(value) for x in leaves(value[key], where=f"{where}[{key!r}]")]
    if type(value) in (list, tuple):
        return [x for i, part in enumerate(value) for x in leaves(part, where=f"{where}[{i}]")]
    if isinstance(value, tuple):
        raise DataError(
            f"{where}: {type(value).__name__} cannot travel; use a dict, a list or a plain tuple"
        )
    return [(where, value)]


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """The same structure with `function` applied to each leaf."""
    if value is None:
        return None
    if isinstance(value, dict):
        return {key: map_leaves(function, value[key]) for key in sorted(value)}
    if isinstance(value, (list, tuple)):
        return type(value)(map_leaves(function, part) for part in value)
    return function(value)


def structure(value: Any) -> Any:
    """The shape as JSON: "*" for a leaf, null, {"dict": ...}, {"list": [...]}, {"tuple": [...]}."""
    if value is None:
        return None
    if isinstance(value, dict):
        return {"dict": {key: structure(value[key]) for key in sorted(value)}}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [structure(part) for part in value]}
    return LEAF


def rebuild(shape: Any, parts: Sequence[Any]) -> Any:
    """The tree of that structure over these leaves, in order.

    Raises:
        DataError: Not a structure, too deep, or another number of leaves.
    """
    supply = iter(parts)
    used = 0

    def build(node: Any, depth: int) -> Any:
        nonlocal used
        if depth > MAX_DEPTH:
            raise DataError(f"data spec: a tree deeper than {MAX_DEPTH} levels")
        if node is None:
            return None
        if node == LEAF:
            used += 1
            try:
                return next(supply)
            except StopIteration:
                raise DataError(f"data spec: more than the {len(parts)} leaves given") from None
        if isinstance(node, dict) and len(node) == 1:
            kind, inner = next(iter(node.items()))
            if kind == "dict" and isinstance(inner, dict):
                return {str(key): build(inner[key], depth + 1) for key in sorted(inner)}
            if kind in ("list", "tuple") and isinstance(inner, list):
                items = [build(part, depth + 1) for part in inner]
                return items if kind == "list" else tuple(items)
        raise DataError(f"data spec: {str(node)[:80]!r} describes no tree")

    tree = build(shape, 0)
    if used != len(parts):
        raise DataError(f"data spec: {used} leaves described, {len(parts)} given")
    return tree
