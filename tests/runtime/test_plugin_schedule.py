"""A schedule that another package brings runs on agents, bit-equal to the reference."""

from __future__ import annotations

import dataclasses
import sys

from support.training import even_plan, identical, small_job

import crowdmesh_jax as cm

SOURCE = """
from crowdmesh_jax.core import Op, OpKind, Schedule

def serial(num_stages, microbatches, warmups):
    line = [Op(kind, m) for m in range(microbatches) for kind in (OpKind.FORWARD, OpKind.BACKWARD)]
    return Schedule(name="serial", ops=(tuple(line),) * num_stages)
"""


def test_an_installed_schedule_trains_as_the_reference_does(crew, tmp_path, monkeypatch):
    (tmp_path / "serial_schedule.py").write_text(SOURCE)
    info = tmp_path / "serial_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: serial-package\nVersion: 1.0\n")
    entry = "[crowdmesh_jax.schedules]\nserial = serial_schedule:serial\n"
    (info / "entry_points.txt").write_text(entry)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "serial_schedule", raising=False)
    job, data = small_job(microbatches=4)
    plan = dataclasses.replace(even_plan(job), schedule="serial")
    run = cm.train(job, crew, data, steps=3, plan=plan, runs_dir=tmp_path / "runs", measure=False)
    expected = cm.reference(job, data, 3, plan=plan)
    assert identical(run.params, expected.params)
    assert identical(run.opt_state, expected.opt_state)
    assert run.losses.tolist() == list(expected.losses)
