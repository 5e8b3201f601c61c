"""A data source over arrays in memory, shuffled anew each epoch.

The order depends on (seed, epoch, rows) alone, through raw generator bits and a stable sort: no
library version, platform or device changes it. Knows nothing of JAX.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from ..errors import DataError
from . import tree
from .checks import checked_integer
from .source import Tree

NARROW = {"float64": np.float32, "int64": np.int32, "uint64": np.uint32, "complex128": np.complex64}
"""What XLA on small devices computes in; wider arrays would change dtype on the way."""
KEPT_EPOCHS = 2


def epoch_order(rows: int, *, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """The order in which an epoch reads `rows` rows: int64 `(rows,)`, each row once.

    Philox is counter-based and its raw output is fixed by its definition; numpy promises that of
    the bit stream, but not of `Generator.permutation`. Ties (one in 2**64) keep row order.
    """
    if not shuffle:
        return np.arange(rows)
    key = np.array([seed, epoch], dtype=np.uint64)  # a list of large integers becomes floats
    bits = np.random.Philox(key=key).random_raw(rows)
    return np.argsort(bits, kind="stable")


class ArraySource:
    """Batches of rows of arrays; rows are the leading axis of every leaf.

    Each epoch visits the rows in a new order. With `drop_remainder`, the rows that do not fill a
    batch wait for another epoch's order; without it, a batch may end with the next epoch's first
    rows. Batches always have `batch_size` rows, since programs have static shapes.

    64-bit arrays are narrowed to 32 bits, which is what the programs take.

    Args:
        inputs: Array, or dict, list or tuple of arrays; None on a device that reads targets only.
        targets: The same; None on a device that reads inputs only.
        batch_size: Rows per step, all microbatches together.
        seed: Of the order, 0 .. 2**64 - 1.

    Raises:
        DataError: No rows, lengths that differ, NaN, dtypes that are no numbers, or a batch larger
            than the data.

    Example:
        >>> source = ArraySource(np.arange(6.0), np.arange(6), batch_size=2)
        >>> inputs, targets = source.batch(0)
        >>> inputs.dtype.name, targets.shape, source.batch(0)[1].tolist() == targets.tolist()
        ('float32', (2,), True)
    """

    KIND: ClassVar[str] = "arrays"

    def __init__(
        self,
        inputs: Tree,
        targets: Tree,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        drop_remainder: bool = True,
    ) -> None:
        self.inputs = _clean(inputs, "inputs")
        self.targets = _clean(targets, "targets")
        self.batch_size = checked_integer("batch_size", batch_size, least=1)
        self.seed = checked_integer("seed", seed, least=0, most=2**64 - 1)
        self.shuffle = bool(shuffle)
        self.drop_remainder = bool(drop_remainder)
        self.rows = _rows(self.inputs, self.targets)
        if drop_remainder and self.batch_size > self.rows:
            raise DataError(
                f"batch_size {self.batch_size} is more than the {self.rows} rows there are;"
                " use a smaller batch or drop_remainder=False"
            )
        self._orders: dict[int, np.ndarray] = {}

    def __repr__(self) -> str:
        return (
            f"ArraySource(rows={self.rows}, batch_size={self.batch_size}, seed={self.seed},"
            f" shuffle={self.shuffle}, drop_remainder={self.drop_remainder})"
        )

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in one pass over the rows."""
        return self.rows // self.batch_size

    def row_numbers(self, step: int) -> np.ndarray:
        """The rows that make the batch of a step: int64 `(batch_size,)`."""
        step = checked_integer("step", step, least=0)
        if self.drop_remainder:
            epoch, index = divmod(step, self.steps_per_epoch)
            first = index * self.batch_size
            return self._order(epoch)[first : first + self.batch_size]
        taken: list[np.ndarray] = []
        missing, position = self.batch_size, step * self.batch_size
        while missing:
            epoch, first = divmod(position, self.rows)
            part = self._order(epoch)[first : first + missing]
            taken.append(part)
            missing, position = missing - len(part), position + len(part)
        return np.concatenate(taken)

    def batch(self, step: int) -> tuple[Tree, Tree]:
        """Inputs and targets of a step, leading axis `batch_size`."""
        return self.batch_inputs(step), self.batch_targets(step)

    def batch_inputs(self, step: int) -> Tree:
        """The inputs of a step.

        Raises:
            DataError: This copy of the source holds targets only.
        """
        return self._take(self.inputs, "inputs", step)

    def batch_targets(self, step: int) -> Tree:
        """The targets of a step.

        Raises:
            DataError: This copy of the source holds inputs only.
        """
        return self._take(self.targets, "targets", step)

    def spec(self) -> dict[str, Any]:
        """All but the arrays, JSON-able; with `arrays` it makes an equal source elsewhere."""
        return {
            "kind": self.KIND,
            "rows": self.rows,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "drop_remainder": self.drop_remainder,
            "inputs": tree.structure(self.inputs),
            "targets": tree.structure(self.targets),
        }

    def arrays(self, *, inputs: bool = True, targets: bool = True) -> dict[str, np.ndarray]:
        """The leaves by name, "inputs/0", "inputs/1", ..., "targets/0", ..., as asked for."""
        named = {}
        for part, wanted in (("inputs", inputs), ("targets", targets)):
            if wanted:
                for index, (_, leaf) in enumerate(tree.leaves(getattr(self, part))):
                    named[f"{part}/{index}"] = leaf
        return named

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> ArraySource:
        """The source that `spec` describes, over all its arrays or only one part's.

        Raises:
            DataError: The arrays are not those of the spec.
        """
        fields = {
            "kind", "rows", "batch_size", "seed", "shuffle", "drop_remainder", "inputs", "targets",
        }  # fmt: skip
        if set(spec) != fields:
            odd = sorted(set(spec) ^ fields)[0]
            raise DataError(f"data spec: unknown or missing field {odd!r}")
        parts = {}
        for part in ("inputs", "targets"):
            names = [name for name in arrays if name.startswith(f"{part}/")]
            leaves = [arrays.get(f"{part}/{index}") for index in range(len(names))]
            if any(leaf is None for leaf in leaves):
                raise DataError(f"data spec: {part} must be numbered from 0, got {sorted(names)}")
            parts[part] = tree.rebuild(spec[part], leaves) if leaves else None
        odd = sorted(n for n in arrays if not n.startswith(("inputs/", "targets/")))
        if odd:
            raise DataError(f"data spec: unknown array {odd[0]!r}")
        source = cls(
            parts["inputs"], parts["targets"], spec["batch_size"], spec["seed"],
            spec["shuffle"], spec["drop_remainder"],
        )  # fmt: skip
        if source.rows != spec["rows"]:
            raise DataError(f"data spec: {spec['rows']} rows described, {source.rows} given")
        return source

    def _order(self, epoch: int) -> np.ndarray:
        order = self._orders.get(epoch)
        if order is None:
            order = epoch_order(self.rows, seed=self.seed, epoch=epoch, shuffle=self.shuffle)
            while len(self._orders) >= KEPT_EPOCHS:
                self._orders.pop(next(iter(self._orders)), None)
            self._orders[epoch] = order
        return order

    def _take(self, part: Tree, name: str, step: int) -> Tree:
        if part is None:
            raise DataError(f"step {step}: this copy of the data source holds no {name}")
        rows = self.row_numbers(step)
        return tree.map_leaves(lambda leaf: leaf[rows], part)


