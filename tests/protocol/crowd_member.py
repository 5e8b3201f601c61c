"""A member's body in virtual time: the compute queue, arrays as `toy` numbers, copies, logs."""

from __future__ import annotations

from collections import deque
from typing import Any

from crowdmesh_jax.core.schedule import OpKind
from crowdmesh_jax.protocol import MemberState, Slot, member, messages
from crowdmesh_jax.protocol import member_events as me
from crowdmesh_jax.protocol.recovery_messages import Manifest

from . import toy

HUB = "hub"


class CrowdMember:
    """One process on a device."""

    def __init__(self, crowd: Any, name: str) -> None:
        self.crowd, self.name, self.life = crowd, name, 0
        self.state = MemberState(device=name, coordinator=HUB)  # type: ignore[arg-type]
        self.is_dead = self.is_asleep = False
        self.inbox: list[tuple[Any, Any]] = []
        self.asked = 0
        """Grows at each Freeze and Unload: answers to what was asked before are not given."""
        self.slots: dict[Slot, Any] = {}
        self.logged: set[Slot] = set()
        self.layers: dict[int, toy.State] = {}
        self.borrowed: dict[int, int] = {}
        """Lending layer of another stage -> its parameters, as they came last."""
        self.version = 0
        self.copies: dict[tuple[int, int, int, int], tuple[dict[int, toy.State], int | None]] = {}
        self.incomplete: dict[tuple[str, Any], Any] = {}
        self.queue: deque[Any] = deque()
        self.is_busy = False
        self.drop_gradient()

    def drop_gradient(self) -> None:
        self.gradients: dict[int, int] = {}
        self.partials: dict[tuple[int, int], int] = {}
        """(lending layer here, borrowing layer) -> gradient, once the step is full."""
        self.counted: list[int] = []
        self.work: dict[int, int] = {}
        self.seen: dict[int, list[int]] = {}
        self.rows_read: set[int] = getattr(self, "rows_read", set())

    def die(self) -> None:
        self.is_dead = True
        self.life += 1

    def wake(self) -> None:
        if self.is_dead or not self.is_asleep:
            return
        self.is_asleep = False
        waiting, self.inbox = self.inbox, []
        for event, arrays in waiting:
            self.on(event, arrays)

    # Events and actions ---------------------------------------------------------------------------

    def on(self, event: Any, arrays: Any = ()) -> None:
        if self.is_dead:
            return
        if self.is_asleep:
            if not isinstance(event, me.Tick):
                self.inbox.append((event, arrays))
            return
        self.state, actions = member.handle(self.state, event, self.crowd.now_s)
        for action in actions:
            self.do(action, arrays)

    def later(self, event: Any, seconds: float | None = None) -> None:
        asked, life = self.asked, self.life

        def tell() -> None:
            if asked == self.asked and life == self.life:
                self.on(event)

        self.crowd.after(self.crowd.delay() if seconds is None else seconds, tell)

    def do(self, action: Any, arrays: Any) -> None:
        match action:
            case me.SendMessage(to=to, message=message, lane=lane, attach=attach):
                values = tuple(self.slots[slot] for slot in attach)
                self.crowd.send(self.name, to, message, lane, values)
            case me.Keep(slots=slots):
                assert len(slots) == len(arrays), (slots, arrays)
                self.slots.update(zip(slots, arrays, strict=True))
            case me.LoadStage(install=install):
                asked, life = self.asked, self.life

                def load() -> None:
                    if asked == self.asked and life == self.life:
                        self.load(install)

                self.crowd.after(self.crowd.delay(), load)
            case me.RequestData(step=step):
                self.rows_read.add(step)
                self.later(me.DataReady(step=step))
            case me.Freeze():
                self.freeze()
            case me.Rewind(step=step, gradient=gradient):
                self.slots = {
                    s: v for s, v in self.slots.items() if s.step < step or s.kind == "state"
                }
                self.logged = {s for s in self.logged if s.step < step}
                if gradient:
                    self.drop_gradient()
            case me.KeepState(copy=copy):
                assert copy.version == self.version
                self.keep(copy, dict(self.layers), self.slots.get(verdict_slot(copy.version - 1)))
            case me.KeepCopy(copy=copy):
                slot = Slot(kind="state", step=copy.version, layer=copy.first_layer)
                self.keep(copy, self.slots[slot], self.slots.get(verdict_slot(copy.version - 1)))
            case me.SendCopy(to=to, copy=copy, epoch=epoch):
                self.send_copy(to, copy, epoch)
            case me.StoreChunk(sender=sender, copy=copy):
                self.incomplete[sender, copy.name] = arrays[0]
            case me.SealCopy(sender=sender, copy=copy, manifest=manifest, epoch=epoch):
                data = self.incomplete.pop((sender, copy.name), None)
                is_whole = data is not None and manifest.checksum == checksum(data)
                is_whole &= self.crowd.random.random() >= self.crowd.damage
                if is_whole:
                    self.keep(copy, *data)
                self.later(me.CopySealed(copy=copy, epoch=epoch, is_whole=is_whole, checksum="c"))
            case me.DropCopies(copies=copies):
                for copy in copies:
                    self.copies.pop(copy.name, None)
            case me.LogFrame(slots=slots):
                self.logged |= set(slots)
            case me.DropLogs(step=step):
                gone = {s for s in self.logged if s.step + (s.kind == "tied") < step}
                self.logged -= gone
                self.slots = {
                    s: v
                    for s, v in self.slots.items()
                    if s not in gone and not (s.kind == "verdict" and s.step < step - 1)
                }
            case me.Rejoin():
                self.crowd.say_hello(self.name)
            case me.Unload():
                self.asked += 1
                self.queue.clear()
                self.slots.clear()
                self.copies.clear()
            case me.Fail(fault=fault):
                raise AssertionError(f"{self.name} failed: {fault.text}")
            case me.Reject(fault=fault, sender=sender):
                raise AssertionError(f"{self.name} refused {sender}: {fault.text}")
            case _:
                self.queue.append(action)
                self.next_op()

    def keep(self, copy: Any, states: dict[int, toy.State], verdict: int | None) -> None:
        assert set(states) == set(copy.layers)
        self.crowd.check_state(f"{self.name}'s copy", states, copy.version, copy.tag)
        self.copies[copy.name] = dict(states), verdict

    def send_copy(self, to: str, copy: Any, epoch: int) -> None:
        if copy.name in self.copies:
            data = self.copies[copy.name]
        else:
            assert copy.version == self.version, "a live state is a source while it stands still"
            data = dict(self.layers), self.slots.get(verdict_slot(copy.version - 1))
        of = {"run": self.state.run, "epoch": epoch, "copy": copy}
        self.crowd.send(self.name, to, messages.Chunk(**of, offset_bytes=0), "bulk", (data,))
        asked, life = self.asked, self.life
        manifest = Manifest(leaves=len(data[0]), size_bytes=16, checksum=checksum(data))

        def seal() -> None:
            if asked == self.asked and life == self.life and not self.is_asleep:
                self.crowd.send(self.name, to, messages.Seal(**of, manifest=manifest), "bulk")

        self.crowd.after(self.crowd.delay(), seal)

    def freeze(self) -> None:
        """The op at work may end; everything else that was asked for is forgotten."""
        ending = self.queue.popleft() if self.is_busy and self.crowd.random.random() < 0.5 else None
        self.queue.clear()
        self.is_busy = False
        self.asked += 1
        self.incomplete.clear()
        if ending is not None:
            answer = self.carry_out(ending)
            if answer is not None:
                self.on(answer)
        self.later(me.Frozen())

    def load(self, install: messages.Install) -> None:
        layers = install.plan.stages[install.stage].layers
        self.crowd.check_grant(install.epoch, layers, self.name)
        version = install.base if install.state_version is None else install.state_version
        brought = self.slots.pop(Slot(kind="install", step=version, layer=layers.start))
        if install.action == "restore":
            found = dict(brought)
            for source in install.sources:
                if source.device == HUB:
                    continue
                if self.crowd.random.random() < self.crowd.damage:
                    self.slots[Slot(kind="install", step=version, layer=layers.start)] = brought
                    self.on(me.CopyDamaged(copy=source.copy, reason="damaged on disk"))
                    return
                states, verdict = self.copies[source.copy.name]
                found.update({k: v for k, v in states.items() if k in layers})
                if verdict is not None:
                    self.slots.setdefault(verdict_slot(source.copy.version - 1), verdict)
            self.layers, self.version = found, version
            self.borrowed = {}
            if version == 0:
                self.borrowed = {tie.owner_layer: toy.initial(tie.owner_layer)[0]
                                 for tie in install.ties}  # fmt: skip
        assert set(self.layers) == set(layers)
        wanted = install.base - (install.action == "apply")
        if install.action != "restore":
            assert self.version == wanted
        self.crowd.check_state(self.name, self.layers, self.version, install.epoch)
        self.on(me.Installed())

    # Compute --------------------------------------------------------------------------------------

    def next_op(self) -> None:
        if self.is_busy or not self.queue:
            return
        self.is_busy = True
        asked, life = self.asked, self.life

        def end() -> None:
            if asked != self.asked or life != self.life or not self.queue:
                return
            if self.is_asleep:
                self.crowd.after(0.5, end)
                return
            answer = self.carry_out(self.queue.popleft())
            self.is_busy = False
            if answer is not None:
                self.on(answer)
            self.next_op()

        self.crowd.after(self.crowd.delay(), end)

    def carry_out(self, action: Any) -> Any:
        match action:
            case me.Compute(kind=kind, step=step, microbatch=microbatch):
                assert step == self.version, "I4"
                if kind is OpKind.FORWARD:
                    self.forward(step, microbatch)
                else:
                    self.backward(step, microbatch)
                return me.OpDone(kind=kind, step=step, microbatch=microbatch)
            case me.FinishStep(step=step):
                parts: dict[Any, int] = {
                    layer: toy.mix(47, g) for layer, g in self.gradients.items()
                }
                for layer, owner in self.crowd.reference.owners.items():
                    if layer in self.gradients:
                        parts[owner, layer] = self.gradients[layer]
                parts |= self.slots.get(Slot(kind="parts_below", step=step), {})
                self.slots[Slot(kind="parts", step=step)] = parts
                self.partials = {
                    key: gradient
                    for key, gradient in parts.items()
                    if isinstance(key, tuple) and key[0] in self.layers
                }
                values = {"loss": float(step)} if self.state.is_last else {}
                return me.StepFinished(step=step, values=values)
            case me.Reduce(step=step):
                all_parts = self.slots[Slot(kind="parts", step=step)]
                parts = {k: v for k, v in all_parts.items() if isinstance(k, int)}
                assert len(parts) == self.crowd.plan.num_layers, "R1: all parts are here"
                self.slots[verdict_slot(step)] = toy.verdict_of(parts)
                return me.Reduced(step=step)
            case me.Apply(step=step):
                count = self.crowd.plan.microbatches
                assert step == self.version, "I3: once per version"
                assert self.counted == list(range(count)), "I3: M gradients, in order"
                self.crowd.check_commit(self, step)
                verdict = self.slots[verdict_slot(step)]
                self.layers = {
                    layer: toy.update(state, self.gradient(layer), self.work[layer], verdict)
                    for layer, state in self.layers.items()
                }
                self.lend(step)
                self.version = step + 1
                self.drop_gradient()
                self.crowd.check_state(self.name, self.layers, self.version, self.state.active)
                return me.Applied(step=step)
            case me.LendTied(step=step):
                assert step == self.version - 1
                self.lend(step)
                return me.TiedLent(step=step)
            case me.Adopt(step=step, layer=layer):
                assert step == self.version - 1, "I4: lent for this version"
                self.borrowed[layer] = self.slots[Slot(kind="tied", step=step, layer=layer)]
                return None
            case me.Snapshot(version=version, layer=layer):
                assert version == self.version
                self.slots[Slot(kind="state", step=version, layer=layer)] = dict(self.layers)
                return me.Snapshotted(version=version)
        raise AssertionError(action)

    def lend(self, step: int) -> None:
        for tie in self.crowd.begin.ties:
            if tie.owner_layer in self.layers:
                slot = Slot(kind="tied", step=step, layer=tie.owner_layer)
                self.slots[slot] = self.layers[tie.owner_layer][0]

    def gradient(self, layer: int) -> int:
        """Summed, with those of the layers that borrow it."""
        lenders = set(self.crowd.reference.owners.values())
        if layer not in lenders:
            return self.gradients[layer]
        partials = {b: g for (owner, b), g in self.partials.items() if owner == layer}
        return toy.merge(self.gradients[layer], partials)

    def used(self, layer: int) -> toy.State:
        """What a layer computes with."""
        owner = self.crowd.reference.owners.get(layer)
        if owner is None:
            return self.layers[layer]
        lent = self.layers[owner][0] if owner in self.layers else self.borrowed[owner]
        return toy.borrow(self.layers[layer], lent)

    def forward(self, step: int, microbatch: int) -> None:
        at = {"step": step, "microbatch": microbatch}
        if self.state.stage == 0:
            assert step in self.rows_read
            generation = self.crowd.rollbacks.generation(step, self.state.active)
            x = toy.rows(step, microbatch, generation)
        else:
            x = self.slots[Slot(kind="x", **at)]
        seen = []
        for layer in sorted(self.layers):
            seen.append(x)
            work = self.work.get(layer, self.layers[layer][1])
            self.work[layer] = toy.statistics(work, x)
            x = toy.forward(self.used(layer), x)
        self.seen[microbatch] = seen
        self.slots[Slot(kind="y", **at)] = x

    def backward(self, step: int, microbatch: int) -> None:
        at = {"step": step, "microbatch": microbatch}
        if self.state.is_last:
            dy = toy.loss_gradient(self.slots[Slot(kind="y", **at)], step, microbatch)
        else:
            dy = self.slots[Slot(kind="dy", **at)]
        order = sorted(self.layers)
        for x, layer in zip(reversed(self.seen[microbatch]), reversed(order), strict=True):
            gradient, dy = toy.backward(self.used(layer), x, dy)
            self.gradients[layer] = toy.mix(43, self.gradients.get(layer, 0), gradient)
        self.counted.append(microbatch)
        self.slots[Slot(kind="dx", **at)] = dy


def verdict_slot(step: int) -> Slot:
    return Slot(kind="verdict", step=step)


def checksum(data: Any) -> str:
    return f"{hash(repr(data)):x}"
