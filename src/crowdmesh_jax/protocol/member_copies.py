"""Copies in the member machine: own snapshots, those kept for others, fetches, garbage.

A copy counts when its Seal matched (R12): before that it is in no report and nobody is told. The
epoch of every piece is checked when it is processed (R7), so a zombie's upload ends nowhere.
"""

from __future__ import annotations

from ..core.crowd import DeviceId
from ..errors import ProtocolError
from . import member_events as ev
from . import messages as msg
from .common import Mark, Slot
from .evidence import Copy
from .member_logs import drop_logs
from .member_state import MemberState, Phase
from .member_turn import MemberTurn, reject

# Own snapshots ----------------------------------------------------------------------------------


def on_snapshotted(turn: MemberTurn, event: ev.Snapshotted) -> None:
    """A snapshot is ready: it becomes a copy here and at the holders, or goes to the disk."""
    state = turn.state
    if not state.is_at_work:
        return
    if event.version != state.version:
        raise ProtocolError(f"the body answered {event} at version {state.version}")
    if event.version in state.waves_due:
        _keep_own(turn, event.version)
    if event.version in state.shards_due:
        _send_shard(turn, event.version)


def _keep_own(turn: MemberTurn, version: int) -> None:
    """R15: the owner keeps its own snapshot; rollback needs it when the holder is lost."""
    state = turn.state
    copy = Copy(
        first_layer=state.layers.start,
        last_layer=state.layers.stop - 1,
        tag=state.tag,
        version=version,
        verdict=state.verdict_of(version - 1),
    )
    turn.set(
        waves_due=tuple(due for due in state.waves_due if due != version),
        copies=_with(state, copy),
    )
    turn.do(ev.KeepCopy(copy=copy))
    turn.tell(msg.Stored(**turn.of_epoch, copy=copy))
    if state.phase is Phase.FENCED:
        return  # no uploads any more
    for holder in holders_of(state, copy):
        turn.do(ev.SendCopy(to=holder, copy=copy, epoch=state.active))


def _send_shard(turn: MemberTurn, version: int) -> None:
    state = turn.state
    is_final = state.ending is Mark.FINISH and version == state.steps
    layers = state.layers
    turn.set(shards_due=tuple(due for due in state.shards_due if due != version))
    shard = msg.StageState(
        **turn.of_epoch,
        version=version,
        first_layer=layers.start,
        last_layer=layers.stop - 1,
        is_final=is_final,
    )
    turn.tell(shard, "bulk", Slot(kind="state", step=version, layer=layers.start))
    if is_final and state.phase is not Phase.FENCED:
        turn.set(phase=Phase.FINISHED)  # stays until the coordinator has the result: Release


def holders_of(state: MemberState, copy: Copy) -> tuple[DeviceId, ...]:
    """Who is assigned to keep these layers."""
    for entry in state.holders:
        if (entry.first_layer, entry.last_layer) == (copy.first_layer, copy.last_layer):
            return entry.devices
    return ()


def _with(state: MemberState, copy: Copy) -> tuple[Copy, ...]:
    return (*(have for have in state.copies if have.name != copy.name), copy)


# Kept for others, and fetched ---------------------------------------------------------------------


def on_chunk(turn: MemberTurn, sender: str, message: msg.Chunk) -> None:
    if _takes(turn, sender, message, message.copy):
        chunk = ev.StoreChunk(sender=sender, copy=message.copy, offset_bytes=message.offset_bytes)
        turn.do(chunk)


def on_seal(turn: MemberTurn, sender: str, message: msg.Seal) -> None:
    if _takes(turn, sender, message, message.copy):
        seal = ev.SealCopy(
            sender=sender,
            copy=message.copy,
            manifest=message.manifest,
            epoch=turn.state.active,
        )
        turn.do(seal)


def _takes(turn: MemberTurn, sender: str, message: msg.Message, copy: Copy) -> bool:
    """The plan names both: the sender owns these layers and this member keeps them; or it asked."""
    state = turn.state
    is_fetched = any(s.device == sender and s.copy.name == copy.name for s in state.fetching)
    if is_fetched:
        return True
    plan = state.install.plan if state.install else state.enlisted and state.enlisted.plan
    index = plan.stage_of(sender) if plan else None
    owns = (
        plan is not None
        and index is not None
        and (plan.stages[index].first_layer, plan.stages[index].last_layer)
        == (copy.first_layer, copy.last_layer)
    )
    # Whether this member keeps them is not asked: word of new holders may reach the owner first. A
    # copy too many is dropped with the next Discard.
    if owns and copy.tag == state.active:
        return True
    reject(turn, sender, message, f"it may not leave a copy of layers {copy.first_layer}- here")
    return False


