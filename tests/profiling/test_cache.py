"""Measured layers on disk: found again, and refused where they do not hold."""

import dataclasses
import json
import logging

import optax
import pytest
from support.families import family

from crowdmesh_jax import errors
from crowdmesh_jax.core.crowd import Crowd
from crowdmesh_jax.profiling import (
    Calibration,
    ProfileCache,
    cache,
    machine_identity,
    measure,
    profile,
)
from crowdmesh_jax.profiling.cache import FILE_NAME, LayerMeasure, load_calibration

CROWD = Crowd.local((1.0, 0.5))
ONE = LayerMeasure(forward_s=0.5, backward_s=1.0, temp_bytes=7, ops=3)


@pytest.fixture
def runs(monkeypatch) -> list[object]:
    """Grows by one for each layer that is run; none takes longer than it must."""
    seen: list[object] = []
    inner = measure._median_s

    def counted(run, seconds, **options):
        seen.append(run)
        return inner(run, 0.0, least=1)

    monkeypatch.setattr(measure, "_median_s", counted)
    return seen


def measured(folder, batch_size=8, optimizer=None):
    kind = family("mlp")
    job = kind.job(optimizer or optax.adam(1e-3), batch_size=batch_size)
    return profile(job, CROWD, kind.batch(batch_size), measure=True, cache_dir=folder)


def test_a_second_profile_of_the_same_job_runs_nothing_and_says_the_same(tmp_path, runs):
    first = measured(tmp_path)
    assert runs
    runs.clear()
    assert measured(tmp_path) == first
    assert not runs


def test_other_shapes_or_another_optimizer_are_measured(tmp_path, runs):
    measured(tmp_path)
    runs.clear()
    measured(tmp_path, optimizer=optax.sgd(0.1))
    assert len(runs) == 1, "the update alone is another"
    runs.clear()
    measured(tmp_path, batch_size=16)
    assert len(runs) > 2


def test_equal_layers_are_measured_once(tmp_path, runs):
    kind = family("gpt2")
    job = kind.job(optax.sgd(0.1), batch_size=4)
    made = profile(job, CROWD, kind.batch(4), measure=True, cache_dir=None)
    rows = dict(zip((layer.name for layer in made.layers), made.seconds["device-0"], strict=True))
    blocks = [row for name, row in rows.items() if name.startswith("block")]
    assert len(blocks) > 1
    assert len({(row.forward_s, row.backward_s) for row in blocks}) == 1
    assert len(runs) == 2 * (len(rows) - len(blocks) + 1) + 1


def test_another_jaxlib_is_another_measurement(tmp_path, runs, monkeypatch):
    measured(tmp_path)
    runs.clear()
    monkeypatch.setattr("jaxlib.version.__version__", "9.9.9")
    measured(tmp_path)
    assert runs


def test_a_cache_of_another_machine_is_refused_and_measured_anew(
    tmp_path, runs, monkeypatch, caplog
):
    with monkeypatch.context() as patched:
        there = {**machine_identity(), "processor": "Cortex-A76"}
        patched.setattr(cache, "machine_identity", lambda: there)
        measured(tmp_path)
    runs.clear()
    with pytest.raises(errors.ProfileCacheError, match="another machine") as caught:
        ProfileCache.load(tmp_path / FILE_NAME)
    assert caught.value.code == "CM-602"
    assert "Cortex-A76" in caught.value.message
    assert machine_identity()["processor"] in caught.value.message
    with caplog.at_level(logging.WARNING):
        measured(tmp_path)
    assert "Cortex-A76" in caplog.text
    assert "measuring again" in caplog.text
    assert runs
    assert ProfileCache.load(tmp_path / FILE_NAME).path.exists(), "it is ours now"


