"""Text: tokens and back, windows that a step alone decides, and what is refused."""

import doctest
import gzip
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crowdmesh_jax.data import (
    ShippableSource,
    TextSource,
    Vocabulary,
    read_text,
    source_from_spec,
)
from crowdmesh_jax.data import text as text_module
from crowdmesh_jax.errors import DataError, DataFileError


@given(st.text(min_size=1))
def test_text_becomes_tokens_and_comes_back(text):
    vocabulary = Vocabulary.of(text)
    tokens = vocabulary.encode(text)
    assert tokens.dtype == np.int32
    assert tokens.max() < len(vocabulary)
    assert vocabulary.decode(tokens) == text


def test_the_examples_in_the_docstrings_are_right():
    assert doctest.testmod(text_module).attempted >= 1
    assert doctest.testmod(text_module).failed == 0


def test_a_strange_character_is_told():
    with pytest.raises(DataError, match="'z' at position 2 is not among the 2"):
        Vocabulary("ab").encode("abz")
    for characters in ("", "aa"):
        with pytest.raises(DataError, match="only once"):
            Vocabulary(characters)


@given(st.integers(2, 60), st.data())
def test_rows_are_windows_of_the_text_and_targets_the_next_tokens(length, data):
    context = data.draw(st.integers(1, length - 1))
    source = TextSource(np.arange(length), context, batch_size=5, seed=data.draw(st.integers(0, 9)))
    step = data.draw(st.integers(0, 10**9))
    inputs, targets = source.batch(step)
    assert inputs.shape == targets.shape == (5, context)
    assert (inputs == inputs[:, :1] + np.arange(context)).all()
    assert (targets == inputs + 1).all()
    assert inputs.min() >= 0
    assert targets.max() < length
    fresh = source_from_spec(json.loads(json.dumps(source.spec())), source.arrays(targets=False))
    np.testing.assert_array_equal(fresh.batch_inputs(step), inputs)


def test_all_places_are_reached_and_seeds_and_steps_differ():
    source = TextSource(np.arange(12), 2, batch_size=200)
    assert set(source.starts(0)) == set(range(10))
    starts = {tuple(TextSource(np.arange(99), 2, 8, s).starts(t)) for s in (0, 1) for t in (0, 1)}
    assert len(starts) == 4


def test_the_places_are_the_same_forever():
    """Written down once: a change of it silently changes every run that is resumed."""
    assert TextSource(np.arange(1000), 8, 4, seed=7).starts(3).tolist() == [146, 31, 390, 469]


def test_a_text_source_ships():
    assert isinstance(TextSource(np.arange(9), 2, 3), ShippableSource)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TextSource(np.arange(4), 4, 1), "4 tokens are too few.* need 5"),
        (lambda: TextSource(np.ones(9), 4, 1), "must be integers in one row, got float64"),
        (lambda: TextSource(np.ones((9, 1), int), 4, 1), "must be integers in one row"),
        (lambda: TextSource(np.arange(9) - 1, 4, 1), "found -1 .. 7"),
        (lambda: TextSource(np.arange(9), 0, 1), "context must be an integer >= 1"),
        (lambda: TextSource(np.arange(9), 4, 1).batch(-1), "step must be"),
    ],
)
def test_bad_tokens_are_told(make, message):
    with pytest.raises(DataError, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "arrays", "message"),
    [
        ({"tokens": 8}, {"tokens": np.arange(9)}, "8 tokens described, 9 given"),
        ({"odd": 1}, {"tokens": np.arange(9)}, "field 'odd'"),
        ({}, {"inputs/0": np.arange(9)}, "expected the array 'tokens'"),
        ({"kind": ["text"]}, {}, "unknown kind .*; known: arrays, text"),
    ],
)
def test_a_spec_that_does_not_fit_its_tokens_is_refused(change, arrays, message):
    with pytest.raises(DataError, match=message):
        source_from_spec(TextSource(np.arange(9), 2, 3).spec() | change, arrays)


def test_a_text_file_is_read_packed_or_not_and_told_when_it_is_none(tmp_path):
    path = tmp_path / "text"
    for data in ("Größe".encode(), gzip.compress("Größe".encode())):
        path.write_bytes(data)
        assert read_text(path) == "Größe"
    path.write_bytes("Größe".encode("latin-1"))
    with pytest.raises(DataFileError, match=r"UTF-8 text, found byte 0xf6 at position 2"):
        read_text(path)
    path.write_bytes(b"")
    with pytest.raises(DataFileError, match="empty file; write one"):
        read_text(path, get="write one")
