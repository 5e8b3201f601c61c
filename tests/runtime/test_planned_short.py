"""A plan whose own prediction is far from what its stages take."""

import dataclasses
import logging
from types import SimpleNamespace

import pytest
from support.training import even_plan, small_job

import crowdmesh_jax as cm
from crowdmesh_jax.core import predict


@pytest.mark.parametrize(("step_s", "warned"), [(1e-9, True), (1e9, False)])
def test_stages_far_slower_than_planned_are_a_warning_that_says_what_to_do(
    crew, tmp_path, caplog, step_s, warned
):
    job, data = small_job()
    plan = even_plan(job)
    profile = cm.profile(job, crew.crowd, data.batch(0))
    told = dataclasses.replace(predict(profile, crew.crowd, plan), step_s=step_s)
    solved = SimpleNamespace(plan=plan, predicted=told)
    with caplog.at_level(logging.WARNING):
        cm.train(job, crew, data, steps=1, plan=solved, runs_dir=tmp_path)
    assert ("times what the plan was made by" in caplog.text) == warned
    assert ("single_best" in caplog.text) == warned
