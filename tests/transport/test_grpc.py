"""gRPC in particular: real processes that die, strangers at the door, ports and addresses."""

import asyncio
import dataclasses
import logging
import os
import signal
import socket
import subprocess
import sys
import time

import grpc
import grpc.aio
import numpy as np
import pytest

from crowdmesh_jax.errors import AddressError, FrameError, InvalidValueError, PeerLostError
from crowdmesh_jax.transport import (
    Frame,
    FrameBounds,
    GrpcTransport,
    Lane,
    PeerGone,
    QueueBounds,
    encode_bytes,
)
from crowdmesh_jax.transport.grpc import METHOD, SERVICE, Hello


def run(body):
    """Runs an async test on a loop of its own, within 20 s."""

    def test():
        async def bounded():
            async with asyncio.timeout(20):
                await body()

        asyncio.run(bounded())

    test.__name__ = body.__name__
    test.__doc__ = body.__doc__
    return test


def transport(device="a", **options) -> GrpcTransport:
    return GrpcTransport(device, **{"run": "run-1", "token": "secret", **options})


CHILD = """
import asyncio, sys
import numpy as np
from crowdmesh_jax.transport import Frame, GrpcTransport, Lane

async def main(address):
    child = GrpcTransport("child", run="run-1", token="secret")
    print(await child.start(), flush=True)
    if address:
        await child.connect("parent", address, deadline_s=10)
        await child.send("parent", Frame({"hello": 1}))
    while True:
        got = await child.receive()
        if got.frame.message.get("flood"):
            while True:
                for lane in Lane:
                    await child.send("parent", Frame({}, (np.zeros(300_000, np.uint8),)), lane)
        await child.send("parent", got.frame, got.lane)

asyncio.run(main(sys.argv[1]))
"""


def child(address: str = "") -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


async def first_line(process: subprocess.Popen) -> str:
    return (await asyncio.to_thread(process.stdout.readline)).strip()


@pytest.mark.system
@pytest.mark.parametrize("dialler", ["parent", "child"])
@pytest.mark.parametrize("flood", [False, True], ids=["quiet", "in the middle of frames"])
def test_a_killed_process_is_gone_once_within_a_second(dialler, flood):
    async def body():
        parent = transport("parent")
        address = await parent.start()
        process = child(address if dialler == "child" else "")
        try:
            child_address = await first_line(process)
            if dialler == "parent":
                await parent.connect("child", child_address, deadline_s=10)
                await parent.send("child", Frame({"hello": 1}))
            assert (await parent.receive()).frame.message == {"hello": 1}
            if flood:
                await parent.send("child", Frame({"flood": True}))
                for _ in range(10):
                    await parent.receive()
            process.send_signal(signal.SIGKILL)
            killed_s = time.monotonic()
            while not isinstance(gone := await parent.receive(), PeerGone):
                pass
            assert time.monotonic() - killed_s < 1.0
            assert gone.peer == "child"
            assert isinstance(gone.error, PeerLostError)
            with pytest.raises(PeerLostError):
                await parent.send("child", Frame({}))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await parent.receive()  # once, though three streams broke
        finally:
            process.kill()
            _, stderr = await asyncio.to_thread(process.communicate)
            await parent.close()
        assert stderr == ""  # no noise of gRPC's own

    asyncio.run(asyncio.wait_for(body(), 20))


@run
async def test_a_peer_that_comes_back_is_a_new_one():
    a, b = transport("a"), transport("b")
    await a.start()
    address = await b.start()
    await a.connect("b", address, deadline_s=5)
    await b.close()
    assert isinstance(await a.receive(), PeerGone)
    again = transport("b", address=address)
    await again.start()
    await again.connect("a", str(a._address), deadline_s=5)
    await again.send("a", Frame({"life": 2}))
    assert (await a.receive()).frame.message == {"life": 2}
    await a.send("b", Frame({"back": 1}))
    assert (await again.receive()).frame.message == {"back": 1}
    await a.close()
    await again.close()


@run
async def test_a_second_life_ends_the_first_before_its_own_frames():
    """The break of the old connection may be noticed later than the new process dials."""
    a, first, second = transport("a"), transport("b"), transport("b")
    address = await a.start()
    await first.connect("a", address, deadline_s=5)
    await first.send("a", Frame({"life": 1}))
    await second.connect("a", address, deadline_s=5)
    await second.send("a", Frame({"life": 2}))
    events = [await a.receive() for _ in range(3)]
    assert events[0].frame.message == {"life": 1}
    assert isinstance(events[1], PeerGone)
    assert events[2].frame.message == {"life": 2}
    assert isinstance(await first.receive(), PeerGone)  # the zombie is told
    for each in (a, first, second):
        await each.close()


