"""Frames over gRPC: one long bidirectional stream per peer and lane.

Either side dials; both directions use the same streams. Each lane has a TCP connection of its
own, so that a full bulk lane does not hold up the others in the kernel. A hello in the stream's
metadata tells device, run and process, and proves the run's token without showing it. Until TLS
exists only 127.0.0.1 and ::1 are listened on or dialled. No protobuf: messages are chunks of
frames (`codec.py`). It knows nothing about what frames mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from ..errors import AddressError, InvalidValueError, PeerLostError, TransportError
from .address import LoopbackAddress, parse_loopback
from .api import Frame, FrameBounds, Lane, PeerGone, Received
from .fetch import Fetcher
from .flow import Inbox, QueueBounds
from .link import PeerLink, Stream

logger = logging.getLogger(__name__)

PROTOCOL_VERSION = "1"
SERVICE = "crowdmesh.Transport"
METHOD = "Lane"
MAX_CHUNK_BYTES = 2 * 2**20
RETRY_S = 0.05
"""Between two attempts to reach a peer that does not listen yet."""
_NOT_THERE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
"""Nobody listens, or whoever did is closing or dead: a successor may listen there soon. All else is
a refusal."""
HANDSHAKE_S = 5.0
"""For the rest of a connection's lanes, once the first has come."""

_EOF: Any = grpc.aio.EOF  # pyright: ignore[reportAttributeAccessIssue]
_CHANNEL_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),  # else channels share one TCP connection
    ("grpc.enable_http_proxy", 0),  # a proxy from the environment would carry the loopback away
    ("grpc.max_receive_message_length", MAX_CHUNK_BYTES),
    ("grpc.max_send_message_length", MAX_CHUNK_BYTES),
)
_SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),  # else two processes bind one port and share its calls
    ("grpc.max_receive_message_length", MAX_CHUNK_BYTES),
    ("grpc.max_send_message_length", MAX_CHUNK_BYTES),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """What one side tells the other when a stream opens."""

    device: str
    peer: str
    run: str
    instance: str
    """This life of the process: a restarted one has another."""
    connection: str
    """The same for the three lanes of one connection."""
    lane: str
    version: str = PROTOCOL_VERSION

    def metadata(self, token: str, role: str) -> tuple[tuple[str, bytes], ...]:
        """As gRPC metadata, with the proof that the sender knows the token."""
        pairs = tuple((f"cm-{name}-bin", value.encode()) for name, value in self._fields())
        return (*pairs, ("cm-proof-bin", self.proof(token, role)))

    def proof(self, token: str, role: str) -> bytes:
        """HMAC of all fields; `role` keeps an answer from being a hello sent back."""
        text = "".join(f"{len(value)}:{value}" for _, value in (("", role), *self._fields()))
        return hmac.digest(token.encode(), text.encode(), hashlib.sha256)

    def _fields(self) -> tuple[tuple[str, str], ...]:
        return tuple((name, getattr(self, name)) for name in _HELLO_FIELDS)

    @classmethod
    def read(cls, metadata: Any) -> tuple[Hello, bytes]:
        """The hello in a stream's metadata, and its proof.

        Raises:
            TransportError: A field is missing or is not text.
        """
        table = {key: value for key, value in metadata or () if key.startswith("cm-")}
        try:
            fields = {name: table[f"cm-{name}-bin"].decode() for name in _HELLO_FIELDS}
            return cls(**fields), bytes(table["cm-proof-bin"])
        except (KeyError, AttributeError, UnicodeDecodeError) as exc:
            raise TransportError(f"a stream opened without a proper hello: {exc!r}") from None


_HELLO_FIELDS = ("version", "device", "peer", "run", "instance", "connection", "lane")


class _RestartedError(PeerLostError):
    """The three lanes of one attempt met two lives of a peer."""


class _DialledStream:
    def __init__(self, channel: grpc.aio.Channel, call: Any, peer: str) -> None:
        self._channel = channel
        self._call = call
        self._peer = peer

    async def read(self) -> bytes | None:
        try:
            data = await self._call.read()
        except Exception as exc:
            raise _lost(self._peer, exc) from exc
        return None if data is _EOF else data

    async def write(self, data: bytes) -> None:
        try:
            await self._call.write(data)
        except Exception as exc:
            raise _lost(self._peer, exc) from exc

    def abort(self) -> None:
        self._call.cancel()

    async def close(self) -> None:
        await self._channel.close()


