"""The codec against flax's msgpack and safetensors.

A frame like a stage's parameters: 20 float32 arrays, 16 MB. A round trip is what both ends of a
wire pay: arrays to one bytes object, and bytes to arrays. The least for that is one copy of the
bytes, timed too. One process, one core.

    python benchmarks/codec.py [--repeats 30] [--quick]
"""

from __future__ import annotations

import numpy as np
from _measure import (
    arguments,
    cpu_per_wall,
    figure,
    interleave,
    like_an_agent,
    ratio,
    report,
    walls,
)

if __name__ == "__main__":
    like_an_agent()

from flax import serialization
from safetensors.numpy import load, save

from crowdmesh_jax.transport import Frame, decode, encode, encode_bytes
from crowdmesh_jax.transport.codec import FrameAssembler, chunks

LEAVES, LEAF_FLOATS = 20, 200_000


def through_chunks(frame: Frame) -> object:
    """As a lane does it: pieces of 1 MiB out, and each received piece into an aligned buffer."""
    assembler, done = FrameAssembler(), None
    for piece in chunks(encode(frame), 2**20):
        done = assembler.feed(piece)
    return done


def main() -> None:
    options = arguments(__doc__, repeats=30)
    floats = LEAF_FLOATS if not options.quick else 1_000
    rng = np.random.default_rng(0)
    arrays = tuple(rng.standard_normal(floats).astype(np.float32) for _ in range(LEAVES))
    table = {f"layer{index}": array for index, array in enumerate(arrays)}
    frame = Frame({"kind": "copy", "step": 3}, arrays)
    whole = encode_bytes(frame)
    samples = interleave(
        {
            "copy": lambda: bytes(memoryview(whole)),
            "ours": lambda: decode(encode_bytes(frame)),
            "msgpack": lambda: serialization.msgpack_restore(
                serialization.msgpack_serialize(table)
            ),
            "safetensors": lambda: load(save(table)),
            "chunked": lambda: through_chunks(frame),
        },
        repeats=options.repeats,
    )
    ours = walls(samples["ours"])
    figures = [
        ratio("round trip / flax msgpack", ours, walls(samples["msgpack"]), at_most=0.2),
        ratio("round trip / one copy of its bytes", ours, walls(samples["copy"])),
        ratio("round trip / safetensors", ours, walls(samples["safetensors"])),
        ratio(
            "round trip in chunks / flax msgpack",
            walls(samples["chunked"]),
            walls(samples["msgpack"]),
        ),
        figure("round trip", [1e3 * s for s in ours], unit="ms"),
        cpu_per_wall("round trip", samples["ours"]),
    ]
    report(
        "codec",
        "arrays to bytes and back, in one process on one core",
        figures,
        quick=options.quick,
        settings={"arrays": LEAVES, "frame_bytes": len(whole)},
    )


if __name__ == "__main__":
    main()