@pytest.mark.parametrize(
    ("options", "word"),
    [({"run": "run-2"}, "run-2"), ({"token": "guess"}, "token")],
    ids=["run", "token"],
)
def test_strangers_are_refused_and_the_others_do_not_notice(options, word, caplog):
    async def body():
        a, b, stranger = transport("a"), transport("b"), transport("c", **options)
        address = await a.start()
        await b.connect("a", address, deadline_s=5)
        with pytest.raises(PeerLostError, match=word):
            await stranger.connect("a", address, deadline_s=5)
        assert a.peers == {"b"}
        await b.send("a", Frame({"still": "here"}))
        assert (await a.receive()).frame.message == {"still": "here"}
        for each in (a, b, stranger):
            await each.close()

    with caplog.at_level(logging.WARNING):
        asyncio.run(asyncio.wait_for(body(), 20))
    assert "refused" in caplog.text
    assert "secret" not in caplog.text


@run
async def test_a_listener_may_send_before_its_answer_has_left():
    listener, dialler = transport("listener"), transport("dialler")
    address = await listener.start()
    await dialler.start()

    async def send_at_once():
        while not listener.peers:
            await asyncio.sleep(0)
        for lane in Lane:
            await listener.send("dialler", Frame({"lane": lane.value}), lane)

    sending = asyncio.create_task(send_at_once())
    await dialler.connect("listener", address, deadline_s=5)
    await sending
    received = [await dialler.receive() for _ in Lane]
    assert {event.frame.message["lane"] for event in received} == {lane.value for lane in Lane}
    await dialler.close()
    await listener.close()


@run
async def test_a_listener_that_does_not_know_the_token_is_not_believed():
    """It answers as it should, but cannot prove it: a port may be taken over by anyone."""

    async def serve(_requests, context):
        hello, _ = Hello.read(context.invocation_metadata())
        answer = dataclasses.replace(hello, device="b", peer="a", instance="x")
        await context.send_initial_metadata(answer.metadata("guess", "answer"))
        await context.read()

    server, address = await foreign_server(serve)
    a = transport("a")
    with pytest.raises(PeerLostError, match="token"):
        await a.connect("b", address, deadline_s=5)
    await a.close()
    await server.stop(0)


@run
async def test_a_stream_that_the_other_side_cancels_ends_the_channel():
    go = asyncio.Event()

    async def serve(_requests, context):
        hello, _ = Hello.read(context.invocation_metadata())
        answer = dataclasses.replace(hello, device="b", peer="a", instance="x")
        await context.send_initial_metadata(answer.metadata("secret", "answer"))
        await go.wait()
        await context.abort(grpc.StatusCode.CANCELLED, "no reason")

    server, address = await foreign_server(serve)
    a = transport("a")
    await a.connect("b", address, deadline_s=5)
    go.set()
    gone = await a.receive()
    assert isinstance(gone, PeerGone)
    assert isinstance(gone.error, PeerLostError)
    await a.close()
    await server.stop(0)


async def foreign_server(serve) -> tuple[grpc.aio.Server, str]:
    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(serve)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"


@run
async def test_a_dialler_that_does_not_know_the_token_gets_no_answer():
    a = transport("a")
    address = await a.start()
    channel, calls = await raw_streams(address, "b", token="guess")
    for call in calls.values():
        assert await call.code() is grpc.StatusCode.PERMISSION_DENIED
    assert a.peers == frozenset()
    await channel.close()
    await a.close()


async def raw_streams(address: str, device: str, lanes=tuple(Lane), token="secret"):
    """Streams of a peer that knows the token but not the rules."""
    channel = grpc.aio.insecure_channel(address)
    calls = {}
    for lane in lanes:
        hello = Hello(
            device=device, peer="a", run="run-1", instance="i", connection="c", lane=lane.value
        )
        calls[lane] = channel.stream_stream(f"/{SERVICE}/{METHOD}")(
            metadata=grpc.aio.Metadata(*hello.metadata(token, "dial"))
        )
    for call in calls.values():
        await call.initial_metadata()
    return channel, calls


def claims(size: int) -> bytes:
    """A frame's first bytes, which promise `size` bytes in one leaf."""
    honest = encode_bytes(Frame({}, (np.zeros(9_000_000, np.uint8),)))
    return honest[:300].replace(b"9000000", str(size).encode())


