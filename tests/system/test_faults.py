"""Each fault by name, on real processes: who dies, stops, lies or goes deaf, and what a run does.

Who dies at which op is ordered by `support.mortal`. Random mixtures are in `test_exactly_once`.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import survival
from support.equality import assert_bit_equal
from support.mortal import Mortals, Order
from support.survival import Blow, Trial
from support.training import Slow, even_plan, identical, small_job

import crowdmesh_jax as cm

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.xdist_group("faults")]

SPARES = 3


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """One folder of compiled programs for all crews, and for the oracles, which fill it."""
    yield survival.share_compiled(tmp_path_factory.mktemp("compiled"), 3 + SPARES)
    survival.stop_sharing()


@contextmanager
def crew_of(devices: int, folder: Path, compiled: Path, *arguments: str) -> Iterator[Any]:
    """A crew that takes orders, and the orders."""
    mortals = Mortals(folder / "orders", arguments)
    crowd = cm.Crowd.local((1.0,) * devices)
    with cm.launch(
        crowd, agent_command=mortals.command, cache_dir=compiled, log_dir=folder / "logs"
    ) as crew:
        yield crew, mortals


@pytest.fixture(scope="module")
def crew_and_orders(tmp_path_factory, compiled):
    """For tests in which devices only die: who died is launched again after each."""
    folder = tmp_path_factory.mktemp("crew")
    survival.undisturbed("mlp", 3, survival.STEPS)
    with crew_of(3 + SPARES, folder, compiled, "--chunk-bytes", "256") as both:
        yield both


class Script:
    """What a test does at which step; `then` waits for an event of a kind."""

    def __init__(self, pace_s: float = 0.01) -> None:
        self.events: list[Any] = []
        self._at: dict[int, Callable[[], None]] = {}
        self._pace_s = pace_s

    def at(self, step: int, call: Callable[[], None]) -> None:
        self._at[step] = call

    def __call__(self, event: Any) -> None:
        self.events.append(event)
        if isinstance(event, cm.StepEvent) and event.step in self._at:
            self._at.pop(event.step)()

    @property
    def recoveries(self) -> list[cm.RecoveryEvent]:
        return [event for event in self.events if isinstance(event, cm.RecoveryEvent)]

    @property
    def shown(self) -> list[int]:
        return [event.step for event in self.events if isinstance(event, cm.StepEvent)]


def go(
    crew: cm.Crew,
    runs_dir: Path,
    *,
    stages: int = 2,
    steps: int = 40,
    script: Callable[[Any], None],
    pause_s: float = 0.0,
    checkpoint_every: int | None = None,
    **terms: Any,
) -> tuple[cm.TrainResult, Any]:
    """Trains; returns the result and that of the undisturbed run."""
    job, data = small_job()
    plan = even_plan(job, stages)
    result = cm.train(
        job,
        crew,
        Slow(data, pause_s) if pause_s else data,
        steps=steps,
        plan=plan,
        runs_dir=runs_dir,
        name="run",
        measure=False,
        checkpoint_every=checkpoint_every,
        recovery=cm.Recovery(**{"wave_every": 4, "log_steps": 16, "replan": False, **terms}),
        on_event=script,
    )
    return result, cm.reference(job, data, steps, plan=plan)


def assert_same_but_lost_losses(result: cm.TrainResult, ideal: Any) -> None:
    """Bit-equal; losses that died with their messenger are no numbers."""
    told = np.isfinite(result.losses)
    assert result.losses[told].tolist() == np.asarray(ideal.losses, np.float32)[told].tolist()
    assert (~told).sum() <= 4
    for part in ("params", "state", "opt_state"):
        assert identical(getattr(result, part), getattr(ideal, part)), part


# Deaths at every op -----------------------------------------------------------------------------


def chain(*kinds: tuple[str, str, int | None], family: str = "mlp") -> Trial:
    """One run in which a device dies at each of these (kind, when, stage)."""
    blows = tuple(
        Blow(order=Order(name=f"{i}", kind=kind, when=when, step=6 + 7 * i, stage=stage))
        for i, (kind, when, stage) in enumerate(kinds)
    )
    return Trial(
        seed=0, family=family, stages=3, spares=SPARES, copies=1, ships=False, relaunches=True,
        blows=blows, steps=survival.STEPS,
    )  # fmt: skip


OPS = {
    "compute, first stage": (
        ("forward", "before", 0), ("backward", "after", 0), ("full", "after", 0),
        ("update", "after", 0),
    ),
    "compute, inner stage": (
        ("forward", "after", 1), ("backward", "before", 1), ("full", "before", 1),
        ("update", "before", 1),
    ),
    "compute, last stage": (
        ("forward", "after", 2), ("backward", "after", 2), ("full", "after", 2),
        ("update", "after", 2),
    ),
    "sending frames": (
        ("send-Forward", "after", 0), ("send-Backward", "before", 2), ("send-Commit", "before", 0),
        ("send-Commit", "before", 1),
    ),
    "sending word": (
        ("send-Done", "before", 0), ("send-Commit", "after", 0), ("send-Loss", "before", 2),
        ("take-Commit", "before", 2),
    ),
    "a copy's way": (
        ("send-Chunk", "after", 1), ("send-Seal", "before", 0), ("take-Chunk", "before", None),
        ("take-Seal", "before", None),
    ),
}  # fmt: skip

LONG = ("compute, first stage", "compute, last stage")
"""What an inner stage does, and other tests' stages."""


