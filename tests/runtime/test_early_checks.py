"""What costs nothing to check is refused before the job is profiled or anything is started."""

import numpy as np
import pytest
from support.training import small_job

import crowdmesh_jax as cm
from crowdmesh_jax import errors, profiling


@pytest.mark.parametrize(
    ("fields", "error", "told"),
    [
        ({"solver": "exaustive"}, errors.UnknownSolverError, "did you mean 'exhaustive'"),
        ({"schedule": "1f1"}, errors.ScheduleError, "unknown schedule '1f1'; known: 1f1b"),
        ({"plan": "best"}, errors.JobError, "plan must be a PipelinePlan or 'auto', got 'best'"),
        (
            {"recovery": cm.Recovery(groups={"van": ("device-0", "pixel")})},
            errors.InvalidCrowdError,
            "pixel",
        ),
        ({"name": "taken"}, errors.RecordError, "a run of that name is there"),
        ({"name": "a/b"}, errors.RecordError, "use letters, digits"),
    ],
)
def test_wrong_words_are_refused_at_once(tmp_path, monkeypatch, fields, error, told):
    def never(*args, **kwargs):
        pytest.fail("the job was profiled first")

    monkeypatch.setattr(profiling, "profile", never)
    (tmp_path / "taken").mkdir()
    job, data = small_job()
    with pytest.raises(error, match=told):
        cm.train(job, cm.Crowd.local(), data, steps=1, runs_dir=tmp_path, **fields)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_arrays_that_are_no_source_are_told_how_to_become_one(tmp_path):
    job, _ = small_job()
    pair = (np.zeros((8, 6), np.float32), np.zeros(8, np.int32))
    with pytest.raises(errors.DataError, match=r"got tuple; .* cm\.ArraySource\(inputs, targets,"):
        cm.train(job, cm.Crowd.local(), pair, steps=1, runs_dir=tmp_path)


def test_a_plan_with_shared_stages_is_refused_as_planned_only(tmp_path):
    job, data = small_job()
    layers = len(job.model.layers)
    shares = tuple(cm.Share(device=d, rows=1) for d in ("device-0", "device-1"))
    stage = cm.Stage(device="device-0", first_layer=0, last_layer=layers - 1, shares=shares)
    plan = cm.PipelinePlan(stages=(stage,), num_layers=layers, microbatches=job.microbatches)
    with pytest.raises(errors.InvalidPlanError, match=r"shared by device-0, device-1: .* share"):
        cm.train(job, cm.Crowd.local(), data, steps=1, plan=plan, runs_dir=tmp_path)


def test_a_split_backward_is_refused_before_anything_is_profiled_or_started(tmp_path, monkeypatch):
    def never(*args, **kwargs):
        pytest.fail("the job was profiled first")

    monkeypatch.setattr(profiling, "profile", never)
    job, data = small_job()
    plan = cm.PipelinePlan.even(
        len(job.model.layers), ["device-0", "device-1"], microbatches=job.microbatches,
        schedule="zb-h1",
    )  # fmt: skip
    for fields in ({"plan": plan}, {"schedule": "zb-h1"}):
        with pytest.raises(errors.ScheduleError, match=r"'zb-h1', stage 0 splits the backward"):
            cm.train(job, cm.Crowd.local(), data, steps=1, runs_dir=tmp_path, **fields)
    assert list(tmp_path.iterdir()) == []