@pytest.mark.parametrize(
    "data",
    [b"not a frame at all, but long enough to be looked at", claims(10**13), b"x" * 3_000_000],
    ids=["garbage", "terabytes", "chunk over the bound"],
)
def test_a_peer_that_breaks_the_format_is_dropped_and_the_others_go_on(data, caplog):
    async def body():
        a, b = transport("a"), transport("b")
        address = await a.start()
        await b.connect("a", address, deadline_s=5)
        channel, calls = await raw_streams(address, "rude")
        assert a.peers == {"b", "rude"}
        await calls[Lane.CONTROL].write(data)
        gone = await a.receive()
        assert isinstance(gone, PeerGone)
        assert gone.peer == "rude"
        assert gone.error is not None
        assert a.peers == {"b"}
        await b.send("a", Frame({"still": "here"}))
        assert (await a.receive()).frame.message == {"still": "here"}
        await channel.close()
        for each in (a, b):
            await each.close()
        return gone

    with caplog.at_level(logging.WARNING):
        gone = asyncio.run(asyncio.wait_for(body(), 20))
    if len(data) < 2**20:
        assert isinstance(gone.error, FrameError)
        assert caplog.text.count("CM-401") == 1  # logged once


@run
async def test_a_connection_with_a_lane_missing_is_no_channel():
    a = transport("a")
    address = await a.start()
    channel, _ = await raw_streams(address, "half", (Lane.PIPELINE, Lane.BULK))
    assert a.peers == frozenset()
    await channel.close()
    channel, _ = await raw_streams(address, "twice", (Lane.PIPELINE,))
    hello = Hello(
        device="twice", peer="a", run="run-1", instance="i", connection="c", lane="pipeline"
    )
    call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(
        metadata=grpc.aio.Metadata(*hello.metadata("secret", "dial"))
    )
    assert await call.code() is grpc.StatusCode.PERMISSION_DENIED
    await channel.close()
    await a.close()


@run
async def test_bounds_hold_on_both_sides():
    a, b = transport("a"), transport("b", bounds=FrameBounds(frame_bytes=1_000_000))
    await b.connect("a", await a.start(), deadline_s=5)
    big = Frame({}, (np.zeros(2_000_000, np.uint8),))
    with pytest.raises(FrameError, match="bound"):
        await b.send("a", big)
    await a.send("b", big)
    gone = await b.receive()
    assert isinstance(gone, PeerGone)
    assert isinstance(gone.error, FrameError)
    await a.close()
    await b.close()


@run
async def test_connect_waits_for_a_peer_that_starts_later():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    a, b = transport("a"), transport("b", address=f"127.0.0.1:{port}")
    connecting = asyncio.create_task(a.connect("b", f"127.0.0.1:{port}", deadline_s=10))
    await asyncio.sleep(0.3)
    assert not connecting.done()
    await b.start()
    await connecting
    assert a.peers == {"b"}
    await a.close()
    await b.close()


@run
async def test_a_port_in_use_is_named_with_what_to_do():
    a = transport("a")
    address = await a.start()
    port = address.rpartition(":")[2]
    b = transport("b", address=address)
    with pytest.raises(AddressError, match=rf"(?s)CM-402.*port {port} is in use.*port 0"):
        await b.start()
    await b.close()
    await a.close()


