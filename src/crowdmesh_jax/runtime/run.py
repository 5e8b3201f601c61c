"""The body round the coordinator machine: one run over a crew.

Feeds the machine what arrives, carries out what it demands: journal, messages with their arrays,
checkpoints, news for the user. Decides nothing. All methods run on the crew's loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..agent.envelope import EVALUATION, TRAINING, Envelope, Group, Key, seal, unseal
from ..control import ControlTerms, CopyGone, Departing, StepCommitted, WaveKept
from ..core import PipelinePlan, values
from ..data import DataSource
from ..errors import CrowdMeshError, ProtocolError, RecordError
from ..protocol import coordinator as machine
from ..protocol import coordinator_events as ev
from ..protocol import messages as msg
from ..protocol import records
from ..protocol.common import Fault, Slot
from ..protocol.records import record_to_plain
from ..record import Journal, RunFolder
from ..transport import Lane, PeerGone, Received
from .crew import COORDINATOR, Crew
from .memory import MemoryReport
from .outbox import Outbox
from .outfit import Outfitter
from .placing import Placer
from .policy import Planner, PolicyBody
from .recovery import RecoveryClock
from .told import Span, read_carried, read_memory, read_spans

logger = logging.getLogger(__name__)

TICK_S = 0.2
DISK_S, DISK_RETRY_S = 600.0, 1.0
"""A journal that cannot be written is tried again for so long, so often."""
MOST_REASON = 300
"""Characters that are kept of what a device says went wrong."""
CLOSE_S = 3.0
"""For the last messages to members; who does not take them meets the next run's Install."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run came to."""

    arrays: Mapping[Key, np.ndarray] = field(repr=False)
    reason: str
    """Why it stopped before its last step; empty if it did not."""


