"""Named things: what is asked for wrongly is told by one message, whatever kind it is."""

from __future__ import annotations

from importlib import metadata
from types import SimpleNamespace

import pytest

from crowdmesh_jax.core.plugins import PlugIns
from crowdmesh_jax.errors import InvalidValueError, MissingExtraError, UnknownSolverError


class Runner:
    def __init__(self, speed: float = 1.0) -> None:
        self.speed = speed

    def run(self) -> float:
        return self.speed


KIND = PlugIns(
    group="tests.runners",
    kind="runner",
    built_in={"quick": (Runner, "runs"), "still": (SimpleNamespace, "cannot run")},
    method="run()",
    unknown=UnknownSolverError,
)


def point(monkeypatch, value: str) -> None:
    found = metadata.EntryPoint(name="theirs", value=value, group="tests.runners")
    monkeypatch.setattr(
        metadata, "entry_points", lambda *, group: [found] if group == found.group else []
    )


def test_a_name_makes_the_thing_with_its_options_and_an_object_is_taken_as_it_is():
    assert KIND.make("quick", speed=2.0).run() == 2.0
    own = Runner(3.0)
    assert KIND.make(own) is own
    with pytest.raises(InvalidValueError, match="come with a runner's name"):
        KIND.make(own, speed=1.0)


def test_unknown_names_options_and_things_that_cannot_are_told():
    with pytest.raises(UnknownSolverError, match=r"no runner 'quik'; did you mean 'quick'\?"):
        KIND.make("quik")
    with pytest.raises(InvalidValueError, match="'quick' does not take these options"):
        KIND.make("quick", colour=1)
    with pytest.raises(InvalidValueError, match=r"'still' is no runner: it has no run\(\)"):
        KIND.make("still")


def test_what_an_installed_package_brings_is_listed_after_ours_and_made(monkeypatch):
    point(monkeypatch, f"{__name__}:Runner")
    assert list(KIND.listed()) == ["quick", "still", "theirs"]
    assert f"({__name__}:Runner)" in KIND.listed()["theirs"]
    assert KIND.make("theirs", speed=4.0).run() == 4.0


@pytest.mark.parametrize("value", ["no_such_module:Runner", f"{__name__}:Gone"])
def test_a_package_that_cannot_be_imported_is_named(monkeypatch, value):
    point(monkeypatch, value)
    with pytest.raises(MissingExtraError, match=r"'theirs' .*cannot be imported"):
        KIND.make("theirs")
