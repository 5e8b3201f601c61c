"""The replica report of a run's folder: what the journal promises, no more."""

import json

import numpy as np
import pytest
from support.training import even_plan, small_job

import crowdmesh_jax as cm
from crowdmesh_jax.cli import main
from crowdmesh_jax.errors import RecordError
from crowdmesh_jax.record import RunFolder

PLAN = cm.PipelinePlan.even(4, ["a", "b"], microbatches=2)
BEGIN_S = 1.7e9


class Journalled:
    """A run's folder whose journal a test writes."""

    def __init__(self, root, recovery=None):
        self.folder = RunFolder.create(root, "x")
        job = {"model": "tiny", "layers": ["l0", "l1", "l2", "l3"]}
        self.folder.write_config({"job": job, "run": {"recovery": recovery or {}}})
        arrays = {("param", f"l{i}", "w"): np.zeros(10 * (i + 1), np.float32) for i in range(4)}
        arrays["global", "", "count"] = np.zeros((), np.int32)
        self.folder.save_checkpoint(0, arrays)
        self.at_s = BEGIN_S

    def add(self, kind, **fields):
        with self.folder.events() as events:
            events.append({"at_s": self.at_s, "kind": kind, **fields})

    def decide(self, epoch, base, plan=PLAN, **fields):
        self.add("Decision", epoch=epoch, base=base, plan=plan, steps=50, **fields)

    def steps(self, first, last):
        for step in range(first, last):
            self.at_s += 1.0
            verdict = {"is_finite": True, "skip": False}
            self.add("StepCommitted", step=step, verdict=verdict, values={"loss": 1.0})

    def wave(self, version, *parts, epoch=1, sent_bytes=0):
        ledger = [
            {"first_layer": first, "last_layer": last, "devices": list(devices)}
            for first, last, devices in parts
        ]
        self.add("Wave", epoch=epoch, version=version, ledger=ledger, sent_bytes=sent_bytes)

    def report(self):
        return cm.read_replicas(self.folder.path)


def _lost(report, device):
    return next(item for item in report.if_lost if item.cause == f"device {device}")


def test_before_the_first_wave_a_loss_goes_back_to_the_checkpoint(tmp_path):
    run = Journalled(tmp_path)
    run.decide(1, 0)
    run.steps(0, 5)
    report = run.report()
    assert (report.head_version, report.durable_version) == (5, None)
    lost = _lost(report, "a")
    assert (lost.outcome, lost.version, lost.redone_steps) == ("checkpoint", 0, 5)


def test_holders_versions_ages_and_bytes_are_those_of_the_last_complete_wave(tmp_path):
    run = Journalled(tmp_path)
    run.decide(1, 0)
    run.steps(0, 5)
    run.wave(4, (0, 1, "ac"), (2, 3, "bc"), sent_bytes=400)
    run.steps(5, 10)
    run.wave(8, (0, 1, "ac"), (2, 3, "bc"), sent_bytes=90)
    run.steps(10, 11)
    report = run.report()
    assert (report.head_version, report.durable_version) == (11, 8)
    copies = [(row.owner, [(c.device, c.version, c.behind_steps, c.age_s) for c in row.copies])
              for row in report.rows]  # fmt: skip
    assert copies == [("a", [("c", 8, 3, 3.0)]), ("b", [("c", 8, 3, 3.0)])]
    assert report.held_bytes == {"a": 120, "b": 280, "c": 400}
    assert report.sent_bytes == 400 + 90, "the second time only what had changed"
    lost = _lost(report, "b")
    assert (lost.outcome, lost.version, lost.redone_steps) == ("replay", 8, 3)
    assert _lost(report, "c").last_copies == ((0, 3),)


def test_a_lost_device_holds_nothing_and_new_cuts_make_logs_useless(tmp_path):
    run = Journalled(tmp_path)
    run.decide(1, 0)
    run.steps(0, 9)
    run.wave(8, (0, 1, "ac"), (2, 3, "bc"))
    run.add("Epoch", epoch=2, lost=["c"], reason="c was lost")
    report = run.report()
    assert set(report.held_bytes) == {"a", "b"}
    assert report.durable_version is None
    other = cm.PipelinePlan.even(4, ["a", "b", "d"], microbatches=2)
    run.decide(2, 8, other, is_rollback=True)
    run.steps(8, 10)
    run.wave(8, (0, 1, "ad"), (2, 2, "bd"), (3, 3, "da"), epoch=2)
    report = run.report()
    assert (report.head_version, [row.owner for row in report.rows]) == (10, ["a", "b", "d"])
    assert _lost(report, "b").outcome == "replay"
    run.decide(3, 9, PLAN, is_rollback=True)
    assert _lost(run.report(), "a").outcome == "rollback", "logs are of other cuts"


