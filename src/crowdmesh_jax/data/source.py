"""What a data source promises, and a check that one keeps it.

Knows batches as trees of numpy arrays; knows nothing of where rows come from, of JAX or of devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ..errors import DataError
from . import tree
from .text import TextSource

Tree = Any


@runtime_checkable
class DataSource(Protocol):
    """Batches by step number.

    Random access and pure: `batch(7)` is the same whenever and wherever it is asked, so a run that
    repeats step 7 after a failure reads the same samples.
    """

    def batch(self, step: int) -> tuple[Tree, Tree]:
        """Inputs and targets of a step: trees of numpy arrays, leading axis `batch_size`."""
        ...


@runtime_checkable
class ShippableSource(DataSource, Protocol):
    """A source that travels: a JSON-able spec and arrays make an equal one on another machine.

    A device needs only what it reads: the first stage the inputs, the last one the targets.
    """

    def spec(self) -> dict[str, Any]:
        """All but the arrays, as JSON-able values."""
        ...

    def arrays(self, *, inputs: bool = True, targets: bool = True) -> dict[str, np.ndarray]:
        """The arrays that go with `spec`, by name; only the parts asked for."""
        ...

    def batch_inputs(self, step: int) -> Tree:
        """The inputs of a step alone."""
        ...

    def batch_targets(self, step: int) -> Tree:
        """The targets of a step alone."""
        ...


def source_from_spec(spec: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> ShippableSource:
    """The source that `spec()` and `arrays()` of another one describe.

    Raises:
        DataError: Of an unknown kind, or the arrays do not fit the spec.
    """
    from .arrays import ArraySource  # it imports this module's types

    kinds = {source.KIND: source for source in (ArraySource, TextSource)}
    kind = spec.get("kind") if isinstance(spec, Mapping) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise DataError(f"data spec: unknown kind {kind!r}; known: {', '.join(sorted(kinds))}")
    return kinds[kind].from_spec(spec, arrays)


def checked_batch(source: DataSource, step: int, batch_size: int) -> tuple[Tree, Tree]:
    """`source.batch(step)`, proved to be two trees of numeric arrays of `batch_size` rows.

    Raises:
        DataError: It is not; names the step, the leaf and its shape.
    """
    if not callable(getattr(source, "batch", None)):
        raise DataError(
            f"data must have batch(step), got {type(source).__name__}; arrays become a source by"
            f" cm.ArraySource(inputs, targets, batch_size={batch_size})"
        )
    batch = source.batch(step)
    if not (isinstance(batch, tuple) and len(batch) == 2):
        raise DataError(
            f"step {step}: batch() must return (inputs, targets), got {type(batch).__name__}"
        )
    for name, part in zip(("inputs", "targets"), batch, strict=True):
        leaves = tree.leaves(part, where=name)
        if not leaves:
            raise DataError(f"step {step}: {name} of the batch hold no array")
        for path, leaf in leaves:
            array = np.asarray(leaf)
            if array.dtype.kind in "OSUMm":
                raise DataError(
                    f"step {step}: {path} has dtype {array.dtype}; numbers or booleans are needed"
                )
            if array.ndim == 0 or array.shape[0] != batch_size:
                raise DataError(
                    f"step {step}: {path} has shape {array.shape}, expected {batch_size} rows"
                    " on the leading axis (the job's batch_size)"
                )
    return batch


def known_targets(source: DataSource, batch: tuple[Tree, Tree]) -> tuple[Tree, str]:
    """All targets that can be looked at before a run, and what they are called.

    Args:
        batch: Of step 0, for a source that makes its batches as it goes.
    """
    from .arrays import ArraySource
    from .text import TextSource

    if isinstance(source, ArraySource):
        return source.targets, "targets"
    if isinstance(source, TextSource):
        return source.tokens, "tokens"
    return batch[1], "targets of step 0"
