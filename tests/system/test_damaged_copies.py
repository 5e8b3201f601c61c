"""Copies that were whole and are damaged on disk since: the one that a take-over reads, surely.

Three devices, two stages, two copies of each: if device-1 dies, device-2 is the only idle one, and
holds a copy of stage 1 itself. That file is damaged. The other copy lies with device-0.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support import survival

import crowdmesh_jax as cm

from .test_faults import Script, assert_same_but_lost_losses, crew_of, go

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.xdist_group("faults")]

LOST_LAYERS = "2-3"
"""Of stage 1."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    yield survival.share_compiled(tmp_path_factory.mktemp("compiled"), 3)
    survival.stop_sharing()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def delete(path: Path) -> None:
    path.unlink()


def damage_and_kill(
    crew: cm.Crew, folder: Path, holders: tuple[str, ...], damage: Callable[[Path], None]
) -> list[str]:
    """Damages all of stage 1's copies with these, then kills their owner; the damaged files."""
    os.kill(crew.pids["device-1"], signal.SIGSTOP)  # nothing new comes from it
    time.sleep(0.5)  # and what has come is on disk
    files = [path for holder in holders for path in (folder / holder).glob(f"copy-{LOST_LAYERS}-*")]
    assert {path.parent.name for path in files} == set(holders), "each has one to damage"
    for path in files:
        damage(path)
    os.kill(crew.pids["device-1"], signal.SIGKILL)
    return [f"{path.parent.name}/{path.name}" for path in files]


def on_disk(folder: Path) -> tuple[str, ...]:
    """An agent's arguments: no copy of others stays in memory."""
    return ("--copies-mb", "0", "--copies-dir", str(folder / "{device}"))


def reasons(run_dir: Path) -> list[str]:
    """Why epochs were opened, by the run's journal."""
    return [r["reason"] for r in survival.journal(run_dir) if r["kind"] == "Epoch"]


@pytest.mark.parametrize("damage", [flip, truncate, delete])
def test_a_take_over_that_reads_a_damaged_copy_goes_on_from_the_next_holders(
    damage, tmp_path, compiled
):
    folder = tmp_path / "copies"
    with crew_of(3, tmp_path, compiled, *on_disk(folder)) as (crew, _):
        script = Script()
        files: list[str] = []
        script.at(14, lambda: files.extend(damage_and_kill(crew, folder, ("device-2",), damage)))
        result, ideal = go(crew, tmp_path, script=script, steps=40, copies=2, pause_s=0.01)
    said = reasons(tmp_path / "run")
    assert any("device-2 cannot be used" in said_of and name in said_of
               for said_of in said for name in files), said  # fmt: skip
    assert_same_but_lost_losses(result, ideal)
    assert script.shown == list(range(40))
    (taken,) = [over for event in result.recoveries for over in event.take_overs]
    assert (taken.before, taken.device, taken.source) == ("device-1", "device-2", "device-0")
    assert [event.how for event in result.recoveries if event.take_overs] == ["replay"]


def test_when_all_copies_are_damaged_the_run_says_what_is_lost_and_ends(tmp_path, compiled):
    """Beyond the checkpoint: nothing is made up from halves."""
    folder = tmp_path / "copies"
    with crew_of(3, tmp_path, compiled, *on_disk(folder)) as (crew, _):
        script = Script()
        files: list[str] = []
        both = ("device-0", "device-2")
        script.at(14, lambda: files.extend(damage_and_kill(crew, folder, both, flip)))
        with pytest.raises(cm.errors.AgentLostError) as caught:
            go(crew, tmp_path, script=script, steps=400, copies=2, pause_s=0.01, return_s=2.0)
    text = str(caught.value)
    assert "no valid copy" in text
    assert "layers 2" in text
    assert "checkpoint: version 0" in text
    assert script.shown == list(range(len(script.shown))), "no step was made up or shown again"


def test_when_all_copies_are_damaged_a_newer_checkpoint_serves(tmp_path, compiled):
    """All go back to it, and end as if nothing had been."""
    folder = tmp_path / "copies"
    with crew_of(3, tmp_path, compiled, *on_disk(folder)) as (crew, _):
        script = Script()
        files: list[str] = []
        both = ("device-0", "device-2")
        script.at(17, lambda: files.extend(damage_and_kill(crew, folder, both, truncate)))
        result, ideal = go(
            crew, tmp_path, script=script, steps=40, copies=2, pause_s=0.05, wave_every=10,
            checkpoint_every=15,
        )  # fmt: skip
    assert_same_but_lost_losses(result, ideal)
    assert script.shown == list(range(40))
    (taken, *_) = [e for e in result.recoveries if e.take_overs]
    assert taken.base >= 15
    stage_1 = [over for over in taken.take_overs if over.before == "device-1"]
    assert [over.source for over in stage_1] == ["coordinator"]
