"""A virtual body: drives member and coordinator machines in virtual time, with symbolic arrays.

An "array" is the history of what it was made from, so that any update lost, doubled, mixed or made
from the wrong version shows. Every message crosses as JSON. Channels are in order per pair, lane.
"""

from __future__ import annotations

import heapq
import json
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from crowdmesh_jax.core import OpKind, schedule_for
from crowdmesh_jax.core.plan import PipelinePlan
from crowdmesh_jax.core.times import CutTimes, StageTimes
from crowdmesh_jax.protocol import (
    CoordinatorState,
    Fault,
    MemberState,
    Slot,
    Tie,
    coordinator,
    member,
    message_from_plain,
    message_to_plain,
    messages,
    records,
)
from crowdmesh_jax.protocol import coordinator_events as ce
from crowdmesh_jax.protocol import member_events as me
from crowdmesh_jax.protocol.member_evaluation import EVAL_AHEAD

HUB = "hub"


@dataclass
class Channel:
    """One direction between two peers on one lane."""

    free_s: float = 0.0
    last_s: float = 0.0


class World:
    """A run of `S` members and a coordinator on one heap of timed calls."""

    def __init__(
        self,
        plan: PipelinePlan,
        *,
        steps: int,
        seed: int = 0,
        ties: tuple[Tie, ...] = (),
        stages: Sequence[StageTimes] | None = None,
        cuts: Sequence[CutTimes] | None = None,
        bad_steps: dict[int, str] | None = None,
        scores: Callable[[int], float] = float,
        **start: Any,
    ) -> None:
        self.plan, self.ties, self.bad_steps = plan, ties, bad_steps or {}
        self.scores, self.evaluation = scores, start.get("evaluation")
        self.random = random.Random(seed)
        self.stages, self.cuts = stages, cuts  # fixed times; None: random ones
        self.now_s = 0.0
        self.heap: list[tuple[float, int, Callable[[], None]]] = []
        self.sequence = 0
        self.channels: dict[tuple[str, str, str], Channel] = {}
        self.hub = Hub(self)
        self.members = {d: Member(self, d, i) for i, d in enumerate(plan.devices)}
        self.watch: Callable[[World, str, Any, Any], None] | None = None
        for device in plan.devices:
            self.after(self.delay(), lambda d=device: self.greet(d))
        begin = ce.Start(plan=plan, schedule=schedule_for(plan), steps=steps, ties=ties, **start)
        self.after(self.delay(), lambda: self.hub.on(begin))
        self.ticks()

    def greet(self, device: str) -> None:
        if not self.members[device].is_dead:
            self.send(device, HUB, messages.Hello(), "control")

    def delay(self) -> float:
        return 0.0 if self.stages else self.random.choice((0.0, 0.01, self.random.random()))

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        self.at(self.now_s + seconds, call)

    def at(self, moment_s: float, call: Callable[[], None]) -> None:
        self.sequence += 1
        heapq.heappush(self.heap, (moment_s, self.sequence, call))

    def ticks(self) -> None:
        for body in (self.hub, *self.members.values()):
            body.on(me.Tick())
        self.after(0.25, self.ticks)

    def run(self, *, until: Callable[[], bool] | None = None, events: int = 100_000) -> None:
        """Runs to the end and a while beyond (what is still on its way), or until it holds."""
        while not (self.hub.state.is_over or (until and until())):
            events -= 1
            assert events > 0, "it never ends"
            self.step()
        for _ in range(0 if until else 200):
            self.step()

    def step(self) -> None:
        self.now_s, _, call = heapq.heappop(self.heap)
        call()

    def send(self, sender: str, to: str, message: Any, lane: str, arrays: Any = ()) -> None:
        channel = self.channels.setdefault((sender, to, lane), Channel())
        latency_s, transfer_s = self.delay(), 0.0
        if self.cuts and lane == "pipeline":
            one, other = self.plan.devices.index(sender), self.plan.devices.index(to)
            cut, down = self.cuts[min(one, other)], one < other
            latency_s = cut.forward_latency_s if down else cut.backward_latency_s
            if isinstance(message, (messages.Forward, messages.Backward, messages.EvalForward)):
                transfer_s = cut.forward_transfer_s if down else cut.backward_transfer_s
        channel.free_s = max(self.now_s, channel.free_s) + transfer_s
        channel.last_s = max(channel.free_s + latency_s, channel.last_s)
        wire = json.dumps(message_to_plain(message))
        target = self.hub if to == HUB else self.members[to]

        def arrive() -> None:
            received = message_from_plain(json.loads(wire))
            target.on(me.MessageReceived(sender=sender, message=received), arrays)

        self.after(channel.last_s - self.now_s, arrive)

    def kill(self, device: str, reason: str = "killed") -> None:
        self.members[device].is_dead = True
        for body in (self.hub, *self.members.values()):
            kind = ce.MemberLost if body is self.hub else me.PeerLost
            lost = kind(device=device, reason=reason)
            self.after(self.delay(), lambda b=body, e=lost: b.on(e))


