"""A crowd in virtual time: members, spares, a coordinator on one heap, and whatever befalls them.

Every message crosses as JSON. Channels are in order per pair and lane, with random delays, so that
channels overtake each other. Devices are killed, freeze and wake as zombies, return, start anew;
the coordinator crashes between any two of its actions and starts again from its journal. After each
event the invariants (I1-I13) are checked; what arrays hold is checked against `toy.Reference`.
"""

from __future__ import annotations

import heapq
import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from crowdmesh_jax.core import schedule_for
from crowdmesh_jax.core.plan import PipelinePlan
from crowdmesh_jax.protocol import (
    CoordinatorState,
    Fault,
    coordinator,
    message_from_plain,
    message_to_plain,
    messages,
    record_from_plain,
    record_to_plain,
    records,
)
from crowdmesh_jax.protocol import coordinator_events as ce
from crowdmesh_jax.protocol import member_events as me
from crowdmesh_jax.protocol.evidence import Base, is_valid
from crowdmesh_jax.protocol.owners import OwnersChoice, choose_owners, ring_holders

from .crowd_member import HUB, CrowdMember
from .toy import Reference, Rollbacks

DUE = {
    messages.Fence: lambda m: (records.Epoch, m.epoch),
    messages.Install: lambda m: (records.Decision, m.epoch),
    messages.Enlist: lambda m: (records.Decision, m.epoch),
    messages.Resume: lambda m: (records.Resumed, m.epoch),
    messages.Discard: lambda m: (records.Wave, m.version),
    messages.VerdictKnown: lambda m: (records.VerdictDecided, m.epoch),
    messages.Attach: lambda m: (records.Term, m.term),
    messages.Release: lambda m: (records.Finish, None),
}
"""Message -> the record that must be on disk before it (I11)."""
QUICK = ce.Deadlines(
    gather_s=60, ready_s=120, first_step_s=200, step_floor_s=60, heartbeat_floor_s=20, finish_s=120
)