def on_copy_sealed(turn: MemberTurn, event: ev.CopySealed) -> bool:
    """The copy is whole, or damaged. True: it was the last one that an install waited for."""
    state = turn.state
    copy = event.copy
    is_current = event.epoch == state.active and state.phase not in (
        Phase.FENCED, Phase.IDLE, Phase.FAILED,
    )  # fmt: skip
    wanted = any(s.copy.name == copy.name for s in state.fetching)
    if not is_current or not event.is_whole or (copy.version < state.floor and not wanted):
        if all(have.name != copy.name for have in state.copies):
            turn.do(ev.DropCopies(copies=(copy,)))
            if is_current and not event.is_whole:
                _ask_again(turn, copy)
        return False
    turn.set(copies=_with(state, copy))
    if not wanted:
        stored = msg.Stored(
            **turn.of_epoch, copy=copy, checksum=event.checksum, came_bytes=event.came_bytes
        )
        turn.tell(stored)
        return False
    left = tuple(s for s in turn.state.fetching if s.copy.name != copy.name)
    turn.set(fetching=left)
    return not left


def _ask_again(turn: MemberTurn, copy: Copy) -> None:
    """It came damaged: once more from the same device; then it is said to be lost."""
    state = turn.state
    source = next((s.device for s in state.fetching if s.copy.name == copy.name), None)
    plan = state.install.plan if state.install else state.enlisted and state.enlisted.plan
    stages = plan.stages if plan is not None else ()
    owners = [s.device for s in stages if s.first_layer == copy.first_layer]
    ask = source or next(iter(owners), None)
    if copy.name not in state.asked_again and ask is not None:
        turn.set(asked_again=(*state.asked_again, copy.name))
        turn.request(ask, msg.Fetch(**turn.of_epoch, copy=copy))
    else:
        reason = f"it came damaged to {state.device}, twice, or there is no room for it"
        lost = source or state.device  # of a wave: nobody need wait for it here
        turn.tell(msg.CopyLost(**turn.of_epoch, device=lost, copy=copy, reason=reason))


def on_copy_damaged(turn: MemberTurn, event: ev.CopyDamaged) -> None:
    """It is no copy any more; who needs it is told, fenced or not: a Report may have named it."""
    state = turn.state
    copies = tuple(have for have in state.copies if have.name != event.copy.name)
    if copies == state.copies:
        return
    turn.set(copies=copies)
    turn.do(ev.DropCopies(copies=(event.copy,)))
    if state.phase in (Phase.IDLE, Phase.FAILED):
        return
    lost = msg.CopyLost(
        run=state.run,
        epoch=state.fence,
        device=state.device,
        copy=event.copy,
        reason=event.reason,
    )
    turn.answer(lost)


def on_fetch(turn: MemberTurn, sender: str, message: msg.Fetch) -> None:
    """A fenced source is frozen, so it may serve before it is installed itself."""
    state = turn.state
    own = own_state_copy(state)
    held = [*state.copies, *([own] if own is not None else [])]
    if all(have.name != message.copy.name for have in held):
        # Discarded since, or never here: an install that waits for it must not wait in vain.
        lost = msg.CopyLost(
            run=state.run,
            epoch=state.fence,
            device=state.device,
            copy=message.copy,
            reason=f"{sender} asked for it, and it is not here",
        )
        turn.answer(lost)
        return
    turn.do(ev.SendCopy(to=DeviceId(sender), copy=message.copy, epoch=message.epoch))


def own_state_copy(state: MemberState) -> Copy | None:
    """The copy that the resident state would make; None: there is none, or it is half made."""
    if state.install is None or state.is_restoring or state.phase is Phase.IDLE:
        return None
    return Copy(
        first_layer=state.layers.start,
        last_layer=state.layers.stop - 1,
        tag=state.tag,
        version=state.version,
        verdict=state.verdict_of(state.version - 1),
    )


# Garbage ----------------------------------------------------------------------------------------


def on_discard(turn: MemberTurn, message: msg.Discard) -> None:
    """R14: only now may what is older than the durable wave go."""
    state = turn.state
    version = message.version
    if version <= state.floor:
        return
    old = tuple(copy for copy in state.copies if copy.version < version)
    turn.set(
        floor=version,
        copies=tuple(copy for copy in state.copies if copy.version >= version),
        losses=tuple(entry for entry in state.losses if entry.step >= version - 1),
    )
    if old:
        turn.do(ev.DropCopies(copies=old))
    drop_logs(turn, version)


def on_assign(turn: MemberTurn, message: msg.Assign) -> None:
    """Other holders, from the next wave on."""
    before = turn.state.reassigned
    if before is None or message.seq > before.seq:
        turn.set(reassigned=message)