@run
async def test_a_port_that_a_foreign_socket_holds_is_in_use_too():
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        b = transport("b", address=f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(AddressError, match="in use"):
            await b.start()
        await b.close()


@pytest.mark.skipif(not os.path.exists("/proc/net/tcp6"), reason="asks Linux")
@run
async def test_it_listens_on_the_loopback_alone():
    a = transport("a")
    port = int((await a.start()).rpartition(":")[2])
    with open("/proc/net/tcp") as ipv4, open("/proc/net/tcp6") as ipv6:
        lines = [line.split() for line in (*ipv4, *ipv6)]
    listening = [local for _, local, _, state, *_ in lines if state == "0A"]
    (host,) = [local[:-5] for local in listening if local.endswith(f":{port:04X}")]
    assert host in ("0100007F", "0000000000000000FFFF00000100007F")  # or as IPv6 writes it
    await a.close()


@run
async def test_only_the_loopback_is_dialled_or_served():
    for address in ("0.0.0.0:0", "192.0.2.1:5000", "localhost:5000"):
        with pytest.raises(AddressError, match="CM-402"):
            transport("a", address=address)
    a = transport("a")
    for address in ("192.0.2.1:5000", "localhost:5000", "unix:/tmp/x"):
        with pytest.raises(AddressError, match="CM-402"):
            await a.connect("b", address, deadline_s=1)
    await a.close()


@run
async def test_a_proxy_of_the_environment_is_not_used():
    a = transport("a")
    address = await a.start()
    code = (
        "import asyncio\n"
        "from crowdmesh_jax.transport import GrpcTransport\n"
        "async def main():\n"
        "    b = GrpcTransport('b', run='run-1', token='secret')\n"
        f"    await b.connect('a', {address!r}, deadline_s=5)\n"
        "    await b.close()\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        code,
        env=os.environ
        | {"grpc_proxy": "http://127.0.0.1:9", "no_proxy": "", "no_grpc_proxy": "", "NO_PROXY": ""},
    )
    assert await process.wait() == 0
    await a.close()


def test_credentials_are_refused_until_they_mean_something():
    with pytest.raises(AddressError, match="TLS does not exist yet"):
        transport("a", credentials=object())


@pytest.mark.parametrize("options", [{"token": ""}, {"chunk_bytes": 0}, {"chunk_bytes": 2**30}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(InvalidValueError):
        transport("a", **options)


def test_the_room_is_imported_without_grpc_jax_or_ml_dtypes():
    code = (
        "import sys, crowdmesh_jax.transport\n"
        "print([m for m in ('grpc', 'jax', 'ml_dtypes', 'flax', 'optax') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@run
async def test_close_does_not_wait_for_frames_that_nobody_took():
    a, b = transport("a"), transport("b", queue=QueueBounds(frames=1))
    await a.connect("b", await b.start(), deadline_s=5)
    for index in range(10):
        await a.send("b", Frame({"i": index}), Lane.PIPELINE)
    await asyncio.sleep(0.2)
    started_s = time.monotonic()
    await b.close()
    assert time.monotonic() - started_s < 1.0
    assert isinstance(await a.receive(), PeerGone)
    await a.close()


@run
async def test_close_is_bounded_when_the_peer_does_not_read():
    a, b = transport("a", flush_s=0.3), transport("b", queue=QueueBounds(frames=1))
    await a.connect("b", await b.start(), deadline_s=5)
    frame = Frame({}, (np.zeros(30_000_000, np.uint8),))
    for _ in range(4):
        await a.send("b", frame, Lane.PIPELINE)
    started_s = time.monotonic()
    await a.close()
    assert 0.25 < time.monotonic() - started_s < 2.0
    await b.close()


@run
async def test_an_array_that_fails_ends_the_channel_and_says_why():
    class Broken:
        dtype, shape = np.dtype("float32"), (3,)

        def is_ready(self):
            return False

        def __array__(self, dtype=None, copy=None):
            raise RuntimeError("computation failed")

    a, b = transport("a"), transport("b")
    await a.connect("b", await b.start(), deadline_s=5)
    await a.send("b", Frame({}, (Broken(),)), Lane.PIPELINE)
    gone = await a.receive()
    assert isinstance(gone, PeerGone)
    assert "computation failed" in gone.reason
    assert isinstance(await b.receive(), PeerGone)
    await a.close()
    await b.close()


@run
async def test_who_dials_a_peer_that_is_closing_goes_on_and_reaches_its_successor():
    """An agent that outlives its coordinator dials at once, while the old one still listens."""
    first, dialler = transport("b"), transport("a")
    address = await first.start()
    first._closed = True  # as in the middle of `close`
    dialling = asyncio.create_task(dialler.connect("b", address, deadline_s=10))
    await asyncio.sleep(0.3)
    assert not dialling.done(), "it is not refused for good"
    first._closed = False
    await first.close()
    second = transport("b", address=address)
    await second.start()
    await dialling
    assert "b" in dialler.peers
    await dialler.close()
    await second.close()


class Stopping(GrpcTransport):
    """Its server is stopped while streams open: gRPC cancels their handlers."""

    async def _serve(self, _requests, context):
        await context.abort(grpc.StatusCode.CANCELLED, "")


@run
async def test_a_server_that_cancels_a_dial_as_it_stops_does_not_refuse_it():
    first, dialler = Stopping("b", run="run-1", token="secret"), transport("a")
    address = await first.start()
    dialling = asyncio.create_task(dialler.connect("b", address, deadline_s=10))
    await asyncio.sleep(0.3)
    assert not dialling.done(), "it is not refused for good"
    await first.close()
    second = transport("b", address=address)
    await second.start()
    await dialling
    assert "b" in dialler.peers
    await dialler.close()
    await second.close()
