"""Trees of arrays by path: leaves are known by the keys that lead to them, joined by "/".

Knows nothing of layers. Every room above names leaves this way, so that the order in which a
container flattens never matters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import ModelError

PyTree = Any


def key_text(key: Any) -> str:
    """One key of a path: a dict key, a sequence index or an attribute's name."""
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def leaf_paths(tree: PyTree) -> list[tuple[str, Any]]:
    """All leaves with their paths, in the tree's own order. A bare leaf has the path "".

    Raises:
        ModelError: Two leaves have the same path (a key that holds "/", or 1 beside "1").
    """
    found = [
        ("/".join(key_text(key) for key in keys), leaf)
        for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]
    seen: set[str] = set()
    for path, _ in found:
        if path in seen:
            raise ModelError(f"two leaves have the path {path!r}; rename one of their keys")
        seen.add(path)
    return found


def get_leaf(tree: PyTree, path: str) -> Any:
    """The leaf at `path`.

    Raises:
        ModelError: There is none; names those there are.
    """
    found = dict(leaf_paths(tree))
    if path not in found:
        raise ModelError(f"no leaf {path!r}; known: {', '.join(map(repr, found)) or 'none'}")
    return found[path]


def set_leaf(tree: PyTree, path: str, value: Any) -> PyTree:
    """A copy of the tree with another leaf at `path`.

    Raises:
        ModelError: There is no such leaf.
    """
    get_leaf(tree, path)
    return unflatten(tree, {**dict(leaf_paths(tree)), path: value})


def unflatten(spec: PyTree, leaves: Mapping[str, Any]) -> PyTree:
    """The tree of the structure of `spec` over leaves given by path.

    Raises:
        ModelError: A leaf is missing or unknown; names it.
    """
    paths = [path for path, _ in leaf_paths(spec)]
    missing = [path for path in paths if path not in leaves]
    if missing:
        raise ModelError(f"leaf {missing[0]!r} is missing ({len(missing)} of {len(paths)})")
    if len(leaves) != len(paths):
        unknown = sorted(set(leaves) - set(paths))
        raise ModelError(f"leaf {unknown[0]!r} is unknown; known: {', '.join(map(repr, paths))}")
    return jax.tree.unflatten(jax.tree.structure(spec), [leaves[path] for path in paths])


def spec_of(tree: PyTree) -> PyTree:
    """Shapes and dtypes as JAX will hold them: 64-bit numbers become 32-bit ones by default."""

    def leaf_spec(leaf: Any) -> jax.ShapeDtypeStruct:
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            leaf = np.asarray(leaf)
        dtype = leaf.dtype
        if not jnp.issubdtype(dtype, jax.dtypes.extended):
            dtype = jax.dtypes.canonicalize_dtype(dtype)
        return jax.ShapeDtypeStruct(tuple(leaf.shape), dtype)

    return jax.tree.map(leaf_spec, tree)


def zeros_of(tree: PyTree) -> PyTree:
    """Arrays of zeros of the specs; leaves that are arrays or tracers stay as they are."""

    def fill(leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jnp.zeros(leaf.shape, leaf.dtype)
        return leaf

    return jax.tree.map(fill, tree)


def size_bytes(tree: PyTree) -> int:
    """Bytes of all leaves."""
    return sum(
        math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)
    )


def count(tree: PyTree) -> int:
    """Numbers in all leaves."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def signature(tree: PyTree) -> tuple[Any, ...]:
    """Hashable; equal where structure, shapes and dtypes are."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((tuple(leaf.shape), str(leaf.dtype)) for leaf in leaves)


def describe(tree: PyTree, *, limit: int = 6) -> str:
    """For messages: `float32[8,16]`, or `{image: float32[8,8], mask: bool[8]}`."""

    def one(leaf: Any) -> str:
        return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"

    found = leaf_paths(tree)
    if len(found) == 1 and not found[0][0]:
        return one(found[0][1])
    shown = [f"{path}: {one(leaf)}" for path, leaf in found[:limit]]
    if len(found) > limit:
        shown.append(f"and {len(found) - limit} more")
    return "{" + ", ".join(shown) + "}"
