"""Boundary logs in the member machine: what was sent is kept, asked for again, and dropped.

A stage that replays takes nothing but logs: its neighbours' old ones at the edges of the run, and
within the run those that they just made. So one rule serves both, nobody is sent what it is not
ready for, and the replayer logs what it would have sent, for the next loss. Metadata only.
"""

from __future__ import annotations

from dataclasses import replace

from ..core.crowd import DeviceId
from ..errors import ProtocolError
from . import member_events as ev
from . import messages as msg
from .common import Parts, Slot
from .evidence import Direction, Logged, LogSpan
from .member_state import LogAsk, LoggedStep, MemberState, Phase
from .member_turn import MemberTurn

MAX_ASKS = 64
"""Of neighbours that replay, waiting here: two each suffice."""


def slots_of(direction: Direction, step: int, microbatch: int, has_parts: bool) -> tuple[Slot, ...]:
    """What goes across a cut for a microbatch."""
    kind = "y" if direction == "forward" else "dx"
    slot = Slot(kind=kind, step=step, microbatch=microbatch)
    return (slot, Slot(kind="parts", step=step)) if has_parts else (slot,)


def cross(turn: MemberTurn, direction: Direction, microbatch: int, parts: Parts | None) -> None:
    """A microbatch of the step at work is ready to cross a cut: log it, send it.

    While catching up nothing is sent but what was asked for."""
    state = turn.state
    to = state.downstream if direction == "forward" else state.upstream
    if to is None:
        return
    cut = state.layers.stop if direction == "forward" else state.layers.start
    if state.granted.log_steps is not None:
        log(turn, direction, cut, microbatch, parts)
    if state.phase is Phase.CATCHING_UP:
        serve(turn)
    else:
        send(turn, to, direction, cut, state.step, microbatch, parts)


def send(
    turn: MemberTurn,
    to: DeviceId,
    direction: Direction,
    cut: int,
    step: int,
    microbatch: int,
    parts: Parts | None,
) -> None:
    of = {**turn.of_epoch, "step": step, "microbatch": microbatch, "cut": cut}
    message = msg.Forward(**of) if direction == "forward" else msg.Backward(**of, parts=parts)
    turn.pass_on(to, message, *slots_of(direction, step, microbatch, parts is not None))


def log(
    turn: MemberTurn, direction: Direction, cut: int, microbatch: int, parts: Parts | None
) -> None:
    """Keeps one microbatch; over the budget the oldest steps go (R17), and nobody waits."""
    state = turn.state
    step = state.step
    key = (direction, cut, step)
    rest = tuple(e for e in state.logs if (e.direction, e.cut, e.step) != key)
    entry = LoggedStep(direction=direction, cut=cut, step=step, count=microbatch + 1, parts=parts)
    turn.set(logs=(*rest, entry))
    turn.do(ev.LogFrame(slots=slots_of(direction, step, microbatch, parts is not None)))
    budget = state.granted.log_steps
    if budget is not None and any(_serves(entry) <= step - budget for entry in rest):
        drop_logs(turn, step - budget + 1)


def lend(turn: MemberTurn, step: int, layer: int) -> None:
    """Values that `layer` lends, made by `step`, are to cross the lower cut: log them, send them.

    While catching up nothing is sent but what was asked for."""
    state = turn.state
    to = state.downstream
    if to is None:
        return
    slot = Slot(kind="tied", step=step, layer=layer)
    if state.granted.log_steps is not None:
        cut = state.layers.stop
        known = entry_of(state, "tied", cut, step)
        layers = {layer, *(known.layers if known is not None else ())}
        entry = LoggedStep(
            direction="tied", cut=cut, step=step, count=len(layers), layers=tuple(sorted(layers))
        )
        turn.set(logs=(*(e for e in state.logs if e != known), entry))
        turn.do(ev.LogFrame(slots=(slot,)))
    if state.phase is Phase.CATCHING_UP:
        serve(turn)
    else:
        turn.pass_on(to, msg.Tied(**turn.of_epoch, step=step, layer=layer), slot)


def lent_across(state: MemberState) -> set[int]:
    """Lending layers whose values cross this stage's lower cut."""
    found = set()
    for tie in state.granted.ties:
        owner, borrowers = tie.stages(state.plan)
        if borrowers and owner <= state.stage < borrowers[-1]:
            found.add(tie.owner_layer)
    return found


def entry_of(state: MemberState, direction: Logged, cut: int, step: int) -> LoggedStep | None:
    """What is logged of a step at a cut."""
    key = direction, cut, step
    return next((e for e in state.logs if (e.direction, e.cut, e.step) == key), None)


