"""A gRPC lane against raw TCP on the loopback: bytes per second, CPU per byte, a small round trip.

Two processes, a core each. A burst of frames goes one way and one answer comes back, so that both
fill their pipes; the answer tells the receiver's CPU seconds, and CPU per GB counts both ends. Raw
TCP is blocking sockets and one kept receive buffer, the least that a machine can do. Bare gRPC is a
`grpc.aio` stream with nothing of ours on it, the most that a lane could do. They take turns.

    python benchmarks/transport.py [--repeats 15] [--quick]
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import numpy as np
from _measure import Figure, arguments, figure, ratio, report

from crowdmesh_jax.agent.memory import ENVIRONMENT, return_freed_memory
from crowdmesh_jax.transport import Frame, GrpcTransport, Lane, PeerGone
from crowdmesh_jax.transport.grpc import MAX_CHUNK_BYTES

KB, MB = 1_000, 1_000_000
BURSTS = {"1 MB": (1 * MB, 64), "16 MB": (16 * MB, 6)}
"""Name to (bytes of a frame, frames of a burst)."""
SMALL_BYTES, ROUNDS_OF_SMALL = 4 * KB, 50
HEAD = struct.Struct("<QQ")
"""Raw TCP and bare gRPC: bytes of a message, messages of a burst."""
ANSWER = struct.Struct("<d")
BARE = "bare"
BARE_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_CHUNK_BYTES),
    ("grpc.max_send_message_length", MAX_CHUNK_BYTES),
)


Send = Callable[[np.ndarray, int], Awaitable[float]]


@dataclass(frozen=True, slots=True)
class Burst:
    """One measured burst."""

    wall_s: float
    cpu_s: float
    """Of both processes."""


# The other process --------------------------------------------------------------------------------


async def child(address: str, tcp_port: int, bare_port: int) -> None:
    """Answers all until the lane's peer goes."""
    transport = GrpcTransport("child", run="benchmark", token="benchmark")
    await transport.connect("parent", address, deadline_s=30)
    threading.Thread(target=answer_tcp, args=(tcp_port,), daemon=True).start()
    bare = asyncio.create_task(answer_bare(bare_port))
    while not isinstance(got := await transport.receive(), PeerGone):
        if got.frame.message["last"]:
            await transport.send("parent", Frame({"cpu_s": time.process_time()}), got.lane)
    bare.cancel()
    await transport.close()


async def answer_bare(port: int) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=BARE_OPTIONS) as channel:
        call = channel.stream_stream(f"/{BARE}/{BARE}")()
        await call.write(b"hello")
        while (head := await call.read()) is not grpc.aio.EOF:
            _, count = HEAD.unpack(head)
            for _ in range(count):
                await call.read()
            await call.write(ANSWER.pack(time.process_time()))


def answer_tcp(port: int) -> None:
    buffer = memoryview(bytearray(max(size for size, _ in BURSTS.values())))
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while head := connection.recv(HEAD.size, socket.MSG_WAITALL):
            size, count = HEAD.unpack(head)
            for _ in range(count):
                left = size
                while left:
                    left -= connection.recv_into(buffer[:left])
            connection.sendall(ANSWER.pack(time.process_time()))


# This process -------------------------------------------------------------------------------------


@dataclass
class Lines:
    """All ways to the child."""

    transport: GrpcTransport
    tcp: socket.socket
    stream: Any
    """Bare gRPC's."""

    @property
    def ways(self) -> dict[str, Send]:
        return {"lane": self.lane, "raw": self.raw, "bare": self.bare}

    async def lane(self, array: np.ndarray, count: int) -> float:
        """Sends a burst; returns the child's CPU seconds so far."""
        for index in range(count):
            frame = Frame({"step": 1, "last": index + 1 == count}, (array,))
            await self.transport.send("child", frame, Lane.PIPELINE)
        answer = await self.transport.receive()
        assert not isinstance(answer, PeerGone), answer
        return answer.frame.message["cpu_s"]

    async def raw(self, array: np.ndarray, count: int) -> float:
        self.tcp.sendall(HEAD.pack(array.nbytes, count))
        for _ in range(count):
            self.tcp.sendall(array)
        return ANSWER.unpack(self.tcp.recv(ANSWER.size, socket.MSG_WAITALL))[0]

    async def bare(self, array: np.ndarray, count: int) -> float:
        """As `lane`, in messages of a chunk at most."""
        starts = range(0, max(1, array.nbytes), 2**20)
        await self.stream.write(HEAD.pack(array.nbytes, count * len(starts)))
        for _ in range(count):
            for at in starts:
                await self.stream.write(array[at : at + 2**20].tobytes())  # a lane copies too
        return ANSWER.unpack(await self.stream.read())[0]