def test_copies_beyond_a_rollback_are_no_copies(tmp_path):
    run = Journalled(tmp_path)
    run.decide(1, 0)
    run.steps(0, 9)
    run.wave(8, (0, 1, "ac"), (2, 3, "bc"))
    run.decide(2, 5, is_rollback=True)
    report = run.report()
    assert (report.head_version, report.held_bytes) == (5, {})


def test_short_logs_mean_a_rollback(tmp_path):
    run = Journalled(tmp_path, {"log_steps": 2})
    run.decide(1, 0)
    run.steps(0, 9)
    run.wave(4, (0, 1, "ac"), (2, 3, "bc"))
    lost = _lost(run.report(), "a")
    assert (lost.outcome, lost.version) == ("rollback", 4)


def test_a_run_without_a_plan_and_a_damaged_one_are_told(tmp_path, capsys):
    run = Journalled(tmp_path)
    run.add("Epoch", epoch=1)
    with pytest.raises(RecordError, match="no plan yet"):
        run.report()
    run.folder.events_path.write_bytes(b"x" + run.folder.events_path.read_bytes())
    assert main(["replicas", str(run.folder.path)]) == 2
    assert "record 0 at byte 0 is damaged" in capsys.readouterr().err
    assert main(["replicas", str(tmp_path / "nowhere")]) == 2


def test_what_one_event_would_take_is_told_of_the_runs_groups(tmp_path):
    run = Journalled(tmp_path)
    config = run.folder.read_config()
    terms = {"recovery": {"groups": {"van": ["a", "b"]}}}
    crowd = {"devices": [{"id": i, "flops_per_s": 1e9, "memory_bytes": 1000} for i in "abc"]}
    run.folder.write_config({"job": config["job"], "run": terms, "crowd": crowd})
    run.decide(1, 0)
    run.steps(0, 4)
    run.wave(4, (0, 1, "ab"), (2, 3, "bc"))
    report = run.report()
    assert [row.shared_hazards for row in report.rows] == [("van",), ()]
    (van,) = [item for item in report.if_lost if item.cause == "van"]
    assert van.bare == ((0, 1),)
    run.folder.write_config({"job": config["job"], "run": terms, "crowd": {"devices": 3}})
    with pytest.raises(RecordError, match=r"config\.toml: damaged: .*devices"):
        run.report()


@pytest.mark.system
@pytest.mark.slow
def test_a_run_that_goes_on_tells_where_its_copies_are(tmp_path, capsys):
    job, data = small_job()
    plan = even_plan(job, 2)
    seen = {}

    def look(event):
        if isinstance(event, cm.StepEvent) and event.step == 30:
            seen["report"] = cm.read_replicas(tmp_path / "x")
            assert main(["replicas", str(tmp_path / "x")]) == 0
            seen["text"] = capsys.readouterr().out
            assert main(["replicas", str(tmp_path / "x"), "--json"]) == 0
            seen["json"] = json.loads(capsys.readouterr().out)

    with cm.launch(cm.Crowd.local((1.0,) * 3)) as crew:
        cm.train(
            job, crew, data, steps=40, plan=plan, runs_dir=tmp_path, name="x", on_event=look,
            recovery=cm.Recovery(wave_every=4), measure=False,
        )  # fmt: skip
    report = seen["report"]
    assert report.head_version >= 31
    assert report.durable_version is not None
    assert {c.device for row in report.rows for c in row.copies} == {"device-2"}
    assert report.held_bytes["device-2"] == sum(
        size for device, size in report.held_bytes.items() if device != "device-2"
    )
    assert "if device device-0 went now: layers" in seen["text"]
    assert "are replayed from version" in seen["text"]
    assert "has ended" not in seen["text"]
    assert seen["json"]["is_running"] is True
    assert main(["replicas", str(tmp_path / "x")]) == 0
    assert "the run has ended" in capsys.readouterr().out
