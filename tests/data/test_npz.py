"""npz archives: only what was expected gets through; windows stay inside their recording."""

import contextlib
import io
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crowdmesh_jax.data import check_labels, cut_windows, read_npz
from crowdmesh_jax.errors import DataError, DataFileError

X, Y = np.arange(24, dtype=np.int16).reshape(4, 6), np.arange(4, dtype=np.uint8)


def test_arrays_are_read_back_and_others_left_alone(tmp_path):
    path = tmp_path / "data.npz"
    np.savez_compressed(path, x=X, names=np.array(["a", "bc"]), other=np.array([None]))
    read = read_npz(path, {"x": ("int16", ("rows", 6)), "names": ("U", (None,))})
    assert sorted(read) == ["names", "x"]
    np.testing.assert_array_equal(read["x"], X)
    assert read["names"].tolist() == ["a", "bc"]


@pytest.mark.parametrize(
    ("arrays", "expected", "message"),
    [
        ({"x": X}, {"z": (None, None)}, "expected an array 'z', found x"),
        ({"x": X}, {"x": ("float32", None)}, "array 'x': expected dtype float32, found int16"),
        ({"x": X}, {"x": (None, (4, 7))}, r"expected shape \(4, 7\), found \(4, 6\)"),
        ({"x": X}, {"x": (None, (4, 6, None))}, r"expected shape \(4, 6, any\), found \(4, 6\)"),
        (
            {"x": X, "y": Y[:3]},
            {"x": (None, ("rows", 6)), "y": (None, ("rows",))},
            r"array 'y': expected shape \(rows\) with rows = 4 as in .*array 'x', found \(3,\)",
        ),
        ({"x": np.array([{}])}, {"x": (None, None)}, "Python objects, which are never unpickled"),
    ],
)
def test_arrays_that_are_not_as_expected_are_refused(tmp_path, arrays, expected, message):
    path = tmp_path / "data.npz"
    np.savez(path, **arrays)
    with pytest.raises(DataFileError, match=message) as caught:
        read_npz(path, expected)
    assert str(path) in str(caught.value)


@given(st.data())
def test_a_damaged_archive_is_refused_or_read_right(tmp_path_factory, data):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=X)
    whole = bytearray(buffer.getvalue())
    if data.draw(st.booleans()):
        whole = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("npz") / "data.npz"
    path.write_bytes(whole)
    with contextlib.suppress(DataFileError):
        read = read_npz(path, {"x": ("int16", ("rows", 6))})
        np.testing.assert_array_equal(read["x"], X)  # a bit that means nothing: of a date, say


def test_an_array_that_announces_more_than_there_is_takes_no_memory(tmp_path):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "<i2", "fortran_order": False, "shape": (2**40, 6)}
    )
    path = tmp_path / "data.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", buffer.getvalue())
    with pytest.raises(DataFileError, match="announces 13194139533312 bytes"):
        read_npz(path, {"x": ("int16", ("rows", 6))})


def test_a_missing_file_or_a_folder_says_what_to_do(tmp_path):
    with pytest.raises(DataFileError, match="found nothing; ask Ada"):
        read_npz(tmp_path / "none.npz", {}, get="ask Ada")
    with pytest.raises(DataFileError, match="found a folder"):
        read_npz(tmp_path, {})


@given(st.integers(0, 40), st.integers(1, 12), st.integers(1, 12))
def test_windows_are_slices_of_the_signal_with_the_most_frequent_label(samples, length, stride):
    signal = np.arange(samples * 2).reshape(samples, 2)
    labels = np.arange(samples) // 7
    windows, classes = cut_windows(signal, labels, length=length, stride=stride)
    assert len(windows) == max(0, (samples - length) // stride + 1) == len(classes)
    for index, (window, label) in enumerate(zip(windows, classes, strict=True)):
        inside = slice(index * stride, index * stride + length)
        np.testing.assert_array_equal(window, signal[inside])
        counts = {c: list(labels[inside]).count(c) for c in labels[inside]}
        assert label == min(counts, key=lambda c: (-counts[c], c))


@pytest.mark.parametrize(
    ("signal", "labels", "length", "message"),
    [
        (np.ones(4), np.ones(4, int), 2, r"found \(4,\) and \(4,\)"),
        (np.ones((4, 1)), np.ones(3, int), 2, r"found \(4, 1\) and \(3,\)"),
        (np.ones((4, 1)), np.ones(4), 2, "labels must be integers >= 0"),
        (np.ones((4, 1)), -np.ones(4, int), 2, "labels must be integers >= 0"),
        (np.ones((4, 1)), np.ones(4, int), 0, "length and stride must be >= 1"),
    ],
)
def test_signals_that_cannot_be_cut_are_refused(signal, labels, length, message):
    with pytest.raises(DataError, match=message):
        cut_windows(signal, labels, length=length, stride=1)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 5, 7], r"0 .. 4, as the model has 5 classes; found 5 in row 2; .* 8 classes"),
        ([[0, 1], [2, -1]], r"found -1 in row 1; .*weight 0"),
        ([0.0, 1.0], "labels must be integers, found float64"),
    ],
)
def test_labels_that_name_no_class_are_told_by_row(labels, message):
    with pytest.raises(DataError, match=message):
        check_labels(np.array(labels), 5)
    check_labels(np.array([0, 4]), 5)
