"""Devices that walk away by a script, on real processes, under each replication policy.

Six agents stand within a few metres; three of them have a stage each. By a seeded script one after
another walks off and is out of range, 80 m, ten seconds later. At that moment its process is
killed; some seconds later it is started again, as a newcomer at the old place. Policies see
positions once a second, nothing of the script. Each rule has its own number of copies: `neighbour`
one more than the others, at its central device, in each wave as in all real runs. A wave every 8
steps, the same seeds, in turns; the cuts stay, so every run ends with the same bits.

"against neighbour" is paired by seed. Stopped seconds, redone and replayed steps are those of the
runs' own recovery events; a newcomer stops everyone too, under every policy. Bytes of copies are
those of complete waves; bytes of states that moved in a take-over come on top.

    python benchmarks/departures.py [--seeds 7] [--keep FILE] [--runs DIR] [--quick]

`--keep` appends each run to a file and takes what is there from it; `--runs` keeps their folders.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["NPROC"] = "1"  # XLA's threads, as in agents

import jax
import numpy as np
from _measure import arguments, figure, ratio, report
from _perceptron import make_job

import crowdmesh_jax as cm
from crowdmesh_jax.mobility import Sightings
from crowdmesh_jax.runtime import Crew

POLICIES = ("mobility", "neighbour", "next_stage", "central")
WIDTH, STAGES, DEVICES, BATCH, MICROBATCHES = 192, 3, 6, 32, 4
STEPS, WAVE_EVERY = 240, 8
LATENCY_S = 0.02
"""Of each link: it, not this machine, sets the pace, so that a run outlasts the script."""
RANGE_M, PACE_M_PER_S = 80.0, 8.0
WALK_S = RANGE_M / PACE_M_PER_S
"""From the first step away until nobody is in range."""
AWAY_S, EVERY_S, DEPARTURES = 6.0, 7.0, 3
POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Departure:
    """One device's way out and back, in seconds of the script."""

    device: int
    walks_s: float

    @property
    def gone_s(self) -> float:
        return self.walks_s + WALK_S

    @property
    def back_s(self) -> float:
        return self.gone_s + AWAY_S


def script_of(seed: int) -> tuple[Departure, ...]:
    """The first who leaves has a stage at the start; then anyone who has not left before."""
    rng = random.Random(seed)
    first = rng.randrange(STAGES)
    others = [device for device in range(DEVICES) if device != first]
    leavers = [first, *rng.sample(others, DEPARTURES - 1)]
    return tuple(
        Departure(device, 1.0 + EVERY_S * index + rng.uniform(0.0, 2.0))
        for index, device in enumerate(leavers)
    )


class Walks:
    """Where everyone is: what a policy may see, and the hand that cuts who is out of range."""

    def __init__(self, departures: Sequence[Departure], crew: Crew) -> None:
        self._departures, self._crew = departures, crew
        self._began_s: float | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self.cut: list[str] = []
        self._back: set[str] = set()

    def begin(self) -> None:
        """The script's clock starts with the first step."""
        if self._began_s is None:
            self._began_s = time.monotonic()
            self._thread.start()

    def end(self) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(10.0)

    @property
    def now_s(self) -> float:
        return -1.0 if self._began_s is None else time.monotonic() - self._began_s

    def __call__(self) -> Sightings:
        now_s, script_s = time.monotonic(), self.now_s
        # Those who leave go three different ways: at 80 m nobody is in range, walking or not.
        angles = 2 * math.pi * np.arange(DEVICES) / DEVICES
        for index, leaves in enumerate(self._departures):
            angles[leaves.device] = 2 * math.pi * index / DEPARTURES
        ways = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        walked_m, pace = np.ones(DEVICES), np.zeros(DEVICES)
        seen_s = np.full(DEVICES, now_s)
        for leaves in self._departures:
            if leaves.walks_s <= script_s < leaves.gone_s:
                walked_m[leaves.device] += PACE_M_PER_S * (script_s - leaves.walks_s)
                pace[leaves.device] = PACE_M_PER_S
            elif leaves.gone_s <= script_s < leaves.back_s:
                walked_m[leaves.device] += RANGE_M
                seen_s[leaves.device] = now_s - (script_s - leaves.gone_s)
        return Sightings(
            now_s=now_s,
            seen_s=seen_s,
            positions_m=ways * walked_m[:, None],
            velocities_m_per_s=ways * pace[:, None],
            velocity_sd_m_per_s=np.full(DEVICES, 0.05),
            occupants=np.arange(DEVICES),
        )

    def _follow(self) -> None:
        out: set[int] = set()
        while not self._over.wait(POLL_S):
            now_s = self.now_s
            for leaves in self._departures:
                name = f"device-{leaves.device}"
                if leaves.device not in out and now_s >= leaves.gone_s:
                    out.add(leaves.device)
                    self.cut.append(name)
                    os.kill(self._crew.pids[name], signal.SIGKILL)
                elif name in self.cut and name not in self._back and now_s >= leaves.back_s:
                    self._back.add(name)
                    self._crew.relaunch(name)


def crowd_of() -> cm.Crowd:
    """Equal devices, each pair joined by a link as slow as radio."""
    crowd = cm.Crowd.local((1.0,) * DEVICES)
    ids = [device.id for device in crowd.devices]
    links = [crowd.link(a, b) for a in ids for b in ids if a != b]
    slow = tuple(replace(link, latency_s=LATENCY_S) for link in links if link is not None)
    return replace(crowd, links=slow)


