"""The run folder: names, files that are whole, and what is no run folder."""

import json
import tomllib

import numpy as np
import pytest

from crowdmesh_jax.core import Crowd, CutTimes, MemoryBreakdown, PipelinePlan, StageTimes, load
from crowdmesh_jax.errors import FormatError, RecordError
from crowdmesh_jax.record import RunFolder, RunPrediction, chrome_trace, write_atomic


def test_a_run_leaves_all_its_files(tmp_path):
    folder = RunFolder.create(tmp_path / "runs", "first")
    plan = PipelinePlan.even(4, ["a", "b"], microbatches=2)
    folder.write_config({"seed": 0, "name": None, "crowd": Crowd.local((1.0, 0.5)), "x": [1, None]})
    folder.write_plan(plan)
    folder.write_trace(chrome_trace([]))
    with folder.events() as events, folder.metrics() as metrics:
        events.append({"kind": "start"}, durable=True)
        metrics.append({"step": 0, "loss": 1.5})
    folder.save_checkpoint(1, {("param", "a", "b"): np.ones(2, np.float32)}, {"job_sha256": "x"})

    again = RunFolder.open(tmp_path / "runs" / "first")
    assert again == folder
    assert again.name == "first"
    assert again.read_plan() == plan
    assert again.load_checkpoint(job_sha256="x").version == 1
    config = tomllib.loads(again.config_path.read_text())
    assert config == again.read_config()
    assert config["format_version"] == 1
    assert config["seed"] == 0
    assert config["x"] == [1]
    assert config["crowd"]["devices"][1]["speed"] == 0.5
    assert json.loads(again.trace_path.read_text())["traceEvents"] == []
    names = {path.name for path in again.path.iterdir() if not path.name.startswith(".")}
    assert names == {
        "config.toml", "plan.json", "events.jsonl", "metrics.jsonl", "trace.json", "checkpoint",
    }  # fmt: skip


def test_unnamed_runs_never_share_a_folder(tmp_path):
    paths = {RunFolder.create(tmp_path).path for _ in range(5)}
    assert len(paths) == 5


def test_a_taken_name_is_told_and_nothing_is_touched(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("kept")
    with pytest.raises(RecordError, match="a run of that name is there; choose another"):
        RunFolder.create(tmp_path, "mine")
    assert (tmp_path / "mine" / "file").read_text() == "kept"


def test_a_name_taken_since_it_was_checked_is_told_too(tmp_path, monkeypatch):
    monkeypatch.setattr(RunFolder, "check_name", lambda root, name: None)
    (tmp_path / "mine").mkdir()
    with pytest.raises(RecordError, match="a run of that name is there"):
        RunFolder.create(tmp_path, "mine")


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "x" * 101, "a\nb"])
def test_names_that_are_no_file_names_are_refused(tmp_path, name):
    with pytest.raises(RecordError, match="run name"):
        RunFolder.create(tmp_path, name)


def test_what_is_no_run_folder_is_told(tmp_path):
    with pytest.raises(RecordError, match="no such run folder"):
        RunFolder.open(tmp_path / "none")
    with pytest.raises(RecordError, match=r"neither config\.toml nor events\.jsonl"):
        RunFolder.open(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="cannot make the folder"):
        RunFolder.create(tmp_path / "file")
    folder = RunFolder.create(tmp_path, "empty")
    with pytest.raises(FormatError, match=r"plan\.json: cannot be read"):
        folder.read_plan()


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "plan.json"
    write_atomic(path, b"old")
    with pytest.raises(TypeError):
        write_atomic(path, "no bytes")  # pyright: ignore
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    with pytest.raises(RecordError, match="cannot write"):
        write_atomic(tmp_path / "no" / "file", b"")


PREDICTION = RunPrediction(
    stages=(StageTimes(forward_s=0.1, backward_s=0.2), StageTimes(forward_s=0.0, backward_s=0.3)),
    cuts=(CutTimes(forward_transfer_s=0.01),),
    step_s=1.5,
    memory={"a": MemoryBreakdown(parameter_bytes=7)},
)


def test_a_prediction_is_kept_and_makes_its_timeline_again(tmp_path):
    folder = RunFolder.create(tmp_path, "mine")
    folder.write_prediction(PREDICTION)
    again = folder.read_prediction()
    assert again == PREDICTION
    timeline = again.timeline(PipelinePlan.even(2, ["a", "b"], microbatches=3))
    assert len(timeline.ops) == 2 * 2 * 3
    assert timeline.stage_ops(0)[0].end_s == 0.1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"format_version": 2, "stages": []}', "format version 2 is newer than 1.*upgrade"),
        ('{"format_version": 1', "damaged"),
        ("[]", "damaged: format version None"),
        ('{"format_version": 1, "stages": [], "cuts": []}', "missing field 'step_s'"),
        (
            '{"format_version":1,"stages":[{"forward_s":-1,"backward_s":0}],"cuts":[],"step_s":1}',
            "forward_s must be finite and >= 0",
        ),
    ],
)
def test_a_prediction_that_cannot_be_read_is_told_with_its_file(tmp_path, text, told):
    folder = RunFolder.create(tmp_path, "mine")
    folder.prediction_path.write_text(text)
    with pytest.raises(RecordError, match=told) as caught:
        folder.read_prediction()
    assert "prediction.json" in caught.value.message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"format_version = 2", "format version 2 is newer than 1.*upgrade"),
        (b"format_version = 'x'", "damaged: format version 'x'"),
        (b"[job", "damaged"),
        (b"a = '\xff'", "damaged"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_told_with_its_file(tmp_path, text, told):
    folder = RunFolder.create(tmp_path, "mine")
    folder.config_path.write_bytes(text)
    with pytest.raises(RecordError, match=told) as caught:
        folder.read_config()
    assert "config.toml" in caught.value.message


def test_memory_figures_are_read_back_and_damage_is_told(tmp_path):
    folder = RunFolder.create(tmp_path, "mine")
    folder.write_memory({"a": {"peak_bytes": 7, "idle_bytes": 3}})
    assert folder.read_memory() == {"a": {"peak_bytes": 7, "idle_bytes": 3}}
    for text in ("{", "[1]", '{"a": 3}'):
        folder.memory_path.write_text(text)
        with pytest.raises(RecordError, match=r"memory\.json: damaged"):
            folder.read_memory()


def test_what_was_resumed_with_another_configuration_or_plan_keeps_the_former_ones(tmp_path):
    folder = RunFolder.create(tmp_path, "mine")
    plans = [PipelinePlan.even(4, ["a", "b"][:count], microbatches=2) for count in (1, 2, 1)]
    for steps, plan in zip((5, 7, 9), plans, strict=True):
        for _ in range(2):  # the same again keeps nothing
            folder.write_config({"run": {"steps": steps}})
            folder.write_plan(plan)
    names = ["config.1.toml", "config.2.toml", "config.toml"]
    assert sorted(path.name for path in folder.path.glob("config*")) == names
    steps = [tomllib.loads((folder.path / name).read_text())["run"]["steps"] for name in names]
    assert steps == [5, 7, 9]
    assert folder.read_config()["run"]["steps"] == 9
    names = ["plan.1.json", "plan.2.json", "plan.json"]
    assert sorted(path.name for path in folder.path.glob("plan*")) == names
    assert [load(PipelinePlan, folder.path / name) for name in names] == plans