@pytest.mark.parametrize(
    "ops",
    [
        pytest.param(ops, id=name, marks=[pytest.mark.long] if name in LONG else [])
        for name, ops in OPS.items()
    ],
)
def test_a_death_at_each_kind_of_op(ops, crew_and_orders, tmp_path):
    play(chain(*ops), crew_and_orders, tmp_path)


def play(trial: Trial, crew_and_orders: Any, runs_dir: Path) -> survival.Story:
    crew, mortals = crew_and_orders
    try:
        story = survival.run_trial(trial, crew, mortals, runs_dir)
        print("\n".join(story.lines()))
        survival.judge(story)
    finally:
        survival.relaunch_dead(crew)
    return story


SECOND = (
    ("load", "before", 1), ("load", "after", 1), ("replay-forward", "after", 1),
    ("replay-backward", "before", 1), ("replay-update", "after", 1), ("send-FetchLog", "after", 1),
    ("send-Report", "before", 0), ("take-Install", "before", 2), ("send-Ready", "before", 0),
    ("take-Resume", "before", 1),
)  # fmt: skip


@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(SECOND[i : i + 2], marks=[] if i in (0, 4) else [pytest.mark.long])
        for i in range(0, len(SECOND), 2)
    ],
)
def test_a_second_death_in_the_recovery_from_the_first(pair, crew_and_orders, tmp_path):
    """The newcomer while it is installed or replays, a survivor while it reports or gets ready."""
    blows = tuple(
        Blow(
            order=Order(name=f"{i}a", kind="backward", step=7 + 12 * i, stage=1, nth=1),
            then=Order(name=f"{i}b", kind=kind, when=when, step=1, stage=stage),
        )
        for i, (kind, when, stage) in enumerate(pair)
    )
    trial = Trial(
        seed=1, family="mlp", stages=3, spares=SPARES, copies=2, ships=False, relaunches=True,
        blows=blows, steps=survival.STEPS,
    )  # fmt: skip
    play(trial, crew_and_orders, tmp_path)


def test_two_neighbours_die_in_the_same_moment(crew_and_orders, tmp_path):
    blows = (
        Blow(order=Order(name="a", kind="full", step=6, stage=0, beside=(1,))),
        Blow(order=Order(name="b", kind="send-Backward", step=15, stage=2, beside=(-1,))),
        Blow(order=Order(name="c", kind="update", step=24, stage=1, beside=(-1,))),
    )
    trial = Trial(
        seed=2, family="mlp", stages=3, spares=SPARES, copies=1, ships=False, relaunches=True,
        blows=blows, steps=survival.STEPS,
    )  # fmt: skip
    story = play(trial, crew_and_orders, tmp_path)
    assert len(story.dead) == 6
    for entry in story.fired.values():
        pair = {entry["device"], *entry["beside"]}
        assert any(pair <= set(event.lost) for event in story.result.recoveries), "both are named"


