"""The bundled digits: shapes, ranges, a split that never changes, a licence beside the file."""

import hashlib
from importlib import resources

import numpy as np
import pytest

from crowdmesh_jax.data import digits
from crowdmesh_jax.errors import DataError


def test_the_split_is_fixed_and_whole():
    (train, train_labels), (test, test_labels) = digits("train"), digits("test")
    assert train.shape == (1437, 8, 8, 1)
    assert test.shape == (360, 8, 8, 1)
    assert train.dtype == np.float32
    assert train_labels.dtype == np.int32
    assert train.min() >= 0 and train.max() == 1  # noqa: PT018
    both = np.concatenate([train, test]).reshape(1797, 64)
    with (resources.files("crowdmesh_jax.data") / "files/digits.npz").open("rb") as stream:
        original = np.load(stream)["images"].reshape(1797, 64)
    assert sorted(map(bytes, (both * 16).astype(np.uint8))) == sorted(map(bytes, original))
    text = test_labels.astype(np.uint8).tobytes() + train_labels.astype(np.uint8).tobytes()
    assert hashlib.sha256(text).hexdigest()[:16] == "f00759aefa1f4e36"


def test_all_classes_are_in_both_parts():
    for split in ("train", "test"):
        counts = np.bincount(digits(split)[1], minlength=10)
        assert counts.min() > 0.07 * counts.sum()


def test_flat_images_are_the_same_rows():
    np.testing.assert_array_equal(
        digits("test", flat=True)[0].reshape(-1, 8, 8, 1), digits("test")[0]
    )


def test_an_unknown_split_is_told():
    with pytest.raises(DataError, match=r"no split 'valid'; known: 'test', 'train'"):
        digits("valid")  # pyright: ignore


def test_the_licence_stands_beside_the_data():
    text = (resources.files("crowdmesh_jax.data") / "files/README.md").read_text()
    assert "CC BY 4.0" in text
    assert "Alpaydin" in text