class Crowd:
    """A run; `step()` is one event."""

    def __init__(
        self,
        *,
        stages: int = 3,
        layers: int | None = None,
        spares: int = 2,
        microbatches: int = 2,
        steps: int = 8,
        seed: int = 0,
        schedule: str = "1f1b",
        copies: int = 1,
        **start: Any,
    ) -> None:
        devices = [f"d{i}" for i in range(stages)]
        self.names = [*devices, *(f"s{i}" for i in range(spares))]
        layers = layers or stages + 1
        self.plan = PipelinePlan.even(layers, devices, microbatches=microbatches, schedule=schedule)
        self.random = random.Random(seed)
        self.copies = copies
        self.wishes = False
        self.damage = 0.0
        """Share of copies that are damaged when they come, or are read."""
        self.rollbacks = Rollbacks()
        self.reference = Reference(layers, microbatches, self.rollbacks, start.get("ties", ()))
        self.now_s, self.sequence, self.events = 0.0, 0, 0
        self.heap: list[tuple[float, int, Callable[[], None]]] = []
        self.last_s: dict[tuple[str, str, str], float] = {}
        terms: dict[str, Any] = {
            "holders": ring_holders(self.plan, self.names, copies=copies),
            "wave_every": 2,
            "log_steps": 6,
            **start.pop("terms", {}),
        }
        self.begin = ce.Start(
            plan=self.plan,
            schedule=schedule_for(self.plan),
            steps=steps,
            deadlines=QUICK,
            recovery=ce.RecoveryTerms(**terms),
            **start,
        )
        self.granted: dict[tuple[int, int], str] = {}
        """(epoch, layer) -> owner (I1)."""
        self.hub = Hub(self)
        self.members = {name: CrowdMember(self, name) for name in self.names}
        self.log: list[str] = []
        for name in self.names:
            self.say_hello(name)
        self.after(1.5, lambda: self.hub.on(self.begin))
        self.ticks()

    # Time and the network ------------------------------------------------------------------------

    def delay(self) -> float:
        return self.random.choice((0.0, 0.001, 0.02 * self.random.random(), self.random.random()))

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        self.sequence += 1
        heapq.heappush(self.heap, (self.now_s + seconds, self.sequence, call))

    def ticks(self) -> None:
        for body in (self.hub, *self.members.values()):
            body.on(me.Tick())
        self.after(1.0, self.ticks)

    def step(self) -> None:
        self.now_s, _, call = heapq.heappop(self.heap)
        call()
        self.events += 1

    def run(self, *, until: Callable[[], bool] | None = None, events: int = 60_000) -> Crowd:
        """To the end, or until it holds.

        Raises:
            AssertionError: An invariant is broken, or it takes more than so many events (I13)."""
        while not (self.hub.is_over or (until and until())):
            assert self.events < events, f"it never ends: {self.hub.state.phase}, {self.log[-20:]}"
            self.step()
            self.check()
        return self

    def send(self, sender: str, to: str, message: Any, lane: str, arrays: Any = ()) -> None:
        key = sender, to, lane
        self.last_s[key] = max(self.now_s + self.delay(), self.last_s.get(key, 0.0))
        wire = json.dumps(message_to_plain(message))
        lives = self.life_of(sender), self.life_of(to)
        if sender == HUB:  # its channel to a process stands from that one's Hello on
            lives = lives[0], self.hub.connected.get(to, -1)

        def arrive() -> None:
            target = self.hub if to == HUB else self.members[to]
            if isinstance(message, messages.Hello):
                self.hub.connected[sender] = lives[0]
            if lives != (self.life_of(sender), self.life_of(to)):
                return  # a process ended, and its channels with it
            received = message_from_plain(json.loads(wire))
            target.on(me.MessageReceived(sender=sender, message=received), arrays)

        self.after(self.last_s[key] - self.now_s, arrive)

    def life_of(self, name: str) -> int:
        return self.hub.life if name == HUB else self.members[name].life

    def say_hello(self, name: str) -> None:
        body = self.members[name]
        if not body.is_dead:
            self.send(name, HUB, messages.Hello(address=f"at-{name}"), "control")

    # What befalls it ----------------------------------------------------------------------------

    def kill(self, name: str) -> None:
        """The process ends; all peers see their channels end, sooner or later."""
        self.log.append(f"{self.now_s:.2f} kill {name}")
        self.members[name].die()
        self.channels_end(name, "killed")

    def channels_end(self, name: str, reason: str) -> None:
        life = self.members[name].life
        for body in (self.hub, *self.members.values()):
            kind = ce.MemberLost if body is self.hub else me.PeerLost
            event = kind(device=name, reason=reason)

            def tell(body: Any = body, event: Any = event) -> None:
                if life == self.members[name].life:  # not after it is back
                    body.on(event)

            self.after(self.delay(), tell)

    def suspect(self, name: str) -> None:
        """The coordinator holds a device to be lost that is alive: a zombie."""
        self.log.append(f"{self.now_s:.2f} suspect {name}")
        self.hub.on(ce.MemberLost(device=name, reason="wrongly suspected"))

    def freeze(self, name: str, seconds: float) -> None:
        """The process is stopped for a while; what comes meanwhile waits."""
        self.log.append(f"{self.now_s:.2f} freeze {name} {seconds:.1f}")
        body = self.members[name]
        body.is_asleep = True
        self.after(seconds, body.wake)

    def restart(self, name: str) -> None:
        """A new process on the device: nothing of the old one is left."""
        self.log.append(f"{self.now_s:.2f} restart {name}")
        if not self.members[name].is_dead:
            self.kill(name)
        fresh = CrowdMember(self, name)
        fresh.life = self.members[name].life + 1
        self.members[name] = fresh
        self.say_hello(name)

    def ask_change(self) -> None:
        """The policy wants another plan, though nobody is lost."""
        self.log.append(f"{self.now_s:.2f} change")
        self.wishes = True
        self.hub.on(ce.ChangeAsked(reason="a better plan"))

    def ask_holders(self) -> None:
        """The policy wants copies elsewhere."""
        self.log.append(f"{self.now_s:.2f} holders")
        party = list(self.hub.state.party)
        self.random.shuffle(party)
        copies = self.random.choice((1, 2))
        self.hub.on(
            ce.HoldersAsked(holders=ring_holders(self.hub.state.plan, party, copies=copies))
        )

    def wish(self, need: Any) -> OwnersChoice:
        """Any plan over whoever is here: other owners, perhaps other cuts."""
        self.wishes = False
        devices = list(need.devices)
        self.random.shuffle(devices)
        layers, stages = self.plan.num_layers, len(need.plan.stages)
        if self.random.random() < 0.5:
            plan = replace(
                need.plan,
                stages=tuple(
                    replace(stage, device=device)
                    for stage, device in zip(need.plan.stages, devices, strict=False)
                ),
            )
            if len(plan.stages) < stages:
                plan = need.plan
        else:
            count = self.random.randint(1, min(len(devices), layers))
            plan = PipelinePlan.even(
                layers, devices[:count], microbatches=self.plan.microbatches,
                schedule=self.plan.schedule,
            )  # fmt: skip
        holders = ring_holders(plan, need.devices, copies=self.copies)
        return OwnersChoice(plan=plan, holders=holders, reason="wished")

    def crash_hub(self, *, after_actions: int = 0, down_s: float = 1.0) -> None:
        """The coordinator ends, perhaps in the middle of a list of actions; it starts again."""
        self.log.append(f"{self.now_s:.2f} crash hub")
        self.hub.crash_after, self.hub.down_s = after_actions, down_s
        if after_actions == 0:
            self.hub.crash()

    # Invariants ---------------------------------------------------------------------------------

    def check(self) -> None:
        """I2 on all who run; the others are checked where they happen."""
        versions: dict[int, set[int]] = {}
        for body in self.members.values():
            state = body.state
            if not body.is_dead and state.install is not None and state.phase.value == "run":
                versions.setdefault(state.active, set()).add(body.version)
        for epoch, found in versions.items():
            assert max(found) - min(found) <= 1, f"I2: epoch {epoch} runs at versions {found}"

    def check_commit(self, body: CrowdMember, step: int) -> None:
        """T1: whoever applies a step, every other stage of the epoch has all of its gradient."""
        epoch = body.state.active
        if body.state.phase.value != "run":
            return
        for other in self.members.values():
            state = other.state
            runs = state.install is not None and state.phase.value == "run"
            if other.is_dead or not runs or state.active != epoch:
                continue
            is_full = len(other.counted) == self.plan.microbatches and other.version == step
            assert other.version > step or is_full, f"T1: {body.name} applies {step} too early"

    def check_grant(self, epoch: int, layers: range, name: str) -> None:
        for layer in layers:
            owner = self.granted.setdefault((epoch, layer), name)
            assert owner == name, f"I1: epoch {epoch} gives layer {layer} to {owner} and {name}"

    def check_state(self, name: str, states: dict[int, Any], version: int, epoch: int) -> None:
        """I3, I5: it is exactly what the undisturbed run of this history has."""
        expected = self.reference.state(version, epoch)
        for layer, state in states.items():
            assert state == expected[layer], f"I5: {name}, layer {layer} at {version}, {epoch=}"


