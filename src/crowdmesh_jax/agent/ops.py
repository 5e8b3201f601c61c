"""What the machine demands of a stage, carried out on the compute thread in the order it was asked.

Inputs are taken from slots, results are filed in slots, and each op is answered by one event.
Decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..core import OpKind
from ..execution import Timed
from ..protocol import member_events as ev
from ..protocol.common import Slot
from .compute import ComputeThread
from .envelope import Group
from .slots import Slots
from .stage import HeldStage

Spans = list[list[Any]]


class StageOps:
    """The compute queue of one agent.

    Args:
        put: Hands an event to the machine.
        failed: Tells that something could not be carried out: what, and why.
        applied: Called after each update.
    """

    def __init__(
        self,
        compute: ComputeThread,
        slots: Slots,
        *,
        put: Callable[[ev.MemberEvent], None],
        failed: Callable[[str, BaseException], None],
        applied: Callable[[], None],
    ) -> None:
        self.compute = compute
        self.held: HeldStage | None = None
        self.spans: Spans = []
        self._slots = slots
        self._put = put
        self._failed = failed
        self._applied = applied
        self.keeps_verdicts = False
        """Where the run recovers, they stay until the machine drops them."""
        self._asked = 0
        """Grows when the queue is given up: answers to what was asked before are not wanted."""

    @property
    def stage(self) -> HeldStage:
        assert self.held is not None, "the machine acts on a stage only after LoadStage"
        return self.held

    def do(self, action: ev.MemberAction) -> bool:
        """Carries out an action on the stage; False: it is none."""
        match action:
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
            case ev.LendTied(step=step):
                self._lend(step)
            case ev.Snapshot():
                self._snapshot(action)
            case ev.EvalCompute():
                self._eval_compute(action)
            case ev.FinishEvaluation(version=version):
                self._finish_evaluation(version)
            case ev.Freeze():
                self._freeze()
            case _:
                return False
        return True

    def give_up(self) -> None:
        """Forgets what is queued, and the stage."""
        self._asked += 1
        self.compute.clear()
        self.spans.clear()
        self.held = None

    def take_spans(self) -> Spans:
        """Times of ops since the last call."""
        spans, self.spans = self.spans, []
        return spans

    def _queue(
        self,
        span: tuple[str, int, int | None],
        call: Callable[[], Any],
        then: Callable[[Any], ev.MemberEvent | None],
    ) -> None:
        """Queues work; `then` files its result and makes the event that answers it."""
        asked = self._asked

        def done(timed: Timed | None, error: BaseException | None) -> None:
            if asked != self._asked:
                return
            if error is not None:
                where = f"{span[0]} of step {span[1]}"
                if span[2] is not None:
                    where += f", microbatch {span[2]}"
                self._failed(where, error)
                return
            assert timed is not None
            self.spans.append([*span, timed.start_s, timed.end_s])
            event = then(timed.result)
            if event is not None:
                self._put(event)

        self.compute.submit(call, done)

    def _freeze(self) -> None:
        """The op at work ends and is answered; what stood behind it never begins (R6)."""
        asked = self._asked
        self.compute.clear()

        def stands_still(timed: Timed | None, error: BaseException | None) -> None:
            if asked == self._asked:
                self._asked += 1
                self._put(ev.Frozen())

        # Answers come in the order of the queue: that of the op at work has come before this one.
        self.compute.submit(lambda: None, stands_still, paced=False)

    # The step ------------------------------------------------------------------------------------

    def _forward(self, step: int, microbatch: int) -> None:
        held = self.stage
        if held.worker.is_first:
            x = held.rows.inputs(step, microbatch)
        else:
            slot = Slot(kind="x", step=step, microbatch=microbatch)
            x = list(self._slots.take(slot).values())

        def then(y: list[Any]) -> ev.MemberEvent:
            slot = Slot(kind="y", step=step, microbatch=microbatch)
            self._slots.fill(slot, dict(zip(held.y_keys, y, strict=True)))
            return ev.OpDone(kind=OpKind.FORWARD, step=step, microbatch=microbatch)

        span = ("forward", step, microbatch)
        self._queue(span, lambda: held.worker.forward(microbatch, x), then)

    def _backward(self, step: int, microbatch: int) -> None:
        held = self.stage
        worker = held.worker
        dy: list[Any] = []
        if not worker.is_last:
            slot = Slot(kind="dy", step=step, microbatch=microbatch)
            dy = list(self._slots.take(slot).values())
        targets = held.rows.targets(step) if worker.is_last else None

        def call() -> list[Any]:
            if targets is not None and not worker.has_targets:
                worker.load_targets(targets)
            return worker.backward(microbatch, dy)

        def then(dx: list[Any]) -> ev.MemberEvent:
            slot = Slot(kind="dx", step=step, microbatch=microbatch)
            self._slots.fill(slot, dict(zip(held.dx_keys, dx, strict=True)))
            return ev.OpDone(kind=OpKind.BACKWARD, step=step, microbatch=microbatch)

        self._queue(("backward", step, microbatch), call, then)

    def _finish_step(self, step: int) -> None:
        held = self.stage
        slot = Slot(kind="parts_below", step=step)
        below = dict(self._slots.get(slot))
        self._slots.drop(slot)

        def call() -> tuple[Group, dict[str, float], bool, bool]:
            return held.finish_step(below)

        def then(result: Any) -> ev.MemberEvent:
            parts, values, is_finite, has_weight = result
            self._slots.fill(Slot(kind="parts", step=step), parts)
            return ev.StepFinished(
                step=step, is_finite=is_finite, has_weight=has_weight, values=values
            )

        self._queue(("finish", step, None), call, then)

    def _reduce(self, step: int) -> None:
        held = self.stage

        def then(verdict: Group) -> ev.MemberEvent:
            self._slots.fill(Slot(kind="verdict", step=step), verdict)
            self._slots.drop(Slot(kind="parts", step=step))
            return ev.Reduced(step=step)

        # FinishStep stands before it in the queue; its result may still be on the way to the loop.
        self._queue(("reduce", step, None), lambda: held.worker.reduce(held.parts), then)

    def _apply(self, action: ev.Apply) -> None:
        held, step = self.stage, action.step
        verdict = self._slots.get(Slot(kind="verdict", step=step))
        if not self.keeps_verdicts:
            self._slots.drop(Slot(kind="verdict", step=step - 2))
        skip = action.verdict.skip

        def then(tied: Mapping[int, Group]) -> ev.MemberEvent:
            self._fill_tied(step, tied)
            held.rows.drop(step)
            self._applied()
            return ev.Applied(step=step)

        self._queue(("update", step, None), lambda: held.apply(verdict, skip), then)

    def _fill_tied(self, step: int, tied: Mapping[int, Group]) -> None:
        for layer, group in tied.items():
            self._slots.fill(Slot(kind="tied", step=step, layer=layer), group)

    def _adopt(self, slot: Slot) -> None:
        held = self.stage
        values = self._slots.get(slot)
        self._slots.drop_unlogged(slot)

        def call() -> None:
            held.worker.set_borrowed({k: v for k, v in values.items() if k in held.borrowed_keys})

        self._queue(("adopt", slot.step, None), call, lambda _: None)

    def _lend(self, step: int) -> None:
        held = self.stage

        def then(tied: Mapping[int, Group]) -> ev.MemberEvent:
            self._fill_tied(step, tied)
            return ev.TiedLent(step=step)

        self._queue(("lend", step, None), held.lent, then)

    def _snapshot(self, action: ev.Snapshot) -> None:
        held = self.stage
        slot = Slot(kind="state", step=action.version, layer=action.layer)

        def then(arrays: Group) -> ev.MemberEvent:
            self._slots.fill(slot, arrays)
            return ev.Snapshotted(version=action.version)

        self._queue(("snapshot", action.version, None), held.worker.snapshot, then)

    # Evaluation ----------------------------------------------------------------------------------

    def _eval_compute(self, action: ev.EvalCompute) -> None:
        held, microbatch = self.stage, action.microbatch
        rows = held.eval_rows
        assert rows is not None, "the machine evaluates only what Install brought"
        slot = Slot(kind="eval_x", step=action.version, microbatch=microbatch)
        if held.worker.is_first:
            x = rows.inputs(microbatch, 0)
        else:
            x = list(self._slots.take(slot).values())
        targets = rows.targets(microbatch)[0] if held.worker.is_last else None

        def then(y: list[Any]) -> ev.MemberEvent:
            rows.drop(microbatch)
            filled = Slot(kind="eval_y", step=action.version, microbatch=microbatch)
            if not held.worker.is_last:
                self._slots.fill(filled, dict(zip(held.y_keys, y, strict=True)))
            return ev.EvalDone(version=action.version, microbatch=microbatch)

        span = ("evaluate", action.version, microbatch)
        self._queue(span, lambda: held.worker.evaluate(x, targets), then)

    def _finish_evaluation(self, version: int) -> None:
        held = self.stage

        def then(values: Mapping[str, float]) -> ev.MemberEvent:
            return ev.EvaluationFinished(version=version, values=values)

        self._queue(("evaluate", version, None), held.worker.finish_evaluation, then)
