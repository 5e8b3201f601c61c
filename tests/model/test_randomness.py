"""Keys depend on (seed, step, microbatch, layer) and on nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crowdmesh_jax.model import init_key, layer_key
from crowdmesh_jax.model.randomness import key_spec

numbers = st.integers(0, 2**32 - 1)
works = st.tuples(numbers, numbers, st.integers(0, 1000), st.integers(0, 1000))


TRACED = jax.jit(lambda *parts: jax.random.key_data(layer_key(*parts)))


def data(key):
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


@given(works, works)
@settings(max_examples=30, deadline=None)
def test_other_work_gives_another_key(one, other):
    assert (data(layer_key(*one)) == data(layer_key(*other))) == (one == other)


@given(works)
@settings(max_examples=20, deadline=None)
def test_traced_scalars_give_the_same_key_as_numbers(work):
    traced = TRACED(*map(np.uint32, work))
    assert tuple(np.asarray(traced).tolist()) == data(layer_key(*work))


def test_the_chain_is_the_documented_one():
    key = jax.random.key(7, impl="threefry2x32")
    for part in (3, 2, 5):
        key = jax.random.fold_in(key, part)
    assert data(layer_key(7, 3, 2, 5)) == data(key)
    assert data(init_key(7, 5)) == data(layer_key(7, 2**31 + 5, 0, 0))


def test_the_readers_default_implementation_changes_nothing():
    plain = data(layer_key(0, 1, 2, 3))
    with jax.default_prng_impl("rbg"):
        assert data(layer_key(0, 1, 2, 3)) == plain
    assert key_spec().dtype == layer_key(0, 0, 0, 0).dtype


def test_initialisation_shares_no_key_with_training():
    training = {data(layer_key(0, s, m, n)) for s in range(4) for m in range(3) for n in range(3)}
    assert not training & {data(init_key(0, n)) for n in range(8)}


@pytest.mark.parametrize("seed", [0, 2**31, 2**32 - 1])
def test_large_seeds_are_taken_as_they_are(seed):
    assert data(layer_key(seed, 0, 0, 0)) == data(layer_key(jnp.uint32(seed), 0, 0, 0))