@dataclass
class Hub:
    """The coordinator's body."""

    world: World
    state: CoordinatorState = field(init=False)
    journal: list[Any] = field(default_factory=list)
    shown: list[ce.StepShown] = field(default_factory=list)
    done_s: list[float] = field(default_factory=list)
    shards: dict[Slot, Any] = field(default_factory=dict)
    checkpoints: dict[int, list[Any]] = field(default_factory=dict)
    held: dict[int, list[Any]] = field(default_factory=dict)
    best: dict[int, list[Any]] = field(default_factory=dict)
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    news: list[Any] = field(default_factory=list)
    rejects: list[me.Reject] = field(default_factory=list)
    fault: Fault | None = None
    completed: int | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        self.state = CoordinatorState(device=HUB, run="r1")

    def on(self, event: Any, arrays: Any = ()) -> None:
        if isinstance(event, me.MessageReceived) and isinstance(event.message, messages.Done):
            self.done_s.append(self.world.now_s)
        self.state, actions = coordinator.handle(self.state, event, self.world.now_s)
        state, kinds = self.state, {type(record) for record in self.journal}
        assert state.start is None or state.is_over or state.wait is not None, "I13"
        for action in actions:
            match action:
                case ce.Journal(record=record):
                    self.journal.append(record)
                    kinds.add(type(record))
                case me.SendMessage(to=to, message=message, lane=lane):
                    due = {messages.Install: records.Decision, messages.Resume: records.Resumed}
                    assert due.get(type(message), records.Term) in kinds, "I11"
                    self.world.send(HUB, to, message, lane)
                case me.Keep(slots=(slot,)):
                    self.shards[slot] = arrays[0]
                case ce.WriteCheckpoint(version=version, hold=hold):
                    stages = self.world.plan.stages
                    slots = [Slot(kind="state", step=version, layer=s.first_layer) for s in stages]
                    self.checkpoints[version] = [self.shards.pop(slot) for slot in slots]
                    if hold:
                        self.held[version] = self.checkpoints[version]
                    written = ce.CheckpointWritten(version=version)
                    self.world.after(self.world.delay(), lambda e=written: self.on(e))
                case ce.WriteBest(version=version):
                    self.best[version] = self.held.pop(version)
                    best = ce.BestWritten(version=version)
                    self.world.after(self.world.delay(), lambda e=best: self.on(e))
                case ce.Forget(version=version):
                    del self.held[version]
                case ce.Announce(news=ce.StepShown() as news):
                    self.shown.append(news)
                case ce.Announce(news=ce.EvaluationShown(version=version, values=values)):
                    assert self.shown[-1].step == version - 1, "shown after its step"
                    assert version not in self.evaluations
                    self.evaluations[version] = dict(values)
                case ce.Announce(news=news):
                    self.news.append(news)
                case me.Reject():
                    self.rejects.append(action)
                case ce.HaltRun(fault=fault):
                    self.fault = fault
                case ce.Complete(version=version, reason=reason):
                    assert version in self.checkpoints
                    self.completed, self.reason = version, reason