def _serves(entry: LoggedStep) -> int:
    """The step that needs it."""
    return entry.step + 1 if entry.direction == "tied" else entry.step


def drop_logs(turn: MemberTurn, below: int) -> None:
    """What steps below `below` need goes: nobody repeats them, or there is no room."""
    state = turn.state
    turn.set(
        logs=tuple(entry for entry in state.logs if _serves(entry) >= below),
        verdicts=tuple(entry for entry in state.verdicts if entry.step >= below - 1),
    )
    turn.do(ev.DropLogs(step=below))


def spans(state: MemberState) -> tuple[LogSpan, ...]:
    """Complete steps, joined where they follow each other."""
    whole = [entry for entry in state.logs if is_complete(state, entry)]
    whole.sort(key=lambda entry: (entry.direction, entry.cut, entry.step))
    joined: list[LogSpan] = []
    for entry in whole:
        last, key = joined[-1] if joined else None, (entry.direction, entry.cut, entry.step)
        if last and (last.direction, last.cut, last.stop_step) == key:
            joined[-1] = replace(last, stop_step=entry.step + 1)
        else:
            span = LogSpan(
                direction=entry.direction,
                cut=entry.cut,
                first_step=entry.step,
                stop_step=entry.step + 1,
            )
            joined.append(span)
    return tuple(joined)


def is_complete(state: MemberState, entry: LoggedStep) -> bool:
    """Whether all of a step is there."""
    if entry.direction == "tied":
        return lent_across(state) <= set(entry.layers)
    if entry.count < state.microbatches:
        return False
    return entry.direction == "forward" or entry.parts is not None


def ask_logs(turn: MemberTurn) -> None:
    """Catching up, at the start of a step: its forwards from above, its backwards from below."""
    state = turn.state
    if not state.is_catching_up:
        return
    of = {**turn.of_epoch, "step": state.step}
    if state.upstream:
        ask = msg.FetchLog(**of, direction="forward", cut=state.layers.start)
        turn.request(state.upstream, ask)
    if state.downstream:
        ask = msg.FetchLog(**of, direction="backward", cut=state.layers.stop)
        turn.request(state.downstream, ask)


def on_fetch_log(turn: MemberTurn, sender: str, message: msg.FetchLog) -> None:
    """Kept until there is something to send; a device not yet installed serves after it is."""
    asks = turn.state.log_asks
    if len(asks) >= MAX_ASKS:
        raise ProtocolError(f"{sender} asks for more logs than any replay needs")
    ask = LogAsk(
        sender=DeviceId(sender),
        direction=message.direction,
        cut=message.cut,
        step=message.step,
    )
    turn.set(log_asks=(*asks, ask))
    serve(turn)


def serve(turn: MemberTurn) -> None:
    """Sends what neighbours ask for and is logged; the purge of Install has happened by now."""
    if turn.state.phase not in (Phase.CATCHING_UP, Phase.INSTALLED):
        return
    left = []
    for ask in turn.state.log_asks:
        state = turn.state
        beside = state.downstream if ask.direction == "forward" else state.upstream
        cut = state.layers.stop if ask.direction == "forward" else state.layers.start
        if (ask.sender, ask.cut) != (beside, cut):
            raise ProtocolError(f"{ask.sender} asks for {ask.direction} logs at cut {ask.cut}")
        if ask.direction == "forward" and not ask.is_lent:
            if not _serve_lent(turn, ask):
                left.append(ask)
                continue
            ask = replace(ask, is_lent=True)
        entry = entry_of(state, ask.direction, ask.cut, ask.step)
        served = ask.served
        while entry is not None and served < entry.count:
            is_last = served == state.microbatches - 1
            parts = entry.parts if is_last else None
            send(turn, ask.sender, ask.direction, ask.cut, ask.step, served, parts)
            served += 1
        if served < state.microbatches:
            left.append(replace(ask, served=served))
    turn.set(log_asks=tuple(left))


def _serve_lent(turn: MemberTurn, ask: LogAsk) -> bool:
    """Sends what was lent for a step, before its forwards; False: not all of it is here yet."""
    layers = lent_across(turn.state)
    entry = entry_of(turn.state, "tied", ask.cut, ask.step - 1)
    if layers and (entry is None or not layers <= set(entry.layers)):
        return False
    for layer in sorted(layers):
        slot = Slot(kind="tied", step=ask.step - 1, layer=layer)
        turn.pass_on(ask.sender, msg.Tied(**turn.of_epoch, step=slot.step, layer=layer), slot)
    return True
