"""The body round the member machine: sockets, the compute thread, slots of arrays, copies.

Feeds the machine what happens, carries out what it demands, decides nothing. The receiving task
always drains the transport, so two neighbours never block each other with full queues; one task
hands events to the machine one by one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Coroutine
from typing import Any

from ..errors import CrowdMeshError, PeerLostError
from ..execution import Pace
from ..programs import ProgramCache
from ..protocol import member as machine
from ..protocol import member_events as ev
from ..protocol import messages as msg
from ..protocol.common import ROUND_TRIP, Fault, Slot
from ..transport import Lane, PeerGone, Received, ShapedTransport, Transport
from .compute import ComputeThread
from .copies import CopyLimits, Incoming
from .envelope import EVALUATION, TRAINING, Envelope, seal, unseal
from .keeper import DamagedCopyError, Keeper
from .memory import MemoryWatch
from .ops import StageOps
from .prepared import PreparedStages, is_preparation
from .probe import Probe, is_probe
from .sending import CopyTransfers
from .slots import SENT_ONCE, Slots
from .stage import HeldStage

logger = logging.getLogger(__name__)

TICK_S = 0.25
CONNECT_DEADLINE_S = 30.0
"""To reach the coordinator or a neighbour: processes on one machine, perhaps still importing."""
REJOIN_S = 600.0
"""A coordinator that broke off has so long to come back; meanwhile this device trains on."""


class Appliance:
    """One device's agent over any transport.

    Args:
        transport: Started; the coordinator's channel is open.
        address: Where it listens.
        coordinator_address: To reach the coordinator again if the channel breaks; None: the agent
            ends with the channel.
        speed: Emulated speed of the compute thread.
        stays: Waits for the next coordinator when one closes its channel.
        limits: How much it keeps for others.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        coordinator: str,
        address: str = "",
        coordinator_address: str | None = None,
        speed: float = 1.0,
        stays: bool = False,
        limits: CopyLimits | None = None,
    ) -> None:
        self._links: dict[str, tuple[float, float]] = {}
        """Emulated links of the plan at work: peer -> (bytes/s, s)."""
        self.transport = ShapedTransport(transport, self._links.get)
        self.coordinator = coordinator
        self.state = machine.MemberState(
            device=machine.DeviceId(transport.device),
            coordinator=machine.DeviceId(coordinator),
        )
        self._address, self._coordinator_address = address, coordinator_address
        self._speed, self._stays = speed, stays
        self._pace = Pace(speed)
        self._programs = ProgramCache()
        self._prepared = PreparedStages(self._programs)
        self._probe = Probe(self._send_probe, self._pass_compute)
        self._events: asyncio.Queue[tuple[ev.MemberEvent, Envelope | None]] = asyncio.Queue()
        self._slots = Slots()
        self._keeper = Keeper(limits or CopyLimits(), self._slots)
        self._transfers = CopyTransfers(self._keeper, self._send_bulk, self._put)
        self._addresses: dict[str, str] = {}
        """Of this epoch's members."""
        self._life = 0
        """Grows at each Freeze and Unload: answers to what was asked before it are not wanted."""
        self._extra: Any = {}
        """Of the frame whose arrays were kept last."""
        self._memory = MemoryWatch()
        self._stage_ops: StageOps | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._stopped = asyncio.Event()

    @property
    def _ops(self) -> StageOps:
        assert self._stage_ops is not None, "the agent runs"
        return self._stage_ops

    async def run(self) -> None:
        """Serves runs until the coordinator closes its channel, or is gone for too long."""
        compute = ComputeThread(self._pace, asyncio.get_running_loop())
        self._stage_ops = StageOps(
            compute,
            self._slots,
            put=self._put,
            failed=self._body_failed,
            applied=lambda: self._spawn(self._report(), "op times"),
        )
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                always = [
                    tasks.create_task(work, name=name)
                    for name, work in (
                        ("tick", self._tick()),
                        ("events", self._handle_events()),
                        ("receive", self._receive()),
                    )
                ]
                await self._stopped.wait()
                for task in (*always, *self._running):
                    task.cancel()
        finally:
            compute.close()
            self._prepared.close()
            await self.transport.close()

    # What happens --------------------------------------------------------------------------------

    async def _receive(self) -> None:
        while True:
            item = await self.transport.receive()
            if isinstance(item, PeerGone):
                self._peer_gone(item)
            else:
                self._take(item)
            del item  # or its arrays stay until the next frame

    def _peer_gone(self, gone: PeerGone) -> None:
        self._transfers.peer_gone(gone.peer)
        if gone.peer != self.coordinator:
            self._put(ev.PeerLost(device=machine.DeviceId(gone.peer), reason=gone.reason))
            return
        is_end = gone.error is None and not self._stays
        if is_end or self._coordinator_address is None:
            logger.info("the coordinator is gone (%s): stopping", gone.reason)
            self._stopped.set()
        else:
            logger.warning("the coordinator is gone (%s): waiting for it to return", gone.reason)
            self._spawn(self._rejoin(self._coordinator_address), "rejoin")

    async def _rejoin(self, address: str) -> None:
        try:
            await self.transport.connect(self.coordinator, address, deadline_s=REJOIN_S)
            await self.say_hello()
            if self._ops.held is not None:
                await self._ops.held.ask_rows_again()
        except PeerLostError as exc:
            logger.error("the coordinator did not come back: %s", exc)
            self._stopped.set()

    def _take(self, item: Received) -> None:
        try:
            envelope = unseal(item.frame)
        except CrowdMeshError as exc:
            logger.error("a frame from %s was refused: %s", item.peer, exc)
            return
        message = envelope.message
        if message is None:
            self._take_extra(item.peer, envelope)
            return
        if isinstance(message, (msg.Forward, msg.Backward)):
            kind = "receive_forward" if isinstance(message, msg.Forward) else "receive_backward"
            sent_s = envelope.extra.get("sent_s")
            if isinstance(sent_s, float):
                span = [kind, message.step, message.microbatch, sent_s, item.received_s]
                self._ops.spans.append(span)
        if isinstance(message, (msg.Install, msg.Enlist)) and item.peer == self.coordinator:
            self._addresses = dict(message.addresses)
        self._put(ev.MessageReceived(sender=item.peer, message=message), envelope)

    def _take_extra(self, peer: str, envelope: Envelope) -> None:
        """What bodies tell each other and no machine decides on."""
        if is_probe(envelope.extra):
            held = self._ops.held
            if held is not None:
                answer = held.worker.manifest.gradient_out
                self._spawn(self._probe.arrived(peer, envelope.extra, answer), "probe")
        elif self._transfers.is_one(envelope.extra):
            # At once: the pieces may be right behind the offer.
            answer = self._transfers.take(peer, envelope.extra)
            if answer is not None:
                self._spawn(self._deliver(peer, seal(answer), Lane.CONTROL), "answer to an offer")
        elif peer != self.coordinator:
            logger.error("a frame from %s was refused: only the coordinator may send it", peer)
        elif is_preparation(envelope.extra):
            self._spawn(self._prepare(envelope), "preparing a stage")
        else:
            self._take_rows(envelope)

    def _take_rows(self, envelope: Envelope) -> None:
        step, error = envelope.extra.get("rows"), envelope.extra.get("error")
        held = self._ops.held
        if held is None or not isinstance(step, int):
            return
        is_eval = envelope.extra.get("of") == EVALUATION
        rows = held.eval_rows if is_eval else held.rows
        if rows is None:
            return
        if error is not None:
            rows.failed(step, Fault(**error).error())
            return
        parts: dict[str, list[Any]] = {"inputs": [], "targets": []}
        for (_, part, _), array in (envelope.groups[0] if envelope.groups else {}).items():
            parts[part].append(array)
        rows.arrived(step, parts)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._put(ev.Tick())

    def _put(self, event: ev.MemberEvent, envelope: Envelope | None = None) -> None:
        self._events.put_nowait((event, envelope))

    async def _handle_events(self) -> None:
        while True:
            event, envelope = await self._events.get()
            self.state, actions = machine.handle(self.state, event, time.monotonic())
            for action in actions:
                await self._act(action, envelope)
            del envelope, actions  # as in _receive

    # What is demanded ----------------------------------------------------------------------------

    async def _act(self, action: ev.MemberAction, envelope: Envelope | None) -> None:
        match action:
            case ev.SendMessage():
                await self._send(action)
            case ev.Keep(slots=slots):
                self._slots.fill_all(slots, envelope.groups if envelope else ())
                self._extra = envelope.extra if envelope else {}
            case ev.RequestData(step=step):
                self._spawn(self._read_rows(step), f"rows of step {step}")
            case ev.RequestEvalData():
                name = f"rows of evaluation microbatch {action.microbatch}"
                self._spawn(self._read_eval_rows(action), name)
            case ev.LoadStage(install=install):
                self._spawn(self._load(install, self._extra), "load")
            case ev.MeasureStage(repeats=repeats):
                self._spawn(self._measure(repeats), "measuring the stage")
            case ev.Freeze():
                self._life += 1
                self._transfers.break_off()
                self._ops.do(action)
            case ev.Rewind(step=step, gradient=gradient):
                self._slots.rewind(step)
                if self._ops.held is not None:
                    self._ops.held.rewind(step, gradient=gradient)
            case ev.LogFrame(slots=slots):
                self._slots.log(slots)
            case ev.DropLogs(step=step):
                self._slots.drop_logs(step)
            case ev.SendCopy():
                self._spawn(self._send_copy(action), "sending a copy")
            case ev.SealCopy():
                self._spawn(self._seal_copy(action), "checking a copy")
            case ev.Rejoin():
                self._spawn(self.say_hello(), "rejoin")
            case ev.Reject(sender=sender, fault=fault, is_stranger=is_stranger):
                logger.error("refused: %s", fault.text)
                if is_stranger:
                    self.transport.disconnect(sender, fault.text)
            case ev.Fail(fault=fault):
                logger.error("failed: %s: %s", fault.kind, fault.text)
            case ev.Unload():
                self._unload()
            case _:
                if not (self._keeper.do(action, envelope, self._ops.held) or self._ops.do(action)):
                    raise AssertionError(f"no part of the body carries out {action}")

    async def _send(self, action: ev.SendMessage) -> None:
        groups = tuple(self._slots.get(slot) for slot in action.attach)
        extra: dict[str, Any] = {}
        if isinstance(action.message, (msg.Forward, msg.Backward)):
            extra["sent_s"] = time.monotonic()
        if isinstance(action.message, msg.StageState):
            extra["spans"] = self._ops.take_spans()
            extra["memory"] = self._memory_report()
        frame = seal(Envelope(action.message, groups, extra))
        for slot in action.attach:
            if slot.kind in SENT_ONCE and not self._is_adopted(slot):
                self._slots.drop_unlogged(slot)
        lane = Lane(action.lane)
        if lane is Lane.BULK or action.to not in self.transport.peers:
            # Megabytes, or a channel still to be opened: waiting would hold up the pipeline.
            self._spawn(self._deliver(action.to, frame, lane), f"send to {action.to}")
        else:
            await self._deliver(action.to, frame, lane)

    def _is_adopted(self, slot: Slot) -> bool:
        """Whether this stage itself will take the slot's values: Adopt follows and drops it."""
        keys = self._slots.get(slot).keys() if slot.kind == "tied" else ()
        return any(key in self._ops.stage.borrowed_keys for key in keys)

    async def _deliver(self, to: str, frame: Any, lane: Lane) -> None:
        try:
            await self._reach(to)
            await self.transport.send(to, frame, lane)
        except PeerLostError as exc:
            # The transport reports the end of the channel as an event of its own. A coordinator
            # that is away misses a heartbeat every half second.
            level = logging.DEBUG if to == self.coordinator else logging.WARNING
            logger.log(level, "could not send to %s: %s", to, exc)

    async def _reach(self, peer: str) -> None:
        """Opens a channel to a member of this epoch, if there is none."""
        address = self._addresses.get(peer)
        if address and peer not in self.transport.peers and peer != self.coordinator:
            await self.transport.connect(peer, address, deadline_s=CONNECT_DEADLINE_S)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        assert self._tasks is not None
        task = self._tasks.create_task(self._guarded(work, name, self._life), name=name)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _guarded(self, work: Coroutine[Any, Any, None], name: str, life: int) -> None:
        try:
            await work
        except Exception as exc:
            if life == self._life:
                self._body_failed(name, exc)
            else:
                logger.info("%s was given up: %s", name, exc)

    def _body_failed(self, what: str, error: BaseException) -> None:
        logger.error("%s failed", what, exc_info=error)
        fault = Fault.of(error).within(f"{self.transport.device}, {what}")
        self._put(ev.BodyFailed(fault=fault))

    # Copies --------------------------------------------------------------------------------------

    async def _send_copy(self, action: ev.SendCopy) -> None:
        life = self._life
        await self._transfers.send(
            action, self.state.run, self._ops.held, lambda: life == self._life
        )

    async def _send_bulk(self, to: str, envelope: Envelope, lane: Lane) -> None:
        await self._reach(to)
        await self.transport.send(to, seal(envelope), lane)

    async def _seal_copy(self, action: ev.SealCopy) -> None:
        life, copy = self._life, action.copy
        came = await self._keeper.keep(action.sender, copy, action.manifest)
        if life != self._life:
            self._keeper.drop_unless_known(copy, self.state.copies)
            return
        sealed = ev.CopySealed(
            copy=copy,
            epoch=action.epoch,
            is_whole=came is not None,
            checksum=action.manifest.checksum,
            came_bytes=came.came_bytes if came is not None else 0,
        )
        self._put(sealed)
        if came is not None:
            await self._tell_carried(action.sender, came)

    async def _tell_carried(self, sender: str, came: Incoming) -> None:
        seconds, size_bytes = came.seconds_and_bytes
        if seconds > 0 and size_bytes > 0:
            told = {"sender": sender, "seconds": seconds, "bytes": size_bytes}
            frame = seal(Envelope(None, extra={"carried": told}))
            await self._deliver(self.coordinator, frame, Lane.CONTROL)

    # Around the run ------------------------------------------------------------------------------

    async def _load(self, install: msg.Install, extra: Any) -> None:
        life = self._life
        stage = install.plan.stages[install.stage]
        version = install.base if install.state_version is None else install.state_version
        brought = dict(
            self._slots.take(Slot(kind="install", step=version, layer=stage.first_layer))
        )
        if install.action == "restore":
            began_s = time.monotonic()
            try:
                held = await self._restored(install, version, brought, extra)
            except DamagedCopyError as exc:
                self._put(ev.CopyDamaged(copy=exc.copy, reason=exc.message))
                return
            if life != self._life:
                return
            self._ops.held = held
            await self._tell_loaded(install, held, began_s)
            self._memory.loaded()
        self._ops.keeps_verdicts = install.log_steps is not None
        self._links.clear()
        for peer, (bandwidth_bytes_per_s, latency_s) in extra.get("links", {}).items():
            self._links[peer] = float(bandwidth_bytes_per_s), float(latency_s)
        if install.stage + 1 < len(install.plan.stages):
            # Each stage dials the one below; the one above has dialled this one.
            below = install.plan.stages[install.stage + 1].device
            try:
                await self._reach(below)
            except PeerLostError as exc:
                if life == self._life:  # a loss like any other: the run need not end for it
                    self._put(ev.PeerLost(device=below, reason=exc.message))
                return
        if life == self._life:
            self._put(ev.Installed())

    async def _restored(
        self, install: msg.Install, version: int, brought: dict[Any, Any], extra: Any
    ) -> HeldStage:
        async def ask(step: int, of: str = TRAINING) -> None:
            frame = seal(Envelope(None, extra={"ask_rows": step, "run": install.run, "of": of}))
            await self._deliver(self.coordinator, frame, Lane.CONTROL)

        away = [s.copy for s in install.sources if s.device != self.coordinator]
        state = await self._keeper.gather(away)
        known, more = self._prepared.find(extra)
        arrays = {**known, **state, **brought}
        held = await asyncio.to_thread(
            HeldStage.load,
            install,
            version,
            arrays,
            {**more, **extra},
            ask,
            lambda: self.coordinator in self.transport.peers,
            self._programs,
        )
        self._prepared.remember({**known, **brought}, {**more, **extra})
        return held

    async def _tell_loaded(self, install: msg.Install, held: HeldStage, began_s: float) -> None:
        away = [s.copy for s in install.sources if s.device != self.state.device]
        loaded = {
            "loaded_s": time.monotonic() - began_s,
            "compiled_s": held.compiled_s,
            "moved_bytes": self._keeper.came_bytes(away),
        }
        frame = seal(Envelope(None, extra={"loaded": loaded}))
        await self._deliver(self.coordinator, frame, Lane.CONTROL)

    async def _prepare(self, envelope: Envelope) -> None:
        """Programs for a stage that this device may have to take over: compiled ahead, so that
        nothing is compiled when it does."""
        told = await self._prepared.prepare(envelope)
        await self._deliver(self.coordinator, seal(Envelope(None, extra=told)), Lane.CONTROL)

    async def _measure(self, repeats: int) -> None:
        """Times the programs and the way to the neighbour below; all others stand still."""
        held, life = self._ops.stage, self._life
        seconds = await self._ops.compute.run(lambda: held.measure(self._pace, repeats))
        below = self.state.downstream
        if below is not None:
            sent = held.worker.manifest.boundary_out
            seconds[ROUND_TRIP] = await self._probe.round_trip_s(below, sent)
        if life == self._life:
            self._put(ev.StageMeasured(seconds=seconds))

    async def _send_probe(self, to: str, envelope: Envelope) -> None:
        await self.transport.send(to, seal(envelope), Lane.PIPELINE)

    async def _pass_compute(self) -> None:
        await self._ops.compute.run(lambda: None)

    async def _read_rows(self, step: int) -> None:
        life = self._life
        await self._ops.stage.rows.read(step)
        if life == self._life:
            self._put(ev.DataReady(step=step))

    async def _read_eval_rows(self, action: ev.RequestEvalData) -> None:
        rows, life = self._ops.stage.eval_rows, self._life
        assert rows is not None, "the machine evaluates only what Install brought"
        await rows.read(action.microbatch)
        if life == self._life:
            self._put(ev.EvalDataReady(version=action.version, microbatch=action.microbatch))

    async def _report(self) -> None:
        extra = {"spans": self._ops.take_spans(), "memory": self._memory_report()}
        await self._deliver(self.coordinator, seal(Envelope(None, extra=extra)), Lane.CONTROL)

    def _memory_report(self) -> dict[str, int]:
        stage = self._ops.stage
        return self._memory.report(*stage.temp_bytes, stage.worker.loaded.ops)

    def _unload(self) -> None:
        self._life += 1
        self._ops.give_up()
        self._slots.clear()
        self._keeper.clear()
        self._prepared.clear()
        self._memory.unloaded()

    async def say_hello(self) -> None:
        """Tells the coordinator where this device listens and what it can read."""
        import jax
        import jax.export

        hello = msg.Hello(
            address=self._address,
            resources={
                "cores": float(os.cpu_count() or 1),
                "speed": self._speed,
                "copies_bytes": float(self._keeper.store.limit_bytes),
            },
            versions={
                "jax": jax.__version__,
                "calling_convention": str(jax.export.maximum_supported_calling_convention_version),
            },
        )
        await self.transport.send(self.coordinator, seal(Envelope(hello)), Lane.CONTROL)
