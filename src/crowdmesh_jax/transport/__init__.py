"""Moves frames (a message and arrays) between devices, on three lanes per peer.

`GrpcTransport` is imported when it is first asked for: gRPC is heavy, and `memory` needs none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .api import Frame, FrameBounds, Lane, PeerGone, Received, Transport
from .codec import aligned_empty, decode, encode, encode_bytes, encoded_size
from .flow import QueueBounds
from .memory import MemoryNetwork, MemoryTransport
from .shaped import ShapedTransport, SharedLink

if TYPE_CHECKING:
    from .grpc import GrpcTransport

__all__ = [
    "Frame",
    "FrameBounds",
    "GrpcTransport",
    "Lane",
    "MemoryNetwork",
    "MemoryTransport",
    "PeerGone",
    "QueueBounds",
    "Received",
    "ShapedTransport",
    "SharedLink",
    "Transport",
    "aligned_empty",
    "decode",
    "encode",
    "encode_bytes",
    "encoded_size",
]


def __getattr__(name: str) -> Any:
    if name == "GrpcTransport":
        from .grpc import GrpcTransport

        return GrpcTransport
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