# Stopped and deaf -------------------------------------------------------------------------------


def test_a_device_that_stopped_and_wakes_after_it_was_replaced_is_a_newcomer(tmp_path, compiled):
    """SIGSTOP, SIGCONT: the zombie is fenced out, comes back, and takes over when it is needed."""
    with crew_of(3, tmp_path, compiled) as (crew, _):
        script = Script()

        def story(event: Any) -> None:
            script(event)
            first = script.recoveries[:1]
            if first and event is first[0]:
                os.kill(crew.pids["device-1"], signal.SIGCONT)
            rejoined = [e for e in script.recoveries[1:] if "device-1" in e.reason and not e.lost]
            if rejoined and event is rejoined[0]:
                os.kill(crew.pids["device-2"], signal.SIGKILL)

        script.at(9, lambda: os.kill(crew.pids["device-1"], signal.SIGSTOP))
        result, ideal = go(crew, tmp_path, script=story, steps=200, pause_s=0.02, silence_s=1.0)
    assert script.shown == list(range(200))
    assert_same_but_lost_losses(result, ideal)
    first, *_, last = result.recoveries
    assert first.lost == ("device-1",)
    assert [taken.device for taken in first.take_overs] == ["device-2"]
    assert last.lost == ("device-2",)
    assert [taken.device for taken in last.take_overs] == ["device-1"]


@pytest.mark.parametrize(
    "ways",
    [
        pytest.param([("device-0", "device-1"), ("device-1", "device-0")], id="both ways"),
        pytest.param([("device-1", "device-0")], id="upwards", marks=pytest.mark.long),
        pytest.param([("device-0", "device-1")], id="downwards"),
    ],
)
def test_a_link_between_neighbours_that_is_cut_without_a_reset(ways, tmp_path, compiled):
    """Both ends live and are heard: the next plan does without that link."""
    with crew_of(4, tmp_path, compiled) as (crew, mortals):
        script = Script()
        script.at(9, lambda: [mortals.cut(*way) for way in ways] and None)
        result, ideal = go(crew, tmp_path, script=script, steps=40, pause_s=0.01, silence_s=1.0)
    assert script.shown == list(range(40))
    assert_same_but_lost_losses(result, ideal)
    assert all(event.how != "rollback" for event in result.recoveries)
    devices = result.recoveries[-1].plan.devices
    assert set(devices) != {"device-0", "device-1"}


def test_a_device_cut_off_from_the_coordinator_alone_is_replaced_and_returns(tmp_path, compiled):
    with crew_of(3, tmp_path, compiled) as (crew, mortals):
        script = Script()
        cut_s: list[float] = []

        def cut() -> None:
            cut_s.append(time.monotonic())
            mortals.cut("device-1", "coordinator")
            mortals.cut("coordinator", "device-1")

        def story(event: Any) -> None:
            script(event)
            if script.recoveries and event is script.recoveries[0]:
                cut_s.append(time.monotonic())
                mortals.mend()

        script.at(9, cut)
        result, ideal = go(crew, tmp_path, script=story, steps=300, pause_s=0.02, silence_s=1.0)
    assert script.shown == list(range(300))
    assert_same_but_lost_losses(result, ideal)
    assert result.recoveries[0].lost == ("device-1",)
    assert cut_s[1] - cut_s[0] < 8.0, "silence is noticed in seconds"
    assert any("device-1" in e.reason and not e.lost for e in result.recoveries[1:]), "it is back"


# Damage -----------------------------------------------------------------------------------------