@dataclass
class Member:
    """A member's body. Gradients are lists of (step, microbatch, versions seen on the way)."""

    world: World
    device: str
    stage: int
    state: MemberState = field(init=False)
    slots: dict[Slot, Any] = field(default_factory=dict)
    version: int = 0
    """Of the parameters, as the compute queue sees them."""
    gradients: list[Any] = field(default_factory=list)
    history: list[Any] = field(default_factory=list)
    borrowed: dict[int, int] = field(default_factory=dict)
    """Lending layer -> version of its leaves held here."""
    evaluated: list[Any] = field(default_factory=list)
    """(version, microbatch) of the evaluation at work."""
    data: set[int] = field(default_factory=set)
    """Steps whose batch is here."""
    queue: deque[Any] = field(default_factory=deque)
    free_s: float = 0.0
    rejects: list[me.Reject] = field(default_factory=list)
    fault: Fault | None = None
    is_dead: bool = False

    def __post_init__(self) -> None:
        self.state = MemberState(device=self.device, coordinator=HUB)
        for tie in self.world.ties:
            if self.stage in tie.stages(self.world.plan)[1]:
                self.borrowed[tie.owner_layer] = 0

    def on(self, event: Any, arrays: Any = ()) -> None:
        if self.is_dead:
            return
        if isinstance(event, me.DataReady):
            self.data.add(event.step)
        self.state, actions = member.handle(self.state, event, self.world.now_s)
        if self.world.watch:
            self.world.watch(self.world, self.device, event, actions)
        for action in actions:
            self.do(action, arrays)

    def later(self, event: Any) -> None:
        self.world.after(self.world.delay(), lambda: self.on(event))

    def do(self, action: Any, arrays: Any) -> None:
        match action:
            case me.SendMessage(to=to, message=message, lane=lane, attach=attach):
                values = tuple(self.slots[slot] for slot in attach)
                self.world.send(self.device, to, message, lane, values)
            case me.Keep(slots=slots) if slots[0].kind != "install":
                self.slots.update(zip(slots, arrays, strict=True))
            case me.LoadStage():
                self.later(me.Installed())
            case me.MeasureStage(repeats=repeats):
                others = [m.state.phase.value for m in self.world.members.values()]
                assert others == ["installed"] * len(others)
                self.later(me.StageMeasured(seconds={"forward": float(repeats)}))
            case me.RequestData(step=step):
                self.later(me.DataReady(step=step))
            case me.RequestEvalData(version=version, microbatch=microbatch):
                self.later(me.EvalDataReady(version=version, microbatch=microbatch))
            case me.Reject():
                self.rejects.append(action)
            case me.Fail(fault=fault):
                self.fault = fault
            case me.Unload():
                self.queue.clear()
            case me.Keep():
                pass
            case _:
                self.compute(action)

    def compute(self, action: Any) -> None:
        """Queues it; it runs when those before it have ended."""
        times = self.world.stages[self.stage] if self.world.stages else None
        seconds = self.world.delay()
        if times is not None and isinstance(action, me.Compute):
            seconds = times.forward_s if action.kind is OpKind.FORWARD else times.backward_s
        elif times is not None and isinstance(action, me.EvalCompute):
            seconds = times.forward_s
        elif times is not None and isinstance(action, me.Apply):
            seconds = times.update_s
        self.free_s = max(self.world.now_s, self.free_s) + seconds
        self.queue.append(action)

        def end() -> None:
            if action in self.queue and not self.is_dead:
                assert self.queue.popleft() is action
                answer = self.carry_out(action)
                if answer is not None:
                    self.on(answer)

        self.world.at(self.free_s, end)  # not as a difference, whose rounding may change the order

    def carry_out(self, action: Any) -> Any:
        world, slots, me_ = self.world, self.slots, self.stage
        first, last = me_ == 0, me_ == len(world.plan.stages) - 1
        everyone, count = range(len(world.plan.stages)), world.plan.microbatches
        match action:
            case me.Compute(kind=kind, step=step, microbatch=microbatch):
                assert step == self.version, "I4"
                assert set(self.borrowed.values()) <= {step}, "a borrowed leaf is old"
                at = {"step": step, "microbatch": microbatch}
                reads = (first and kind is OpKind.FORWARD) or (last and kind is OpKind.BACKWARD)
                assert step in self.data or not reads, "no batch yet"
                if kind is OpKind.FORWARD:
                    seen = () if first else slots[Slot(kind="x", **at)]
                    slots[Slot(kind="y", **at)] = (*seen, (me_, self.version))
                else:
                    seen = slots[Slot(kind="y", **at)] if last else slots[Slot(kind="dy", **at)]
                    assert [stage for stage, _ in seen] == list(everyone)
                    assert {version for _, version in seen} == {step}, "mixed versions"
                    self.gradients.append((step, microbatch))
                    slots[Slot(kind="dx", **at)] = seen
                return me.OpDone(kind=kind, step=step, microbatch=microbatch)
            case me.FinishStep(step=step):
                assert self.gradients == [(step, m) for m in range(count)], "order"
                below = () if last else slots[Slot(kind="parts_below", step=step)]
                tied = [(me_, layer, tuple(self.gradients)) for layer in self.borrowed]
                parts = ((me_, tuple(self.gradients), tuple(tied)), *below)
                slots[Slot(kind="parts", step=step)] = parts
                bad = world.bad_steps.get(step)
                values = {"loss": float("nan") if bad == "nan" else float(step)} if last else {}
                return me.StepFinished(
                    step=step,
                    is_finite=not (last and bad == "nan"),
                    has_weight=not (last and bad == "weightless"),
                    values=values,
                )
            case me.Reduce(step=step):
                parts = slots[Slot(kind="parts", step=step)]
                assert [part[0] for part in parts] == list(everyone), "R1: all parts are here"
                borrowers = [s for tie in world.ties for s in tie.stages(world.plan)[1]]
                assert sorted(t[0] for p in parts for t in p[2]) == sorted(borrowers)
                slots[Slot(kind="verdict", step=step)] = ("reduced", step)
                return me.Reduced(step=step, is_finite=world.bad_steps.get(step) != "inf")
            case me.Apply(step=step, verdict=verdict):
                self.check_commit(step)
                assert slots[Slot(kind="verdict", step=step)] == ("reduced", step)
                kept = () if verdict.skip else tuple(self.gradients)
                self.history.append((step, kept))
                self.version, self.gradients = step + 1, []
                for tie in world.ties:
                    if tie.stages(world.plan)[0] == me_:
                        slot = Slot(kind="tied", step=step, layer=tie.owner_layer)
                        slots[slot] = self.version
                return me.Applied(step=step)
            case me.Adopt(step=step, layer=layer):
                self.borrowed[layer] = slots[Slot(kind="tied", step=step, layer=layer)]
                return None
            case me.Snapshot(version=version, layer=layer):
                assert version == self.version
                slots[Slot(kind="state", step=version, layer=layer)] = tuple(self.history)
                return me.Snapshotted(version=version)
            case me.EvalCompute(version=version, microbatch=microbatch):
                assert version == self.version, "evaluated at one version"
                assert set(self.borrowed.values()) <= {version}, "a borrowed leaf is old"
                assert not self.gradients, "nothing of the next step has begun"
                at = {"step": version, "microbatch": microbatch}
                seen = () if first else slots.pop(Slot(kind="eval_x", **at))
                waiting = [slot for slot in slots if slot.kind == "eval_x"]
                assert len(waiting) < EVAL_AHEAD
                slots[Slot(kind="eval_y", **at)] = (*seen, (me_, self.version))
                if last:
                    assert slots[Slot(kind="eval_y", **at)] == tuple((s, version) for s in everyone)
                self.evaluated.append((version, microbatch))
                return me.EvalDone(version=version, microbatch=microbatch)
            case me.FinishEvaluation(version=version):
                count = world.evaluation.microbatches
                assert self.evaluated[-count:] == [(version, m) for m in range(count)]
                assert last
                values = {"loss": world.scores(version)}
                return me.EvaluationFinished(version=version, values=values)
        raise AssertionError(action)

    def check_commit(self, step: int) -> None:
        """T1, I2, I3: nobody applies before everyone is full; nobody is further than one ahead."""
        assert self.version == step, "I3"
        assert len(self.gradients) == self.world.plan.microbatches, "I3"
        for other in self.world.members.values():
            full = len(other.gradients) == self.world.plan.microbatches
            beyond = other.version == step + 1
            assert beyond or (other.version == step and full), "T1"
