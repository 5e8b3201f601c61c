"""The pure machines with 1,000 devices: events per second of one core.

A coordinator whose run has 1,000 members (40 with a stage, the others hold copies or are spares)
takes what they say in ordinary running: heartbeats, Done and Loss, Stored, ticks. Then it loses one
and goes through fence, reports, decision and install. Members take what a step brings them.

    python benchmarks/machines.py [--repeats 7] [--devices 1000] [--quick]
"""

from __future__ import annotations

import time
from typing import Any

from _measure import arguments, figure, report

from crowdmesh_jax.core import PipelinePlan, schedule_for
from crowdmesh_jax.protocol import (
    CoordinatorState,
    Evidence,
    MemberState,
    RecoveryTerms,
    Verdict,
    choose_owners,
    coordinator,
    member,
    messages,
)
from crowdmesh_jax.protocol import coordinator_events as ce
from crowdmesh_jax.protocol import member_events as me
from crowdmesh_jax.protocol.evidence import Copy, LogSpan, StageReport
from crowdmesh_jax.protocol.owners import ring_holders

STAGES = 40
STEPS = 1_000_000


class Hub:
    """A coordinator machine and its clock; what it demands is counted and dropped."""

    def __init__(self, devices: int) -> None:
        self.names = [f"d{i:04d}" for i in range(devices)]
        self.plan = PipelinePlan.even(STAGES, self.names[:STAGES], microbatches=8)
        self.state = CoordinatorState(device="hub", run="r")  # type: ignore[arg-type]
        self.now_s, self.events, self.actions = 0.0, 0, 0
        holders = ring_holders(self.plan, self.names, copies=1)  # type: ignore[arg-type]
        start = ce.Start(
            plan=self.plan,
            schedule=schedule_for(self.plan),
            steps=STEPS,
            recovery=RecoveryTerms(holders=holders, wave_every=10**6, log_steps=16),
        )
        for name in self.names:
            self.say(name, messages.Hello(address=f"at-{name}"))
        self.on(start)
        for name in self.names:
            self.say(name, messages.Ready(**self.of))
        assert self.state.phase.value == "running", self.state.phase

    @property
    def of(self) -> dict[str, Any]:
        return {"run": "r", "epoch": self.state.epoch}

    def on(self, event: Any) -> tuple[Any, ...]:
        self.state, actions = coordinator.handle(self.state, event, self.now_s)
        self.events += 1
        self.actions += len(actions)
        return actions

    def say(self, sender: str, message: Any) -> tuple[Any, ...]:
        return self.on(me.MessageReceived(sender=sender, message=message))

    def run(self, steps: int) -> None:
        """Steps of 0.5 s; in each, every device's heartbeat and two ticks."""
        for _ in range(steps):
            step = self.state.committed
            self.say(self.names[0], messages.Done(**self.of, step=step, verdict=Verdict()))
            last = self.names[STAGES - 1]
            self.say(last, messages.Loss(**self.of, step=step, values={"loss": 1.0}))
            for index, name in enumerate(self.names):
                if index % (len(self.names) // 2) == 0:
                    self.now_s += 0.25
                    self.on(ce.Tick())
                beat = messages.Heartbeat(
                    **self.of, phase="run", version=step, completed_ops=3, waiting=None
                )
                self.say(name, beat)

    def recover(self) -> None:
        """One stage's owner is lost; everyone reports; a spare takes over."""
        base = self.state.committed
        lost = self.names[1]
        self.on(ce.MemberLost(device=lost, reason="killed"))  # type: ignore[arg-type]
        asked: tuple[Any, ...] = ()
        for name in self.names:
            if name != lost:
                asked = self.say(
                    name, messages.Report(**self.of, evidence=self._evidence(name, base))
                )
        (ask,) = [action for action in asked if isinstance(action, ce.ChooseOwners)]
        choice = choose_owners(ask.need)
        self.on(ce.OwnersChosen(epoch=ask.need.epoch, choice=choice))
        assert self.state.phase.value == "installing", self.state.phase

    def _evidence(self, name: str, base: int) -> Evidence:
        index = self.plan.stage_of(name)
        lost = self.plan.stages[1]
        copies = ()
        if any(name in entry.devices and entry.first_layer == 1 for entry in self.state.holders):
            copies = (
                Copy(
                    first_layer=lost.first_layer,
                    last_layer=lost.last_layer,
                    tag=self.state.epoch - 1,
                    version=base,
                ),
            )
        if index is None:
            return Evidence(copies=copies)
        stage = self.plan.stages[index]
        spans = tuple(
            LogSpan(direction=way, cut=cut, first_step=base - 8, stop_step=base)
            for way, cut in (("forward", stage.last_layer + 1), ("backward", stage.first_layer))
        )
        return Evidence(
            stage=StageReport(
                first_layer=stage.first_layer,
                last_layer=stage.last_layer,
                version=base,
                tag=self.state.epoch - 1,
            ),
            copies=copies,
            logs=spans,
        )


def member_rate(steps: int) -> float:
    """Events per second of a middle stage: what arrives, and what its body answers."""
    plan = PipelinePlan.even(3, ["a", "b", "c"], microbatches=8)
    state = MemberState(device="b", coordinator="hub")  # type: ignore[arg-type]
    install = messages.Install(
        run="r", epoch=1, term=1, base=0, plan=plan, stage=1, ops=schedule_for(plan).ops[1],
        log_steps=16,
    )  # fmt: skip
    events, now_s = 0, 0.0

    def on(event: Any) -> None:
        nonlocal state, events
        state, actions = member.handle(state, event, now_s)
        events += 1
        for action in actions:
            match action:
                case me.LoadStage():
                    on(me.Installed())
                case me.Compute(kind=kind, step=step, microbatch=microbatch):
                    on(me.OpDone(kind=kind, step=step, microbatch=microbatch))
                case me.FinishStep(step=step):
                    on(me.StepFinished(step=step))
                case me.Apply(step=step):
                    on(me.Applied(step=step))
                case me.Fail(fault=fault):
                    raise AssertionError(fault.text)

    def say(sender: str, message: Any) -> None:
        on(me.MessageReceived(sender=sender, message=message))

    from crowdmesh_jax.protocol import Parts

    of = {"run": "r", "epoch": 1}
    say("hub", install)
    say("hub", messages.Resume(**of, steps=STEPS))
    start_s = time.perf_counter()
    for step in range(steps):
        for microbatch in range(8):
            at = {"step": step, "microbatch": microbatch}
            say("a", messages.Forward(**of, **at, cut=1))
            parts = Parts() if microbatch == 7 else None
            say("c", messages.Backward(**of, **at, cut=2, parts=parts))
        say("a", messages.Commit(**of, step=step, verdict=Verdict()))
    assert state.version == steps
    return events / (time.perf_counter() - start_s)


def main() -> None:
    options = arguments(__doc__, repeats=7, devices=1000)
    devices, steps = (100, 2) if options.quick else (options.devices, 20)
    rates, recoveries, members = [], [], []
    for _ in range(options.repeats):
        hub = Hub(devices)
        before, start_s = hub.events, time.perf_counter()
        hub.run(steps)
        rates.append((hub.events - before) / (time.perf_counter() - start_s))
        start_s = time.perf_counter()
        hub.recover()
        recoveries.append(1e3 * (time.perf_counter() - start_s))
        members.append(member_rate(50))
    figures = [
        figure(
            f"coordinator, {devices} devices", rates, unit="/s",
            at_least=None if options.quick else 20_000,
        ),
        figure("a recovery in it, fence to install", recoveries, unit="ms"),
        figure("member, a stage of three", members, unit="/s"),
    ]  # fmt: skip
    report(
        "machines",
        f"events per second of the pure machines, one core; {devices} devices, {STAGES} stages",
        figures,
        quick=options.quick,
        settings={"devices": devices, "stages": STAGES, "steps": steps},
    )


if __name__ == "__main__":
    main()
