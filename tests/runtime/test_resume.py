"""Going on from a run's folder: exactly, on other crowds, and never from what does not fit."""

from __future__ import annotations

import collections
import dataclasses
import json
import shutil
import tomllib

import jax
import numpy as np
import optax
import pytest
from support.families import family
from support.training import even_plan, identical, small_job

import crowdmesh_jax as cm
from crowdmesh_jax import errors
from crowdmesh_jax.export import initial_arrays
from crowdmesh_jax.record import Journal, read_journal
from crowdmesh_jax.runtime.resume import _plain_spec, _spec_from_plain, check_job

SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 0.05, warmup_steps=3, decay_steps=9)
CHAIN = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(SCHEDULE))


def train(crew, job, data, *, stages=2, **fields):
    plan = even_plan(job, stages) if stages else "auto"
    return cm.train(job, crew, data, measure=False, **{"plan": plan, **fields})


@pytest.fixture(scope="module")
def job_and_data():
    return small_job(CHAIN)


@pytest.fixture(scope="module")
def undisturbed(crew, job_and_data, tmp_path_factory):
    """Nine steps under a warm-up and a cosine."""
    return train(crew, *job_and_data, steps=9, runs_dir=tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def five_steps(crew, job_and_data, tmp_path_factory):
    """A run that ended after five."""
    job, data = job_and_data
    return train(
        crew, job, data, steps=5, runs_dir=tmp_path_factory.mktemp("five"), name="five",
        evaluate=cm.Evaluation(data, every=2), keep_best="loss",
    ).run_dir  # fmt: skip


@pytest.fixture
def folder(five_steps, tmp_path):
    """A copy of its folder, to go on in or to damage."""
    return shutil.copytree(five_steps, tmp_path / "run")


def rows_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_is_bit_equal_to_one_without_a_break(crew, job_and_data, undisturbed, folder):
    """Clipping, Adam's counts and the schedule's go on where they stood."""
    job, data = job_and_data
    resumed = train(crew, job, data, steps=9, resume=folder, stages=0)
    assert resumed.plan == even_plan(job), "plan='auto' takes the run's own"
    assert resumed.first_step == 5
    assert resumed.run_dir == folder
    first = tomllib.loads((folder / "config.1.toml").read_text())["run"]
    assert (first["steps"], first["evaluate"]["every"]) == (5, 2)
    assert not (folder / "plan.1.json").exists(), "the plan is the same"
    assert resumed.losses.tolist() == undisturbed.losses[5:].tolist()
    for part in ("params", "state", "opt_state"):
        assert identical(getattr(resumed, part), getattr(undisturbed, part)), part
    rows = rows_of(folder)
    steps = [row["step"] for row in rows if "step" in row]
    assert steps == list(range(9))
    losses = [row["loss"] for row in rows if "step" in row]
    assert losses == undisturbed.losses.tolist()
    assert [row["version"] for row in rows if "eval" in row] == [2, 4, 5]
    events = read_journal(folder / "events.jsonl")
    assert [event["term"] for event in events if event["kind"] == "Term"] == [1, 2]
    epochs = [event["epoch"] for event in events if event["kind"] == "Epoch"]
    assert epochs == [1, 2]
    bases = [event["base"] for event in events if event["kind"] == "Decision"]
    assert bases == [0, 5]
    assert events[-1] == {**events[-1], "kind": "Finish", "version": 9}


@pytest.mark.parametrize("stages", [1, 3])
def test_another_cut_goes_on_to_float32_rounding(stages, crew, job_and_data, undisturbed, folder):
    job, data = job_and_data
    resumed = train(crew, job, data, steps=9, resume=folder, stages=stages)
    np.testing.assert_allclose(resumed.losses, undisturbed.losses[5:], rtol=1e-5)
    pairs = zip(jax.tree.leaves(resumed.params), jax.tree.leaves(undisturbed.params), strict=True)
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_crowd_without_the_plans_devices_gets_a_plan_of_its_own(
    job_and_data, undisturbed, folder, caplog
):
    job, data = job_and_data
    crowd = cm.Crowd.local((1.0,))
    own = cm.RunFolder.open(folder).read_plan()
    assert "device-1" in own.devices
    resumed = train(
        crowd, job, data, steps=7, resume=folder, stages=0, transport="memory", solver="even"
    )
    assert resumed.plan.devices == ("device-0",)
    (told,) = [r.getMessage() for r in caplog.records if r.name.endswith("runtime.train")]
    assert told == (
        "planning anew, since the plan that the run had does not fit this crowd:"
        " no device 'device-1' in the crowd; known: device-0"
    )
    np.testing.assert_allclose(resumed.losses, undisturbed.losses[5:7], rtol=1e-5)


def test_rows_of_steps_that_are_made_again_are_dropped_once(crew, job_and_data, folder):
    """The process died after steps that no checkpoint holds."""
    job, data = job_and_data
    with Journal(folder / "metrics.jsonl") as metrics:
        for step in (5, 6):
            metrics.append({"step": step, "loss": 99.0, "step_s": 1.0, "accuracy": 0.0})
        metrics.append({"version": 6, "eval": {"loss": 99.0}})
    train(crew, job, data, steps=8, resume=folder)
    rows = rows_of(folder)
    assert [row["step"] for row in rows if "step" in row] == list(range(8))
    assert max(row["loss"] for row in rows if "step" in row) < 9
    assert [row["seq"] for row in read_journal(folder / "metrics.jsonl")] == list(range(len(rows)))
    assert [row["version"] for row in rows if "eval" in row] == [2, 4, 5]


def test_the_best_of_before_stays_until_it_is_beaten(crew, job_and_data, folder):
    job, data = job_and_data
    before = cm.load_checkpoint(folder / "best")
    path = folder / "best" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["meta"]["best"]["value"] = -1.0  # nothing will beat that
    path.write_text(json.dumps(manifest))
    fields = {"evaluate": cm.Evaluation(data, every=1), "keep_best": "loss"}
    resumed = train(crew, job, data, steps=7, resume=folder, **fields)
    # None was told before: "by this call". But who resumes asks which version is in best/.
    assert resumed.best_version == before.version
    assert cm.load_checkpoint(folder / "best").version == before.version
    manifest["meta"]["best"]["value"] = 1e9
    path.write_text(json.dumps(manifest))
    resumed = train(crew, job, data, steps=9, resume=folder, **fields)
    assert resumed.best_version == cm.load_checkpoint(folder / "best").version
    assert resumed.best_version > 7


def test_the_best_of_before_is_told_by_a_run_that_keeps_none(crew, job_and_data, folder):
    job, data = job_and_data
    before = cm.load_checkpoint(folder / "best").version
    assert train(crew, job, data, steps=6, resume=folder).best_version == before
    (folder / "best" / "manifest.json").write_text("{}")  # damaged, but nobody needs it
    assert train(crew, job, data, steps=7, resume=folder).best_version is None


def test_a_loss_that_is_not_finite_after_going_on_halts_as_ever(crew, job_and_data, folder):
    job, data = job_and_data
    inputs = np.full_like(data.inputs, np.inf)
    wild = cm.ArraySource(inputs, data.targets, 8)
    with pytest.raises(errors.NonFiniteLossError, match=r"step [5-8]"):
        train(crew, job, wild, steps=9, resume=folder)
    assert cm.load_checkpoint(folder / "checkpoint").version > 5


# Refusals ---------------------------------------------------------------------------------------


def other_job(job, **change):
    return dataclasses.replace(job, **change)


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        ({"seed": 5}, ["seed: 0 in the checkpoint, 5 in this job"]),
        ({"microbatches": 2}, ["microbatches: 4 in the checkpoint, 2 in this job"]),
        (
            {"optimizer": optax.sgd(0.1)},
            [
                f"differs  optimizer state {name}: only in the checkpoint"
                for name in ("mu", "nu", "count")
            ],
        ),
        (
            {"model": family("lenet").model},
            ["model: ", "layer 'conv0': only in this job", "layer 'conv1': only", "more"],
        ),
    ],
)
def test_a_checkpoint_of_another_job_is_refused_with_what_differs(
    change, texts, crew, job_and_data, folder
):
    job, data = job_and_data
    if "model" in change:
        made = family("lenet")
        other = made.job(optax.sgd(0.1), batch_size=8)
        data = made.source()
    else:
        other = other_job(job, **change)
    with pytest.raises(errors.RecordError, match="checkpoint of another job") as caught:
        train(crew, other, data, steps=9, resume=folder)
    for text in texts:
        assert text in str(caught.value)
    with pytest.raises(errors.RecordError, match="another job"):
        cm.restore(folder, other, data.batch(0))