class Run:
    """One run from Start to Complete or HaltRun.

    Args:
        outfitter: What goes with each Install.
        load_state: Version -> all arrays of it, from the checkpoint. Slow: called in a thread.
        terms, planner, placer: Of the policy: how eager it is, how it plans, where copies go.
        source: Read here for devices that hold no copy of it.
        eval_source: The same for evaluation, by microbatch.
        restart: The journal's records of this run, which goes on where it is; (): a new one.
        term, epoch: Of the start before, from the run's journal; 0: there was none.
        on_news: Called on the loop with what the machine announces.
        on_spans: Called on the loop with op times as they come.
        on_memory: Called on the loop with what a device's process holds, once a step.
        meta: Goes into each checkpoint's manifest.
    """

    def __init__(
        self,
        crew: Crew,
        folder: RunFolder,
        events: Journal,
        start: ev.Start,
        *,
        run: str,
        restart: tuple[records.Record, ...],
        term: int,
        epoch: int,
        outfitter: Outfitter,
        load_state: Callable[[int], Mapping[Key, np.ndarray]],
        terms: ControlTerms,
        planner: Planner,
        placer: Placer | None,
        policy_log: Journal | None,
        source: DataSource,
        eval_source: DataSource | None,
        on_news: Callable[[Any], None],
        on_spans: Callable[[Sequence[Span]], None],
        on_memory: Callable[[MemoryReport], None],
        meta: Mapping[str, Any],
    ) -> None:
        self._crew = crew
        self._folder = folder
        self._journal = events
        self._start = start
        self._sources = {TRAINING: source, EVALUATION: eval_source}
        self._on_news = on_news
        self._on_spans = on_spans
        self._on_memory = on_memory
        self._meta = meta
        self._restart = restart
        self._state = machine.CoordinatorState(
            device=machine.DeviceId(COORDINATOR), run=run, term=term + 1, epoch=epoch
        )
        self._events: asyncio.Queue[tuple[ev.CoordinatorEvent, Envelope | None]] = asyncio.Queue()
        self._slots: dict[Slot, Group] = {}
        self._outfitter = outfitter
        self._load_state = load_state
        self._policy = PolicyBody(
            terms,
            crew.crowd,
            outfitter,
            planner,
            ask=self._put,
            post=self._prepare,
            spawn=self._spawn,
            placer=placer,
            log=policy_log,
        )
        self._clock = RecoveryClock()
        self._outbox = Outbox(crew.transport, self._spawn)
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closing = False
        self._result: asyncio.Future[Outcome] | None = None
        self._final: dict[Key, np.ndarray] = {}

    async def run(self) -> Outcome:
        """Trains; returns all arrays of the final version.

        Raises:
            CrowdMeshError: What halted the run.
        """
        self._result = asyncio.get_running_loop().create_future()
        with self._crew.listen(self._take):
            if self._restart:
                self._put(ev.Restart(start=self._start, records=self._restart))
            else:
                self._put(self._start)
            # Who has no stage comes first: the run begins when the last one with a stage is here.
            planned = self._start.plan.devices
            spares = [device for device in self._crew.hellos if device not in planned]
            for device in (*(spares if self._start.recovery is not None else ()), *planned):
                hello = self._crew.hellos.get(device)
                if hello is None:
                    continue  # of a run that is taken up; it may yet come
                self._put(ev.MessageReceived(sender=device, message=hello))
            helpers = [
                asyncio.create_task(self._tick(), name="tick"),
                asyncio.create_task(self._handle_events(), name="events"),
            ]
            try:
                # The one wait without a deadline of its own: the machine has one for each phase.
                await asyncio.wait([self._result, *helpers], return_when=asyncio.FIRST_COMPLETED)
            finally:
                await self._close(helpers)
        for helper in helpers:
            if helper.done() and not helper.cancelled():
                helper.result()  # our own bug: raise it rather than wait for ever
        return self._result.result()

    async def _close(self, helpers: list[asyncio.Task[None]]) -> None:
        """Lets the last messages out (Release, Halt), then ends all tasks."""
        self._is_closing = True
        self._policy.close()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_S)
        left = [*helpers, *self._tasks]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def interrupt(self) -> None:
        """The user wants to stop."""
        self._put(ev.Interrupt())

    def ask(self, event: ev.StopAsked | ev.CheckpointAsked | Departing) -> None:
        """The user's code wants something of the run, or knows something."""
        if isinstance(event, Departing):
            self._policy.tell(event)
        else:
            self._put(event)

    # What happens --------------------------------------------------------------------------------

    def _put(self, event: ev.CoordinatorEvent, envelope: Envelope | None = None) -> None:
        self._events.put_nowait((event, envelope))

    def _take(self, item: Received | PeerGone) -> None:
        if self._is_closing:
            return
        if isinstance(item, PeerGone):
            lost = ev.MemberLost(device=machine.DeviceId(item.peer), reason=item.reason)
            self._put(lost)
            self._policy.lost(item.peer)
            return
        try:
            envelope = unseal(item.frame)
        except CrowdMeshError as exc:
            logger.error("a frame from %s was refused: %s", item.peer, exc)
            return
        if "spans" in envelope.extra:
            self._on_spans(read_spans(item.peer, envelope.extra["spans"]))
        if "memory" in envelope.extra:
            memory = read_memory(item.peer, envelope.extra["memory"])
            if memory is not None:
                self._on_memory(memory)
        self._clock.heard(item.peer)
        if envelope.message is not None:
            self._note(item.peer, envelope.message)
            self._put(ev.MessageReceived(sender=item.peer, message=envelope.message), envelope)
        elif "prepared" in envelope.extra or "unprepared" in envelope.extra:
            self._take_prepared(item.peer, envelope.extra)
        elif "carried" in envelope.extra:
            measured = read_carried(item.peer, envelope.extra["carried"])
            if measured is not None and measured.sender in self._state.party:
                self._policy.tell(measured)
        elif isinstance(loaded := envelope.extra.get("loaded"), Mapping):
            self._clock.loaded(item.peer, loaded)
        elif isinstance(step := envelope.extra.get("ask_rows"), int):
            of = str(envelope.extra.get("of", TRAINING))
            self._spawn(self._send_rows(item.peer, step, of), f"rows of {of}, step {step}")

    def _note(self, device: str, message: msg.Message) -> None:
        """What bodies know of each other besides."""
        if isinstance(message, msg.Hello):
            self._policy.joined(device)
        elif isinstance(message, msg.Ready) and message.epoch == self._state.epoch:
            index = self._state.plan.stage_of(device)
            if index is not None:
                self._policy.ready(device, self._outfitter.key(self._state.plan, index))
        elif isinstance(message, msg.Stored) and message.epoch == self._state.epoch:
            self._policy.stored(device, message.copy)
        elif isinstance(message, msg.CopyLost):
            gone = CopyGone(device=str(message.device), first_layer=message.copy.first_layer)
            self._policy.tell(gone)

    def _take_prepared(self, device: str, extra: Mapping[str, Any]) -> None:
        if "unprepared" in extra:
            reason = str(extra.get("error", ""))[:MOST_REASON]
            self._policy.unready(device, str(extra["unprepared"]), reason)
            return
        self._policy.ready(device, str(extra["prepared"]))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._put(ev.Tick())
            self._policy.tick()

    async def _handle_events(self) -> None:
        while True:
            event, envelope = await self._events.get()
            self._state, actions = machine.handle(self._state, event, time.monotonic())
            if isinstance(event, ev.Restart):
                self._answer_asked()
            for action in actions:
                self._clock.saw(action, self._state)
                try:
                    await self._act(action, envelope)
                except CrowdMeshError as exc:
                    logger.error("%s failed: %s", type(action).__name__, exc)
                    self._put(ev.BodyFailed(fault=Fault.of(exc)))
                    break  # journal before message: what follows must not happen

    def _answer_asked(self) -> None:
        """Rows that members asked for when they reached this process, before there was this run."""
        for item in self._crew.take_asked():
            if item.frame.message["extra"].get("run") == self._state.run:
                self._take(item)

    # What is demanded ----------------------------------------------------------------------------

    async def _act(self, action: ev.CoordinatorAction, envelope: Envelope | None) -> None:
        match action:
            case ev.Journal(record=record, sync=sync):
                await self._write_record(record, sync)
            case ev.SendMessage():
                self._send(action)
            case ev.Keep(slots=slots):
                groups = envelope.groups if envelope else ()
                for index, slot in enumerate(slots):
                    self._slots[slot] = groups[index] if index < len(groups) else {}
            case ev.WriteCheckpoint():
                self._spawn(self._write_checkpoint(action), "checkpoint")
            case ev.WriteBest():
                self._spawn(self._write_best(action), "best checkpoint")
            case ev.Forget(version=version):
                self._free(version)
            case ev.Announce(news=news):
                self._announce(news)
            case ev.ChooseOwners(need=need):
                self._policy.needed(need)
            case ev.Reject(sender=sender, fault=fault, is_stranger=is_stranger):
                logger.error("refused: %s", fault.text)
                if is_stranger:
                    self._crew.transport.disconnect(sender, fault.text)
            case ev.Complete():
                self._spawn(self._complete(action), "result")
            case ev.HaltRun(fault=fault):
                self._end(fault.error())

    async def _write_record(self, record: records.Record, sync: bool) -> None:
        """Journal before message: while the disk takes nothing, nothing else is done here, and the
        devices train on (section 10).

        Raises:
            RecordError: The run does not recover, or the disk was full for too long.
        """
        stamped = {"at_s": round(time.time(), 3), **record_to_plain(record)}
        until_s = time.monotonic() + DISK_S
        while True:
            try:
                self._journal.append(stamped, durable=sync)
                return
            except RecordError as exc:
                if self._start.recovery is None or time.monotonic() > until_s:
                    raise
                logger.error(
                    "%s; the devices train on, but no copy or checkpoint counts and no loss is"
                    " recovered until there is room: waiting, at most %.0f s more",
                    exc.message,
                    until_s - time.monotonic(),
                )
            await asyncio.sleep(DISK_RETRY_S)

    def _end(self, result: Outcome | CrowdMeshError) -> None:
        assert self._result is not None
        if self._result.done():
            return
        if isinstance(result, Outcome):
            self._result.set_result(result)
        else:
            self._result.set_exception(result)

    def _announce(self, news: Any) -> None:
        self._on_news(news)
        if isinstance(news, ev.StepShown) and (recovery := self._clock.stepped()) is not None:
            self._on_news(recovery)
        if self._start.recovery is None:
            return
        if isinstance(news, ev.EpochOpened):
            # Reports bring all verdicts that anyone still needs.
            self._slots = {s: g for s, g in self._slots.items() if s.kind != "verdict"}
        elif isinstance(news, ev.StepShown):
            in_wave = self._state.wave_asked_s is not None
            self._policy.tell(StepCommitted(step=news.step, step_s=news.step_s, in_wave=in_wave))
        elif isinstance(news, ev.WaveKept):
            self._policy.tell(WaveKept(version=news.version))
        elif isinstance(news, ev.WaveGivenUp):
            self._policy.wave_given_up(self._state, news.missing)
        elif isinstance(news, ev.PhaseChanged) and news.phase == "running":
            self._policy.running(self._state)

    def _prepare(self, device: str, plan: PipelinePlan, stage: int) -> None:
        """Sends a stage's programs and rows to a device that may have to take it over."""

        async def make() -> Any:
            kit = await asyncio.to_thread(self._outfitter.kit, plan, stage)
            extra = {**kit.extra, "prepare": kit.extra["kit"]}
            return seal(Envelope(None, (kit.arrays,), extra))

        self._outbox.post(device, Lane.BULK, make)

    def _send(self, action: ev.SendMessage) -> None:
        message = action.message
        lane = Lane(action.lane)
        if isinstance(message, msg.Install):
            verdicts = tuple(self._slots.get(slot, {}) for slot in action.attach[1:])

            async def install() -> Any:
                return await self._install_frame(message, action.to, verdicts)

            self._outbox.post(action.to, lane, install)
            return
        groups = tuple(
            self._slots.get(slot, {}) if slot.kind == "verdict" else self._slots.pop(slot, {})
            for slot in action.attach
        )
        self._outbox.post_frame(action.to, lane, seal(Envelope(message, groups)))

    async def _install_frame(
        self, install: msg.Install, device: str, verdicts: tuple[Group, ...]
    ) -> Any:
        """The frame of an Install: what its device lacks goes with it."""
        plan, stage = install.plan, install.stage
        arrays: dict[Key, Any] = {}
        extra: dict[str, Any] = self._outfitter.addressed(plan, stage)
        if install.action == "restore":
            if not self._policy.has(device, extra["kit"]):
                kit = await asyncio.to_thread(self._outfitter.kit, plan, stage)
                arrays |= kit.arrays
                extra = {**kit.extra, **extra}
            if not install.sources or any(s.device == COORDINATOR for s in install.sources):
                version = install.base if install.state_version is None else install.state_version
                state = await asyncio.to_thread(self._load_state, version)
                arrays |= self._outfitter.state(plan, stage, state)
        return seal(Envelope(install, (arrays, *verdicts), extra))

    def _spawn(self, work: Any, name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(self._guarded(work, name), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _guarded(self, work: Any, name: str) -> None:
        try:
            await work
        except Exception as exc:
            logger.error("%s failed", name, exc_info=exc)
            self._put(ev.BodyFailed(fault=Fault.of(exc).within(name)))

    def _state_slots(self, version: int) -> list[Slot]:
        return [slot for slot in self._slots if slot.kind == "state" and slot.step == version]

    def _arrays(self, version: int) -> dict[Key, np.ndarray]:
        arrays: dict[Key, np.ndarray] = {}
        for slot in self._state_slots(version):
            arrays.update(self._slots[slot])
        return arrays

    def _free(self, version: int) -> None:
        for slot in self._state_slots(version):
            del self._slots[slot]

    async def _write_checkpoint(self, action: ev.WriteCheckpoint) -> None:
        version = action.version
        arrays = self._arrays(version)
        meta = {**self._meta, "epoch": self._state.writing_tag}
        try:
            await asyncio.to_thread(self._folder.save_checkpoint, version, arrays, meta)
        except RecordError as exc:
            self._free(version)
            self._put(ev.CheckpointFailed(version=version, fault=Fault.of(exc)))
            return
        if not action.hold:
            self._free(version)
        if action.is_final:
            self._final = arrays
        self._put(ev.CheckpointWritten(version=version))

    async def _write_best(self, action: ev.WriteBest) -> None:
        best = {"metric": action.metric, "value": action.value}
        meta = {**self._meta, "best": best}
        arrays = self._arrays(action.version)
        await asyncio.to_thread(self._folder.save_best, action.version, arrays, meta)
        self._free(action.version)
        self._put(ev.BestWritten(version=action.version))

    async def _complete(self, action: ev.Complete) -> None:
        arrays = self._final
        if not arrays:  # it stopped before the last step: the result is its checkpoint
            try:
                kept = await asyncio.to_thread(self._folder.load_checkpoint)
            except CrowdMeshError as exc:
                self._end(exc)  # the machine is done: nobody else would end the run
                return
            assert kept.version == action.version, "nothing is written after a stop"
            arrays = dict(kept.arrays)
        self._end(Outcome(arrays=arrays, reason=action.reason))

    async def _send_rows(self, device: str, step: int, of: str) -> None:
        """Answers a device that holds no copy of the source."""
        plan = self._state.plan
        extra: dict[str, Any] = {"rows": step, "of": of}
        groups: tuple[Group, ...] = ()
        try:
            source = self._sources.get(of)
            if source is None:
                raise ProtocolError(f"rows of {of!r}, of which there is no source")
            inputs, targets = await asyncio.to_thread(source.batch, step)
            named: dict[Key, np.ndarray] = {}
            if device == plan.stages[0].device:
                named.update(_leaves("inputs", inputs))
            if device == plan.stages[-1].device:
                named.update(_leaves("targets", targets))
            groups = (named,)
        except Exception as exc:  # user code: whatever it raises ends the run, named
            name = "data source, step" if of == TRAINING else "evaluation source, microbatch"
            extra["error"] = values.to_plain(Fault.of(exc).within(f"{name} {step}"))
        await self._outbox.deliver(device, Lane.BULK, seal(Envelope(None, groups, extra)))


def _leaves(part: str, tree: Any) -> dict[Key, np.ndarray]:
    import jax

    return {("rows", part, str(i)): np.asarray(x) for i, x in enumerate(jax.tree.leaves(tree))}
