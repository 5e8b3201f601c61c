"""The gRPC transport against raw TCP and a bare gRPC stream: the same bytes between two processes.

One round: a payload goes to the other process, one byte (ours: an empty frame) comes back. Raw TCP
is blocking sockets into one kept buffer, the least that a machine can do.

    python benchmarks/transport.py [--repeats 15]
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import statistics
import subprocess
import sys
import time

import grpc
import grpc.aio
import numpy as np
from _measure import ratio, ratio_line, write

from crowdmesh_jax.transport import Frame, GrpcTransport, Lane, PeerGone

SIZES = {"1 kB": 1_000, "100 kB": 100_000, "1 MiB": 2**20, "8 MiB": 8 * 2**20}
SMALL_BYTES, ROUNDS_OF_SMALL = 200_000, 20
CHUNK_BYTES = 2**20
OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


async def child(ours: str, bare: str, tcp_port: int) -> None:
    """Answers all three until ours goes."""
    transport = GrpcTransport("child", run="benchmark", token="benchmark")
    await transport.connect("parent", ours, deadline_s=10)
    stopped = asyncio.to_thread(answer_tcp, tcp_port)
    async with asyncio.TaskGroup() as group:
        group.create_task(stopped)
        group.create_task(answer_bare(bare))
        while not isinstance(got := await transport.receive(), PeerGone):
            await transport.send("parent", Frame({}), got.lane)
    await transport.close()


def answer_tcp(port: int) -> None:
    buffer = memoryview(bytearray(max(SIZES.values())))
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while head := connection.recv(8, socket.MSG_WAITALL):
            left = int.from_bytes(head, "little")
            while left:
                left -= connection.recv_into(buffer[:left])
            connection.sendall(b"1")


async def answer_bare(address: str) -> None:
    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        call = channel.stream_stream("/bare/stream")()
        await call.write(b"0")
        while (data := await call.read()) is not grpc.aio.EOF:
            if data[:1] == b"1":
                await call.write(b"1")


class Bare:
    """A gRPC stream with nothing around it: chunks of bytes, the last one marked."""

    def __init__(self) -> None:
        self.context: asyncio.Future = asyncio.get_running_loop().create_future()
        self.done = asyncio.Event()
        self.server = grpc.aio.server(options=OPTIONS)
        handler = grpc.stream_stream_rpc_method_handler(self._serve)
        self.server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("bare", {"stream": handler}),)
        )
        self.port = self.server.add_insecure_port("127.0.0.1:0")

    async def _serve(self, _requests, context) -> None:
        await context.read()
        self.context.set_result(context)
        await self.done.wait()

    async def round(self, payload: bytes) -> None:
        context = await self.context
        for start in range(0, len(payload), CHUNK_BYTES):
            is_last = start + CHUNK_BYTES >= len(payload)
            mark = b"1" if is_last else b"0"
            await context.write(mark + payload[start : start + CHUNK_BYTES])
        await context.read()


async def parent(repeats: int) -> dict[str, object]:
    transport = GrpcTransport("parent", run="benchmark", token="benchmark")
    bare = Bare()
    await bare.server.start()
    rows: dict[str, object] = {}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        arguments = [await transport.start(), f"127.0.0.1:{bare.port}", listener.getsockname()[1]]
        process = subprocess.Popen([sys.executable, __file__, "--child", *map(str, arguments)])
        tcp, _ = await asyncio.to_thread(listener.accept)
        tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while not transport.peers:
            await asyncio.sleep(0.01)

        async def ours(array: np.ndarray) -> None:
            await transport.send("child", Frame({"step": 1}, (array,)), Lane.PIPELINE)
            await transport.receive()

        async def raw(array: np.ndarray) -> None:
            tcp.sendall(array.nbytes.to_bytes(8, "little"))
            tcp.sendall(array)
            tcp.recv(1)

        for name, size in SIZES.items():
            array = np.ones(size, np.uint8)
            payload = array.tobytes()
            works = {
                "ours": lambda array=array: ours(array),
                "bare": lambda payload=payload: bare.round(payload),
                "tcp": lambda array=array: raw(array),
            }
            rounds = ROUNDS_OF_SMALL if size < SMALL_BYTES else 1
            seconds = await interleaved(works, repeats, rounds)
            for peer, label in (("tcp", "raw TCP"), ("bare", "bare gRPC stream")):
                row = ratio(seconds["ours"], seconds[peer])
                rows[f"{name} and back / {label}"] = row
                print(ratio_line(f"{name} and back / {label}", row), flush=True)
        tcp.close()
        bare.done.set()
        await transport.close()
        await bare.server.stop(1)
        await asyncio.to_thread(process.wait, 10)
    return rows


async def interleaved(works, repeats: int, rounds: int) -> dict[str, list[float]]:
    """Median seconds of `rounds`, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 3):
        for name, work in works.items():
            times = []
            for _ in range(rounds):
                start_s = time.perf_counter()
                await work()
                times.append(time.perf_counter() - start_s)
            if repeat >= 3:  # windows grow, caches fill
                seconds[name].append(statistics.median(times))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--child", nargs=3)
    arguments = parser.parse_args()
    if arguments.child:
        ours, bare, port = arguments.child
        asyncio.run(child(ours, bare, int(port)))
        return
    rows = asyncio.run(parent(arguments.repeats))
    what = "seconds of a payload there and an answer back, two processes, loopback"
    write("transport", f"python benchmarks/transport.py --repeats {arguments.repeats}", what, rows)


if __name__ == "__main__":
    main()