def test_a_copy_damaged_on_its_way_does_not_count_and_is_not_used(tmp_path, compiled):
    """One bit of a chunk: the holder refuses it; the loss after it still costs a replay only."""
    with crew_of(3, tmp_path, compiled) as (crew, mortals):
        mortals.order(
            Order(name="flip", kind="send-Chunk", step=8, device="device-1", do="corrupt")
        )
        script = Script()
        script.at(24, lambda: os.kill(crew.pids["device-1"], signal.SIGKILL))
        result, ideal = go(crew, tmp_path, script=script, steps=40)
        log = (tmp_path / "logs" / "device-2.log").read_text()
    assert list(mortals.fired()) == ["flip"]
    assert "damaged" in log
    assert_same_but_lost_losses(result, ideal)
    (event,) = result.recoveries
    assert event.how == "replay"
    (taken,) = event.take_overs
    assert taken.source == "device-2"
    waves = [r["version"] for r in survival.journal(tmp_path / "run") if r["kind"] == "Wave"]
    assert [v for v in waves if 8 < v < 24], "the waves after it are whole"


def test_a_copy_damaged_on_its_way_to_who_takes_over_is_sent_again(tmp_path, compiled):
    """One spare holds two stages whose owners die at once; the other one must fetch a copy."""
    with crew_of(5, tmp_path, compiled) as (crew, mortals):
        script = Script()

        def kill() -> None:
            order = Order(name="flip", kind="send-Chunk", device="device-3", do="corrupt")
            mortals.order(order)
            for device in ("device-0", "device-2"):
                os.kill(crew.pids[device], signal.SIGKILL)

        script.at(14, kill)
        result, ideal = go(crew, tmp_path, script=script, stages=3, steps=40, pause_s=0.02)
    assert mortals.fired()["flip"]["to"] == "device-4"
    assert_same_but_lost_losses(result, ideal)
    takes = {t.device: t for e in result.recoveries for t in e.take_overs}
    assert takes["device-4"].source == "device-3"
    assert takes["device-4"].moved_bytes > 0
    assert all(event.how == "replay" for event in result.recoveries)


def test_a_clock_that_jumps_changes_nothing(tmp_path, compiled, monkeypatch):
    """A day forward on a device, and on the coordinator: deadlines are counted by other clocks."""
    with crew_of(3, tmp_path, compiled) as (crew, mortals):
        mortals.order(Order(name="jump", kind="forward", step=6, device="device-1", do="jump"))
        script = Script()
        real = time.time
        script.at(9, lambda: monkeypatch.setattr(time, "time", lambda: real() + 86_400.0))
        script.at(15, lambda: monkeypatch.setattr(time, "time", lambda: real() - 86_400.0))
        result, ideal = go(crew, tmp_path, script=script, steps=40, pause_s=0.05, silence_s=1.0)
    assert list(mortals.fired()) == ["jump"]
    assert result.recoveries == ()
    assert_bit_equal(result, ideal)


# Too little -------------------------------------------------------------------------------------


def test_with_no_room_for_any_copy_a_loss_goes_back_to_the_checkpoint(tmp_path, compiled):
    """It is said that there is no room, and the run does not pretend that copies exist."""
    with crew_of(3, tmp_path, compiled, "--copies-mb", "0") as (crew, _):
        script = Script()
        script.at(17, lambda: os.kill(crew.pids["device-1"], signal.SIGKILL))
        result, ideal = go(
            crew, tmp_path, script=script, steps=30, pause_s=0.05, checkpoint_every=5, log_steps=1
        )
    told = [e for e in script.events if isinstance(e, cm.PhaseEvent) and e.phase == "protection"]
    assert len(told) == 1, "before training"
    assert "layers 0-1 of device-0 have no copy" in told[0].detail
    assert "newest checkpoint" in told[0].detail
    assert_same_but_lost_losses(result, ideal)
    (event,) = result.recoveries
    assert (event.how, event.base) == ("rollback", 15)
    assert all(taken.source == "coordinator" for taken in event.take_overs)
    assert script.shown == list(range(30))
    waves = [r for r in survival.journal(tmp_path / "run") if r["kind"] == "Wave" and r["ledger"]]
    assert not waves, "no wave counts of which a copy is missing"


