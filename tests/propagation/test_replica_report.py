"""The replica report and the replica plan, as values."""

import json

import pytest
from replica_worlds import copies, plan

from crowdmesh_jax.core import DeviceId, ReplicaPlan, from_json, to_json
from crowdmesh_jax.errors import InvalidPlanError, InvalidValueError
from crowdmesh_jax.propagation import HazardGroups, Holding, ReplicaReport, replica_report


def at(device, first, last, version, keep="memory"):
    return Holding(
        device=DeviceId(device), first_layer=first, last_layer=last, version=version,
        age_s=abs(100.0 - version), size_bytes=5_000_000, keep=keep,
    )  # fmt: skip


HELD = [
    at("d", 0, 1, 90), at("c", 2, 3, 90), at("c", 2, 3, 95), at("e", 4, 5, 90, "disk"),
    at("a", 0, 1, 90), at("b", 2, 3, 90), at("c", 4, 5, 90),
]  # fmt: skip


def lost(report, cause):
    return next(item for item in report.if_lost if item.cause == cause)


def test_who_holds_what_how_stale():
    report = replica_report(plan(), HELD, head_version=100, logs_from=90, sent_bytes=7_000_000)
    assert [(r.first_layer, r.last_layer, r.owner) for r in report.rows] == [
        (0, 1, "a"), (2, 3, "b"), (4, 5, "c"),
    ]  # fmt: skip
    assert [(c.device, c.version, c.behind_steps) for c in report.rows[1].copies] == [
        ("c", 95, 5), ("c", 90, 10),
    ]  # fmt: skip
    assert report.durable_version == 90
    assert report.held_bytes["c"] == 15_000_000
    text = report.text()
    assert "every layer has a second copy at version 90, 10 steps behind" in text
    assert "layers 4-5 of c: e v90 (10 behind, 10 s, disk)" in text
    assert "sent 7.0 MB" in text
    assert "if device b went now: layers 2-3 are replayed from version 95, 5 steps" in text


def test_replay_needs_logs_back_to_the_copy():
    late = replica_report(plan(), HELD, head_version=100, logs_from=96)
    assert lost(late, "device b").outcome == "rollback"
    # The newest version of which everyone has a copy, own snapshots included.
    assert (lost(late, "device b").version, lost(late, "device b").redone_steps) == (90, 10)
    none = replica_report(plan(), HELD, head_version=100)
    assert lost(none, "device b").outcome == "rollback"
    at_head = replica_report(plan(), [at("c", 2, 3, 100)], head_version=100)
    assert lost(at_head, "device b").outcome == "replay"
    assert lost(at_head, "device b").redone_steps == 0


def test_a_copy_in_parts_needs_one_version():
    parts = [at("d", 2, 2, 95), at("d", 3, 3, 92), at("d", 2, 2, 92)]
    report = replica_report(plan(), parts, head_version=100, logs_from=0)
    assert lost(report, "device b").version == 92


def test_what_goes_with_holders_and_without_copies():
    report = replica_report(plan(), HELD, head_version=100, logs_from=90, checkpoint_version=80)
    only = lost(report, "device d")
    assert (only.outcome, only.owned, only.last_copies) == ("nothing", (), ((0, 1),))
    assert "no layer is lost; layers 0-1 lose their only copy" in report.text()
    assert lost(report, "device c").last_copies == ((2, 3),)
    bare = replica_report(plan(), HELD[1:4], head_version=100, checkpoint_version=80)
    gone = lost(bare, "device a")
    assert (gone.outcome, gone.version, gone.redone_steps) == ("checkpoint", 80, 20)
    assert gone.bare == ((0, 1),)
    assert "no version of which every layer has a second copy" in bare.text()
    unknown = replica_report(plan(), [], head_version=3)
    assert lost(unknown, "device a").redone_steps is None
    assert "no copy" in unknown.text()


def test_hazards_take_owner_and_copy_together():
    groups = HazardGroups(members={"van": ("a", "d"), "far": ("y", "z")}, common=("city",))
    report = replica_report(plan(), HELD, head_version=100, logs_from=90, groups=groups)
    assert report.rows[0].shared_hazards == ("van",)
    assert lost(report, "van").bare == ((0, 1),)
    assert lost(report, "van").outcome == "checkpoint"
    assert "all behind van" in report.text()
    assert "nothing helps against city" in report.text()
    assert not any(item.cause == "far" for item in report.if_lost)


def test_order_does_not_matter_and_json_has_it_all():
    report = replica_report(plan(), HELD, head_version=100, logs_from=90)
    assert replica_report(plan(), reversed(HELD), head_version=100, logs_from=90) == report
    assert from_json(ReplicaReport, report.to_json()) == report
    assert json.loads(report.to_json())["durable_version"] == 90


def test_impossible_copies_are_refused():
    with pytest.raises(InvalidValueError, match="layers 4-6"):
        replica_report(plan(), [at("d", 4, 6, 1)], head_version=100)
    with pytest.raises(InvalidValueError, match="version 101"):
        replica_report(plan(), [at("d", 4, 5, 101)], head_version=100)
    with pytest.raises(InvalidValueError, match="layers 3-2"):
        at("d", 3, 2, 1)


def test_a_replica_plan_checks_itself_and_round_trips():
    made = copies(plan(), {"a": "d e", "b": "d"})
    assert from_json(ReplicaPlan, to_json(made)) == made
    assert made.holders_of(1) == ("d", "e")
    assert [r.owner for r in made.held_by("d")] == ["a", "b"]
    assert [r.owner for r in made.unprotected] == ["c"]
    assert made.interval_steps == 10
    with pytest.raises(InvalidPlanError, match="layer 6 is outside"):
        made.holders_of(6)
    with pytest.raises(InvalidPlanError, match="'d' holds two copies"):
        copies(plan(), {"a": "d d"})
    with pytest.raises(InvalidPlanError, match="the owner is named"):
        copies(plan(), {"a": "a"})
    with pytest.raises(InvalidPlanError, match="end before layer 6, the plan has 7"):
        ReplicaPlan(ranges=made.ranges, num_layers=7)
    with pytest.raises(InvalidPlanError, match="expected to start at layer 0"):
        ReplicaPlan(ranges=made.ranges[1:], num_layers=6)
