"""What a stage should need, from its programs' leaves: against sums on paper."""

import numpy as np
import optax
import pytest
from flax import linen as nn
from support.families import family

from crowdmesh_jax.core import PipelinePlan
from crowdmesh_jax.core.memory import RUNTIME_BYTES
from crowdmesh_jax.export import build_bundles
from crowdmesh_jax.model import StagedModel, TrainingJob, losses
from crowdmesh_jax.runtime.memory import MemoryReport, memory_table, stage_memory
from crowdmesh_jax.runtime.recovery import logged_bytes

ROWS, IN, MID, OUT = 6, 8, 16, 4
FLOAT = 4


@pytest.fixture(scope="module")
def made():
    model = StagedModel.from_linen([nn.Dense(MID, use_bias=False), nn.Dense(OUT, use_bias=False)])
    job = TrainingJob(model, losses.mean_squared_error, optax.adam(1e-3), 3 * ROWS, 3)
    plan = PipelinePlan.even(2, ["a", "b"], microbatches=3)
    batch = np.zeros((3 * ROWS, IN), np.float32), np.zeros((3 * ROWS, OUT), np.float32)
    bundles = build_bundles(job, plan, *job.microbatch_specs(batch))
    return plan, [bundle.manifest for bundle in bundles]


def test_a_stages_memory_is_the_sum_on_paper(made):
    _, (first, last) = made
    a = stage_memory(first, in_flight=2, step_temp_bytes=1000, update_temp_bytes=0)
    assert a.parameter_bytes == a.gradient_bytes == FLOAT * IN * MID
    assert a.optimizer_bytes == 2 * FLOAT * IN * MID + FLOAT  # Adam's count
    assert a.stash_bytes == 2 * FLOAT * ROWS * IN
    assert a.credit_bytes == 2 * 2 * FLOAT * ROWS * MID  # activation down, its gradient back
    assert a.working_bytes == 1000
    b = stage_memory(last, in_flight=1, step_temp_bytes=0, update_temp_bytes=0)
    assert b.stash_bytes == FLOAT * ROWS * (MID + OUT)  # its input, and the targets that wait
    assert b.credit_bytes == 2 * 2 * FLOAT * ROWS * MID


def test_an_update_has_the_memory_of_the_stash_that_is_gone_by_then(made):
    _, (first, _) = made
    stash = 2 * FLOAT * ROWS * IN
    small = stage_memory(first, in_flight=2, step_temp_bytes=100, update_temp_bytes=stash)
    large = stage_memory(first, in_flight=2, step_temp_bytes=100, update_temp_bytes=stash + 5000)
    assert small.working_bytes == 100
    assert large.working_bytes == 5000


def test_the_table_tells_of_each_device_that_reported(made):
    plan, manifests = made
    report = MemoryReport(
        device="b",
        idle_bytes=100,
        now_bytes=300,
        loading_peak_bytes=500,
        peak_bytes=400,
        step_temp_bytes=50,
        update_temp_bytes=0,
        program_ops=0,
    )
    table = memory_table(plan, manifests, {"b": report})
    needs = stage_memory(manifests[1], in_flight=1, step_temp_bytes=50, update_temp_bytes=0)
    assert table == {
        "b": {
            "predicted_bytes": RUNTIME_BYTES + needs.training_bytes,
            "idle_bytes": 100,
            "loading_peak_bytes": 500,
            "peak_bytes": 400,
            "now_bytes": 300,
        }
    }


def test_logs_keep_each_borrowed_leaf_once_down_and_once_up():
    """In four stages one passes a table on that it borrows itself; in two it is lent once."""
    shared = family("shared")
    job = shared.job(optax.sgd(0.1), batch_size=8, microbatches=2)
    table, frame = FLOAT * 13 * 8, FLOAT * 4 * 5 * 8  # (vocabulary, width), (rows, tokens, width)
    for stages, sent in ((2, 1), (4, 2)):
        plan = PipelinePlan.even(4, ["a", "b", "c", "d"][:stages], microbatches=2)
        bundles = build_bundles(job, plan, *job.microbatch_specs(shared.batch()))
        manifests = [bundle.manifest for bundle in bundles]
        assert logged_bytes(manifests, 2) == 2 * sent * frame + 2 * table