def test_the_loss_of_the_last_copy_stops_the_run_with_a_clear_statement(tmp_path, compiled):
    """Owner and only holder of a stage die together, beyond the checkpoint: nothing is made up."""
    with crew_of(4, tmp_path, compiled) as (crew, _):
        script = Script()
        killed_s: list[float] = []

        def kill() -> None:
            wave = [r for r in survival.journal(tmp_path / "run") if r["kind"] == "Wave"][-1]
            entry = wave["ledger"][1]
            for device in entry["devices"]:
                os.kill(crew.pids[device], signal.SIGKILL)
            killed_s.append(time.monotonic())

        script.at(18, kill)
        with pytest.raises(cm.errors.AgentLostError) as caught:
            go(crew, tmp_path, script=script, steps=400, return_s=2.0)
        assert time.monotonic() - killed_s[0] < 15
    text = str(caught.value)
    assert "no valid copy" in text
    assert "layers 2" in text, "it names the layers"
    assert "checkpoint: version 0" in text
    kept = cm.load_checkpoint(tmp_path / "run" / "checkpoint")
    assert kept.version == 0
    shown = script.shown
    assert shown == list(range(len(shown))), "no step was made up or shown again"


def test_the_run_goes_on_when_the_last_copy_returns(tmp_path, compiled):
    """The only holder is merely stopped: the run waits for it, and goes on when it wakes."""
    with crew_of(3, tmp_path, compiled) as (crew, _):
        script = Script()

        def stop() -> None:
            os.kill(crew.pids["device-2"], signal.SIGSTOP)
            os.kill(crew.pids["device-1"], signal.SIGKILL)
            wake = threading.Timer(14.0, lambda: os.kill(crew.pids["device-2"], signal.SIGCONT))
            wake.daemon = True
            wake.start()

        script.at(18, stop)
        result, ideal = go(crew, tmp_path, script=script, steps=60, silence_s=1.0, return_s=60.0)
    assert_same_but_lost_losses(result, ideal)
    phases = [event.phase for event in script.events if isinstance(event, cm.PhaseEvent)]
    assert "waiting" in phases
    assert all(t.source != "coordinator" for e in result.recoveries for t in e.take_overs)


# Beyond replay ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "victim", ["device-0", *(pytest.param(f"device-{i}", marks=pytest.mark.long) for i in (1, 2))]
)
def test_a_stage_that_lends_passes_on_or_borrows_tied_weights_is_replayed(
    tmp_path, compiled, victim
):
    """The first stage lends to the last one; what crossed a cut of it is in the logs too. Then who
    took it over dies as well, and is replayed from the logs that the replay made."""
    job, data = small_job(name="gpt2")
    plan = even_plan(job, 3)
    with crew_of(5, tmp_path, compiled) as (crew, _):
        script = Script()

        def again():
            heir = script.recoveries[0].take_overs[0].device
            os.kill(crew.pids[str(heir)], signal.SIGKILL)

        script.at(18, lambda: os.kill(crew.pids[victim], signal.SIGKILL))
        script.at(30, again)
        result = cm.train(
            job, crew, data, steps=44, plan=plan, runs_dir=tmp_path, measure=False,
            recovery=cm.Recovery(wave_every=4, replan=False), on_event=script,
        )  # fmt: skip
    assert script.shown == list(range(44))
    assert [event.how for event in result.recoveries] == ["replay", "replay"]
    assert_same_but_lost_losses(result, cm.reference(job, data, 44, plan=plan))


def test_without_spares_other_cuts_agree_to_rounding(tmp_path, compiled):
    job, data = survival.job_of("mlp")
    plan = survival.plan_of("mlp", 3)
    with crew_of(3, tmp_path, compiled) as (crew, _):
        script = Script()
        script.at(14, lambda: os.kill(crew.pids["device-1"], signal.SIGKILL))
        result = cm.train(
            job, crew, data, steps=36, plan=plan, runs_dir=tmp_path, measure=False,
            recovery=cm.Recovery(wave_every=4, standby=False), on_event=script,
        )  # fmt: skip
    assert script.shown == list(range(36))
    event = result.recoveries[0]
    assert event.plan is not None
    assert len(event.plan.stages) < 3 or event.plan.devices != plan.devices
    assert all(taken.source != "coordinator" for taken in event.take_overs)
    whole = cm.reference(job, data, 36)
    told = np.isfinite(result.losses)
    np.testing.assert_allclose(result.losses[told], np.asarray(whole.losses)[told], rtol=1e-5)
    assert survival.distance(result.params, whole.params) <= 1e-5
