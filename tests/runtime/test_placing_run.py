"""A replication policy of the user's own in a run, and what becomes of the run when it fails."""

from __future__ import annotations

import pytest
from support.training import Slow, even_plan, small_job

import crowdmesh_jax as cm
from crowdmesh_jax.propagation import make_replication_policy

pytestmark = pytest.mark.system


class Failing:
    """Answers like `next_stage`, but not always."""

    name = "failing"

    def __init__(self, good: int) -> None:
        self.good, self.asked = good, 0
        self._rule = make_replication_policy("next_stage")

    def decide(self, view):
        self.asked += 1
        if self.asked > self.good:
            raise ZeroDivisionError("mine")
        return self._rule.decide(view)


def train(policy, folder):
    job, data = small_job()
    with cm.launch(cm.Crowd.local((1.0,) * 3), transport="memory") as crew:
        return cm.train(
            job, crew, Slow(data, 0.05), steps=70, plan=even_plan(job, 2), runs_dir=folder,
            recovery=cm.Recovery(policy=policy, replan=False), measure=False,
        )  # fmt: skip


def test_a_policy_that_fails_later_is_told_once_and_ends_nothing(tmp_path, caplog):
    policy = Failing(good=1)
    result = train(policy, tmp_path)
    assert len(result.losses) == 70
    assert policy.asked > 2, "it is asked again all the same"
    told = [r for r in caplog.records if "policy 'failing' failed" in r.getMessage()]
    assert len(told) == 1
    assert told[0].exc_info, "with where it was"


def test_a_policy_that_never_answered_ends_the_run_with_its_own_error(tmp_path):
    with pytest.raises(ZeroDivisionError, match="mine"):
        train(Failing(good=0), tmp_path)
