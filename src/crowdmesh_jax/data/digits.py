"""The 8x8 handwritten digits that come with the package: enough to see a real model learn.

Source: E. Alpaydin, C. Kaynak (1998), Optical Recognition of Handwritten Digits, UCI Machine
Learning Repository, CC BY 4.0; see files/README.md. Knows nothing of models.
"""

from __future__ import annotations

from importlib import resources
from typing import Literal

import numpy as np

from ..errors import DataError
from .arrays import epoch_order

TRAIN_ROWS = 1437
SPLIT_SEED = 0


def digits(
    split: Literal["train", "test"] = "train", flat: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Images and classes of one part of the bundled digits.

    The split is fixed: a shuffle that never changes sends 1,437 images to `train`, the other 360
    to `test`. The same people may have written in both parts.

    Args:
        flat: Images as rows of 64 numbers instead of 8x8x1.

    Returns:
        Images, float32 in [0, 1], `(rows, 8, 8, 1)` or `(rows, 64)`; classes, int32 in 0..9,
        `(rows,)`.

    Raises:
        DataError: No split of that name.

    Example:
        >>> images, labels = digits("test")
        >>> images.shape, labels.dtype.name
        ((360, 8, 8, 1), 'int32')
    """
    if split not in ("train", "test"):
        raise DataError(f"digits: no split {split!r}; known: 'test', 'train'")
    file = resources.files("crowdmesh_jax.data") / "files" / "digits.npz"
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
        images, labels = archive["images"], archive["labels"]
    order = epoch_order(len(labels), seed=SPLIT_SEED, epoch=0)
    rows = order[:TRAIN_ROWS] if split == "train" else order[TRAIN_ROWS:]
    shape = (len(rows), 64) if flat else (len(rows), 8, 8, 1)
    return (images[rows].astype(np.float32) / 16).reshape(shape), labels[rows].astype(np.int32)
