"""The body round the member machine: sockets, the compute thread, slots of arrays.

Feeds the machine what happens, carries out what it demands, decides nothing. The receiving task
always drains the transport, so two neighbours never block each other with full queues; one task
hands events to the machine one by one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from ..core import OpKind
from ..errors import CrowdMeshError, PeerLostError
from ..execution import Pace, Timed
from ..programs import ProgramCache
from ..protocol import member as machine
from ..protocol import member_events as ev
from ..protocol import messages as msg
from ..protocol.common import ROUND_TRIP, Fault, Slot
from ..transport import GrpcTransport, Lane, PeerGone, Received, ShapedTransport, Transport
from .compute import ComputeThread
from .envelope import EVALUATION, TRAINING, Envelope, Group, seal, unseal
from .memory import memory_use, reset_peak, trim
from .probe import Probe, is_probe
from .stage import HeldStage

logger = logging.getLogger(__name__)

TICK_S = 0.25
CONNECT_DEADLINE_S = 30.0
"""To reach the coordinator or a neighbour: processes on one machine, perhaps still importing."""


class Appliance:
    """One device's agent over any transport.

    Args:
        transport: Started; the coordinator's channel is open.
        speed: Emulated speed of the compute thread.
    """

    def __init__(self, transport: Transport, *, coordinator: str, speed: float = 1.0) -> None:
        self._links: dict[str, tuple[float, float]] = {}
        """Emulated links of the plan at work: peer -> (bytes/s, s)."""
        self.transport = ShapedTransport(transport, self._links.get)
        self.coordinator = coordinator
        self.state = machine.MemberState(
            device=machine.DeviceId(transport.device),
            coordinator=machine.DeviceId(coordinator),
        )
        self._pace = Pace(speed)
        self._programs = ProgramCache()
        self._probe = Probe(self._send_probe, self._pass_compute)
        self._events: asyncio.Queue[tuple[ev.MemberEvent, Envelope | None]] = asyncio.Queue()
        self._slots: dict[Slot, Group] = {}
        self._held: HeldStage | None = None
        self._life = 0
        """Grows at each Unload: answers to what was asked before it are not wanted."""
        self._spans: list[list[Any]] = []
        self._extra: Any = {}
        """Of the frame whose arrays were kept last."""
        self._idle_bytes = memory_use().now_bytes
        """Resident before anything was installed."""
        self._loading_peak_bytes = 0
        """The most that was resident while the stage was received, compiled and put in place."""
        self._compute: ComputeThread | None = None
        self._tasks: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Serves runs until the coordinator's channel ends; then closes the transport."""
        self._compute = ComputeThread(self._pace, asyncio.get_running_loop())
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                ticking = tasks.create_task(self._tick(), name="tick")
                handling = tasks.create_task(self._handle_events(), name="events")
                await self._receive()
                ticking.cancel()
                handling.cancel()
        finally:
            self._compute.close()
            await self.transport.close()

    # What happens --------------------------------------------------------------------------------

    async def _receive(self) -> None:
        while True:
            item = await self.transport.receive()
            if isinstance(item, PeerGone):
                if item.peer == self.coordinator:
                    logger.info("the coordinator is gone (%s): stopping", item.reason)
                    return
                lost = ev.PeerLost(device=machine.DeviceId(item.peer), reason=item.reason)
                self._put(lost)
            else:
                self._take(item)
            del item  # or its arrays stay until the next frame

    def _take(self, item: Received) -> None:
        try:
            envelope = unseal(item.frame)
        except CrowdMeshError as exc:
            logger.error("a frame from %s was refused: %s", item.peer, exc)
            return
        message = envelope.message
        if message is None:
            if is_probe(envelope.extra):
                self._take_probe(item.peer, envelope)
            else:
                self._take_rows(envelope)
            return
        if isinstance(message, (msg.Forward, msg.Backward)):
            kind = "receive_forward" if isinstance(message, msg.Forward) else "receive_backward"
            sent_s = envelope.extra.get("sent_s")
            if isinstance(sent_s, float):
                self._spans.append(
                    [kind, message.step, message.microbatch, sent_s, item.received_s]
                )
        self._put(ev.MessageReceived(sender=item.peer, message=message), envelope)

    def _take_rows(self, envelope: Envelope) -> None:
        step, error = envelope.extra.get("rows"), envelope.extra.get("error")
        if self._held is None or not isinstance(step, int):
            return
        is_eval = envelope.extra.get("of") == EVALUATION
        rows = self._held.eval_rows if is_eval else self._held.rows
        if rows is None:
            return
        if error is not None:
            rows.failed(step, Fault(**error).error())
            return
        parts: dict[str, list[Any]] = {"inputs": [], "targets": []}
        for (_, part, _), array in (envelope.groups[0] if envelope.groups else {}).items():
            parts[part].append(array)
        rows.arrived(step, parts)

    def _take_probe(self, peer: str, envelope: Envelope) -> None:
        if self._held is not None:
            answer = self._held.worker.manifest.gradient_out
            self._spawn(self._probe.arrived(peer, envelope.extra, answer), "probe")

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
                groups = envelope.groups if envelope else ()
                for index, slot in enumerate(slots):
                    self._slots[slot] = groups[index] if index < len(groups) else {}
                self._extra = envelope.extra if envelope else {}
            case ev.Compute(kind=OpKind.FORWARD):
                self._forward(action.step, action.microbatch)
            case ev.Compute():
                self._backward(action.step, action.microbatch)
            case ev.FinishStep(step=step):
                self._finish_step(step)
            case ev.Reduce(step=step):
                self._reduce(step)
            case ev.Apply():
                self._apply(action)
            case ev.Adopt(step=step, layer=layer):
                self._adopt(Slot(kind="tied", step=step, layer=layer))
            case ev.Snapshot():
                self._snapshot(action)
            case ev.RequestData(step=step):
                self._spawn(self._read_rows(step), f"rows of step {step}")
            case ev.RequestEvalData():
                name = f"rows of evaluation microbatch {action.microbatch}"
                self._spawn(self._read_eval_rows(action), name)
            case ev.EvalCompute():
                self._eval_compute(action)
            case ev.FinishEvaluation(version=version):
                self._finish_evaluation(version)
            case ev.LoadStage(install=install):
                self._spawn(self._load(install, self._extra), "load")
            case ev.MeasureStage(repeats=repeats):
                self._spawn(self._measure(repeats), "measuring the stage")
            case ev.Reject(sender=sender, fault=fault, is_stranger=is_stranger):
                logger.error("refused: %s", fault.text)
                if is_stranger:
                    self.transport.disconnect(sender, fault.text)
            case ev.Fail(fault=fault):
                logger.error("failed: %s: %s", fault.kind, fault.text)
            case ev.Unload():
                self._unload()

    async def _send(self, action: ev.SendMessage) -> None:
        groups = tuple(self._slots.get(slot, {}) for slot in action.attach)
        extra: dict[str, Any] = {}
        if isinstance(action.message, (msg.Forward, msg.Backward)):
            extra["sent_s"] = time.monotonic()
        if isinstance(action.message, msg.StageState):
            extra["spans"] = self._take_spans()
            extra["memory"] = self._memory()
        frame = seal(Envelope(action.message, groups, extra))
        for slot in action.attach:
            sent_once = ("y", "dx", "parts", "state", "tied", "eval_y")
            if slot.kind in sent_once and not self._is_adopted(slot):
                self._slots.pop(slot, None)
        lane = Lane(action.lane)
        if lane is Lane.BULK:
            # Megabytes: waiting here would hold up the pipeline.
            self._spawn(self._deliver(action.to, frame, lane), "bulk send")
        else:
            await self._deliver(action.to, frame, lane)

    def _is_adopted(self, slot: Slot) -> bool:
        """Whether this stage itself will take the slot's values: Adopt follows and drops it."""
        keys = self._slots.get(slot, {}).keys() if slot.kind == "tied" else ()
        return any(key in self._stage.borrowed_keys for key in keys)

    async def _deliver(self, to: str, frame: Any, lane: Lane) -> None:
        try:
            await self.transport.send(to, frame, lane)
        except PeerLostError as exc:
            # The transport reports the end of the channel as an event of its own.
            logger.warning("could not send to %s: %s", to, exc)

    def _spawn(self, work: Any, name: str) -> None:
        assert self._tasks is not None
        self._tasks.create_task(self._guarded(work, name, self._life), name=name)

    async def _guarded(self, work: Any, name: str, life: int) -> None:
        try:
            await work
        except Exception as exc:
            if life == self._life:
                self._body_failed(name, exc)

    def _body_failed(self, what: str, error: BaseException) -> None:
        logger.error("%s failed", what, exc_info=error)
        fault = Fault.of(error).within(f"{self.transport.device}, {what}")
        self._put(ev.BodyFailed(fault=fault))

    # The compute queue ---------------------------------------------------------------------------

    def _queue(
        self,
        span: tuple[str, int, int | None],
        call: Callable[[], Any],
        then: Callable[[Any], ev.MemberEvent | None],
    ) -> None:
        """Queues work; `then` files its result and makes the event that answers it."""
        assert self._compute is not None
        life = self._life

        def done(timed: Timed | None, error: BaseException | None) -> None:
            if life != self._life:
                return
            if error is not None:
                where = f"{span[0]} of step {span[1]}"
                if span[2] is not None:
                    where += f", microbatch {span[2]}"
                self._body_failed(where, error)
                return
            assert timed is not None
            self._spans.append([*span, timed.start_s, timed.end_s])
            event = then(timed.result)
            if event is not None:
                self._put(event)

        self._compute.submit(call, done)

    @property
    def _stage(self) -> HeldStage:
        assert self._held is not None, "the machine acts on a stage only after LoadStage"
        return self._held

    def _forward(self, step: int, microbatch: int) -> None:
        held = self._stage
        if held.worker.is_first:
            x = held.rows.inputs(step, microbatch)
        else:
            slot = Slot(kind="x", step=step, microbatch=microbatch)
            x = list(self._slots.pop(slot).values())

        def then(y: list[Any]) -> ev.MemberEvent:
            keys = held.y_keys
            self._slots[Slot(kind="y", step=step, microbatch=microbatch)] = dict(
                zip(keys, y, strict=True)
            )
            return ev.OpDone(kind=OpKind.FORWARD, step=step, microbatch=microbatch)

        span = ("forward", step, microbatch)
        self._queue(span, lambda: held.worker.forward(microbatch, x), then)

    def _backward(self, step: int, microbatch: int) -> None:
        held = self._stage
        worker = held.worker
        dy: list[Any] = []
        if not worker.is_last:
            slot = Slot(kind="dy", step=step, microbatch=microbatch)
            dy = list(self._slots.pop(slot).values())
        targets = held.rows.targets(step) if worker.is_last else None

        def call() -> list[Any]:
            if targets is not None and not worker.has_targets:
                worker.load_targets(targets)
            return worker.backward(microbatch, dy)

        def then(dx: list[Any]) -> ev.MemberEvent:
            self._slots[Slot(kind="dx", step=step, microbatch=microbatch)] = dict(
                zip(held.dx_keys, dx, strict=True)
            )
            return ev.OpDone(kind=OpKind.BACKWARD, step=step, microbatch=microbatch)

        self._queue(("backward", step, microbatch), call, then)

    def _finish_step(self, step: int) -> None:
        held = self._stage
        below = dict(self._slots.pop(Slot(kind="parts_below", step=step), {}))

        def call() -> tuple[Group, dict[str, float], bool, bool]:
            return held.finish_step(below)

        def then(result: Any) -> ev.MemberEvent:
            parts, values, is_finite, has_weight = result
            self._slots[Slot(kind="parts", step=step)] = parts
            return ev.StepFinished(
                step=step, is_finite=is_finite, has_weight=has_weight, values=values
            )

        self._queue(("finish", step, None), call, then)

    def _reduce(self, step: int) -> None:
        held = self._stage
        parts = Slot(kind="parts", step=step)

        def then(verdict: Group) -> ev.MemberEvent:
            self._slots[Slot(kind="verdict", step=step)] = verdict
            self._slots.pop(parts, None)
            return ev.Reduced(step=step)

        # FinishStep stands before it in the queue; its result may still be on the way to the loop.
        self._queue(("reduce", step, None), lambda: held.worker.reduce(held.parts), then)

    def _apply(self, action: ev.Apply) -> None:
        held, step = self._stage, action.step
        verdict = self._slots.get(Slot(kind="verdict", step=step), {})
        self._slots.pop(Slot(kind="verdict", step=step - 2), None)
        skip = action.verdict.skip

        def then(tied: Mapping[int, Group]) -> ev.MemberEvent:
            for layer, group in tied.items():
                self._slots[Slot(kind="tied", step=step, layer=layer)] = group
            held.rows.drop(step)
            spans = self._take_spans()
            self._spawn(self._report(spans), "op times")
            return ev.Applied(step=step)

        self._queue(("update", step, None), lambda: held.apply(verdict, skip), then)

    def _adopt(self, slot: Slot) -> None:
        held = self._stage
        values = self._slots.pop(slot)

        def call() -> None:
            held.worker.set_borrowed({k: v for k, v in values.items() if k in held.borrowed_keys})

        self._queue(("adopt", slot.step, None), call, lambda _: None)

    def _snapshot(self, action: ev.Snapshot) -> None:
        held = self._stage
        slot = Slot(kind="state", step=action.version, layer=action.layer)

        def then(arrays: Group) -> ev.MemberEvent:
            self._slots[slot] = arrays
            return ev.Snapshotted(version=action.version)

        self._queue(("snapshot", action.version, None), held.worker.snapshot, then)

    def _eval_compute(self, action: ev.EvalCompute) -> None:
        held, microbatch = self._stage, action.microbatch
        rows = held.eval_rows
        assert rows is not None, "the machine evaluates only what Install brought"
        slot = Slot(kind="eval_x", step=action.version, microbatch=microbatch)
        if held.worker.is_first:
            x = rows.inputs(microbatch, 0)
        else:
            x = list(self._slots.pop(slot).values())
        targets = rows.targets(microbatch)[0] if held.worker.is_last else None

        def then(y: list[Any]) -> ev.MemberEvent:
            rows.drop(microbatch)
            filled = Slot(kind="eval_y", step=action.version, microbatch=microbatch)
            if not held.worker.is_last:
                self._slots[filled] = dict(zip(held.y_keys, y, strict=True))
            return ev.EvalDone(version=action.version, microbatch=microbatch)

        span = ("evaluate", action.version, microbatch)
        self._queue(span, lambda: held.worker.evaluate(x, targets), then)

    def _finish_evaluation(self, version: int) -> None:
        held = self._stage

        def then(values: Mapping[str, float]) -> ev.MemberEvent:
            return ev.EvaluationFinished(version=version, values=values)

        self._queue(("evaluate", version, None), held.worker.finish_evaluation, then)

    async def _measure(self, repeats: int) -> None:
        """Times the programs and the way to the neighbour below; all others stand still."""
        assert self._compute is not None
        held, life = self._stage, self._life
        seconds = await self._compute.run(lambda: held.measure(self._pace, repeats))
        below = self.state.downstream
        if below is not None:
            sent = held.worker.manifest.boundary_out
            seconds[ROUND_TRIP] = await self._probe.round_trip_s(below, sent)
        if life == self._life:
            self._put(ev.StageMeasured(seconds=seconds))

    async def _send_probe(self, to: str, envelope: Envelope) -> None:
        await self.transport.send(to, seal(envelope), Lane.PIPELINE)

    async def _pass_compute(self) -> None:
        assert self._compute is not None
        await self._compute.run(lambda: None)

    # Around the run ------------------------------------------------------------------------------

    async def _load(self, install: msg.Install, extra: Any) -> None:
        assert self._compute is not None
        stage = install.plan.stages[install.stage]
        slot = Slot(kind="install", step=install.base, layer=stage.first_layer)
        arrays = dict(self._slots.pop(slot))
        life = self._life

        async def ask(step: int, of: str = TRAINING) -> None:
            frame = seal(Envelope(None, extra={"ask_rows": step, "run": install.run, "of": of}))
            await self._deliver(self.coordinator, frame, Lane.CONTROL)

        held = await self._compute.run(
            lambda: HeldStage.load(install, arrays, extra, ask, self._programs)
        )
        if life != self._life:
            return
        self._held = held
        self._loading_peak_bytes = memory_use().peak_bytes
        trim()
        reset_peak()
        self._links.clear()
        for peer, (bandwidth_bytes_per_s, latency_s) in extra.get("links", {}).items():
            self._links[peer] = float(bandwidth_bytes_per_s), float(latency_s)
        if install.stage + 1 < len(install.plan.stages):
            below = install.plan.stages[install.stage + 1].device
            # Each stage dials the one below; the one above has dialled this one.
            await self.transport.connect(
                below, install.addresses[below], deadline_s=CONNECT_DEADLINE_S
            )
        self._put(ev.Installed())

    async def _read_rows(self, step: int) -> None:
        await self._stage.rows.read(step)
        self._put(ev.DataReady(step=step))

    async def _read_eval_rows(self, action: ev.RequestEvalData) -> None:
        rows = self._stage.eval_rows
        assert rows is not None, "the machine evaluates only what Install brought"
        await rows.read(action.microbatch)
        self._put(ev.EvalDataReady(version=action.version, microbatch=action.microbatch))

    def _take_spans(self) -> list[list[Any]]:
        spans, self._spans = self._spans, []
        return spans

    async def _report(self, spans: list[list[Any]]) -> None:
        extra = {"spans": spans, "memory": self._memory()}
        frame = seal(Envelope(None, extra=extra))
        await self._deliver(self.coordinator, frame, Lane.CONTROL)

    def _memory(self) -> dict[str, int]:
        """What this process holds, at most, by phase, and what its programs need."""
        use = memory_use()
        step_bytes, update_bytes = self._stage.temp_bytes
        return {
            "idle_bytes": self._idle_bytes,
            "now_bytes": use.now_bytes,
            "loading_peak_bytes": self._loading_peak_bytes,
            "peak_bytes": use.peak_bytes,
            "step_temp_bytes": step_bytes,
            "update_temp_bytes": update_bytes,
            "program_ops": self._stage.worker.loaded.ops,
        }

    def _unload(self) -> None:
        self._life += 1
        if self._compute is not None:
            self._compute.clear()
        self._slots.clear()
        self._spans.clear()
        self._held = None
        trim()
        reset_peak()


async def serve(
    *, device: str, coordinator_address: str, listen: str, speed: float, token: str
) -> int:
    """Joins a coordinator over gRPC and serves its runs. Returns the process's exit status."""
    transport = GrpcTransport(device, run="crowd", token=token, address=listen)
    coordinator = "coordinator"
    try:
        address = await transport.start()
        await transport.connect(coordinator, coordinator_address, deadline_s=CONNECT_DEADLINE_S)
        await say_hello(transport, coordinator, address, speed)
        await Appliance(transport, coordinator=coordinator, speed=speed).run()
    except CrowdMeshError as exc:
        logger.error("%s", exc)
        return 1
    finally:
        await transport.close()
    return 0


async def say_hello(transport: Transport, coordinator: str, address: str, speed: float) -> None:
    """Tells the coordinator where this device listens and what it can read."""
    import jax
    import jax.export

    hello = msg.Hello(
        address=address,
        resources={"cores": float(os.cpu_count() or 1), "speed": speed},
        versions={
            "jax": jax.__version__,
            "calling_convention": str(jax.export.maximum_supported_calling_convention_version),
        },
    )
    await transport.send(coordinator, seal(Envelope(hello)), Lane.CONTROL)
