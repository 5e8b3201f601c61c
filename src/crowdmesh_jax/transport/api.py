"""What every transport promises.

A frame is a small JSON-able message and a list of arrays. Peers are known by device id. Each pair
of peers has three lanes; pipeline frames overtake bulk ones, which are chunked and keep a floor
share of the link. Frames on one lane between two peers arrive in order. Nothing is pickled; every
size is checked against a bound before memory is allocated.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ..errors import CrowdMeshError


class Lane(enum.Enum):
    PIPELINE = "pipeline"
    CONTROL = "control"
    BULK = "bulk"


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameBounds:
    """What a receiver accepts before it allocates anything."""

    header_bytes: int = 4 * 2**20
    leaves: int = 65_536
    leaf_bytes: int = 4 * 2**30
    frame_bytes: int = 8 * 2**30


@dataclass(frozen=True, slots=True)
class Frame:
    """A message (JSON-able) and the arrays that go with it."""

    message: Mapping[str, Any]
    arrays: tuple[np.ndarray, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Received:
    """A frame that arrived. `size_bytes` is its encoded size; times are this machine's
    `time.monotonic()`."""

    peer: str
    lane: Lane
    frame: Frame
    size_bytes: int = 0
    received_s: float = 0.0


@dataclass(frozen=True, slots=True)
class PeerGone:
    """A peer's connection ended: its process died, it broke the format, or it closed (then
    `error` is None)."""

    peer: str
    reason: str
    error: CrowdMeshError | None = None


@runtime_checkable
class Transport(Protocol):
    """Moves frames between devices. One instance per process (or per device, in `memory`).

    All methods run on one asyncio loop.
    """

    @property
    def device(self) -> str:
        """This side's id, told to peers when a channel opens."""
        ...

    @property
    def peers(self) -> frozenset[str]:
        """Ids of the peers with an open channel."""
        ...

    async def start(self) -> str:
        """Begins to listen; returns the address that peers dial.

        Raises:
            AddressError: The address is in use, or is not the loopback (until TLS exists).
        """
        ...

    async def connect(self, peer: str, address: str, *, deadline_s: float) -> None:
        """Opens all lanes to a peer; harmless if they are open (either side may have dialled).

        Raises:
            PeerLostError: Not reached by the deadline, or it is another device than `peer`.
        """
        ...

    async def send(self, peer: str, frame: Frame, lane: Lane = Lane.CONTROL) -> None:
        """Queues a frame. Waits while the lane's bounded queue is full.

        The arrays must not change until they are sent; arrays may be numpy or anything
        `np.asarray` reads without a copy (the sender, not the caller, fetches them).

        Raises:
            PeerLostError: No channel to that peer, or it broke.
        """
        ...

    async def receive(self) -> Received | PeerGone:
        """The next frame from anyone, in order per peer and lane."""
        ...

    def disconnect(self, peer: str, reason: str) -> None:
        """Ends the channel to one peer at once; what is queued is dropped.

        Both sides receive `PeerGone`, this side with `reason`. Harmless without a channel.
        """
        ...

    async def close(self) -> None:
        """Sends what is queued for a bounded time, then closes all channels. Idempotent."""
        ...
