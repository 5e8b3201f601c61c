"""Evaluation during training: what it gives, what it leaves alone, what is refused."""

from __future__ import annotations

import json

import jax
import numpy as np
import optax
import pytest
from support.families import family
from support.training import even_plan, identical, small_job

import crowdmesh_jax as cm
from crowdmesh_jax import errors

CROWD = cm.Crowd.local((1.0, 0.5, 0.5))


def train(crew, job, data, tmp_path, *, steps=4, stages=2, **fields):
    return cm.train(
        job, crew, data, steps=steps, plan=even_plan(job, stages), runs_dir=tmp_path, measure=False,
        **fields,
    )  # fmt: skip


def plain_values(job, params, state, inputs, targets) -> dict[str, float]:
    """The whole set through the whole model at once."""
    y, _, _ = job.model.apply(
        params, state, inputs, seed=0, step=0, microbatch=0, train=False
    )  # fmt: skip
    values, weights = job.loss_fn(y, targets)
    told = {"loss": float((values * weights).sum() / weights.sum())}
    for name, metric in job.metric_functions.items():
        total, count = metric(y, targets)
        told[name] = float(total) / float(count)
    return told


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("mlp", 1),
        ("nnx_batchnorm", 3),
        pytest.param("masked", 2, marks=pytest.mark.long),
        pytest.param("gpt2", 2, marks=pytest.mark.long),
    ],
)
def test_values_are_the_plain_models_and_training_is_bit_equal(name, stages, crew, tmp_path):
    """Statistics, tied weights, masks: as a plain evaluation of the trained trees gives them."""
    job, data = small_job(name=name)
    held_out = family(name).batch(11, seed=9)
    without = train(crew, job, data, tmp_path, stages=stages)
    evaluate = cm.Evaluation(held_out, every=2)
    result = train(crew, job, data, tmp_path, stages=stages, evaluate=evaluate, keep_best="loss")
    assert result.losses.tolist() == without.losses.tolist()
    for part in ("params", "state", "opt_state"):
        assert identical(getattr(result, part), getattr(without, part)), part
    assert list(result.evaluations) == [2, 4]
    assert (result.evaluated_rows, result.left_out_rows) == (10, 1)
    whole = jax.tree.map(lambda leaf: leaf[:10], held_out)
    wanted = plain_values(job, result.params, result.state, *whole)
    assert result.evaluations[4] == pytest.approx(wanted, rel=1e-5)
    assert result.evaluations[2] != result.evaluations[4]


def test_metrics_hold_a_row_per_evaluation_and_the_step_that_it_delayed(crew, tmp_path):
    job, data = small_job()
    seen = []
    result = train(
        crew, job, data, tmp_path, evaluate=cm.Evaluation(data, every=2), on_event=seen.append
    )
    lines = (result.run_dir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    evaluated = {row["version"]: row["eval"] for row in rows if "eval" in row}
    assert evaluated == result.evaluations
    assert [row["step"] for row in rows if row.get("has_evaluated")] == [2]
    order = [row.get("step", row.get("version")) for row in rows]
    assert order == [0, 1, 2, 2, 3, 4], "version 2 stands after step 1, before step 2"
    events = [event for event in seen if isinstance(event, cm.EvaluationEvent)]
    assert [(event.version, event.rows) for event in events] == [(2, 64), (4, 64)]


def test_a_source_of_the_users_own_is_evaluated_at_home(crew, tmp_path):
    """It cannot travel: its rows are asked for, microbatch by microbatch."""
    job, data = small_job()
    held_out = family("mlp").source(seed=5)
    evaluate = cm.Evaluation(held_out, every=None, batches=3)
    result = train(crew, job, data, tmp_path, evaluate=evaluate)
    batches = [held_out.batch(k) for k in range(3)]
    whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)
    wanted = plain_values(job, result.params, result.state, *whole)
    assert result.evaluations == {4: pytest.approx(wanted, rel=1e-5)}
    assert result.evaluated_rows == 24


