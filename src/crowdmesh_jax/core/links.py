"""What crosses a cut takes, and what it shares: from a crowd's links and medium to `CutTimes`.

It knows bytes and devices, nothing of layers or schedules.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import InvalidPlanError
from .crowd import Crowd, Link
from .times import CutTimes


def link_between(crowd: Crowd, why: str, source: str, target: str) -> Link:
    """The link, which must be there.

    Raises:
        InvalidPlanError: It is not; begins with `why` it must be.
    """
    link = crowd.link(source, target)
    if link is None:
        raise InvalidPlanError(
            f"{why}, but there is no link {source!r} -> {target!r};"
            " add the link, a default_link, or another device order"
        )
    return link


def pair_times(
    crowd: Crowd,
    pairs: Sequence[tuple[str, str]],
    forward_bytes: float,
    backward_bytes: float,
    *,
    why: str = "two stages are neighbours",
) -> CutTimes:
    """Seconds of so many bytes down and back between linked devices.

    Between groups, several pairs: all rows over the slowest link of any pair, as Asteroid counts
    it, with all channels of all pairs.

    Raises:
        InvalidPlanError: A pair has no link.
    """
    down = [link_between(crowd, why, a, b) for a, b in pairs]
    back = [link_between(crowd, why, b, a) for a, b in pairs]
    return CutTimes(
        forward_latency_s=max(link.latency_s for link in down),
        forward_transfer_s=forward_bytes / min(link.bandwidth_bytes_per_s for link in down),
        backward_latency_s=max(link.latency_s for link in back),
        backward_transfer_s=backward_bytes / min(link.bandwidth_bytes_per_s for link in back),
        forward_channels=_channels(crowd, pairs),
        backward_channels=_channels(crowd, [(b, a) for a, b in pairs]),
    )


def _channels(crowd: Crowd, pairs: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    if crowd.medium == "full_duplex":
        return ()
    return tuple(sorted({channel for a, b in pairs for channel in crowd.channels(a, b)}))


def occupied_s(cuts: Sequence[CutTimes]) -> dict[str, float]:
    """Seconds per microbatch that each shared channel is occupied, by all cuts together."""
    found: dict[str, float] = {}
    for cut in cuts:
        for channels, seconds in (
            (cut.forward_channels, cut.forward_transfer_s),
            (cut.backward_channels, cut.backward_transfer_s),
        ):
            for channel in channels:
                found[channel] = found.get(channel, 0.0) + seconds
    return found
