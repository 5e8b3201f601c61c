"""A run as it goes: a row per device on a terminal, a line now and then elsewhere, or JSON lines.

Takes the events of `train`; knows nothing of how they come about.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..core import Crowd, PipelinePlan
from ..runtime import (
    BestEvent,
    CheckpointEvent,
    DeviceEvent,
    EvaluationEvent,
    MeasuredEvent,
    PhaseEvent,
    RecoveryEvent,
    RunEvent,
    StepEvent,
)
from .console import format_seconds, print_json

REFRESH_PER_S = 8
LINES_PER_RUN = 10
"""Without a terminal, about so many lines tell of the steps."""
DOING = {
    "installing": " (loading and compiling their programs)",
    "fencing": " (all stop, and tell what they have)",
}
"""What devices do in a phase that is silent for long."""
RECOVERING = ("fencing", "deciding", "installing")
"""Phases that are worth more than the step's figures once there are steps."""
SMOOTHING = 0.2
"""Weight of the newest step in the shown step time."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KillEvent:
    """Somebody ended a device's process, as a crash would."""

    device: str
    pid: int
    step: int
    """Steps that were made by then."""


class JsonView:
    """Each event as one JSON line: {"event": "step", ...}."""

    def __enter__(self) -> JsonView:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def __call__(self, event: RunEvent | KillEvent) -> None:
        name = type(event).__name__.removesuffix("Event").lower()
        fields: dict[str, Any] = {
            field.name: getattr(event, field.name) for field in dataclasses.fields(event)
        }
        if isinstance(event, (CheckpointEvent, BestEvent)):
            fields["path"] = str(event.path)
        if isinstance(event, RecoveryEvent):
            fields |= {"total_s": event.total_s, "line": event.line()}
        print_json({"event": name, **fields})


