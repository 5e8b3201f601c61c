"""Leaves by path: there and back, whatever the containers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crowdmesh_jax import errors
from crowdmesh_jax.model.trees import (
    describe,
    get_leaf,
    leaf_paths,
    set_leaf,
    signature,
    size_bytes,
    spec_of,
    unflatten,
    zeros_of,
)

keys = st.text("abcXYZ_01", min_size=1, max_size=4)
trees = st.recursive(
    st.integers(0, 99),
    lambda inner: st.one_of(
        st.dictionaries(keys, inner, max_size=3),
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
    ),
    max_leaves=12,
)


@given(trees)
def test_paths_and_leaves_rebuild_the_tree(tree):
    pairs = leaf_paths(tree)
    shuffled = dict(reversed(pairs))
    assert unflatten(tree, shuffled) == tree
    assert [leaf for _, leaf in pairs] == jax.tree.leaves(tree)


@given(trees)
def test_setting_one_leaf_changes_that_leaf_only(tree):
    for path, leaf in leaf_paths(tree):
        changed = dict(leaf_paths(set_leaf(tree, path, -1)))
        assert changed == {**dict(leaf_paths(tree)), path: -1}
        assert get_leaf(tree, path) == leaf


def test_a_path_joins_dict_keys_sequence_indices_and_attributes():
    assert [p for p, _ in leaf_paths({"b": [1, {"c": 2}], "a": 3})] == ["a", "b/0", "b/1/c"]
    assert leaf_paths(7) == [("", 7)]


def test_two_leaves_of_one_path_are_refused():
    with pytest.raises(errors.ModelError, match=r"CM-120.*'a/b'"):
        leaf_paths({"a": {"b": 1}, "a/b": 2})


def test_missing_and_unknown_leaves_are_named():
    with pytest.raises(errors.ModelError, match="'w' is missing"):
        unflatten({"w": 0, "b": 0}, {"b": 1})
    with pytest.raises(errors.ModelError, match="'v' is unknown"):
        unflatten({"w": 0}, {"w": 1, "v": 2})
    with pytest.raises(errors.ModelError, match="no leaf 'v'; known: 'w'"):
        get_leaf({"w": 0}, "v")


def test_specs_are_what_jax_will_hold():
    tree = {"x": np.zeros((2, 3)), "n": np.zeros(4, np.int64), "flag": True}
    spec = spec_of(tree)
    held = jax.tree.map(jnp.asarray, tree)
    assert signature(spec) == signature(held) == signature(zeros_of(spec))
    assert size_bytes(spec) == 2 * 3 * 4 + 4 * 4 + 1


def test_descriptions_show_dtypes_and_shapes():
    assert describe(np.zeros((8, 2), np.float32)) == "float32[8,2]"
    many = {f"k{i}": np.zeros(1, np.int8) for i in range(9)}
    assert describe(many, limit=2) == "{k0: int8[1], k1: int8[1], and 7 more}"