def test_an_evaluation_source_that_raises_ends_the_run_and_is_named(crew, tmp_path):
    job, data = small_job()

    class Broken:
        def batch(self, step):
            if step == 1:
                raise OSError("disk on fire")
            return family("mlp").batch(8, step=step)

    evaluate = cm.Evaluation(Broken(), every=1, batches=2)
    with pytest.raises(cm.CrowdMeshError, match=r"evaluation source.*microbatch 4.*on fire"):
        train(crew, job, data, tmp_path, evaluate=evaluate)


def test_the_best_version_stays_beside_the_newest(crew, tmp_path):
    """A learning rate that grows until it ruins everything: the best one lies on the way."""
    rate = optax.schedules.linear_schedule(0.05, 30.0, 8)
    job, data = small_job(optax.sgd(rate))
    seen = []
    result = train(
        crew, job, data, tmp_path, steps=8, evaluate=cm.Evaluation(data, every=1),
        keep_best=("loss", "min"), on_event=seen.append,
    )  # fmt: skip
    losses = {version: values["loss"] for version, values in result.evaluations.items()}
    best = min(losses, key=lambda version: losses[version])
    assert best < 8, "the test needs a run that gets worse"
    assert result.best_version == best
    kept = cm.load_checkpoint(result.run_dir / "best")
    assert kept.version == best
    assert kept.meta["best"] == {"metric": "loss", "value": losses[best]}
    assert cm.load_checkpoint(result.run_dir / "checkpoint").version == 8
    trees = cm.restore(result.run_dir / "best", job, data.batch(0))
    wanted = plain_values(job, trees.params, trees.state, data.inputs, data.targets)
    assert losses[best] == pytest.approx(wanted["loss"], rel=1e-5)
    assert identical(cm.restore(result.run_dir, job, data.batch(0)).params, result.params)
    told = [event for event in seen if isinstance(event, cm.BestEvent)]
    assert told[-1].version == best
    assert [event.value for event in told] == sorted((e.value for e in told), reverse=True)


def mlp_rows(rows, **change):
    inputs, targets = family("mlp").batch(rows)
    return change.get("inputs", inputs), change.get("targets", targets)


@pytest.mark.parametrize(
    ("evaluate", "kind", "text"),
    [
        (mlp_rows(1), errors.DataError, "1 rows, less than a microbatch of 2 rows"),
        (
            mlp_rows(4, inputs=np.zeros((4, 3), np.float32)), errors.DataError,
            r"evaluation inputs have rows of float32\[3\], in training float32\[6\]",
        ),
        (
            mlp_rows(4, targets=np.zeros(4, np.float32)), errors.DataError,
            r"evaluation targets have rows of float32\[\], in training int32\[\]",
        ),
        (({"x": np.zeros((4, 6), np.float32)}, np.zeros(4, np.int32)), errors.DataError, "PyTree"),
        (family("mlp").source(), errors.DataError, r"use cm.Evaluation\(source, batches="),
        (
            mlp_rows(4, targets=np.array([0, 1, 9, 2], np.int32)), errors.DataError,
            r"evaluation targets: .*9",
        ),
        ("test", errors.DataError, "must be a data source, .* got str"),
    ],
)  # fmt: skip
def test_an_evaluation_that_does_not_fit_is_refused_before_anything_starts(
    evaluate, kind, text, tmp_path
):
    job, data = small_job()
    with pytest.raises(kind, match=text):
        cm.train(job, CROWD, data, steps=2, evaluate=evaluate, runs_dir=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"keep_best": "loss"}, "keep_best needs an evaluation"),
        ({"keep_best": "f1", "evaluate": True}, "no metric 'f1'; evaluations give 'loss', 'acc"),
        ({"keep_best": ("loss", "up"), "evaluate": True}, "is a high 'loss' good or bad"),
    ],
)
def test_a_best_that_means_nothing_is_refused(fields, text, tmp_path):
    job, data = small_job()
    if "evaluate" in fields:
        fields = {**fields, "evaluate": data}
    with pytest.raises(errors.JobError, match=text):
        cm.train(job, CROWD, data, steps=2, runs_dir=tmp_path, **fields)


@pytest.mark.parametrize("fields", [{"every": 0}, {"batches": 0}, {"every": 1.5}])
def test_an_evaluation_knows_its_bounds(fields):
    with pytest.raises(errors.InvalidValueError, match="must be >= 1 or None"):
        cm.Evaluation(None, **fields)