class LiveView:
    """Rows per device that change in place; plain lines where the output is no terminal.

    Args:
        spares: Devices without a stage that wait for one.
        console: A rich console; None: standard output.
    """

    def __init__(
        self, plan: PipelinePlan, crowd: Crowd, spares: Sequence[str] = (), console: Any = None
    ) -> None:
        from rich.console import Console

        self._plan, self._crowd, self._spares = plan, crowd, tuple(spares)
        self._gone: dict[str, str] = {}
        """Devices that were lost, and what became of them."""
        self._console = console or Console(highlight=False)
        self._live: Any = None
        self._phase = ""
        self._step: StepEvent | None = None
        self._step_s: float | None = None
        self._prediction_s: float | None = None
        self._evaluation: EvaluationEvent | None = None
        self._best: BestEvent | None = None
        self._checkpoint: int | None = None
        self._devices: dict[str, DeviceEvent] = {}

    def __enter__(self) -> LiveView:
        if self._console.is_terminal:
            from rich.live import Live

            self._live = Live(
                get_renderable=self._render,
                console=self._console,
                refresh_per_second=REFRESH_PER_S,
            )
            self._live.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.__exit__(*exc)

    def __call__(self, event: RunEvent | KillEvent) -> None:
        match event:
            case KillEvent():
                self._gone[event.device] = f"killed after step {event.step}"
                text = f"{event.device} (SIGKILL to process {event.pid}) after step {event.step}"
                self._tell("KILLED", text, "bold red")
            case RecoveryEvent():
                self._take_recovery(event)
            case PhaseEvent():
                self._phase = _phase_line(event)
                self._say(self._phase)
            case MeasuredEvent():
                self._prediction_s = event.prediction_s
                self._say(f"stages timed alone: a step should take {self._predicted()}")
            case DeviceEvent():
                self._devices[event.device] = event
            case StepEvent():
                self._take_step(event)
            case EvaluationEvent():
                self._evaluation = event
                self._say(_evaluation_line(event))
            case BestEvent():
                self._best = event
                self._say(_best_line(event))
            case CheckpointEvent():
                self._checkpoint = event.version
                self._say(f"checkpoint of step {event.version}")

    def _predicted(self) -> str:
        return "-" if self._prediction_s is None else format_seconds(self._prediction_s)

    def _say(self, line: str) -> None:
        if self._live is None:
            self._console.print(line, markup=False, soft_wrap=True)

    def _tell(self, what: str, text: str, style: str) -> None:
        """A line that stays: on a terminal it goes above the rows, and wraps beside `what`."""
        if self._live is None:
            self._console.print(f"{what:<10} {text}", markup=False, style=style, soft_wrap=True)
            return
        from rich.table import Table
        from rich.text import Text

        line = Table.grid(padding=(0, 1))
        line.add_column(width=10)
        line.add_column()
        line.add_row(Text(what), Text(text), style=style)
        self._console.print(line)

    def _take_recovery(self, event: RecoveryEvent) -> None:
        self._tell("RECOVERED" if event.lost else "CHANGED", event.story(), "bold green")
        self._tell("", event.times(), "green")
        for device in event.lost:
            self._gone.setdefault(device, f"lost after step {event.base}")
            self._devices.pop(device, None)
        if event.plan is not None:
            self._plan = event.plan
        for device in self._plan.devices:
            self._gone.pop(device, None)

    def _take_step(self, event: StepEvent) -> None:
        self._step = event
        if event.step_s is not None:
            old = self._step_s
            self._step_s = (
                event.step_s if old is None else (1 - SMOOTHING) * old + SMOOTHING * event.step_s
            )
        every = max(1, event.steps // LINES_PER_RUN)
        if (event.step + 1) % every == 0 or event.step + 1 == event.steps:
            self._say(self._headline())

    def _headline(self) -> str:
        if self._step is None:
            return self._phase
        step = self._step
        if self._phase.startswith(RECOVERING):
            return f"step {step.step + 1}/{step.steps}  {self._phase}"
        parts = [f"step {step.step + 1}/{step.steps}", f"loss {step.loss:.4f}"]
        parts += [f"{name} {value:.3f}" for name, value in step.metrics.items()]
        if self._step_s is not None:
            parts.append(f"{format_seconds(self._step_s)} a step (predicted {self._predicted()})")
            left = step.steps - step.step - 1
            if left:
                parts.append(f"{format_seconds(left * self._step_s)} left")
        return "  ".join(parts)

    def _render(self) -> Any:
        from rich import box
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in ("device", "layers", "speed", "forward", "backward", "update", "busy", ""):
            right = name in ("speed", "forward", "backward", "update", "busy")
            table.add_column(name, justify="right" if right else "left")
        for stage in self._plan.stages:
            event = self._devices.get(stage.device)
            layers = f"{stage.first_layer}-{stage.last_layer}"
            row = [stage.device, layers if len(stage.layers) > 1 else str(stage.first_layer)]
            row.append(f"{self._crowd.device(stage.device).speed:.3g}")
            if event is None:
                table.add_row(*row, "-", "-", "-", "-", "")
                continue
            busy = max(0.0, min(1.0, 1.0 - event.idle_share))
            times = (event.forward_s, event.backward_s, event.update_s)
            row += [format_seconds(seconds) for seconds in times]
            table.add_row(*row, f"{busy:.0%}", ProgressBar(total=1.0, completed=busy, width=20))
        for device in self._crowd.devices:
            if device.id in self._plan.devices:
                continue
            state = self._gone.get(device.id) or ("spare" if device.id in self._spares else "")
            if state:
                row = (device.id, state, f"{device.speed:.3g}", "", "", "", "", "")
                table.add_row(*row, style="red" if device.id in self._gone else "dim")
        parts: list[Any] = [table, Text(self._headline())]
        if self._evaluation is not None:
            parts.append(Text(_evaluation_line(self._evaluation)))
        if self._best is not None:
            parts.append(Text(_best_line(self._best)))
        if self._checkpoint is not None:
            parts.append(Text(f"newest checkpoint: step {self._checkpoint}"))
        if self._step is not None:
            done = self._step.step + 1
            parts.append(ProgressBar(total=self._step.steps, completed=done, width=60))
        return Group(*parts)


def _phase_line(event: PhaseEvent) -> str:
    line = f"{event.phase}: {event.detail}" if event.detail else event.phase
    return line + DOING.get(event.phase, "")


def _evaluation_line(event: EvaluationEvent) -> str:
    values = [f"{name} {value:.4f}" for name, value in event.values.items()]
    return "  ".join([f"evaluated at step {event.version}", *values, f"({event.rows} rows)"])


def _best_line(event: BestEvent) -> str:
    return f"best so far: step {event.version}  {event.metric} {event.value:.4f}"
