"""Schedules beyond those that solvers search in: ZB-H1, and those of other packages."""

from __future__ import annotations

import dataclasses
import sys

import pytest
from hypothesis import given, settings
from partition_problems import chain_profile, problems

from crowdmesh_jax.core import (
    Crowd,
    PipelinePlan,
    evaluate_step_s,
    make_schedule,
    predict,
    schedule_for,
    schedules,
    search_schedule,
)
from crowdmesh_jax.core import builders as builders_module
from crowdmesh_jax.errors import (
    InfeasibleError,
    MissingExtraError,
    ScheduleError,
)
from crowdmesh_jax.solvers import PartitionProblem, explain, plan_faults, solve
from crowdmesh_jax.solvers.partition.tables import Tables

CROWD = Crowd.local((1.0, 0.5, 0.5))
PROFILE = chain_profile(8)

SERIAL = """
from crowdmesh_jax.core import Op, OpKind, Schedule

def serial(num_stages, microbatches, warmups):
    line = [Op(kind, m) for m in range(microbatches) for kind in (OpKind.FORWARD, OpKind.BACKWARD)]
    return Schedule(name="serial", ops=(tuple(line),) * num_stages)

def broken(num_stages, microbatches, warmups):
    built = serial(num_stages, microbatches, warmups)
    return Schedule(name="broken", ops=(built.ops[0][::-1],) * num_stages)

def nothing(num_stages, microbatches, warmups):
    return None

number = 3
"""


def install(tmp_path, monkeypatch, value: str, name: str = "theirs", source: str = SERIAL) -> None:
    """A real distribution on the path that brings a schedule."""
    (tmp_path / "their_schedule.py").write_text(source)
    info = tmp_path / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[crowdmesh_jax.schedules]\n{name} = {value}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "their_schedule", raising=False)


@pytest.fixture(autouse=True)
def forget_what_was_loaded():
    yield
    builders_module._loaded.cache_clear()


def test_an_installed_schedule_is_listed_built_planned_and_predicted(tmp_path, monkeypatch):
    with pytest.raises(ScheduleError, match="unknown schedule 'theirs'; known: 1f1b, eager, gpipe"):
        PartitionProblem(profile=PROFILE, crowd=CROWD, schedule="theirs")
    install(tmp_path, monkeypatch, "their_schedule:serial")
    assert schedules()["theirs"] == "from their-package (their_schedule:serial)"
    assert list(schedules())[:4] == ["gpipe", "1f1b", "eager", "zb-h1"]
    assert [str(op) for op in make_schedule("theirs", 1, 2).ops[0]] == ["F0", "B0", "F1", "B1"]
    assert search_schedule("theirs") == "1f1b"
    problem = PartitionProblem(profile=PROFILE, crowd=CROWD, schedule="theirs")
    found = solve(problem, solver="exhaustive")
    assert found.plan.schedule == "theirs"
    assert not found.optimal
    assert found.gap is None
    # One microbatch at a time: the fastest device alone is the best there is.
    assert found.plan.devices == ("device-0",)
    assert found.predicted.closed_form_step_s == found.predicted.step_s
    two = PipelinePlan.even(8, ["device-0", "device-1"], microbatches=8, schedule="theirs")
    assert predict(PROFILE, CROWD, two).stages[0].in_flight == 1
    assert "no closed form" in explain(two, PROFILE, CROWD)


@pytest.mark.parametrize(
    ("value", "error", "complaint"),
    [
        ("their_schedule:broken", ScheduleError, "'broken', stage 0: B7 stands before its forward"),
        ("their_schedule:nothing", ScheduleError, "'theirs': its builder gave a NoneType"),
        ("their_schedule:number", ScheduleError, "'theirs' of their-package is no builder"),
        ("their_schedule:gone", MissingExtraError, "'theirs' of their-package cannot be imported"),
        ("no_such_module:x", MissingExtraError, "pip install their-package"),
    ],
)
def test_what_a_package_brings_is_checked(tmp_path, monkeypatch, value, error, complaint):
    install(tmp_path, monkeypatch, value)
    with pytest.raises(error, match=complaint):
        make_schedule("theirs", 2, 8)


def test_a_built_in_name_stays_ours_and_a_builder_given_goes_first(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "their_schedule:broken", name="1f1b")
    assert make_schedule("1f1b", 2, 4).max_in_flight(0) == 2
    mine = {"1f1b": lambda stages, count, warmups: make_schedule("gpipe", stages, count)}
    assert make_schedule("1f1b", 2, 4, builders=mine).max_in_flight(0) == 4


@settings(max_examples=60, deadline=None)
@given(problems(max_layers=5, max_devices=3, schedules=("zb-h1",)))
def test_a_plan_for_zb_h1_fits_and_is_no_slower_than_the_same_plan_under_1f1b(problem):
    try:
        found = solve(problem, solver="exhaustive")
    except InfeasibleError:
        return
    assert plan_faults(problem, found.plan) == ()
    assert not found.optimal
    stages = tuple(dataclasses.replace(stage, warmup=None) for stage in found.plan.stages)
    whole = dataclasses.replace(found.plan, stages=stages, schedule="1f1b")
    ours_s = found.predicted.step_s
    assert ours_s <= predict(problem.profile, problem.crowd, whole).step_s * (1 + 1e-9)
    auto = solve(problem, solver="auto", budget_s=0.5)
    assert plan_faults(problem, auto.plan) == ()


def test_every_solver_that_takes_1f1b_takes_zb_h1():
    problem = PartitionProblem(profile=PROFILE, crowd=CROWD, schedule="zb-h1")
    plain = PartitionProblem(profile=PROFILE, crowd=CROWD)
    for name in ("ilp", "dp", "auto", "even", "by_params", "pipedream", "dapple"):
        found = solve(problem, solver=name)
        assert found.plan.schedule == "zb-h1"
        assert found.predicted.step_s <= solve(plain, solver=name).predicted.step_s * (1 + 1e-9)


def test_where_memory_is_short_fewer_are_kept_in_flight():
    roomy = PartitionProblem(
        profile=PROFILE, crowd=CROWD, schedule="zb-h1", compile_peak_bytes=0, min_stages=3
    )
    free = solve(roomy, solver="exhaustive")
    need = [stage.memory.total_bytes for stage in free.predicted.stages]
    limit = dict(zip(free.plan.devices, need, strict=True))
    limit[free.plan.devices[2]] -= 1
    devices = tuple(
        dataclasses.replace(device, memory_bytes=limit[device.id]) for device in CROWD.devices
    )
    tight = dataclasses.replace(roomy, crowd=dataclasses.replace(CROWD, devices=devices))
    assert any("needs" in fault for fault in plan_faults(tight, free.plan))
    tables = Tables(tight)
    cuts = [(tables.devices.index(s.device), s.last_layer + 1) for s in free.plan.stages]
    chain = tables.chain(cuts)
    assert chain is not None
    plan = tables.plan(chain)
    assert plan.stages[2].warmup is not None
    assert plan_faults(tight, plan) == ()
    assert schedule_for(plan).max_in_flight(2) < schedule_for(free.plan).max_in_flight(2)
    times = tables.times(chain)
    assert tables.evaluate_s(chain) == evaluate_step_s(schedule_for(plan), *times)