def test_differences_are_told_from_cause_to_effect(job_and_data, five_steps):
    """Layers, parameters, state, optimizer: a wider layer was told by paths of Adam's state."""
    job, data = job_and_data
    inputs_spec, _ = job.microbatch_specs(data.batch(0))
    arrays = dict(initial_arrays(job, inputs_spec))
    stored = cm.load_checkpoint(five_steps / "checkpoint")
    kernel = ("param", "dense1", "Dense_0/kernel")
    arrays[kernel] = np.zeros((9, 8), np.float32)
    arrays["opt", "dense1", "1/0/mu/dense1/Dense_0/kernel"] = arrays[kernel]
    arrays["state", "head", "batch_stats/mean"] = np.zeros(4, np.float32)
    arrays["param", "extra", "bias"] = np.zeros(4, np.float32)
    arrays["opt", "extra", "1/0/mu/extra/bias"] = np.zeros(4, np.float32)
    with pytest.raises(errors.RecordError) as caught:
        check_job(five_steps, stored, job, arrays)
    lines = str(caught.value).splitlines()
    assert [line.removeprefix("  differs  ") for line in lines if "differs" in line] == [
        "layer 'extra': only in this job",
        (
            "layer 'dense1', parameter Dense_0/kernel: float32[8, 8] in the checkpoint,"
            " float32[9, 8] in this job"
        ),
        "layer 'head', state batch_stats/mean: only in this job",
        "optimizer state mu: float32[8, 8] in the checkpoint, float32[9, 8] in this job",
    ]


