"""Chunked transfers: what is sent, resumed, taken from an older version; damage is found."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crowdmesh_jax.errors import DataError, InvalidValueError
from crowdmesh_jax.propagation import Assembly, ChunkMove, Manifest, checksum, plan_transfer

OLD = bytes(range(100)) * 5


def parts(data, manifest, indices):
    for index in indices:
        offset, size = manifest.span(index)
        yield offset, data[offset : offset + size]


@settings(max_examples=60)
@given(st.binary(max_size=100), st.integers(1, 50), st.binary(max_size=200), st.randoms())
def test_whatever_was_there_the_bytes_arrive(data, chunk, older, rng):
    manifest = Manifest.of(data, chunk_bytes=chunk)
    before = Manifest.of(older, chunk_bytes=chunk)
    left = bytearray(data)
    for place in range(len(left)):
        if rng.random() < 0.3:
            left[place] = rng.randrange(256)
    there = Assembly.resumed(manifest, left, limit_bytes=len(data))
    plan = plan_transfer(manifest, older=before, there=there.there())
    indices = [*plan.there, *(m.index for m in plan.local), *plan.send]
    assert sorted(indices) == list(range(len(manifest.checksums)))
    assert plan.send_bytes == sum(manifest.span(i)[1] for i in plan.send)
    there.take(plan.local, older)
    sent = list(parts(data, manifest, plan.send))
    rng.shuffle(sent)
    for offset, part in sent:
        there.put(offset, part)
        there.put(offset, part)  # a repeated chunk changes nothing
    assert there.finish() == data


def test_only_what_changed_is_sent():
    new = bytearray(OLD)
    new[205] ^= 1
    manifest = Manifest.of(new, chunk_bytes=50)
    plan = plan_transfer(manifest, older=Manifest.of(OLD, chunk_bytes=50))
    assert plan.send == (4,)
    assert plan.send_bytes == 50
    # Chunks that stayed are read where they were, though the bytes stand elsewhere too.
    assert all(m.from_offset == m.index * 50 for m in plan.local)
    assert plan_transfer(manifest).send == tuple(range(10))


def test_an_older_version_in_other_chunks_tells_nothing():
    manifest = Manifest.of(OLD, chunk_bytes=50)
    assert plan_transfer(manifest, older=Manifest.of(OLD, chunk_bytes=25)).local == ()
    # Nor does a last chunk that is equal by its size: it lies elsewhere there.
    new, old = b"z" * 30 + b"y" * 20, b"x" * 20 + b"y" * 20
    older = Manifest.of(old, chunk_bytes=20)
    assert plan_transfer(Manifest.of(new, chunk_bytes=30), older=older).local == ()


def test_moved_bytes_are_found_at_chunk_borders():
    shifted = OLD[100:150] + OLD[:50]
    plan = plan_transfer(
        Manifest.of(shifted, chunk_bytes=50), older=Manifest.of(bytes(50) + OLD, chunk_bytes=50)
    )
    assert plan.send == ()


def test_a_broken_transfer_goes_on_where_it_was():
    manifest = Manifest.of(OLD, chunk_bytes=30)
    half = Assembly(manifest, limit_bytes=1000)
    for offset, part in parts(OLD, manifest, range(9)):
        half.put(offset, part)
    plan = plan_transfer(manifest, there=half.there())
    assert plan.send == tuple(range(9, 17))
    # What the receiver says of its chunks counts by checksum only.
    lying = {0: checksum(b"other"), 99: manifest.checksums[0]}
    assert 0 in plan_transfer(manifest, there=lying).send


def test_damage_is_found_and_changes_nothing():
    manifest = Manifest.of(OLD, chunk_bytes=100)
    made = Assembly(manifest, limit_bytes=1000)
    made.put(0, OLD[:100])
    bad = bytearray(OLD[100:200])
    bad[3] ^= 128
    with pytest.raises(DataError, match=r"chunk 1 at 100: checksum .* damaged or is of another"):
        made.put(100, bad)
    assert made.missing == (1, 2, 3, 4)
    with pytest.raises(DataError, match="99 bytes, expected 100"):
        made.put(100, OLD[100:199])
    for offset in (50, -100, 500, 600):
        with pytest.raises(DataError, match="no chunk begins"):
            made.put(offset, OLD[:100])
    with pytest.raises(DataError, match="4 of 5 chunks are missing, chunk 1 first"):
        made.finish()


def test_a_rotten_older_version_is_found():
    older = bytes(random.Random(1).randbytes(100))
    manifest = Manifest.of(older, chunk_bytes=50)
    plan = plan_transfer(manifest, older=manifest)
    rotten = bytearray(older)
    rotten[60] ^= 1
    made = Assembly(manifest, limit_bytes=100)
    with pytest.raises(DataError, match="chunk 1"):
        made.take(plan.local, rotten)
    assert made.missing == (1,)
    with pytest.raises(DataError, match="bytes, expected 50"):
        made.take([ChunkMove(index=1, from_offset=90)], older)


def test_an_inconsistent_manifest_is_found_at_the_end():
    good = Manifest.of(b"abcd", chunk_bytes=2)
    bad = Manifest(size_bytes=4, chunk_bytes=2, checksums=good.checksums, sha256="0" * 64)
    made = Assembly.resumed(bad, b"abcd", limit_bytes=4)
    with pytest.raises(DataError, match="the manifest is inconsistent"):
        made.finish()


def test_sizes_off_the_wire_are_bounded_before_memory_is_taken():
    manifest = Manifest.of(OLD, chunk_bytes=100)
    with pytest.raises(DataError, match="500 bytes is over the limit of 499"):
        Assembly(manifest, limit_bytes=499)
    with pytest.raises(InvalidValueError, match="need 5 checksums, got 1"):
        Manifest(size_bytes=500, chunk_bytes=100, checksums=("x",), sha256="")
    with pytest.raises(InvalidValueError, match="at most 1000000"):
        Manifest(size_bytes=10**12, chunk_bytes=1, checksums=(), sha256="")
    with pytest.raises(InvalidValueError, match="chunk_bytes"):
        Manifest.of(b"", chunk_bytes=0)
    with pytest.raises(InvalidValueError, match=r"outside 0\.\.4"):
        manifest.span(5)
    assert Assembly(Manifest.of(b""), limit_bytes=0).finish() == b""
