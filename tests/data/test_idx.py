"""IDX files: read back as written; Fashion-MNIST; what is wrong with a file is told by its name."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from crowdmesh_jax.data import fashion_mnist, read_idx
from crowdmesh_jax.data.idx import FASHION_FOLDER
from crowdmesh_jax.errors import DataError, DataFileError

CODES = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}


def idx_bytes(array: np.ndarray) -> bytes:
    head = bytes([0, 0, CODES[array.dtype.str[1:]], array.ndim])
    big = array.astype(array.dtype.newbyteorder(">"))
    return head + struct.pack(f">{array.ndim}I", *array.shape) + big.tobytes()


arrays = st.sampled_from([np.uint8, np.int8, np.int16, np.int32, np.float32, np.float64]).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(max_dims=4, max_side=5))
)


@given(array=arrays, packed=st.booleans())
def test_an_array_is_read_back_as_written_packed_or_not(tmp_path_factory, array, packed):
    path = tmp_path_factory.mktemp("idx") / "x"
    path.write_bytes(gzip.compress(idx_bytes(array)) if packed else idx_bytes(array))
    read = read_idx(path, shape=array.shape, dtype=array.dtype.name)
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)


IMAGES = np.arange(5 * 28 * 28).reshape(5, 28, 28).astype(np.uint8)
LABELS = np.array([3, 9, 0, 1, 9], np.uint8)
WHOLE = idx_bytes(IMAGES)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected an IDX file.* found an empty file"),
        (b"\x89PNG" + WHOLE, "begins 00 00.* found 89 50 4e 47"),
        (b"\0\0\x07\x01" + WHOLE, "found 00 00 07 01"),
        (WHOLE[:9], "truncated in its header"),
        (WHOLE[:-1], r"announces 3920 bytes of values \(5 x 28 x 28 uint8\), found only 3919"),
        (WHOLE + b"x", "announces 3920 .*, found more; the file is damaged"),
        (gzip.compress(WHOLE, mtime=0)[:-200], "truncated: its gzip stream has no end"),
        (b"\x1f\x8b" + b"\xff" * 40, "damaged gzip stream"),
        (idx_bytes(IMAGES[:, :14]), "expected shape any x 28 x 28, found 5 x 14 x 28"),
        (idx_bytes(LABELS), "expected shape any x 28 x 28, found 5;"),
        (idx_bytes(IMAGES.astype(np.int32)), "expected uint8 values, found int32"),
    ],
)
def test_a_bad_file_is_told_by_name_with_what_was_expected_and_found(tmp_path, data, message):
    path = tmp_path / "images"
    path.write_bytes(data)
    with pytest.raises(DataFileError, match=message) as caught:
        read_idx(path, shape=(None, 28, 28), dtype="uint8")
    assert caught.value.code == "CM-141"
    assert str(path) in str(caught.value)


def test_a_header_that_promises_gigabytes_takes_no_memory(tmp_path):
    path = tmp_path / "images"
    path.write_bytes(b"\0\0\x0e\x03" + struct.pack(">3I", 2**32 - 1, 2**16, 2**16))
    with pytest.raises(DataFileError, match="found only 0"):
        read_idx(path)


def write_fashion(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(images))
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(labels)))


def test_fashion_mnist_is_scaled_images_and_classes(tmp_path):
    write_fashion(tmp_path, IMAGES, LABELS)
    images, labels = fashion_mnist("test", tmp_path)
    assert images.dtype == np.float32
    np.testing.assert_array_equal((images[..., 0] * 255).round(), IMAGES)
    assert labels.dtype == np.int32
    assert labels.tolist() == LABELS.tolist()


def test_fashion_mnist_with_a_label_beyond_its_classes_is_refused(tmp_path):
    write_fashion(tmp_path, IMAGES, np.where(LABELS == 1, 10, LABELS).astype(np.uint8))
    with pytest.raises(DataError, match=r"t10k-labels.*expected 0 .. 9.* found 10 in row 3"):
        fashion_mnist("test", tmp_path)


def test_fashion_mnist_with_fewer_labels_than_images_is_refused(tmp_path):
    write_fashion(tmp_path, IMAGES, LABELS[:4])
    with pytest.raises(DataFileError, match=r"labels-idx1.*expected shape 5, found 4"):
        fashion_mnist("test", tmp_path)


def test_without_the_files_it_says_how_to_get_them(tmp_path):
    with pytest.raises(DataFileError, match=r"found nothing; .*apt install dataset-fashion-mnist"):
        fashion_mnist("train", tmp_path)
    with pytest.raises(DataError, match="no split 'valid'"):
        fashion_mnist("valid", tmp_path)  # pyright: ignore


@pytest.mark.skipif(not Path(FASHION_FOLDER).is_dir(), reason="dataset-fashion-mnist is not here")
def test_the_debian_package_holds_what_its_authors_describe():
    images, labels = fashion_mnist("test")
    assert images.shape == (10_000, 28, 28, 1)
    assert np.bincount(labels).tolist() == [1000] * 10
