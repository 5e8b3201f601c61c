"""Which addresses may be used: the loopback, as long as there is no TLS.

Text only: nothing is resolved, opened or asked from the system, except why a bind failed.
"""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass

from ..errors import AddressError

HOSTS = ("127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class LoopbackAddress:
    """`127.0.0.1:PORT` or `[::1]:PORT`."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def target(self) -> str:
        """As gRPC dials it: an address, never a name that someone else resolves."""
        return f"{'ipv6' if ':' in self.host else 'ipv4'}:{self}"

    def bind_failure(self) -> str:
        """Asks the system why this address cannot be bound, in words; for error messages."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.bind((self.host, self.port))
                probe.listen(1)
        except OSError as exc:
            if exc.errno == errno.EADDRINUSE:
                return f"port {self.port} is in use"
            return exc.strerror or str(exc)
        return "unknown"


def parse_loopback(text: str, *, dial: bool = False) -> LoopbackAddress:
    """Reads an address and refuses all but the loopback.

    Args:
        text: `127.0.0.1:PORT` or `[::1]:PORT`; port 0, only to listen, means any free one.
        dial: The address is one to dial.

    Raises:
        AddressError: Malformed, not the loopback, or a port out of range.
    """
    host, colon, port_text = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""  # an IPv6 address needs brackets
    if not colon or not host or not (port_text.isascii() and port_text.isdigit()):
        raise AddressError(f"{text!r} is not an address; write 127.0.0.1:PORT or [::1]:PORT")
    if host not in HOSTS:
        raise AddressError(
            f"{text!r} is not the loopback; without TLS an agent neither listens nor dials"
            f" beyond its own machine: use {' or '.join(HOSTS)}"
        )
    port = int(port_text[:10])
    if not (1 if dial else 0) <= port <= 65_535:
        raise AddressError(f"{text!r}: port must be {1 if dial else 0} to 65535")
    return LoopbackAddress(host, port)