GOOD = {
    "format_version": 2,
    "layers": {"k": {"forward_s": 1, "backward_s": 1, "temp_bytes": 1, "ops": 1}},
}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no JSON"),
        ('{"layers": {"k', "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "no table of layers"),
        (json.dumps({**GOOD, "format_version": 1}), "format version 1"),
        (json.dumps({**GOOD, "machine": 5}), "there    5"),
        (json.dumps({**GOOD, "layers": {"k": {"forward_s": 1}}}), "layer k has not forward_s"),
        (json.dumps(GOOD).replace('"forward_s": 1', '"forward_s": NaN'), "forward_s is nan"),
        (json.dumps(GOOD).replace('"forward_s": 1', '"forward_s": -1'), "forward_s is -1"),
        (json.dumps(GOOD).replace('"forward_s": 1', '"forward_s": true'), "forward_s is True"),
    ],
)
def test_a_damaged_cache_is_refused_and_begun_afresh(tmp_path, text, says, caplog):
    path = tmp_path / FILE_NAME
    if '"machine"' not in text and text.startswith("{") and text.endswith("}"):
        text = text[:-1] + f', "machine": {json.dumps(machine_identity())}}}'
    path.write_text(text)
    with pytest.raises(errors.ProfileCacheError, match=says):
        ProfileCache.load(path)
    opened = cache.open_cache(tmp_path)
    assert opened is not None
    assert opened.get("k") is None
    opened.put("k", ONE)
    opened.save()
    assert ProfileCache.load(path).get("k") == ONE


RATES = Calibration(flops_per_s=1e9, bytes_per_s=2e9, call_s=3e-5)


@pytest.fixture
def calibrations(monkeypatch) -> list[Calibration]:
    """Rates that calibrating finds, in turn; what is left was not needed."""
    found = [RATES, dataclasses.replace(RATES, call_s=1.0)]
    monkeypatch.setattr(measure, "calibrate_machine", lambda: found.pop(0))
    return found


def calibrated(folder):
    kind = family("mlp")
    return profile(
        kind.job(optax.adam(1e-3)), CROWD, kind.batch(), calibrate=True, cache_dir=folder
    )


def test_a_machine_is_calibrated_once_so_that_plans_stay_the_same(tmp_path, calibrations):
    first = calibrated(tmp_path)
    assert calibrated(tmp_path).seconds == first.seconds
    assert len(calibrations) == 1
    assert load_calibration(tmp_path) == RATES
    assert calibrated(None).seconds != first.seconds, "nowhere kept, so measured"


def test_other_threads_or_another_jaxlib_are_other_rates(tmp_path, calibrations, monkeypatch):
    calibrated(tmp_path)
    with monkeypatch.context() as patched:
        patched.setenv("NPROC", "77")
        with pytest.raises(errors.ProfileCacheError, match="threads 77"):
            load_calibration(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("jaxlib.version.__version__", "9.9.9")
        with pytest.raises(errors.ProfileCacheError, match=r"jaxlib 9\.9\.9"):
            load_calibration(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda kept: kept["rates"].pop("call_s"), "rates has not bytes_per_s, call_s"),
        (lambda kept: kept["rates"].update(call_s="soon"), "no numbers"),
        (lambda kept: kept["rates"].update(call_s=-1.0), "call_s must be finite and > 0"),
        (lambda kept: kept.update(rates=3), "rates has not"),
        (lambda kept: kept.update(format_version=9), "format version 9"),
        (lambda kept: kept["machine"].update(processor="Cortex-A76"), "Cortex-A76"),
    ],
)
def test_damaged_rates_are_refused_and_measured_again(tmp_path, calibrations, change, says, caplog):
    calibrated(tmp_path)
    path = tmp_path / cache.CALIBRATION_NAME
    kept = json.loads(path.read_text())
    change(kept)
    path.write_text(json.dumps(kept))
    with pytest.raises(errors.ProfileCacheError, match=says):
        load_calibration(tmp_path)
    with caplog.at_level(logging.WARNING):
        calibrated(tmp_path)
    assert "measuring again" in caplog.text
    assert not calibrations
    assert load_calibration(tmp_path) is not None


def test_two_processes_keep_each_others_measures(tmp_path):
    path = tmp_path / FILE_NAME
    first, second = ProfileCache.load(path), ProfileCache.load(path)
    first.put("a", ONE)
    second.put("b", ONE)
    first.save()
    second.save()
    kept = ProfileCache.load(path)
    assert kept.get("a") == kept.get("b") == ONE
    assert (kept.hits, kept.misses) == (2, 0)
    assert [file.name for file in tmp_path.iterdir()] == [FILE_NAME]


def test_a_folder_that_cannot_be_written_costs_a_warning_and_no_profile(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    opened = ProfileCache(tmp_path / "file" / FILE_NAME)
    opened.put("a", ONE)
    opened.save()
    assert "could not be kept" in caplog.text