class _ServedStream:
    def __init__(self, context: Any, peer: str) -> None:
        self._context = context
        self._peer = peer
        self.finished = asyncio.Event()
        self.answered = asyncio.Event()
        """Our hello has left. A message before that would send gRPC's headers a second time."""

    async def read(self) -> bytes | None:
        try:
            data = await self._context.read()
        except Exception as exc:
            raise _lost(self._peer, exc) from exc
        return None if data is _EOF else data

    async def write(self, data: bytes) -> None:
        await self.answered.wait()
        try:
            await self._context.write(data)
        except Exception as exc:
            raise _lost(self._peer, exc) from exc

    def abort(self) -> None:
        self.finished.set()


@dataclass(slots=True)
class _Arriving:
    """A served connection of which not all lanes have come."""

    hello: Hello
    streams: dict[Lane, _ServedStream] = field(default_factory=dict)
    complete: asyncio.Event = field(default_factory=asyncio.Event)


class GrpcTransport:
    """See `Transport` for what the methods promise.

    Args:
        device: This side's id.
        run: Peers of another run are refused.
        token: A secret of the run; peers that do not know it are refused. It never travels.
        address: Where to listen, `127.0.0.1:PORT` or `[::1]:PORT`; port 0 takes a free one.
        bounds: What a peer's frame may ask for.
        queue: How much may wait per peer and lane, on each side.
        chunk_bytes: Longer frames are cut; 0.5 to 2 MB are fastest.
        flush_s: How long `close` waits for what is queued.
        credentials: For TLS, which does not exist yet: must be None.

    Raises:
        AddressError: The address is not the loopback, or credentials are given.
    """

    def __init__(
        self,
        device: str,
        *,
        run: str,
        token: str,
        address: str = "127.0.0.1:0",
        bounds: FrameBounds | None = None,
        queue: QueueBounds | None = None,
        chunk_bytes: int = 2**20,
        flush_s: float = 2.0,
        credentials: object | None = None,
    ) -> None:
        if credentials is not None:
            raise AddressError(
                "credentials were given, but TLS does not exist yet: pass credentials=None,"
                " which keeps all traffic on this machine"
            )
        if not 4096 <= chunk_bytes <= MAX_CHUNK_BYTES:
            raise InvalidValueError(
                f"chunk_bytes must be 4096 to {MAX_CHUNK_BYTES}, got {chunk_bytes}"
            )
        if not token:
            raise InvalidValueError(f"{device!r}: the token is empty: make one per run")
        self._device = device
        self._run = run
        self._token = token
        self._address = parse_loopback(address)
        self._bounds = bounds or FrameBounds()
        self._queue = queue or QueueBounds()
        self._chunk_bytes = chunk_bytes
        self._flush_s = flush_s
        self._instance = secrets.token_hex(8)
        self._inbox = Inbox(self._queue)
        self._fetcher = Fetcher(device)
        self._server: grpc.aio.Server | None = None
        self._links: dict[str, PeerLink] = {}
        self._arriving: dict[tuple[str, str], _Arriving] = {}
        self._dialling: dict[str, asyncio.Lock] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def device(self) -> str:
        return self._device

    @property
    def peers(self) -> frozenset[str]:
        return frozenset(self._links)

    async def start(self) -> str:
        server = grpc.aio.server(options=_SERVER_OPTIONS)
        handler = grpc.stream_stream_rpc_method_handler(self._serve)  # identity serializers
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),)
        )
        try:
            port = server.add_insecure_port(str(self._address))
        except RuntimeError as exc:
            await server.stop(grace=None)
            raise AddressError(
                f"{self._device!r} cannot listen on {self._address}:"
                f" {self._address.bind_failure()}; stop the process that has the port,"
                " or use port 0 for a free one"
            ) from exc
        await server.start()
        self._server = server
        self._address = LoopbackAddress(self._address.host, port)
        logger.info("%s listens on %s", self._device, self._address)
        return str(self._address)

    async def connect(self, peer: str, address: str, *, deadline_s: float) -> None:
        target = parse_loopback(address, dial=True).target
        if peer == self._device:
            raise PeerLostError(f"{peer!r} cannot connect to itself")
        until_s = time.monotonic() + deadline_s
        last = "no answer"
        limit = asyncio.timeout(deadline_s)
        try:
            async with limit, self._dialling.setdefault(peer, asyncio.Lock()):
                while peer not in self._links:
                    if self._closed:
                        raise PeerLostError(f"{self._device!r} is closed")
                    try:
                        await self._dial(peer, target)
                    except grpc.aio.AioRpcError as exc:
                        last = exc.details() or str(exc.code())
                        if exc.code() not in _NOT_THERE:
                            raise PeerLostError(
                                f"{self._device!r} was refused by {address}: {last}"
                            ) from exc
                    except _RestartedError as exc:
                        last = exc.message
                    if peer not in self._links:
                        await asyncio.sleep(min(RETRY_S, max(0.0, until_s - time.monotonic())))
        except TimeoutError as exc:
            if not limit.expired():
                raise
            raise PeerLostError(
                f"{self._device!r} did not reach {peer!r} at {address} within {deadline_s:g} s:"
                f" {last}; check that it runs and listens there"
            ) from exc

    async def send(self, peer: str, frame: Frame, lane: Lane = Lane.CONTROL) -> None:
        link = self._links.get(peer)
        if link is None:
            raise PeerLostError(f"{self._device!r} has no channel to {peer!r}")
        await link.send(frame, lane)

    async def receive(self) -> Received | PeerGone:
        return await self._inbox.get()

    def disconnect(self, peer: str, reason: str) -> None:
        link = self._links.get(peer)
        if link is not None:
            link.end(reason)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._inbox.close()
        links = tuple(self._links.values())
        for link in links:
            link.goodbye()
        # A peer that is not read keeps its writer waiting: hence the bound.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._flush_s):
                for link in links:
                    await link.ended.wait()
        for link in links:
            link.end("closed by this side")
        for link in links:
            await link.finished()
        for arriving in tuple(self._arriving.values()):
            for stream in arriving.streams.values():
                stream.abort()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._server is not None:
            await self._server.stop(grace=0.5)
        self._fetcher.close()

    async def _dial(self, peer: str, target: str) -> None:
        connection = secrets.token_hex(8)
        streams: dict[Lane, _DialledStream] = {}
        answers = []
        try:
            for lane in Lane:
                channel = grpc.aio.insecure_channel(target, options=_CHANNEL_OPTIONS)
                hello = self._hello(peer, connection, lane)
                call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(
                    metadata=grpc.aio.Metadata(*hello.metadata(self._token, "dial"))
                )
                streams[lane] = _DialledStream(channel, call, peer)
                answers.append(self._answer(call, hello))
            instances = set(await asyncio.gather(*answers))
            if len(instances) != 1:
                raise _RestartedError(f"{peer!r} at {target} restarted while it was dialled")
        except BaseException:
            for stream in streams.values():
                stream.abort()
                self._spawn(stream.close(), f"close channel to {peer}")
            raise
        self._join(peer, instances.pop(), streams)

    async def _answer(self, call: Any, hello: Hello) -> str:
        """Checks that the other end is whom we dialled; returns its instance."""
        metadata = await call.initial_metadata()
        if not any(key == "cm-device-bin" for key, _ in metadata or ()):
            code = await call.code()
            raise grpc.aio.AioRpcError(code, metadata, metadata, await call.details())
        answer, proof = Hello.read(metadata)
        expected = self._expected_answer(hello, answer.instance)
        if answer != expected or not hmac.compare_digest(
            proof, answer.proof(self._token, "answer")
        ):
            raise PeerLostError(
                f"whoever answers for {hello.peer!r} is {answer.device!r} of run {answer.run!r},"
                f" or does not know the run's token"
            )
        return answer.instance

    async def _serve(self, _requests: Any, context: Any) -> None:
        try:
            hello, lane = self._checked_hello(context.invocation_metadata())
        except TransportError as exc:
            logger.warning("%s refused a stream: %s", self._device, exc.message)
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, exc.message)
            return
        if self._closed:  # no refusal: a successor may listen here soon, and is dialled again
            closing = f"{self._device!r} is closing"
            await context.abort(grpc.StatusCode.UNAVAILABLE, closing)
            return
        key = (hello.device, hello.connection)
        arriving = self._arriving.setdefault(key, _Arriving(hello))
        stream = _ServedStream(context, hello.device)
        arriving.streams[lane] = stream
        try:
            if len(arriving.streams) == len(Lane):
                del self._arriving[key]
                self._join(hello.device, hello.instance, arriving.streams)
                arriving.complete.set()
            answer = self._expected_answer(hello, self._instance)
            await context.send_initial_metadata(answer.metadata(self._token, "answer"))
            stream.answered.set()
            async with asyncio.timeout(HANDSHAKE_S):
                await arriving.complete.wait()
            await stream.finished.wait()
        except TimeoutError:
            logger.warning("%s: a connection of %s stayed incomplete", self._device, hello.device)
        finally:  # also when gRPC cancels the handler: the connection broke
            if self._arriving.get(key) is arriving:
                del self._arriving[key]
            link = self._links.get(hello.device)
            if link is not None and link.uses(stream):
                reason = f"{hello.device!r} broke its {lane.value} stream"
                link.end(reason, PeerLostError(reason))

    def _checked_hello(self, metadata: Any) -> tuple[Hello, Lane]:
        hello, proof = Hello.read(metadata)
        if hello.version != PROTOCOL_VERSION:
            raise TransportError(
                f"protocol version {hello.version!r:.20}, this side speaks {PROTOCOL_VERSION}"
            )
        if not hmac.compare_digest(proof, hello.proof(self._token, "dial")):
            raise TransportError(f"{hello.device!r:.80} does not know the run's token")
        if hello.run != self._run:
            raise TransportError(f"run {hello.run!r:.80}, this side is in run {self._run!r}")
        if hello.peer != self._device:
            raise TransportError(f"this is {self._device!r}, not {hello.peer!r:.80}")
        if hello.device == self._device:
            raise TransportError(f"another device calls itself {hello.device!r} too")
        lanes = {lane.value: lane for lane in Lane}
        arriving = self._arriving.get((hello.device, hello.connection))
        if hello.lane not in lanes or (arriving and lanes[hello.lane] in arriving.streams):
            raise TransportError(f"lane {hello.lane!r:.20} is unknown or open already")
        return hello, lanes[hello.lane]

    def _hello(self, peer: str, connection: str, lane: Lane) -> Hello:
        return Hello(
            device=self._device,
            peer=peer,
            run=self._run,
            instance=self._instance,
            connection=connection,
            lane=lane.value,
        )

    @staticmethod
    def _expected_answer(hello: Hello, instance: str) -> Hello:
        return Hello(
            device=hello.peer,
            peer=hello.device,
            run=hello.run,
            instance=instance,
            connection=hello.connection,
            lane=hello.lane,
        )

    def _join(self, peer: str, instance: str, streams: Mapping[Lane, Stream]) -> None:
        link = self._links.get(peer)
        if link is not None and link.instance != instance:
            reason = f"{peer!r} restarted"
            link.end(reason, PeerLostError(reason))
            link = None
        if link is None:
            link = PeerLink(
                peer,
                instance,
                device=self._device,
                inbox=self._inbox,
                fetcher=self._fetcher,
                bounds=self._bounds,
                queue=self._queue,
                chunk_bytes=self._chunk_bytes,
                on_end=self._link_ended,
            )
            self._links[peer] = link
        link.attach(streams)

    def _link_ended(self, link: PeerLink) -> None:
        if self._links.get(link.peer) is link:
            del self._links[link.peer]
        for stream in link.streams:
            if isinstance(stream, _DialledStream):
                self._spawn(stream.close(), f"close channel to {link.peer}")

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Runs a short clean-up; `close` waits for it."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _lost(peer: str, exc: BaseException) -> PeerLostError:
    details = exc.details() if isinstance(exc, grpc.aio.AioRpcError) else repr(exc)
    return PeerLostError(f"the connection to {peer!r} broke: {details}")