async def timed(send: Send, array: np.ndarray, count: int) -> Burst:
    """One burst. An empty one before it tells the child's CPU seconds at the start."""
    before_s = await send(array[:0], 1)
    cpu_s, start_s = time.process_time(), time.perf_counter()
    after_s = await send(array, count)
    wall_s = time.perf_counter() - start_s
    return Burst(wall_s, time.process_time() - cpu_s + after_s - before_s)


async def compare(lines: Lines, repeats: int, *, quick: bool) -> list[Figure]:
    figures: list[Figure] = []
    least = {"1 MB": 0.4, "16 MB": 0.22}
    for name, (size, count) in BURSTS.items():
        array = np.ones(size, np.uint8)
        count = 1 if quick else count
        bursts: dict[str, list[Burst]] = {way: [] for way in lines.ways}
        for repeat in range(repeats + 2):
            for way, send in lines.ways.items():
                burst = await timed(send, array, count)
                if repeat >= 2:  # windows grow
                    bursts[way].append(burst)
        lane_s, raw_s, bare_s = ([b.wall_s for b in burst] for burst in bursts.values())
        lane_cpu_s, raw_cpu_s = ([b.cpu_s for b in bursts[way]] for way in ("lane", "raw"))
        gb = size * count / 1e9
        figures += [
            ratio(f"{name}: bytes/s, lane / raw TCP", raw_s, lane_s, at_least=least[name]),
            ratio(f"{name}: CPU s per GB, lane / raw TCP", lane_cpu_s, raw_cpu_s, at_most=5),
            ratio(f"{name}: bytes/s, bare gRPC / raw TCP", raw_s, bare_s),
            figure(f"{name}: lane", [gb / s for s in lane_s], unit="GB/s"),
            figure(f"{name}: lane, both ends", [s / gb for s in lane_cpu_s], unit="CPUs/GB"),
            figure(
                f"{name}: lane, cpu / wall, both ends",
                [b.cpu_s / b.wall_s for b in bursts["lane"]],
            ),
        ]
    array = np.ones(SMALL_BYTES, np.uint8)
    seconds: dict[str, list[float]] = {way: [] for way in lines.ways}
    rounds = 1 if quick else ROUNDS_OF_SMALL
    for repeat in range(repeats + 2):
        for way, send in lines.ways.items():
            start_s = time.perf_counter()
            for _ in range(rounds):
                await send(array, 1)
            if repeat >= 2:
                seconds[way].append((time.perf_counter() - start_s) / rounds)
    figures += [
        ratio("4 KB round trip, lane / raw TCP", seconds["lane"], seconds["raw"], at_most=7),
        ratio("4 KB round trip, bare gRPC / raw TCP", seconds["bare"], seconds["raw"]),
    ]
    micro = [1e6 * s for s in seconds["lane"]]
    figures.append(figure("4 KB round trip, lane", micro, unit="us"))
    return figures


async def serve_bare() -> tuple[grpc.aio.Server, int, asyncio.Future[Any]]:
    """A server of one bare stream; the future brings the stream."""
    arriving: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def serve(_requests: Any, context: Any) -> None:
        await context.read()
        arriving.set_result(context)
        await asyncio.Event().wait()  # until the server stops

    server = grpc.aio.server(options=BARE_OPTIONS)
    handler = grpc.stream_stream_rpc_method_handler(serve)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(BARE, {BARE: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, port, arriving


async def parent(repeats: int, *, quick: bool) -> list[Figure]:
    transport = GrpcTransport("parent", run="benchmark", token="benchmark")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server, bare_port, arriving = await serve_bare()
        places = [await transport.start(), str(listener.getsockname()[1]), str(bare_port)]
        process = subprocess.Popen([sys.executable, __file__, "--child", *places])
        tcp, _ = await asyncio.to_thread(listener.accept)
        with tcp:
            tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while not transport.peers:
                await asyncio.sleep(0.01)
            lines = Lines(transport, tcp, await arriving)
            figures = await compare(lines, repeats, quick=quick)
        await transport.close()
        await server.stop(grace=None)
        await asyncio.to_thread(process.wait, 10)
    return figures


def settle(which: int) -> None:
    """Sender and receiver on a core each, with an agent's way with memory."""
    return_freed_memory()
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[which % len(cores)]})


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        settle(1)
        asyncio.run(child(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
        return
    options = arguments(__doc__, repeats=15)
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})
    settle(0)
    figures = asyncio.run(parent(options.repeats, quick=options.quick))
    report(
        "transport",
        "bursts of frames from one process to another, loopback; two processes, a core each",
        figures,
        quick=options.quick,
        settings={name: {"bytes": b, "frames": n} for name, (b, n) in BURSTS.items()},
    )


if __name__ == "__main__":
    main()
