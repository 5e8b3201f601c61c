"""A stage's state is in memory once: installing, measuring and snapshots make no lasting copy."""

import gc
import time

import jax
import jax.monitoring
import numpy as np
import optax
import pytest
from support.families import family

from crowdmesh_jax.core import PipelinePlan
from crowdmesh_jax.execution import Pace, StageWorker, pace, warm_up
from crowdmesh_jax.export import build_bundles, initial_arrays
from crowdmesh_jax.programs import load_stage
from crowdmesh_jax.programs.load import output_order


@pytest.fixture(scope="module")
def loaded():
    kind = family("mlp")
    job, batch = kind.job(optax.adam(1e-2)), kind.batch()
    layers = len(job.model.layers)
    plan = PipelinePlan.even(layers, ["a"], microbatches=job.microbatches)
    specs = job.microbatch_specs(batch)
    (bundle,) = build_bundles(job, plan, *specs)
    return load_stage(bundle), initial_arrays(job, specs[0])


def worker_of(loaded, **options) -> StageWorker:
    stage, arrays = loaded
    worker = StageWorker(stage)
    worker.install(arrays, 0, **options)
    return worker


def updated(worker: StageWorker) -> None:
    worker._gradients = {key: value + 1.0 for key, value in worker._gradients.items()}
    worker.apply(worker.reduce(worker.finish_step()))


def test_a_snapshot_stays_as_it_was_while_updates_follow(loaded):
    worker = worker_of(loaded)
    updated(worker)
    shot = worker.snapshot()
    copies = {key: np.array(value) for key, value in shot.items()}
    for _ in range(3):
        updated(worker)
    moved = worker.snapshot()
    for key, value in shot.items():
        assert np.array_equal(value, copies[key]), key
    assert any(not np.array_equal(moved[key], copies[key]) for key in shot)


def test_installing_can_empty_what_it_was_given(loaded):
    stage, arrays = loaded
    left = dict(arrays)
    worker = StageWorker(stage)
    worker.install(left, 0, consume=True)
    assert not left
    for key, value in worker.snapshot().items():
        assert np.array_equal(value, arrays[key]), key


def test_old_gradients_are_let_go_before_new_ones_are_made(loaded):
    worker = worker_of(loaded)
    updated(worker)
    gc.collect()
    before = sum(array.nbytes for array in jax.live_arrays())
    for _ in range(3):
        updated(worker)
    gc.collect()
    assert sum(array.nbytes for array in jax.live_arrays()) == before


def test_measuring_leaves_the_stages_arrays_alone_and_keeps_none_of_its_own(loaded):
    worker = worker_of(loaded)
    before = {key: np.array(value) for key, value in worker.snapshot().items()}
    gc.collect()
    held = sum(array.nbytes for array in jax.live_arrays())
    seconds = worker.measure(Pace(), 2)
    gc.collect()
    assert set(seconds) >= {"loss_backward", "update", "weigh"}
    assert all(value > 0 for value in seconds.values())
    assert sum(array.nbytes for array in jax.live_arrays()) == held
    for key, value in worker.snapshot().items():
        assert np.array_equal(value, before[key]), key
    assert worker._gradients
    assert not any(np.any(value) for value in worker._gradients.values())


def test_an_updates_time_contains_the_new_accumulators_that_it_makes(loaded, monkeypatch):
    worker = worker_of(loaded)
    inner = worker._begin_step
    monkeypatch.setattr(worker, "_begin_step", lambda: time.sleep(0.05) or inner())
    seconds = worker.measure(Pace(), 1)
    assert seconds["update"] > 0.05
    assert seconds["weigh"] < 0.05


def test_measuring_a_backward_makes_no_second_set_of_accumulators(loaded, monkeypatch):
    made = []
    inner = pace._sample
    monkeypatch.setattr(pace, "_sample", lambda spec, rng: made.append(spec) or inner(spec, rng))
    worker_of(loaded).measure(Pace(), 2)
    roles = {spec.role for spec in made}
    assert "grad" not in roles
    assert {"x", "target"} <= roles


def test_an_update_overwrites_its_state_in_place(loaded):
    stage, arrays = loaded
    update = stage.program("update")
    update.compile()
    parameters = sum(a.nbytes for key, a in arrays.items() if key[0] == "param")
    assert update.temp_bytes < parameters / 10
    spec = update.spec
    first = [spec.outputs[index].key for index in output_order(spec)][: len(spec.donate)]
    assert first == [spec.inputs[index].key for index in spec.donate]


def test_a_large_update_is_judged_by_its_bytes_and_not_run(loaded, monkeypatch):
    worker = worker_of(loaded)
    monkeypatch.setattr(pace, "COPIED_UPDATE_BYTES", 0)
    monkeypatch.setattr(pace, "_stream_bytes_per_s", lambda pace, repeats: 1000.0)
    seconds = worker.measure(Pace(), 1)
    own = sum(a.nbytes for k, a in worker.snapshot().items() if k[0] in ("param", "opt"))
    gradients = sum(a.nbytes for k, a in worker._gradients.items() if k[0] == "grad")
    # Reads state and gradients, writes state; a few scalars come on top.
    assert seconds["update"] == pytest.approx((2 * own + gradients) / 1000.0, rel=0.05)


def test_a_stage_that_was_compiled_ahead_compiles_nothing_when_it_is_taken_over(loaded):
    """Its programs, and the small ones that JAX makes for each shape that is set to zero."""
    stage, arrays = loaded
    jax.clear_caches()
    stage.compile()
    warm_up(stage.manifest)
    compiled: list[str] = []

    def hear(event: str, seconds: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(hear)
    try:
        jax.numpy.ones((3, 11, 17)).block_until_ready()
        assert compiled, "it hears what is compiled"
        compiled.clear()
        StageWorker(stage).install(arrays, 0)
        assert not compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(hear)
