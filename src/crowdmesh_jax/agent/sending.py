"""Copies between agents: offered, answered, sent piece by piece, sealed.

Who sends first offers the checksums of all pieces; who receives answers which it has not. So a
transfer carries only what changed, and goes on where a fence broke it off. Chunk and Seal are the
protocol's, and checked by the machine; offers and answers are between the bodies, and promise
nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from ..errors import FrameError, PeerLostError
from ..protocol import member_events as ev
from ..protocol import messages as msg
from ..protocol.evidence import Copy
from ..transport import Lane
from .copies import Name
from .envelope import Envelope
from .keeper import DamagedCopyError, Keeper, Outgoing
from .stage import HeldStage

logger = logging.getLogger(__name__)

ANSWER_S = 10.0
"""For an answer to an offer. Who gives none gets all pieces."""

Send = Callable[[str, Envelope, Lane], Awaitable[None]]
"""(peer, envelope, lane): opens a channel if there is none. Raises PeerLostError."""


class CopyTransfers:
    """Both ends of the transfers of one agent.

    Args:
        send: See `Send`.
        put: Hands an event to the machine.
    """

    def __init__(self, keeper: Keeper, send: Send, put: Callable[[ev.MemberEvent], None]) -> None:
        self._keeper, self._send, self._put = keeper, send, put
        self._answers: dict[tuple[str, Name], asyncio.Future[tuple[int, ...] | None]] = {}

    async def send(
        self, action: ev.SendCopy, run: str, held: HeldStage | None, goes_on: Callable[[], bool]
    ) -> None:
        """Sends a copy, as long as `goes_on`."""
        copy, to = action.copy, action.to
        of = {"run": run, "epoch": action.epoch, "copy": copy}
        try:
            outgoing = await self._keeper.outgoing(copy, held)
            if not goes_on():
                return
            for index in await self._wanted(to, copy, outgoing):
                piece = await asyncio.to_thread(outgoing.piece, index)
                if not goes_on():
                    return
                chunk = msg.Chunk(**of, offset_bytes=outgoing.offer.span(index)[0])
                await self._send(to, Envelope(chunk, ({("copy", "", ""): piece},)), Lane.BULK)
            if goes_on():
                sealed = msg.Seal(**of, manifest=outgoing.offer.manifest)
                await self._send(to, Envelope(sealed), Lane.BULK)
        except PeerLostError as exc:
            logger.warning("a copy did not reach %s: %s", to, exc)
        except DamagedCopyError as exc:
            self._put(ev.CopyDamaged(copy=exc.copy, reason=exc.message))

    async def _wanted(self, to: str, copy: Copy, outgoing: Outgoing) -> tuple[int, ...]:
        """The pieces that a peer has not, by its own word."""
        key = to, copy.name
        offer, pieces = outgoing.offer, range(len(outgoing.offer.checksums))
        answer: asyncio.Future[tuple[int, ...] | None]
        answer = self._answers[key] = asyncio.get_running_loop().create_future()
        try:
            told = {"copy_offer": {"name": list(copy.name), **offer.to_plain()}}
            await self._send(to, Envelope(None, extra=told), Lane.BULK)
            if len(pieces) <= 1:
                return tuple(pieces)  # to ask takes longer than to send
            async with asyncio.timeout(ANSWER_S):
                wanted = await answer
        except TimeoutError:
            logger.warning("%s did not answer an offer within %g s: it gets all", to, ANSWER_S)
            return tuple(pieces)
        finally:
            if self._answers.get(key) is answer:
                del self._answers[key]
        if wanted is None or not set(wanted) <= set(pieces):
            return tuple(pieces)
        return wanted

    def is_one(self, extra: Mapping[str, Any]) -> bool:
        """Whether a frame without a message is an offer or an answer."""
        return "copy_offer" in extra or "copy_wanted" in extra

    def take(self, peer: str, extra: Mapping[str, Any]) -> Envelope | None:
        """An offer or an answer came; what is to be said to it."""
        try:
            if "copy_wanted" in extra:
                self._answered(peer, extra["copy_wanted"])
                return None
            offer = dict(extra["copy_offer"])
            name = _name(offer.pop("name", None))
            wanted = self._keeper.offered(peer, name, offer)
        except (FrameError, TypeError, ValueError) as exc:
            logger.error("a frame from %s was refused: %s", peer, exc)
            return None
        told = {"copy_wanted": {"name": list(name), "pieces": list(wanted)}}
        return Envelope(None, extra=told)

    def _answered(self, peer: str, plain: Any) -> None:
        if not isinstance(plain, Mapping) or set(plain) != {"name", "pieces"}:
            raise FrameError("an answer to an offer needs name and pieces")
        answer = self._answers.get((peer, _name(plain["name"])))
        pieces = plain["pieces"]
        if not isinstance(pieces, list) or not all(isinstance(p, int) for p in pieces):
            raise FrameError("an answer's pieces must be numbers")
        if answer is not None and not answer.done():
            answer.set_result(tuple(sorted(set(pieces))))

    def peer_gone(self, peer: str) -> None:
        """Nobody need wait for its answers."""
        for (name, _), answer in self._answers.items():
            if name == peer and not answer.done():
                answer.set_result(None)

    def break_off(self) -> None:
        """A fence: all uploads stop, and nothing is on its way here."""
        for answer in self._answers.values():
            if not answer.done():
                answer.set_result(None)
        self._keeper.break_off()


def _name(plain: Any) -> Name:
    if not isinstance(plain, list) or len(plain) != 4 or not all(type(n) is int for n in plain):
        raise FrameError(f"a copy's name must be four numbers, got {plain!r:.80}")
    return plain[0], plain[1], plain[2], plain[3]
