"""What a replication policy may see of a real run, and what becomes of its wishes."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.training import even_plan, small_job

import crowdmesh_jax as cm
from crowdmesh_jax import control
from crowdmesh_jax.errors import InvalidValueError
from crowdmesh_jax.mobility import Sightings
from crowdmesh_jax.propagation import make_replication_policy
from crowdmesh_jax.protocol.owners import CopyRoom, ring_holders
from crowdmesh_jax.runtime.placing import Placer, Presence, known_hazards, unprotected, with_rates
from crowdmesh_jax.runtime.policy import PolicyBody

NAMES = tuple(f"device-{i}" for i in range(4))


def placer(policy: Any, **more) -> Placer:
    job, data = small_job()
    crowd = cm.Crowd.local((1.0,) * 4)

    def profiled():
        return cm.profile(job, crowd, data.batch(0))

    made = Placer(
        make_replication_policy(policy), crowd, profiled, copies=1, crash_per_s=1e-5,
        detect_s=3.0, **more,
    )  # fmt: skip
    for name in NAMES:
        made.presence.joined(name)
    return made


def test_presence_counts_sessions_that_ended_and_those_that_go_on():
    presence = Presence(NAMES)
    presence.joined("device-0")
    presence.joined("device-1")
    presence.lost("device-1")
    presence.joined("device-1")
    presence.lost("device-2")  # was never here
    heard = presence.heard()
    assert heard.present.tolist() == [True, True, False, False]
    assert heard.sessions.ends.tolist() == [0, 1, 0, 0]
    assert len(heard.sessions.duration_s) == 3


@pytest.mark.parametrize("policy", ["mobility", "neighbour", "next_stage", "central", "none"])
def test_wishes_become_holders_of_stages_among_the_members(policy):
    job, _ = small_job()
    plan = even_plan(job, 2)
    made = placer(policy)
    decision = made.decide(plan, 0.1)
    holders = made.holders(decision, plan, NAMES)
    assert [(e.first_layer, e.last_layer) for e in holders] == [(0, 1), (2, 3)]
    kept = {str(d) for entry in holders for d in entry.devices}
    assert (kept == set()) == (policy == "none")
    for entry, stage in zip(holders, plan.stages, strict=True):
        assert stage.device not in entry.devices
    few = made.holders(decision, plan, ("device-0", "device-1"))
    assert {str(d) for e in few for d in e.devices} <= {"device-0", "device-1"}
    left = [bool(entry.devices) for entry in few]
    assert left == [policy != "none"] * 2, "where a wish is for others only, somebody has it"


def test_a_stage_beside_one_who_walks_away_has_a_copy_all_the_same():
    """Whoever held it would lose that neighbour, so nobody is expected to stay; but a wave that
    lacks one stage's copy counts for no stage, and the one who walks needs it most."""
    job, _ = small_job()
    plan = even_plan(job, 3)
    still, zero = np.zeros((4, 2)), np.zeros(4)
    walks = np.array([[8.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    seen = Sightings(
        now_s=0.0, seen_s=zero, positions_m=still, velocities_m_per_s=walks,
        velocity_sd_m_per_s=np.full(4, 0.05), occupants=np.arange(4),
        straight_s=np.full(4, 600.0),
    )  # fmt: skip
    made = placer("mobility", watch=lambda: seen, range_m=80.0)
    decision = made.decide(plan, 0.1)
    assert [item.lack for item in decision.unprotected] == ["nobody"]
    holders = made.holders(decision, plan, NAMES)
    assert all(entry.devices for entry in holders)
    for entry, stage in zip(holders, plan.stages, strict=True):
        assert stage.device not in entry.devices


def test_no_two_copies_behind_one_hazard():
    job, _ = small_job()
    plan = even_plan(job, 2)
    groups = {"bus": ("device-0", "device-2", "device-3")}
    made = placer("mobility", groups=groups)
    holders = made.holders(made.decide(plan, 0.1), plan, NAMES)
    assert holders[0].devices == ("device-1",), "device-0 is on the bus, so its copy is not"


def test_where_all_others_share_a_hazard_a_copy_lies_behind_it_all_the_same():
    """Else no wave would ever be complete, and every loss would undo the run."""
    job, _ = small_job()
    plan = even_plan(job, 2)
    groups = {"bus": NAMES[:3], "house": ("device-0", "device-3")}
    made = placer("mobility", groups=groups)
    decision = made.decide(plan, 0.1)
    assert "hazard" in [item.lack for item in decision.unprotected]
    assert all(entry.devices for entry in made.holders(decision, plan, NAMES))


def test_who_leaves_or_does_not_store_is_given_no_copies():
    job, _ = small_job()
    plan = even_plan(job, 2)
    made = placer("mobility")
    decision = made.decide(plan, 0.1, leave_in_s={"device-2": 5.0})
    assert "device-2" not in {str(r.device) for i in decision.replicas.ranges for r in i.replicas}
    decision = made.decide(plan, 0.1)

    def kept(**bars):
        return [entry.devices for entry in made.holders(decision, plan, NAMES, **bars)]

    (first, *_), *_ = kept()
    assert all(first not in devices and devices for devices in kept(leaving=[first]))
    assert all(first not in devices and devices for devices in kept(failed=[first]))
    assert kept(failed=NAMES) == kept(), "where there is no other, they are asked again"
    spares = NAMES[2:]
    assert kept(leaving=spares, failed=NAMES[:1]) == [("device-1",), ("device-0",)]
    assert kept(leaving=(*spares, "device-1")) == [(), ("device-0",)], "owners leave as well"


def test_a_policy_knows_what_copies_there_are_what_room_and_what_links_carried():
    job, _ = small_job()
    plan = even_plan(job, 2)
    seen = []

    class Looks:
        name = "looks"

        def decide(self, view):
            seen.append(view)
            return make_replication_policy("none").decide(view)

    made = placer(Looks(), room_bytes=lambda: {"device-3": 10.0})
    stored = {"device-2": ((0, (1, 7)), (2, (3, 5)))}
    rates = {"device-0": {"device-2": 1e5}}
    made.decide(plan, 0.1, stored=stored, measured_bytes_per_s=rates)
    (view,) = seen
    assert view.crowd.link("device-0", "device-2").bandwidth_bytes_per_s == 1e5
    back = view.crowd.link("device-2", "device-0")
    assert back.bandwidth_bytes_per_s > 1e6, "nothing was measured that way round"
    assert view.crowd.devices == cm.Crowd.local((1.0,) * 4).devices
    assert [(h.device, h.first_layer, h.last_layer, h.version) for h in view.holdings] == [
        ("device-2", 0, 1, 7), ("device-2", 2, 3, 5),
    ]  # fmt: skip
    assert view.budget.memory_bytes == {"device-3": 10}
    full = placer("mobility", room_bytes=lambda: dict.fromkeys(NAMES, 0.0))
    assert {item.lack for item in full.decide(plan, 0.1).unprotected} == {"memory"}


def test_a_run_tells_its_policy_what_links_carried():
    asked = []

    class Looks:
        presence = Presence(NAMES)

        def decide(self, plan, step_s, **known):
            asked.append(known["measured_bytes_per_s"])
            return SimpleNamespace(handovers=())

        def holders(self, *wishes, **known):
            return ()

    body = PolicyBody(
        control.ControlTerms(), cm.Crowd.local((1.0,) * 4), None, None, ask=asked.append,
        post=lambda *args: None, spawn=lambda *args: None, placer=Looks(),
    )  # fmt: skip
    job, _ = small_job()
    body.tell(
        control.Running(
            epoch=1, plan=even_plan(job, 2), party=NAMES[:2], holders=(), keys=("a", "b"), step=0,
            steps=9,
        )
    )  # fmt: skip
    body.tell(control.LinkMeasured(sender="device-0", receiver="device-2", bytes_per_s=1e5))
    body.tick()
    body.close()
    assert asked == [{"device-0": {"device-2": 1e5}}]


def test_a_measured_link_takes_the_place_of_the_crowds_and_joins_nobody():
    far = cm.Link(source="device-0", target="device-1", bandwidth_bytes_per_s=5.0, latency_s=2.0)
    crowd = replace(cm.Crowd.local((1.0,) * 3), links=(far,), default_link=None)
    made = with_rates(crowd, {"device-0": {"device-1": 7.0, "device-2": 9.0}})
    assert made.links == (replace(far, bandwidth_bytes_per_s=7.0),)


def test_a_runs_hazards_are_its_cells_and_the_groups_that_the_user_named():
    crowd = cm.Crowd.local((1.0,) * 4)
    groups = {"van": NAMES[:2], "bike": NAMES[1:3], "city": NAMES}
    assert known_hazards(crowd, groups) == {
        "device-0": ("van",), "device-1": ("bike", "van"), "device-2": ("bike",),
    }  # fmt: skip
    assert known_hazards(crowd) == {}
    for bad, told in (({"van": ("pi",)}, "pi"), ({"device x": NAMES[:2]}, "hazard group")):
        with pytest.raises(cm.errors.InputError, match=told):
            known_hazards(crowd, bad)


def test_sightings_of_another_crowd_are_refused():
    one = np.zeros(1)
    seen = Sightings(
        now_s=0.0, seen_s=one, positions_m=np.zeros((1, 2)), velocities_m_per_s=np.zeros((1, 2)),
        velocity_sd_m_per_s=one, occupants=np.zeros(1, int),
    )  # fmt: skip
    job, _ = small_job()
    with pytest.raises(InvalidValueError, match="watch gave 1 rows, the crowd has 4"):
        placer("mobility", watch=lambda: seen).decide(even_plan(job, 2), 0.1)


def test_copies_go_where_there_is_room_and_what_has_none_is_said():
    from crowdmesh_jax.protocol import messages
    from crowdmesh_jax.runtime.placing import copy_room

    job, data = small_job()
    plan = even_plan(job, 2)
    inputs, targets = job.microbatch_specs(data.batch(0))
    from crowdmesh_jax.export import build_bundles

    leaves = [b.manifest.resident for b in build_bundles(job, plan, inputs, targets)]
    names = [layer.name for layer in job.model.layers]

    def hello(size: float) -> messages.Hello:
        return messages.Hello(resources={"copies_bytes": size})

    room = copy_room(leaves, {}, names)
    first, second = (room.needs(stage) for stage in plan.stages)
    assert first > second > 0
    hellos = {"device-0": hello(second), "device-1": hello(0), "device-2": hello(first)}
    room = copy_room(leaves, hellos, names)
    holders = ring_holders(plan, NAMES[:3], copies=1, room=room)  # type: ignore[arg-type]
    assert [entry.devices for entry in holders] == [("device-2",), ("device-0",)]
    assert unprotected(plan, holders, room) == []
    full = copy_room(leaves, {name: hello((first + second) / 2) for name in NAMES}, names)
    holders = ring_holders(plan, NAMES[:3], copies=1, room=full)  # type: ignore[arg-type]
    (note,) = unprotected(plan, holders, full)
    assert "layers 0-1 of device-0 have no copy" in note
    assert "--copies-mb" in note


def test_copies_that_go_with_their_owner_are_said_where_no_others_are():
    room = CopyRoom(layer_bytes=(500_000,) * 4, device_bytes={"device-1": 0.0, "device-3": 0.0})
    plan = cm.PipelinePlan.even(4, NAMES[:2], microbatches=2)
    hazards = {"device-0": ("power", "van"), "device-2": ("van",)}

    def notes(rooms: CopyRoom, copies: int = 1) -> list[str]:
        party = NAMES if rooms is not room else NAMES[:3]
        holders = ring_holders(plan, party, copies=copies, room=rooms, hazards=hazards)  # type: ignore[arg-type]
        return unprotected(plan, holders, rooms, hazards)

    (note,) = notes(room)
    assert note == (
        "layers 0-1 of device-0 have copies (device-2) only behind the same hazard (van): no device"
        " apart from it keeps 2 MB free for copies"
    )
    assert notes(room, copies=2) == [note]
    assert notes(CopyRoom(layer_bytes=room.layer_bytes, device_bytes={})) == []


@pytest.mark.parametrize(
    ("terms", "told"),
    [
        ({"copies": 0}, "copies must be a whole number >= 1, got 0"),
        ({"wave_every": 2.5}, "wave_every must be a whole number >= 1, got 2.5"),
        ({"log_bytes": -1}, "log_bytes"),
        ({"crash_per_s": float("inf")}, "crash_per_s must be finite"),
        ({"return_s": 0.0}, "return_s must be > 0"),
        ({"heartbeat_s": 10.0, "silence_s": 1.0}, "longer than heartbeat_s"),
        ({"policy": "mobilty"}, "did you mean 'mobility'"),
        ({"range_m": float("nan")}, "range_m must be finite"),
        ({"watch": 3, "policy": "mobility", "range_m": 9.0}, "watch must be a function"),
        ({"watch": dict, "policy": "mobility"}, "no use without range_m"),
        ({"watch": dict, "range_m": 9.0}, "no use without policy"),
    ],
)
def test_terms_that_cannot_be_are_refused_before_anything_starts(terms, told):
    with pytest.raises(InvalidValueError, match=told):
        cm.Recovery(**terms)
