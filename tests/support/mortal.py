"""Orders to agents that die at an exact op (`mortal_agent`), and what became of them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

AGENT = Path(__file__).with_name("mortal_agent.py")


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is to happen, once, where its conditions are first met."""

    name: str
    kind: str
    """An op: forward, backward, full (the last backward is done), update, each with "replay-"
    before it while it is done again from logs; load; send-KIND or take-KIND of a message."""
    step: int = 0
    """From this step (of a copy: version) on."""
    when: str = "before"
    stage: int | None = None
    """Of whoever has this stage by then; None: of anyone."""
    device: str | None = None
    nth: int = 0
    """So many occasions are let pass."""
    beside: tuple[int, ...] = ()
    """Devices of stages so far away are killed in the same moment."""
    do: str = "kill"
    """Or "stop" (SIGSTOP), "corrupt" (a byte of what is sent), "jump" (the clock, by a day)."""


class Mortals:
    """The folder through which a test and its agents speak.

    Args:
        arguments: Of the wrapper, then of each agent; "{device}" stands for the device.
    """

    def __init__(self, folder: Path, arguments: Sequence[str] = ()) -> None:
        self.folder = folder
        for name in ("orders", "fired", "pids", "cuts"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.command = (sys.executable, str(AGENT), str(folder), *arguments)

    def order(self, order: Order) -> None:
        """From now on this is ordered."""
        part = self.folder / "orders" / f"{order.name}.part"
        part.write_text(json.dumps(asdict(order)))
        part.replace(part.with_suffix(".json"))

    def fired(self) -> dict[str, dict[str, Any]]:
        """What was carried out, by the order's name."""
        files = sorted((self.folder / "fired").iterdir())
        return {file.name: json.loads(text) for file in files if (text := file.read_text())}

    def clear(self) -> None:
        """Forgets all orders."""
        for name in ("orders", "fired", "cuts"):
            for file in (self.folder / name).iterdir():
                file.unlink()

    def cut(self, source: str, target: str) -> None:
        """From now on frames of one to the other are lost; no reset is seen."""
        (self.folder / "cuts" / f"{source}--{target}").touch()

    def mend(self) -> None:
        """All cuts are over."""
        for file in (self.folder / "cuts").iterdir():
            file.unlink()

    def pid(self, device: str) -> int:
        return int((self.folder / "pids" / device).read_text())

    def kill(self, device: str, signal_number: int) -> None:
        os.kill(self.pid(device), signal_number)
