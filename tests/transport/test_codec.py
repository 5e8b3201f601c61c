"""Frames survive the way to bytes and back; bytes from strangers do no harm."""

import contextlib
import json
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crowdmesh_jax.errors import FrameError
from crowdmesh_jax.transport import Frame, FrameBounds, aligned_empty, decode, encode_bytes
from crowdmesh_jax.transport.codec import (
    DTYPES,
    MAGIC,
    MAX_DEPTH,
    PREFIX,
    VERSION,
    FrameAssembler,
    chunks,
    dtype_of,
    encode,
    encoded_size,
)

SMALL = FrameBounds(header_bytes=4096, leaves=8, leaf_bytes=4096, frame_bytes=16384)

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
)
json_values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), inner)
    ),
    max_leaves=8,
)
messages = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), json_values)


@st.composite
def arrays(draw):
    """Any allowed dtype, 0 to 3 dimensions, possibly empty, possibly not in C order."""
    dtype = dtype_of(draw(st.sampled_from(DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    size = math.prod(shape)
    raw = np.frombuffer(
        draw(st.binary(min_size=size * dtype.itemsize, max_size=size * dtype.itemsize)), np.uint8
    )
    array = (raw & 1 if dtype.kind == "b" else raw).view(dtype).reshape(shape)
    how = draw(st.sampled_from(["as is", "transposed", "strided", "reversed"]))
    if how == "transposed":
        return array.T
    if how == "strided" and array.ndim:
        return np.repeat(array, 2, axis=0)[::2]
    if how == "reversed" and array.ndim:
        return array[::-1]
    return array


frames = st.builds(Frame, messages, st.lists(arrays(), max_size=4).map(tuple))


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and np.ascontiguousarray(left).tobytes() == np.ascontiguousarray(right).tobytes()
    )


@settings(deadline=None)
@given(frames)
def test_a_frame_survives_bit_for_bit(frame):
    back = decode(encode_bytes(frame))
    assert back.message == frame.message
    assert len(back.arrays) == len(frame.arrays)
    assert all(map(same_bits, frame.arrays, back.arrays))


@settings(deadline=None)
@given(frames, st.integers(1, 500))
def test_chunks_of_any_size_assemble_to_the_frame_in_aligned_memory(frame, chunk_bytes):
    assembler = FrameAssembler()
    results = [assembler.feed(piece) for piece in chunks(encode(frame), chunk_bytes)]
    assert results[:-1] == [None] * (len(results) - 1)
    back, size_bytes = results[-1]
    assert size_bytes == encoded_size(frame) == len(encode_bytes(frame))
    assert back.message == frame.message
    assert all(map(same_bits, frame.arrays, back.arrays))
    assert all(array.ctypes.data % 64 == 0 for array in back.arrays if array.size)
    assert assembler.is_between_frames


def test_a_large_received_array_shares_its_memory_with_no_other():
    large = np.arange(2**18, dtype=np.float32)
    sent = (np.arange(3), large, np.ones(5), large[:-3] + 1, np.ones(0), np.arange(7))
    assembler = FrameAssembler()
    *_, (back, _) = [assembler.feed(piece) for piece in chunks(encode(Frame({}, sent)), 300_001)]
    assert all(map(same_bits, sent, back.arrays))

    def owner(array: np.ndarray) -> int:
        base = array
        while isinstance(base.base, np.ndarray):
            base = base.base
        return base.nbytes

    assert owner(back.arrays[1]) < large.nbytes + 200
    assert owner(back.arrays[0]) < 1000
    assert owner(back.arrays[5]) < large.nbytes + 1000, "just under a megabyte: with its neighbours"


def test_a_decoded_array_is_a_read_only_view_of_the_buffer():
    encoded = encode_bytes(Frame({}, (np.arange(6.0),)))
    buffer = aligned_empty(len(encoded))
    buffer[:] = np.frombuffer(encoded, np.uint8)
    (array,) = decode(buffer).arrays
    assert np.shares_memory(array, buffer)
    assert array.ctypes.data % 64 == 0
    assert not array.flags.writeable


def test_an_array_in_c_order_is_sent_from_its_own_memory():
    array = np.arange(1000, dtype=np.float32)
    assert any(
        np.shares_memory(np.frombuffer(part, np.uint8), array)
        for part in encode(Frame({}, (array,)))
    )


def test_big_endian_arrays_arrive_with_the_same_values():
    (back,) = decode(encode_bytes(Frame({}, (np.arange(5, dtype=">i4"),)))).arrays
    assert back.dtype == np.dtype("<i4")
    assert back.tolist() == [0, 1, 2, 3, 4]


def test_jax_arrays_are_sent_and_received_arrays_are_adopted_by_jax_without_a_copy():
    import jax

    encoded = encode_bytes(Frame({}, (jax.numpy.arange(2048.0, dtype="bfloat16"),)))
    buffer = aligned_empty(len(encoded))
    buffer[:] = np.frombuffer(encoded, np.uint8)
    (array,) = decode(buffer).arrays
    assert array.dtype == jax.numpy.bfloat16
    adopted = jax.device_put(array)
    assert adopted.unsafe_buffer_pointer() == array.ctypes.data
    assert adopted[2047] == 2048.0  # 2047 in bfloat16


@pytest.mark.parametrize(
    "bad",
    [
        {1: "key"},
        {"a": object},
        {"a": math.nan},
        {"a": math.inf},
        {"a": 2**70},
        {"a": b"bytes"},
        {"a": np.ones(2)},
        {"a": "\ud800"},
        ["list"],
    ],
    ids=repr,
)
def test_a_message_that_is_not_json_is_refused_where_it_is_sent(bad):
    with pytest.raises(FrameError, match="CM-401"):
        encode(Frame(bad))


@pytest.mark.parametrize(
    "array",
    [
        np.array([object()]),
        np.array(["text"]),
        np.array([b"bytes"]),
        np.zeros(2, dtype=[("a", "i4")]),
        np.array(["2020-01-01"], dtype="datetime64[D]"),
        np.zeros(2, dtype=np.longdouble),
    ],
    ids=lambda array: str(array.dtype),
)
def test_arrays_of_other_dtypes_do_not_travel(array):
    with pytest.raises(FrameError, match="does not travel"):
        encode(Frame({}, (array,)))


def raw_frame(header: str | bytes, body: bytes = b"", **prefix) -> bytes:
    text = header.encode() if isinstance(header, str) else header
    start = -(-(PREFIX.size + len(text)) // 64) * 64
    head = PREFIX.pack(
        prefix.get("magic", MAGIC),
        prefix.get("version", VERSION),
        prefix.get("zero", 0),
        prefix.get("header_bytes", len(text)),
        prefix.get("frame_bytes", start + len(body)),
    )
    return (head + text).ljust(start, b"\0") + body


def with_leaves(*leaves, body: bytes = b"", message="{}") -> bytes:
    return raw_frame(f'{{"message":{message},"leaves":{json.dumps(list(leaves))}}}', body)


GOOD = ["int8", [64], 0, 64]


def test_the_hand_made_frame_is_good():
    assert decode(with_leaves(GOOD, body=bytes(64)), SMALL).arrays[0].shape == (64,)


HOSTILE = {
    "wrong magic": raw_frame('{"message":{},"leaves":[]}', magic=b"PK\3\4"),
    "other version": raw_frame('{"message":{},"leaves":[]}', version=9),
    "reserved bits": raw_frame('{"message":{},"leaves":[]}', zero=1),
    "huge header": raw_frame("{}", header_bytes=2**63),
    "huge frame": raw_frame('{"message":{},"leaves":[]}', frame_bytes=2**63),
    "frame shorter than its header": raw_frame('{"message":{},"leaves":[]}', frame_bytes=1),
    "cut off": raw_frame('{"message":{},"leaves":[]}')[:30],
    "too long": raw_frame('{"message":{},"leaves":[]}') + b"x",
    "not json": raw_frame("{"),
    "not ascii": raw_frame(b'{"message":{"a":"\xff"},"leaves":[]}'),
    "utf-16": raw_frame('{"message":{},"leaves":[]}'.encode("utf-16")),
    "not an object": raw_frame("[]"),
    "no leaves": raw_frame('{"message":{}}'),
    "unknown field": raw_frame('{"message":{},"leaves":[],"more":1}'),
    "key twice": raw_frame('{"message":{},"leaves":[],"leaves":[]}'),
    "key twice inside": raw_frame('{"message":{"a":1,"a":2},"leaves":[]}'),
    "message not an object": raw_frame('{"message":[],"leaves":[]}'),
    "NaN": raw_frame('{"message":{"a":NaN},"leaves":[]}'),
    "Infinity": raw_frame('{"message":{"a":-Infinity},"leaves":[]}'),
    "infinite by overflow": raw_frame('{"message":{"a":1e999},"leaves":[]}'),
    "half a surrogate pair": raw_frame('{"message":{"a":"\\ud800"},"leaves":[]}'),
    "integer of 2000 digits": raw_frame('{"message":{"a":%s},"leaves":[]}' % ("9" * 2000)),
    "deep": raw_frame('{"message":{"a":%s},"leaves":[]}' % ("[" * 50 + "]" * 50)),
    "very deep": raw_frame('{"message":{"a":%s},"leaves":[]}' % ("[" * 2000)),
    "leaves not a list": raw_frame('{"message":{},"leaves":{}}'),
    "too many leaves": with_leaves(*[["int8", [0], 0, 0]] * 9),
    "leaf not a list": with_leaves("int8"),
    "leaf of three": with_leaves(["int8", [64], 0], body=bytes(64)),
    "object dtype": with_leaves(["object", [8], 0, 64], body=bytes(64)),
    "dtype by code": with_leaves(["|O8", [8], 0, 64], body=bytes(64)),
    "void dtype": with_leaves(["V64", [1], 0, 64], body=bytes(64)),
    "dtype not text": with_leaves([["int8"], [64], 0, 64], body=bytes(64)),
    "negative dimension": with_leaves(["int8", [-64], 0, 64], body=bytes(64)),
    "two negative dimensions": with_leaves(["int8", [-8, -8], 0, 64], body=bytes(64)),
    "dimension true": with_leaves(["int8", [True, 64], 0, 64], body=bytes(64)),
    "dimension a float": with_leaves(["int8", [64.0], 0, 64], body=bytes(64)),
    "shape not a list": with_leaves(["int8", 64, 0, 64], body=bytes(64)),
    "too many dimensions": with_leaves(["int8", [1] * 70 + [64], 0, 64], body=bytes(64)),
    "shape over the bound": with_leaves(["int8", [2**40], 0, 2**40]),
    "product wraps to 0 in 64 bits": with_leaves(["int8", [2**32, 2**32], 0, 0]),
    "empty, but numpy cannot multiply": with_leaves(["int8", [0, 2**62, 2**62], 0, 0]),
    "dimension of 1000 digits": with_leaves(["int8", [10**1000], 0, 0]),
    "more bytes than the shape": with_leaves(["int8", [32], 0, 64], body=bytes(64)),
    "fewer bytes than the shape": with_leaves(["int16", [64], 0, 64], body=bytes(64)),
    "beyond the end": with_leaves(["int8", [128], 0, 128], body=bytes(64)),
    "offset beyond the end": with_leaves(["int8", [64], 64, 64], body=bytes(64)),
    "negative offset": with_leaves(["int8", [64], -64, 64], body=bytes(64)),
    "offset off the grid": with_leaves(["int8", [32], 32, 32], body=bytes(64)),
    "overlap": with_leaves(GOOD, GOOD, body=bytes(64)),
    "bytes that no leaf has": with_leaves(GOOD, body=bytes(128)),
    "bool of 2": with_leaves(["bool", [64], 0, 64], body=b"\2" * 64),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_bytes_are_one_typed_error(data):
    with pytest.raises(FrameError, match="CM-401"):
        decode(data, SMALL)
    # a stream cannot know that it is cut off, but what comes next is not a continuation
    with pytest.raises(FrameError, match="CM-401"):
        feed_all(FrameAssembler(SMALL), [data] * (2 + 5 * len(data)))


def feed_all(assembler: FrameAssembler, pieces: list[bytes]) -> None:
    for piece in pieces:
        assembler.feed(piece)


def test_a_message_nested_as_deep_as_allowed_travels():
    message = value = {}
    for _ in range(MAX_DEPTH - 1):
        value["a"] = {}
        value = value["a"]
    assert decode(encode_bytes(Frame(message))).message == message
    value["a"] = {"b": {}}
    with pytest.raises(FrameError, match="nested"):
        encode(Frame(message))


@st.composite
def mutated(draw):
    """A valid small frame: bytes flipped, cut out or put in, a number of its header changed."""
    message = draw(st.dictionaries(st.sampled_from("abc"), scalars, max_size=3))
    data = bytearray(encode_bytes(Frame(message, tuple(draw(st.lists(arrays(), max_size=3))))))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, min(len(data), 400) - 1)))
        match draw(st.sampled_from(["flip", "cut", "insert", "digit"])):
            case "flip" if data:
                data[at] = draw(st.integers(0, 255))
            case "cut":
                del data[at : at + draw(st.integers(1, 20))]
            case "insert":
                data[at:at] = draw(st.binary(max_size=20))
            case "digit":
                digits = [i for i, byte in enumerate(data[:400]) if 48 <= byte <= 57]
                if digits:
                    where = draw(st.sampled_from(digits))
                    data[where : where + 1] = draw(
                        st.sampled_from([b"-1", b"9999999", b"1e9", b"0"])
                    )
    return bytes(data)


@settings(max_examples=300, deadline=None)
@given(mutated())
def test_mutated_frames_decode_or_raise_frame_errors_and_nothing_else(data):
    try:
        frame = decode(data, SMALL)
    except FrameError:
        return
    for array in frame.arrays:
        assert array.nbytes <= SMALL.leaf_bytes
    assert len(frame.arrays) <= SMALL.leaves


@settings(max_examples=100, deadline=None)
@given(mutated())
def test_mutated_frames_allocate_no_more_than_the_bounds_allow(data):
    decode_quietly(data)  # first calls fill caches
    tracemalloc.start()
    try:
        decode_quietly(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # JSON objects take up to about 30 bytes of memory per byte of header
    assert peak <= SMALL.frame_bytes + 30 * SMALL.header_bytes + 64 * 1024


def decode_quietly(data: bytes) -> None:
    with contextlib.suppress(FrameError):
        feed_all(FrameAssembler(SMALL), [data[at : at + 100] for at in range(0, len(data), 100)])


def test_a_frame_that_claims_gigabytes_allocates_nothing_before_its_header_is_checked():
    claim = raw_frame('{"message":{},"leaves":[["int8",[64],0,64]]}', frame_bytes=8 * 2**30)
    tracemalloc.start()
    try:
        with pytest.raises(FrameError, match="leaves end"):
            FrameAssembler().feed(claim)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20