class Hub:
    """The coordinator's body, and its disk."""

    def __init__(self, crowd: Crowd) -> None:
        self.crowd = crowd
        self.life = 0
        self.journal: list[dict[str, Any]] = []
        self.records: list[Any] = []
        """The journal, read back."""
        self.disk: dict[int, dict[int, Any]] = {0: dict(enumerate(crowd.reference.state(0, 0)))}
        self.shown: dict[int, float] = {}
        self.news: list[Any] = []
        self.fault: Fault | None = None
        self.completed: int | None = None
        self.crash_after: int | None = None
        self.is_down, self.down_s = False, 1.0
        self.done = 0
        """Steps shown to the user (I8)."""
        self.durable = 0
        self.ledger_lives: dict[str, int] = {}
        """Which process of each device has the copies of the last wave."""
        self.decisions: list[records.Decision] = []
        self.start_anew()

    def start_anew(self) -> None:
        self.state = CoordinatorState(device=HUB, run="r1")  # type: ignore[arg-type]
        self.slots: dict[Any, Any] = {}
        self.connected: dict[str, int] = {}
        """Which process of each device has said Hello."""

    @property
    def is_over(self) -> bool:
        return self.fault is not None or self.completed is not None

    def crash(self) -> None:
        self.is_down = True
        self.crash_after = None
        self.life += 1
        self.crowd.after(self.down_s, self.restart)

    def restart(self) -> None:
        if not self.is_down or self.is_over:
            return
        self.is_down = False
        last = self.records[-1] if self.records else None
        if isinstance(last, records.Halted):
            self.fault = last.fault
            return
        if not any(plain["kind"] == "Decision" for plain in self.journal):
            self.journal.clear()  # nothing was promised yet
            self.records.clear()
            self.start_anew()
            self.crowd.after(1.5, lambda: self.on(self.crowd.begin))
        else:
            self.start_anew()
            self.on(ce.Restart(start=self.crowd.begin, records=tuple(self.records)))
        for name in self.crowd.names:
            self.crowd.say_hello(name)

    def on(self, event: Any, arrays: Any = ()) -> None:
        if self.is_down or self.is_over:
            return
        self.state, actions = coordinator.handle(self.state, event, self.crowd.now_s)
        state = self.state
        assert state.start is None or state.is_over or state.wait is not None, "I13"
        for action in actions:
            if self.crash_after is not None:
                self.crash_after -= 1
                if self.crash_after <= 0:
                    self.crash()
                    return
            self.do(action, arrays)

    def later(self, event: Any) -> None:
        life = self.life

        def tell() -> None:
            if life == self.life:
                self.on(event)

        self.crowd.after(self.crowd.delay(), tell)

    def do(self, action: Any, arrays: Any) -> None:
        crowd = self.crowd
        match action:
            case ce.Journal(record=record):
                self.check_record(record)
                self.journal.append(json.loads(json.dumps(record_to_plain(record))))
                self.records.append(record_from_plain(self.journal[-1]))
            case me.SendMessage():
                self.send(action)
            case me.Keep(slots=slots):
                self.slots.update(zip(slots, arrays, strict=True))
            case ce.WriteCheckpoint(version=version):
                life = self.life

                def write() -> None:
                    if life != self.life:
                        return
                    found: dict[int, Any] = {}
                    for slot in [s for s in self.slots if s.kind == "state"]:
                        if slot.step == version:
                            found |= self.slots.pop(slot)
                    assert len(found) == crowd.plan.num_layers
                    is_running = self.state.phase.value in ("running", "fencing")
                    if crowd.damage and is_running and crowd.random.random() < 0.3:
                        fault = Fault(kind="RecordError", text="the disk is full")
                        self.on(ce.CheckpointFailed(version=version, fault=fault))
                        return
                    self.disk[version] = found  # the older one stays until the record is there
                    self.on(ce.CheckpointWritten(version=version))

                crowd.after(crowd.delay(), write)
            case ce.Forget(version=version):
                for slot in [s for s in self.slots if (s.kind, s.step) == ("state", version)]:
                    del self.slots[slot]
            case ce.ChooseOwners(need=need):
                choice = crowd.wish(need) if crowd.wishes and need.is_still else None
                choice = choice or choose_owners(need, copies=crowd.copies)
                self.later(ce.OwnersChosen(epoch=need.epoch, choice=choice))
            case ce.Announce(news=news):
                if isinstance(news, ce.StepShown):
                    assert news.step in self.shown, "I11"
                self.news.append(news)
                if isinstance(news, ce.Waiting):
                    self.check_waiting()
            case ce.HaltRun(fault=fault):
                self.fault = fault
            case ce.Complete(version=version):
                assert version in self.disk
                epoch = self.state.epoch
                crowd.check_state("disk", self.disk[version], version, epoch)
                self.completed = version
            case me.Reject(fault=fault):
                raise AssertionError(fault.text)
            case _:
                raise AssertionError(action)

    def send(self, action: me.SendMessage) -> None:
        message, crowd = action.message, self.crowd
        due = DUE.get(type(message))
        if due is not None:
            cls, number = due(message)
            kept = [record for record in self.records if isinstance(record, cls)]
            field = {records.Wave: "version", records.Term: "term"}.get(cls, "epoch")
            numbers = [getattr(record, field, None) for record in kept]
            assert number in numbers, f"I11: {message}"
        arrays: tuple[Any, ...] = ()
        if isinstance(message, messages.Install):
            arrays = (self.install_arrays(message), *(self.slots.get(s) for s in action.attach[1:]))
            assert all(array is not None for array in arrays[1:]), f"a verdict is lost: {message}"
        elif action.attach:
            arrays = tuple(self.slots[slot] for slot in action.attach)
        if isinstance(message, (messages.Install, messages.Enlist)):
            lost = [r.lost for r in self.records if isinstance(r, records.Epoch)]
            assert not lost or action.to not in lost[-1] or action.to in self.state.reports, "I12"
        crowd.send(HUB, action.to, message, action.lane, arrays)

    def install_arrays(self, message: messages.Install) -> Any:
        """The state, where the disk is a source."""
        layers = message.plan.stages[message.stage].layers
        from_disk = [s for s in message.sources if s.device == HUB]
        if message.action == "restore" and (from_disk or not message.sources):
            version = message.base if message.state_version is None else message.state_version
            return {layer: self.disk[version][layer] for layer in layers}
        return {}

    # What the journal promises ------------------------------------------------------------------

    def check_record(self, record: Any) -> None:
        crowd = self.crowd
        if isinstance(record, records.Decision):
            epochs = [d.epoch for d in self.decisions]
            assert record.epoch not in epochs, "a number is used once"
            assert record.base >= self.durable, "I7"
            if record.is_rollback:
                crowd.rollbacks.entries.append((record.epoch, record.base))
            else:
                assert record.base >= self.done or not self.decisions, "I8"
                assert record.base >= self.head(record.epoch), "I7: a rollback without saying so"
            self.done = min(self.done, record.base) if record.is_rollback else self.done
            self.decisions.append(record)
            assert set(self.state.reports) <= set(record.crew) or not self.state.reports, "I12"
        elif isinstance(record, records.StepCommitted):
            assert record.step not in self.shown, "shown once"
            self.shown[record.step] = record.values["loss"]
            self.done = max(self.done, record.step + 1)
        elif isinstance(record, records.Wave):
            if not record.ledger:
                self.durable = max(self.durable, record.version)
                self.disk = {v: state for v, state in self.disk.items() if v >= record.version}
            else:
                assert record.version >= self.durable, "I7: durable never goes back"
                self.durable = record.version
                self.check_wave(record)
                # Who acknowledged may have started anew since: then its copy is gone already.
                gone = {
                    device
                    for entry in record.ledger
                    for device in entry.devices
                    if (entry.first_layer, entry.last_layer, record.epoch, record.version)
                    not in crowd.members[device].copies
                }
                lives = {n: body.life for n, body in crowd.members.items()}
                self.ledger_lives = {n: life for n, life in lives.items() if n not in gone}

    def head(self, epoch: int) -> int:
        """Highest valid version of a stage that reported."""
        bases = [Base(epoch=d.epoch, base=d.base) for d in self.decisions]
        return (
            max(
                (
                    said.stage.version
                    for said in self.state.reports.values()
                    if said.stage
                    and not said.stage.is_restoring
                    and is_valid(said.stage.tag, said.stage.version, bases)
                ),
                default=0,
            )
            if epoch > 1
            else 0
        )

    def check_wave(self, record: records.Wave) -> None:
        """R13: who is in the ledger and alive has the copy, whole, of this epoch's history."""
        for entry in record.ledger:
            for device in entry.devices:
                body = self.crowd.members[device]
                if body.is_dead or body.life > 0:
                    continue
                name = (entry.first_layer, entry.last_layer, record.epoch, record.version)
                assert name in body.copies, f"R13: {device} has no {name}"

    def check_waiting(self) -> None:
        """I9: it waits only if some layer's ledger devices are all gone, or devices are too few."""
        crowd = self.crowd
        here = [n for n in self.state.crew if n in self.state.reports]
        if len(here) < len(self.state.plan.stages):
            return
        waves = [r for r in self.records if isinstance(r, records.Wave)]
        if not waves or not waves[-1].ledger:
            raise AssertionError(f"I9: on disk, {self.state.why_waiting}")
        kept = {n for n in here if crowd.members[n].life == self.ledger_lives.get(n)}
        if crowd.damage:
            return  # a ledger does not know what was damaged since
        gone = any(not set(entry.devices) & kept for entry in waves[-1].ledger)
        assert gone, f"I9: {self.state.why_waiting}, {waves[-1]}"