# Reading --------------------------------------------------------------------------------------


def test_a_checkpoint_is_restored_without_a_batch(job_and_data, folder):
    """It needed one for shapes that the run knew when it wrote the checkpoint."""
    job, data = job_and_data
    for path in (folder, folder / "checkpoint", folder / "best"):
        kept = cm.restore(path, job)
        assert identical(kept.params, cm.restore(path, job, data.batch(0)).params)
        stored = cm.load_checkpoint(path / "checkpoint" if path == folder else path).arrays
        kernel = stored["param", "head", "kernel"]
        assert kept.params["head"]["kernel"].tolist() == kernel.tolist()


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        (None, r"give example_batch, a batch of the job: data\.batch\(0\)"),
        (3, "damaged: shapes of inputs: 3"),
        ({"shape": [2, "x"], "dtype": "float32"}, "damaged: shapes of inputs"),
        ({"set": []}, "damaged: shapes of inputs"),
    ],
)
def test_a_checkpoint_that_knows_no_shapes_asks_for_a_batch(inputs, text, job_and_data, folder):
    job, data = job_and_data
    path = folder / "checkpoint" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "meta": {**manifest["meta"], "inputs": inputs}}))
    with pytest.raises(errors.RecordError, match=text):
        cm.restore(folder, job)
    cm.restore(folder, job, data.batch(0))


def test_trees_of_shapes_survive_a_manifest():
    leaf = jax.ShapeDtypeStruct((2, 3), jax.numpy.bfloat16)
    whole = {"a": (leaf, [leaf]), "b": jax.ShapeDtypeStruct((2,), np.int32)}
    assert _spec_from_plain(json.loads(json.dumps(_plain_spec(whole)))) == whole
    assert _plain_spec({"a": (leaf, collections.OrderedDict(b=leaf))}) is None


def damage_bit(folder):
    shard = next(folder.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)


def truncate(folder):
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-9])


def lose_shard(folder):
    next(folder.glob("*.safetensors")).unlink()


def newer_format(folder):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "format_version": 99}))


def lose_manifest(folder):
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("harm", "text"),
    [
        (damage_bit, "damaged"),
        (truncate, "damaged"),
        (lose_shard, "cannot read"),
        (newer_format, "newer than 1"),
        (lose_manifest, "no checkpoint here"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_whole_is_never_half_loaded(
    harm, text, job_and_data, folder
):
    """Nothing is launched: the crowd's agents would be processes."""
    job, data = job_and_data
    harm(folder / "checkpoint")
    events = (folder / "events.jsonl").read_bytes()
    with pytest.raises(errors.RecordError, match=text):
        train(cm.Crowd.local((1.0, 1.0)), job, data, steps=9, resume=folder)
    assert (folder / "events.jsonl").read_bytes() == events
    with pytest.raises(errors.RecordError, match=text):
        cm.restore(folder / "checkpoint", job, data.batch(0))


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"steps": 5}, errors.JobError, "has made 5 steps; steps=5 in all leaves nothing to do"),
        ({"steps": 3}, errors.JobError, "nothing to do"),
        ({"steps": 9, "name": "x"}, errors.JobError, "leave out name"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, kind, text, job_and_data, folder):
    job, data = job_and_data
    with pytest.raises(kind, match=text):
        train(cm.Crowd.local((1.0, 1.0)), job, data, resume=folder, **fields)


def test_a_folder_that_is_none_is_refused(job_and_data, tmp_path):
    job, data = job_and_data
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(errors.RecordError, match="run"):
            train(cm.Crowd.local((1.0, 1.0)), job, data, steps=9, resume=path)


def test_a_run_that_another_process_trains_is_refused_and_the_process_named(job_and_data, folder):
    job, data = job_and_data
    with (
        Journal(folder / "events.jsonl"),
        pytest.raises(errors.RecordError, match=r"process \d+ is writing it"),
    ):
        train(cm.Crowd.local((1.0, 1.0)), job, data, steps=9, resume=folder)