def run_one(crew: Crew, policy: str, seed: int, steps: int, runs_dir: str) -> dict[str, Any]:
    """One run through the script of a seed; what came of it."""
    for device in sorted(crew.missing):
        crew.relaunch(device)
    crew.await_hellos()
    job, data = make_job(width=WIDTH, stages=STAGES, batch=BATCH, microbatches=MICROBATCHES)
    walks = Walks(script_of(seed), crew)
    marks: list[float] = []

    def on_event(event: object) -> None:
        if isinstance(event, cm.StepEvent):
            marks.append(time.monotonic())
            walks.begin()

    try:
        result = cm.train(
            job, crew, data, steps=steps, measure=False, runs_dir=runs_dir, on_event=on_event,
            name=f"{policy}-{seed}-{time.time_ns()}",
            plan=cm.PipelinePlan.even(
                STAGES, [f"device-{i}" for i in range(STAGES)], microbatches=MICROBATCHES
            ),
            recovery=cm.Recovery(
                policy=policy, watch=walks, range_m=RANGE_M, wave_every=WAVE_EVERY, replan=False
            ),
        )  # fmt: skip
    except cm.CrowdMeshError as exc:
        return {"policy": policy, "seed": seed, "error": exc.message[:300], "steps": len(marks)}
    finally:
        walks.end()
    events = result.recoveries
    leaf = jax.tree.leaves(result.params)[0]
    return {
        "policy": policy,
        "seed": seed,
        "error": "",
        "seconds": marks[-1] - marks[0],
        "cuts": len(walks.cut),
        "losses": sum(bool(e.lost) and bool(e.take_overs) for e in events),
        "handovers": sum(e.how == "hand-over" for e in events),
        "recoveries": len(events),
        "again": sum(e.replayed_steps + e.redone_steps for e in events),
        "stopped_s": sum(e.total_s for e in events),
        "copies_bytes": cm.read_replicas(result.run_dir).sent_bytes / steps,
        "moved_bytes": sum(o.moved_bytes for e in events for o in e.take_overs) / steps,
        "bits": np.asarray(leaf).tobytes()[:64].hex(),
        "lines": [e.line() for e in events],
    }


def take(options: Any, steps: int) -> list[dict[str, Any]]:
    """All runs, seed by seed, the policies in turns."""
    path = Path(options.keep) if options.keep else None
    lines = path.read_text().splitlines() if path and path.exists() else []
    rows = [json.loads(line) for line in lines]
    known = {(row["policy"], row["seed"]) for row in rows}
    with tempfile.TemporaryDirectory() as scratch, cm.launch(crowd_of()) as crew:
        runs_dir = options.runs or scratch
        run_one(crew, "neighbour", 0, steps, scratch)  # all devices compile all stages
        for seed in range(1 if options.quick else options.seeds):
            turn = seed % len(POLICIES)
            for policy in (*POLICIES[turn:], *POLICIES[:turn]):
                if (policy, seed) in known:
                    continue
                row = run_one(crew, policy, seed, steps, runs_dir)
                rows.append(row)
                print(json.dumps({k: v for k, v in row.items() if k != "bits"}), flush=True)
                if path:
                    with path.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    return rows


def main() -> None:
    options = arguments(__doc__, seeds=7, keep="", runs="")
    steps = 120 if options.quick else STEPS
    rows = take(options, steps)
    by = {(row["policy"], row["seed"]): row for row in rows if not row["error"]}
    failed = [row for row in rows if row["error"]]
    bits = {row["bits"] for row in by.values()}
    assert len(bits) <= 1, "every run ends with the same bits"
    figures = []
    for policy in POLICIES:
        seeds = sorted(seed for name, seed in by if name == policy)
        own = [by[policy, seed] for seed in seeds]
        if not own:
            continue
        paired = [seed for seed in seeds if ("neighbour", seed) in by]
        theirs = [by["neighbour", seed] for seed in paired]
        ours = [by[policy, seed] for seed in paired]
        if policy != "neighbour" and paired:
            figures.append(
                ratio(f"{policy}: time to finish / neighbour's",
                      [r["seconds"] for r in ours], [r["seconds"] for r in theirs])
            )  # fmt: skip
            figures.append(
                ratio(f"{policy}: bytes of copies / neighbour's",
                      [r["copies_bytes"] for r in ours], [r["copies_bytes"] for r in theirs])
            )  # fmt: skip
        for what, name, unit in (
            ("time to finish", "seconds", "s"), ("stopped", "stopped_s", "s"),
            ("losses of a stage's owner", "losses", ""), ("hand-overs", "handovers", ""),
            ("recoveries, newcomers too", "recoveries", ""),
            ("steps redone or replayed", "again", ""),
        ):  # fmt: skip
            figures.append(figure(f"{policy}: {what}", [r[name] for r in own], unit=unit))
        sent = {"copies sent a step": "copies_bytes", "states moved a step": "moved_bytes"}
        for what, name in sent.items():
            kilobytes = [r[name] / 1e3 for r in own]
            figures.append(figure(f"{policy}: {what}", kilobytes, unit="kB"))
    report(
        "departures",
        f"{DEVICES} agents, {STAGES} stages, {steps} steps, {DEPARTURES} devices walk out of range"
        f" and come back; {len(by)} runs, {len(failed)} did not finish",
        figures,
        quick=options.quick,
        settings={
            "width": WIDTH, "stages": STAGES, "devices": DEVICES, "batch": BATCH,
            "microbatches": MICROBATCHES, "steps": steps, "wave_every": WAVE_EVERY, "copies": 1,
            "latency_s": LATENCY_S, "range_m": RANGE_M, "pace_m_per_s": PACE_M_PER_S,
            "away_s": AWAY_S,
        },
        details={
            "failed": failed,
            "recoveries": {f"{p} {s}": row["lines"] for (p, s), row in sorted(by.items())},
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