def _clean(part: Tree, name: str) -> Tree:
    """The same tree of numpy arrays, narrowed and checked leaf by leaf."""
    checked = iter([_clean_leaf(leaf, path) for path, leaf in tree.leaves(part, where=name)])
    return tree.map_leaves(lambda _: next(checked), part)


def _clean_leaf(leaf: Any, path: str) -> np.ndarray:
    array = np.asarray(leaf)
    if array.dtype.kind in "OSUMm" or array.dtype.names:
        raise DataError(f"{path} has dtype {array.dtype}; numbers or booleans are needed")
    if array.ndim == 0:
        raise DataError(f"{path} is a single value; rows on a leading axis are needed")
    if array.dtype.kind not in "biu":
        # bfloat16 and float8 have kind V, and isnan only through the wider type
        bad = np.isnan(array if array.dtype.kind in "fc" else array.astype(np.float32))
        if bad.any():
            row = int(np.argwhere(bad)[0][0])
            raise DataError(f"{path} holds NaN, first in row {row}; clean or drop that row")
    narrow = NARROW.get(array.dtype.name)
    if narrow is not None:
        if array.dtype.kind in "iu" and array.size:
            bounds = np.iinfo(narrow)
            if array.min() < bounds.min or array.max() > bounds.max:
                raise DataError(
                    f"{path} holds integers that 32 bits cannot: {array.min()} .. {array.max()}"
                )
        array = array.astype(narrow)
    return array


def _rows(inputs: Tree, targets: Tree) -> int:
    leaves = tree.leaves(inputs, where="inputs") + tree.leaves(targets, where="targets")
    if not leaves:
        raise DataError("neither inputs nor targets hold an array")
    first_path, first = leaves[0]
    for path, leaf in leaves:
        if len(leaf) != len(first):
            raise DataError(
                f"lengths differ: {first_path} has {len(first)} rows, {path} has {len(leaf)}"
            )
    if len(first) == 0:
        raise DataError(f"{first_path} is empty; at least one row is needed")
    return len(first)
