"""An agent that dies, stops, lies or goes deaf at an exact op, by orders in a folder. For tests.

    python mortal_agent.py FOLDER [--chunk-bytes N] ARGUMENTS OF crowdmesh_jax.agent

`support.mortal` writes the orders and reads what was carried out. Each order is carried out once,
by the first process that meets its conditions, and logged before it is: which device, which op, at
which step. The product has no part in it: its classes are wrapped here.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

FOLDER = Path(sys.argv[1])
AGENT: list[Any] = []
"""The appliance of this process, once it is made."""


class Orders:
    """What is ordered, read again when the folder changes."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._names: list[str] = []
        self._orders: list[dict[str, Any]] = []
        self._met: dict[str, int] = {}
        self.ops = 0
        """Compute ops that this process has begun."""

    def read(self) -> list[dict[str, Any]]:
        names = sorted(n for n in os.listdir(FOLDER / "orders") if n.endswith(".json"))
        if names != self._names:
            self._orders = [json.loads((FOLDER / "orders" / n).read_text()) for n in names]
            self._names = names
        return self._orders

    def reach(self, kind: str, step: int, when: str, **more: Any) -> str | None:
        """A point was reached; what is to be done there beside dying: "corrupt", or nothing."""
        for order in self.read():
            if order["kind"] == kind and order["when"] == when and self._fits(order, step):
                met = self._met[order["name"]] = self._met.get(order["name"], 0) + 1
                if met > order["nth"] and self._take(order, step, more):
                    return self._carry_out(order)
        return None

    def _fits(self, order: dict[str, Any], step: int) -> bool:
        if order["device"] not in (None, self.device) or step < order["step"]:
            return False
        if order["stage"] is None:
            return True
        return stage_here() == order["stage"]

    def _take(self, order: dict[str, Any], step: int, more: dict[str, Any]) -> bool:
        """Claims the order for this process; False: another one has carried it out."""
        beside = neighbours(order["beside"])
        log = {
            "name": order["name"],
            "do": order["do"],
            "kind": order["kind"],
            "when": order["when"],
            "device": self.device,
            "stage": stage_here(),
            "step": step,
            "op": self.ops,
            "beside": beside,
            "at_s": round(time.time(), 3),
            **more,
        }
        try:
            file = os.open(FOLDER / "fired" / order["name"], os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            return False
        os.write(file, json.dumps(log).encode())
        os.close(file)
        return True

    def _carry_out(self, order: dict[str, Any]) -> str | None:
        for device in neighbours(order["beside"]):
            os.kill(int((FOLDER / "pids" / device).read_text()), signal.SIGKILL)
        if order["do"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif order["do"] == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif order["do"] == "jump":
            real = time.time
            time.time = lambda: real() + 86_400.0
        else:
            return str(order["do"])
        return None


def stage_here() -> int | None:
    """The stage that this process has now."""
    state = AGENT[0].state if AGENT else None
    return state.install.stage if state is not None and state.install is not None else None


def neighbours(offsets: list[int]) -> list[str]:
    """Devices of the stages so far from this one."""
    stage = stage_here()
    if stage is None:
        return []
    stages = AGENT[0].state.install.plan.stages
    return [str(stages[stage + by].device) for by in offsets if 0 <= stage + by < len(stages)]


def is_cut(source: str, target: str) -> bool:
    """Whether frames of one device to another are lost on the way."""
    return (FOLDER / "cuts" / f"{source}--{target}").exists()


def wrap(orders: Orders) -> None:
    """Puts the points at which orders are looked for into the agent's classes."""
    from crowdmesh_jax.agent import appliance as agents
    from crowdmesh_jax.agent.stage import HeldStage
    from crowdmesh_jax.execution import StageWorker
    from crowdmesh_jax.protocol.member_state import Phase
    from crowdmesh_jax.transport import ShapedTransport

    def op(name: str, kind: str) -> None:
        original = getattr(StageWorker, name)

        def wrapped(self: Any, *args: Any, **fields: Any) -> Any:
            orders.ops += 1
            step = self.version
            replays = AGENT[0].state.phase is Phase.CATCHING_UP
            named = f"replay-{kind}" if replays else kind
            more = {"microbatch": args[0]} if kind in ("forward", "backward") else {}
            orders.reach(named, step, "before", **more)
            result = original(self, *args, **fields)
            orders.reach(named, step, "after", **more)
            return result

        setattr(StageWorker, name, wrapped)

    op("forward", "forward")
    op("backward", "backward")
    op("finish_step", "full")
    op("apply", "update")

    make = agents.Appliance.__init__

    def init(self: Any, *args: Any, **fields: Any) -> None:
        make(self, *args, **fields)
        AGENT[:] = [self]

    agents.Appliance.__init__ = init

    load = HeldStage.load.__func__  # type: ignore[attr-defined]

    def loaded(cls: Any, install: Any, version: int, *args: Any, **fields: Any) -> Any:
        orders.reach("load", version, "before")
        held = load(cls, install, version, *args, **fields)
        orders.reach("load", version, "after")
        return held

    HeldStage.load = classmethod(loaded)  # type: ignore[method-assign]

    send = ShapedTransport.send

    async def sending(self: Any, peer: str, frame: Any, *args: Any, **fields: Any) -> None:
        message = frame.message.get("message") or {}
        kind, step = f"send-{message.get('kind')}", step_of(message)
        if orders.reach(kind, step, "before", to=peer) == "corrupt":
            flip(frame)
        if is_cut(orders.device, peer):
            return
        await send(self, peer, frame, *args, **fields)
        orders.reach(kind, step, "after", to=peer)

    ShapedTransport.send = sending

    take = agents.Appliance._take

    def taking(self: Any, item: Any) -> None:
        if is_cut(item.peer, orders.device):
            return
        message = item.frame.message.get("message") or {}
        kind, step = f"take-{message.get('kind')}", step_of(message)
        orders.reach(kind, step, "before", by=item.peer)
        take(self, item)

    agents.Appliance._take = taking


def step_of(message: dict[str, Any]) -> int:
    """The step or version that a message is about; one that tells none: the present one."""
    copy = message.get("copy") or {}
    for told in (message.get("step"), copy.get("version"), message.get("base")):
        if isinstance(told, int):
            return told
    return AGENT[0].state.version if AGENT else 0


def flip(frame: Any) -> None:
    """One bit of the frame's arrays comes out wrong."""
    import numpy as np

    array = np.array(frame.arrays[0])
    array.reshape(-1).view(np.uint8)[array.nbytes // 2] ^= 4
    object.__setattr__(frame, "arrays", (array, *frame.arrays[1:]))


def main() -> int:
    arguments = sys.argv[2:]
    chunk_bytes = None
    if arguments[0] == "--chunk-bytes":
        chunk_bytes, arguments = int(arguments[1]), arguments[2:]
    device = arguments[arguments.index("--device") + 1]
    arguments = [argument.replace("{device}", device) for argument in arguments]
    (FOLDER / "pids" / device).write_text(str(os.getpid()))
    orders = Orders(device)
    wrap(orders)
    if chunk_bytes is not None:
        from crowdmesh_jax.agent import packing

        packing.PIECE_BYTES = chunk_bytes
    from crowdmesh_jax.agent.__main__ import main as run

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
