"""A coordinator that is killed at an exact point, by an order on its command line. For tests.

    python mortal_coordinator.py

Imports what takes long, then forks a process for each line of JSON that `support.coordinators`
writes to it, and says its process id and, later, how it ended. The product has no part in it: its
classes are wrapped here, as an agent's are in `mortal_agent`. What was reached is written to a file
before a process kills itself.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
import warnings
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np
from support import coordinators
from support.coordinators import LATENCY_S, Death, job_of, plan_of

import crowdmesh_jax as cm
from crowdmesh_jax.record import checkpoint, journal
from crowdmesh_jax.runtime import run as bodies
from crowdmesh_jax.transport import GrpcTransport


class Fate:
    """Waits for the point at which this process is to die."""

    def __init__(self, death: Death | None, folder: Path, name: str, life: int) -> None:
        self.death = death
        self.armed = death is not None and death.after < 0
        self._folder, self._name, self._life = folder, name, life
        self._met = 0

    def arm(self, step_s: float) -> None:
        """So many steps were shown: from here on the point counts; a device may die first."""
        death = self.death
        assert death is not None
        self.armed = True
        if death.victim is not None:
            coordinators.kill_owner(self._folder, self._name, death.victim)
        if death.what == "time":
            delay_s = death.delay * max(step_s, 0.01)
            timer = threading.Timer(delay_s, self.die, (f"{1e3 * delay_s:.1f} ms later",))
            timer.daemon = True
            timer.start()

    def reach(self, what: str, name: str, when: str) -> bool:
        """Whether this is the point; the caller may do something before it dies of it."""
        if not self.armed or self.death is None or (what, name, when) != self.death.point:
            return False
        self._met += 1
        return self._met > self.death.nth

    def meet(self, what: str, name: str, when: str) -> None:
        if self.reach(what, name, when):
            self.die(f"{what} {name}, {when}")

    def die(self, where: str) -> None:
        (self._folder / f"fired-{self._name}-{self._life}").write_text(where)
        os.kill(os.getpid(), signal.SIGKILL)


def wrap(fate: Fate) -> None:
    """Puts the points at which it may die into the coordinator's classes."""
    append = journal.Journal.append

    def appending(self: Any, record: Any, *, durable: bool = False) -> int:
        kind = str(record.get("kind", "row"))
        if kind == "Wave" and not record.get("ledger"):
            kind = "Checkpoint"
        fate.meet("record", kind, "before")
        if fate.reach("record", kind, "torn"):
            line = journal.encode_record(self._next, record)
            os.write(self._file, line[: len(line) // 2])
            fate.die(f"record {kind}, torn")
        number = append(self, record, durable=durable)
        fate.meet("record", kind, "after")
        return number

    journal.Journal.append = appending

    send = GrpcTransport.send

    async def sending(self: Any, peer: str, frame: Any, *args: Any, **fields: Any) -> None:
        kind = str((frame.message.get("message") or {}).get("kind"))
        fate.meet("send", kind, "before")
        await send(self, peer, frame, *args, **fields)
        fate.meet("send", kind, "after")

    GrpcTransport.send = sending

    take = bodies.Run._take

    def taking(self: Any, item: Any) -> None:
        frame = getattr(item, "frame", None)
        if frame is not None:
            fate.meet("take", str((frame.message.get("message") or {}).get("kind")), "before")
        take(self, item)

    bodies.Run._take = taking

    write = checkpoint.write_atomic

    def writing(path: Path, data: Any) -> None:
        name = "manifest" if path.name == checkpoint.MANIFEST else "shard"
        fate.meet("file", name, "before")
        write(path, data)
        fate.meet("file", name, "after")

    checkpoint.write_atomic = writing


def live(says: dict[str, Any]) -> None:
    """One life: starts the run, or takes it up."""
    folder, name = Path(says["folder"]), says["name"]
    death = Death(**says["death"]) if says["death"] else None
    fate = Fate(death, folder, name, says["life"])
    wrap(fate)
    job, data = job_of()
    source: Any = data if says["ships"] else coordinators.AtHome(data)
    begun = (folder / name / "checkpoint" / checkpoint.MANIFEST).exists()
    where = {"resume": folder / name} if begun else {"runs_dir": folder, "name": name}
    shown = 0

    def watch(event: Any) -> None:
        nonlocal shown
        if isinstance(event, cm.RecoveryEvent):
            print("recovery", event.line(), flush=True)
        if not isinstance(event, cm.StepEvent):
            return
        print("step", event.step, flush=True)
        shown += 1
        if death is None or fate.armed or shown <= death.after or event.step < death.from_step:
            return
        if coordinators.is_whole(folder / name):
            fate.arm(event.step_s or 0.0)

    crowd = coordinators.crowd_of(LATENCY_S if says["ships"] else 0.0)
    with cm.connect(crowd, listen=says["listen"]) as crew:
        result = cm.train(
            job, crew, source, steps=says["steps"], plan=plan_of(), measure=False,
            checkpoint_every=coordinators.CHECKPOINT_EVERY, on_event=watch,
            recovery=cm.Recovery(
                wave_every=coordinators.WAVE_EVERY, log_steps=8 * coordinators.WAVE_EVERY,
                replan=False, return_s=60.0,
            ),
            **where,
        )  # fmt: skip
    leaves = jax.tree.leaves((result.params, result.state, result.opt_state))
    part = folder / f"{name}.part.npz"
    np.savez(part, *map(np.asarray, leaves))
    part.replace(folder / f"{name}.npz")


def child(says: dict[str, Any]) -> NoReturn:
    """The forked process."""
    for descriptor, path in ((1, says["out"]), (2, says["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    status = 1
    try:
        live(says)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    # No backend is made and no thread started before the fork.
    warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called", category=RuntimeWarning)
    for line in sys.stdin:
        says = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(says)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
