"""Messages, records and states cross processes and restarts as plain JSON, strictly."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crowdmesh_jax import errors
from crowdmesh_jax.core import values
from crowdmesh_jax.core.plan import PipelinePlan
from crowdmesh_jax.core.schedule import Op, OpKind
from crowdmesh_jax.protocol import (
    CoordinatorState,
    EvaluationPlan,
    Fault,
    MemberState,
    Tie,
    message_from_plain,
    message_to_plain,
    messages,
    record_from_plain,
    record_to_plain,
    records,
)
from crowdmesh_jax.protocol import coordinator_events as ce
from crowdmesh_jax.protocol import member_events as me

from .test_run import make_plan
from .virtual import World

st.register_type_strategy(PipelinePlan, st.just(make_plan(2, 3, "eager")))
st.register_type_strategy(
    EvaluationPlan, st.builds(EvaluationPlan, microbatches=st.integers(1, 9), every=st.just(2))
)
st.register_type_strategy(Op, st.builds(Op, st.sampled_from(OpKind), st.integers(0, 9)))
st.register_type_strategy(float, st.floats(allow_nan=False))  # NaN is not equal to itself


def over_json(plain: Any) -> Any:
    return json.loads(json.dumps(plain, allow_nan=False))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(messages.MESSAGES).flatmap(st.from_type))
def test_every_message_survives_json(message):
    assert message_from_plain(over_json(message_to_plain(message))) == message


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(records.RECORDS).flatmap(st.from_type))
def test_every_record_survives_json(record):
    assert record_from_plain(over_json(record_to_plain(record))) == record
    journalled = {"seq": 3, "at_s": 1.5, **record_to_plain(record)}
    assert record_from_plain(journalled) == record


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(messages.MESSAGES).flatmap(st.from_type), st.data())
def test_a_damaged_message_is_a_format_error_or_a_message(message, data):
    plain = message_to_plain(message)
    field = data.draw(st.sampled_from(sorted(plain)))
    plain[field] = data.draw(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.lists(st.integers())
    )
    with contextlib.suppress(errors.FormatError):
        message_from_plain(over_json(plain))


@pytest.mark.parametrize(
    ("plain", "text"),
    [
        ({}, "unknown kind"),
        ({"kind": "Explode", "run": "r", "epoch": 1}, "unknown kind 'Explode'"),
        ({"kind": ["Ready"]}, "unknown kind"),
        ([], "expected a table"),
        ({"kind": "Ready", "run": "r"}, "missing field 'epoch'"),
        ({"kind": "Ready", "run": "r", "epoch": 1, "extra": 1}, "unknown field 'extra'"),
        ({"kind": "Ready", "run": "r", "epoch": "1"}, "expected an integer"),
        (
            {"kind": "AskMarks", "run": "r", "epoch": 1, "marks": ["explode"]},
            "expected 'evaluate' or 'snapshot' or 'wave' or 'stop' or 'finish'",
        ),
    ],
)
def test_what_is_no_message_is_refused_by_name(plain, text):
    with pytest.raises(errors.FormatError, match="CM-102") as caught:
        message_from_plain(plain)
    assert text in str(caught.value)


def test_a_plan_that_is_no_plan_makes_the_message_a_format_error():
    world = World(make_plan(2, 2, "1f1b"), steps=1)
    world.run(until=lambda: world.hub.state.epoch == 1)
    install = messages.Install(
        run="r", epoch=1, term=1, base=0, plan=make_plan(2, 2, "1f1b"), stage=0, ops=()
    )
    plain = message_to_plain(install)
    plain["plan"]["stages"][1]["first_layer"] = 5
    with pytest.raises(errors.FormatError, match="Install: stage 1"):
        message_from_plain(plain)


@pytest.mark.parametrize("tied", [(), (Tie(owner_layer=0, borrower_layers=(5,)),)])
def test_every_state_that_a_run_passes_through_survives_json(tied):
    """So a state can be journalled, inspected, and given to a machine that starts again."""
    world = World(
        make_plan(3, 3, "eager"), steps=4, seed=1, ties=tied, snapshot_every=2, measure_repeats=1
    )
    seen = 0

    def check() -> bool:
        nonlocal seen
        hub = world.hub.state
        assert values.from_plain(CoordinatorState, over_json(values.to_plain(hub))) == hub
        for body in world.members.values():
            plain = over_json(values.to_plain(body.state))
            assert values.from_plain(MemberState, plain) == body.state
        seen += 1
        return False

    world.run(until=check)
    assert world.hub.completed == 4
    assert seen > 100


def test_a_fault_comes_out_as_the_error_that_went_in():
    fault = Fault.of(errors.BundleError("damaged")).within("d1")
    with pytest.raises(errors.BundleError, match=r"\[CM-301\] d1: damaged"):
        raise fault.error()
    foreign = Fault.of(ValueError("odd")).error()
    assert type(foreign) is errors.RunError
    assert "ValueError: odd" in foreign.message
    hostile = Fault(kind="annotations", text="x").error()
    assert type(hostile) is errors.RunError


def test_all_events_and_actions_are_listed_once_and_are_values():
    for group in (
        me.MEMBER_EVENTS,
        me.MEMBER_ACTIONS,
        ce.COORDINATOR_EVENTS,
        ce.COORDINATOR_ACTIONS,
    ):
        assert len(set(group)) == len(group)
        for cls in group:
            assert cls.__dataclass_params__.frozen
            assert "__dict__" not in dir(cls)
            assert cls.__doc__
            assert not cls.__doc__.startswith(cls.__name__ + "(")
