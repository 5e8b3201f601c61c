"""IDX files, the format of MNIST and its successors, and Fashion-MNIST in them.

Source of the format: Y. LeCun, C. Cortes, C. Burges, The MNIST database of handwritten digits: two
zero bytes, a code for the type, the number of axes, each axis as a big-endian uint32, the values.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from ..errors import DataError, DataFileError
from .checks import check_labels
from .reading import existing_file, read_start

DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
MAX_AXES = 8
FASHION_FOLDER = "/usr/share/datasets/fashion-mnist"
"""Where Debian's package puts it."""
FASHION_GET = (
    "on Debian or Ubuntu: apt install dataset-fashion-mnist; elsewhere take the four files from"
    " https://github.com/zalandoresearch/fashion-mnist and name their folder"
)
FASHION_CLASSES = 10


def read_idx(
    path: str | Path,
    *,
    shape: Sequence[int | None] | None = None,
    dtype: str | None = None,
    get: str = "check the path",
) -> np.ndarray:
    """The array of an IDX file, gzip'd or not, in native byte order.

    Args:
        shape: Expected shape, None for an axis of any length; None: any.
        dtype: Expected dtype, "uint8" say; None: any.
        get: What a user without the file should do, for the message.

    Raises:
        DataFileError: Missing, no IDX file, truncated, longer than it says, or not as expected.
    """
    path = existing_file(path, get=get)
    start = read_start(path, 4)
    if len(start) < 4 or start[:2] != b"\0\0" or start[2] not in DTYPES or start[3] > MAX_AXES:
        raise DataFileError(
            f"{path}: expected an IDX file, which begins 00 00, a type ({_codes()}) and a number of"
            f" axes; found {start.hex(' ') or 'an empty file'}; get the file again"
        )
    found, axes = np.dtype(DTYPES[start[2]]), start[3]
    header = read_start(path, 4 + 4 * axes)[4:]
    if len(header) < 4 * axes:
        raise DataFileError(f"{path}: truncated in its header; get the file again")
    sizes = struct.unpack(f">{axes}I", header)
    if dtype is not None and found.newbyteorder("=") != np.dtype(dtype):
        raise DataFileError(f"{path}: expected {dtype} values, found {found.name}")
    if shape is not None and (
        len(shape) != axes
        or any(w is not None and w != s for w, s in zip(shape, sizes, strict=True))
    ):
        told = " x ".join("any" if w is None else str(w) for w in shape)
        raise DataFileError(
            f"{path}: expected shape {told}, found {' x '.join(map(str, sizes))}; is it the right"
            " file?"
        )
    skip, size = 4 + 4 * axes, math.prod(sizes) * found.itemsize
    # One byte more than announced shows a file that goes on; memory grows with what is there.
    values = read_start(path, skip + size + 1)[skip:]
    if len(values) != size:
        much = "more" if len(values) > size else f"only {len(values)}"
        raise DataFileError(
            f"{path}: its header announces {size} bytes of values ({' x '.join(map(str, sizes))}"
            f" {found.name}), found {much}; the file is"
            f" {'damaged' if len(values) > size else 'truncated'}, get it again"
        )
    return np.frombuffer(values, found).reshape(sizes).astype(found.newbyteorder("="))


def fashion_mnist(
    split: Literal["train", "test"] = "train", folder: str | Path = FASHION_FOLDER
) -> tuple[np.ndarray, np.ndarray]:
    """Fashion-MNIST: 60,000 images of clothes to train on, 10,000 to test, in 10 classes.

    It is not bundled (30 MB, MIT licence): `apt install dataset-fashion-mnist`, or the four files
    from its authors in a folder.

    Args:
        folder: Holds `train-images-idx3-ubyte.gz` and its three sisters, gzip'd or not.

    Returns:
        Images, float32 in [0, 1], `(rows, 28, 28, 1)`; classes, int32 in 0..9, `(rows,)`.

    Raises:
        DataFileError: A file is missing, damaged or of another shape; says how to get it.
        DataError: No split of that name.

    Source: H. Xiao, K. Rasul, R. Vollgraf, Fashion-MNIST: a Novel Image Dataset for Benchmarking
    Machine Learning Algorithms (2017), arXiv:1708.07747.
    """
    stems = {"train": "train", "test": "t10k"}
    if split not in stems:
        raise DataError(f"fashion_mnist: no split {split!r}; known: 'test', 'train'")
    images_path = _packed_or_not(Path(folder) / f"{stems[split]}-images-idx3-ubyte")
    labels_path = _packed_or_not(Path(folder) / f"{stems[split]}-labels-idx1-ubyte")
    images = read_idx(images_path, shape=(None, 28, 28), dtype="uint8", get=FASHION_GET)
    labels = read_idx(labels_path, shape=(len(images),), dtype="uint8", get=FASHION_GET)
    check_labels(labels, FASHION_CLASSES, where=str(labels_path))
    return images.astype(np.float32)[..., None] / 255, labels.astype(np.int32)


def _packed_or_not(path: Path) -> Path:
    return path if path.is_file() else path.with_name(f"{path.name}.gz")


def _codes() -> str:
    return ", ".join(f"{code:02x}" for code in DTYPES)
