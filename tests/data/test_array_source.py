"""Array sources: pure random access, orders that never change, and what they refuse."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crowdmesh_jax.data import (
    ArraySource,
    DataSource,
    ShippableSource,
    checked_batch,
    epoch_order,
    source_from_spec,
)
from crowdmesh_jax.errors import DataError

sources = st.builds(
    lambda rows, batch, seed, shuffle, drop: ArraySource(
        np.arange(rows), np.arange(rows) * 10, min(batch, rows) if drop else batch, seed,
        shuffle, drop,
    ),
    st.integers(1, 40), st.integers(1, 60), st.integers(0, 2**64 - 1), st.booleans(), st.booleans(),
)  # fmt: skip


@given(sources, st.lists(st.integers(0, 200), min_size=1, max_size=6))
def test_a_batch_depends_on_the_step_alone(source, steps):
    fresh = ArraySource.from_spec(source.spec(), source.arrays())
    for step in steps:
        for ours, again in zip(source.batch(step), fresh.batch(step), strict=True):
            assert ours.shape == (source.batch_size,)
            np.testing.assert_array_equal(ours, again)


@given(sources, st.integers(0, 5))
def test_an_epoch_visits_each_row_at_most_once_and_whole_epochs_exactly_once(source, epoch):
    if source.drop_remainder:
        steps = range(epoch * source.steps_per_epoch, (epoch + 1) * source.steps_per_epoch)
        seen = np.concatenate([source.row_numbers(step) for step in steps])
        assert len(set(seen.tolist())) == len(seen) == source.steps_per_epoch * source.batch_size
    else:
        stream = np.concatenate([source.row_numbers(step) for step in range(source.rows)])
        epochs = stream.reshape(source.batch_size, source.rows)  # batch_size whole epochs
        assert (np.sort(epochs, axis=1) == np.arange(source.rows)).all()


@given(sources, st.integers(0, 50))
def test_rows_of_inputs_and_targets_stay_together(source, step):
    inputs, targets = source.batch(step)
    np.testing.assert_array_equal(inputs * 10, targets)


def test_the_order_is_the_same_forever():
    """Written down once: a change of it silently changes every run that is resumed."""
    assert epoch_order(8, seed=0, epoch=0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert epoch_order(8, seed=7, epoch=3).tolist() == [2, 5, 7, 3, 0, 6, 4, 1]
    assert epoch_order(4, seed=7, epoch=3, shuffle=False).tolist() == [0, 1, 2, 3]


def test_epochs_and_seeds_give_different_orders():
    orders = {tuple(epoch_order(50, seed=s, epoch=e)) for s in range(4) for e in range(4)}
    assert len(orders) == 16


def test_a_source_travels_in_parts():
    inputs = {"image": np.ones((6, 2), np.float32), "mask": [np.zeros((6,), bool)]}
    whole = ArraySource(inputs, (np.arange(6),), batch_size=2, seed=3)
    spec = json.loads(json.dumps(whole.spec()))
    first = source_from_spec(spec, whole.arrays(targets=False))
    last = source_from_spec(spec, whole.arrays(inputs=False))
    assert list(first.batch_inputs(4)) == ["image", "mask"]
    np.testing.assert_array_equal(last.batch_targets(4)[0], whole.batch_targets(4)[0])
    with pytest.raises(DataError, match=r"step 4: this copy .* holds no targets"):
        first.batch(4)
    with pytest.raises(DataError, match="holds no inputs"):
        last.batch_inputs(0)


def test_wide_dtypes_are_narrowed_and_others_kept():
    source = ArraySource([np.ones(3), np.ones(3, np.uint8)], np.arange(3), batch_size=3)
    assert [leaf.dtype.name for leaf in source.inputs] == ["float32", "uint8"]
    assert source.targets.dtype == np.int32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ArraySource(np.ones((4, 2)), np.ones(3), 2), r"inputs has 4 rows, targets has 3"),
        (lambda: ArraySource(np.ones((0, 2)), np.ones(0), 1), "inputs is empty"),
        (lambda: ArraySource(None, None, 1), "neither inputs nor targets"),
        (lambda: ArraySource(np.ones(3), np.array([0, np.nan, 1]), 1), r"targets holds NaN.*row 1"),
        (lambda: ArraySource({"a": np.array([[np.nan]])}, np.ones(1), 1), r"inputs\['a'\] holds"),
        (lambda: ArraySource(np.ones(3), np.array(["a", "b", "c"]), 1), "targets has dtype"),
        (lambda: ArraySource(np.ones(3), 5, 1), "targets is a single value"),
        (lambda: ArraySource(np.ones(3), np.ones(3), 4), "batch_size 4 is more than the 3 rows"),
        (lambda: ArraySource(np.ones(3), np.ones(3), 0), "batch_size must be an integer >= 1"),
        (lambda: ArraySource(np.ones(3), np.ones(3), 2.5), r"batch_size .* got 2.5"),
        (lambda: ArraySource(np.ones(3), np.ones(3), 1, seed=-1), "seed must be"),
        (lambda: ArraySource(np.ones(3), np.ones(3), 1).batch(-1), "step must be an integer >= 0"),
        (lambda: ArraySource(np.ones(3), np.array([2**40] * 3), 1), "32 bits cannot"),
        (lambda: ArraySource({1: np.ones(3)}, np.ones(3), 1), "keys must be strings, got 1"),
        (lambda: source_from_spec({"kind": "web"}, {}), "unknown kind 'web'"),
    ],
)
def test_bad_data_is_told_by_name_and_value(make, message):
    with pytest.raises(DataError, match=message) as caught:
        make()
    assert caught.value.code == "CM-140"


@pytest.mark.parametrize(
    ("change", "arrays", "message"),
    [
        ({"rows": 5}, {}, "5 rows described, 4 given"),
        ({"extra": 1}, {}, "field 'extra'"),
        ({"inputs": {"list": ["*", "*"]}}, {}, "more than the 1 leaves"),
        ({"inputs": {"list": []}}, {}, "0 leaves described, 1 given"),
        ({"inputs": {"set": ["*"]}}, {}, "describes no tree"),
        ({}, {"labels/0": np.ones(4)}, "unknown array 'labels/0'"),
        ({}, {"inputs/3": np.ones(4)}, "numbered from 0"),
    ],
)
def test_a_spec_that_does_not_fit_its_arrays_is_refused(change, arrays, message):
    source = ArraySource(np.ones(4), np.ones(4), 2)
    with pytest.raises(DataError, match=message):
        ArraySource.from_spec(source.spec() | change, source.arrays() | arrays)


def test_a_deep_spec_is_refused_before_it_overflows():
    source = ArraySource(np.ones(4), np.ones(4), 2)
    deep = "*"
    for _ in range(200):
        deep = {"list": [deep]}
    with pytest.raises(DataError, match="deeper than"):
        ArraySource.from_spec(source.spec() | {"inputs": deep}, source.arrays())


class _Broken:
    def __init__(self, batch):
        self._batch = batch

    def batch(self, step):
        return self._batch


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (np.ones(4), r"must return \(inputs, targets\), got ndarray"),
        ((np.ones(3), np.ones(4)), r"step 5: inputs has shape \(3,\), expected 4 rows"),
        ((np.ones(4), np.ones(())), r"targets has shape \(\)"),
        ((np.ones(4), None), "targets of the batch hold no array"),
        ((np.array(["x"] * 4), np.ones(4)), "dtype <U1"),
    ],
)
def test_a_source_that_breaks_its_promise_is_told(batch, message):
    with pytest.raises(DataError, match=message):
        checked_batch(_Broken(batch), 5, 4)


def test_array_sources_are_shippable_data_sources():
    source = ArraySource(np.ones(4), np.ones(4), 2)
    assert isinstance(source, DataSource)
    assert isinstance(source, ShippableSource)
    assert not isinstance(_Broken(None), ShippableSource)
    assert checked_batch(source, 0, 2)[0].shape == (2,)


def test_data_needs_no_jax():
    code = "import sys, crowdmesh_jax.data as d; d.digits(); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
