"""The run folder: names, files that are whole, and what is no run folder."""

import json
import tomllib

import numpy as np
import pytest

from crowdmesh_jax.core import Crowd, PipelinePlan
from crowdmesh_jax.errors import FormatError, RecordError
from crowdmesh_jax.record import RunFolder, chrome_trace, write_atomic


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
