"""The codec against a plain copy of the same bytes, and against safetensors and flax's msgpack.

A frame like a stage's parameters: 60 float32 arrays, 17 MB. `encode` makes views; with the join
it is what a wire needs. Ratios below 1 mean that ours is faster.

    python benchmarks/codec.py [--repeats 15]
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
from _measure import interleave, ratio, ratio_line, write
from flax import serialization
from safetensors.numpy import load, save

from crowdmesh_jax.transport import Frame, decode, encode, encode_bytes

LEAVES, LEAF_FLOATS = 60, 71_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    rng = np.random.default_rng(0)
    arrays = tuple(rng.standard_normal(LEAF_FLOATS).astype(np.float32) for _ in range(LEAVES))
    table = {f"layer{index}": array for index, array in enumerate(arrays)}
    frame = Frame({"kind": "copy", "step": 3}, arrays)
    ours, safe, packed = encode_bytes(frame), save(table), serialization.msgpack_serialize(table)
    encoding = interleave(
        {
            "views": lambda: encode(frame),
            "ours": lambda: encode_bytes(frame),
            "copy": lambda: b"".join([memoryview(array).cast("B") for array in arrays]),
            "safetensors": lambda: save(table),
            "msgpack": lambda: serialization.msgpack_serialize(table),
        },
        repeats=repeats,
    )
    decoding = interleave(
        {
            "ours": lambda: decode(ours),
            "safetensors": lambda: load(safe),
            "msgpack": lambda: serialization.msgpack_restore(packed),
        },
        repeats=repeats,
    )
    rows = {
        "encode, views only / a copy of the bytes": ratio(encoding["views"], encoding["copy"]),
        "encode / a copy of the bytes": ratio(encoding["ours"], encoding["copy"]),
        "encode / safetensors": ratio(encoding["ours"], encoding["safetensors"]),
        "encode / flax msgpack": ratio(encoding["ours"], encoding["msgpack"]),
        "decode / safetensors": ratio(decoding["ours"], decoding["safetensors"]),
        "decode / flax msgpack": ratio(decoding["ours"], decoding["msgpack"]),
    }
    for name, row in rows.items():
        print(ratio_line(name, row))
    what = f"{LEAVES} float32 arrays, {len(ours)} bytes, one process"
    write("codec", " ".join(("python", *sys.argv)), what, rows)


if __name__ == "__main__":
    main()
