"""Real processes: pieces of a copy that did not change are not sent again, and serve as well."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import optax
import pytest
from flax import linen as nn
from support.equality import assert_bit_equal

import crowdmesh_jax as cm
from crowdmesh_jax.record import read_journal

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("system")]
ROWS, WIDTH = 40_000, 16


def table_job() -> tuple[cm.TrainingJob, cm.ArraySource]:
    """A large table of which a run sees few rows: Adam leaves the others as they are."""

    class Flat(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            return nn.Dense(4)(x.mean(axis=1))

    model = cm.StagedModel.from_linen([nn.Embed(ROWS, WIDTH), Flat()], name="table")
    job = cm.TrainingJob(
        model, cm.losses.softmax_cross_entropy, optax.adam(1e-2), batch_size=8, microbatches=2
    )
    random = np.random.default_rng(0)
    seen = random.integers(0, 50, (32, 6)).astype(np.int32)
    return job, cm.ArraySource(seen, random.integers(0, 4, 32).astype(np.int32), 8)


def waves(run_dir: Path) -> list[int]:
    """Bytes that each wave of copies sent, in order."""
    entries = read_journal(run_dir / "events.jsonl")
    return [e["sent_bytes"] for e in entries if e.get("kind") == "Wave" and e.get("ledger")]


def test_what_did_not_change_is_not_sent_again_and_a_take_over_from_it_is_exact(tmp_path):
    job, data = table_job()
    plan = cm.PipelinePlan.even(2, ["device-0", "device-1"], microbatches=2)
    with cm.launch(cm.Crowd.local((1.0,) * 3)) as crew:

        def kill(event):
            if isinstance(event, cm.StepEvent) and event.step == 17:
                os.kill(crew.pids["device-0"], signal.SIGKILL)

        result = cm.train(
            job, crew, data, steps=30, plan=plan, runs_dir=tmp_path, measure=False, on_event=kill,
            recovery=cm.Recovery(wave_every=4, replan=False),
        )  # fmt: skip
    sent = waves(result.run_dir)
    table_bytes = 3 * 4 * ROWS * WIDTH
    assert sent[0] > table_bytes
    assert sent[1] < 0.6 * table_bytes, "its parameters and moments lie in three parts"
    assert cm.read_replicas(result.run_dir).sent_bytes == sum(sent)
    (event,) = result.recoveries
    assert event.how == "replay"
    assert_bit_equal(result, cm.reference(job, data, steps=30, plan=plan))
