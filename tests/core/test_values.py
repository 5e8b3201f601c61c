"""Values survive JSON and TOML, and what is no value is refused by the path of its field."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from core_strategies import crowds, plans, profiles, schedules, times
from hypothesis import given
from hypothesis import strategies as st

from crowdmesh_jax.core import (
    Crowd,
    CutTimes,
    MemoryBreakdown,
    ModelProfile,
    PipelinePlan,
    Schedule,
    StageTimes,
    Timeline,
    evaluate,
    from_json,
    from_plain,
    from_toml,
    load,
    to_json,
    to_plain,
    to_toml,
)
from crowdmesh_jax.errors import CrowdMeshError, FormatError


@st.composite
def timelines(draw):
    schedule = draw(schedules(max_stages=3, max_microbatches=3))
    return evaluate(schedule, *draw(times(schedule.num_stages)))


@given(
    st.one_of(
        crowds(),
        profiles(),
        plans(),
        schedules(),
        timelines(),
        times(1).map(lambda pair: pair[0][0]),
        times(2).map(lambda pair: pair[1][0]),
        st.builds(MemoryBreakdown, stash_bytes=st.integers(0, 2**60)),
    )
)
def test_every_value_survives_json_and_toml(value):
    assert from_json(type(value), to_json(value)) == value
    assert from_json(type(value), to_json(value, indent=2)) == value
    assert from_toml(type(value), to_toml(value)) == value
    assert to_json(from_json(type(value), to_json(value))) == to_json(value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
KINDS = [Crowd, ModelProfile, PipelinePlan, Schedule, Timeline, StageTimes, CutTimes]


@given(json_values, st.sampled_from(KINDS))
def test_any_json_gives_a_value_or_a_typed_error(plain, kind):
    try:
        value = from_plain(kind, plain)
    except CrowdMeshError:
        return
    assert isinstance(value, kind)


def places(plain: Any, path: tuple = ()) -> list[tuple]:
    """Paths of all nodes of a plain value."""
    found = [path]
    if isinstance(plain, dict):
        for key in plain:
            found += places(plain[key], (*path, key))
    elif isinstance(plain, list):
        for index, item in enumerate(plain):
            found += places(item, (*path, index))
    return found


@given(st.one_of(crowds(), profiles(), plans()), json_values, st.data())
def test_one_damaged_place_gives_a_value_or_a_typed_error(value, damage, data):
    plain = json.loads(to_json(value))
    *path, last = data.draw(st.sampled_from([p for p in places(plain) if p]))
    node = plain
    for step in path:
        node = node[step]
    node[last] = damage
    try:
        found = from_plain(type(value), plain)
    except CrowdMeshError:
        return
    assert isinstance(found, type(value))


@given(st.one_of(crowds(), profiles(), plans()), st.text(min_size=1, max_size=8))
def test_an_unknown_field_is_refused_by_name(value, name):
    plain = to_plain(value)
    if name in plain or name in type(value).__dataclass_fields__:
        return
    with pytest.raises(FormatError) as caught:
        from_plain(type(value), {**plain, name: 1}, "mine.json")
    assert f"mine.json: unknown field {name!r} for {type(value).__name__}" in str(caught.value)


@dataclass(frozen=True, kw_only=True)
class Inner:
    count: int
    rate: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: tuple[Inner, ...]
    pair: tuple[int, str]
    kind: Literal["a", "b"]
    by_name: dict[str, Inner] = field(default_factory=dict)
    flag: bool = False
    note: str | None
    either: int | str = 0


GOOD = {"inner": [{"count": 1}], "pair": [1, "x"], "kind": "a"}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"inner": [{"count": 1}, {}]}, "Outer.inner[1]: missing field 'count' of Inner"),
        ({"inner": [{"count": "lots"}]}, "Outer.inner[0].count: expected an integer, got 'lots'"),
        ({"inner": [{"count": True}]}, "Outer.inner[0].count: expected an integer, got True"),
        ({"inner": [{"count": 1.5}]}, "Outer.inner[0].count: expected an integer, got 1.5"),
        ({"inner": [{"count": 1, "rate": "x"}]}, "Outer.inner[0].rate: expected a number, got 'x'"),
        ({"inner": [{"count": 1, "rat": 2}]}, "known fields: count, rate"),
        ({"inner": {}}, "Outer.inner: expected a list, got {}"),
        ({"inner": [3]}, "Outer.inner[0]: expected a table of Inner, got 3"),
        ({"pair": [1]}, "Outer.pair: expected a list of 2, got [1]"),
        ({"kind": "c"}, "Outer.kind: expected 'a' or 'b', got 'c'"),
        ({"by_name": []}, "Outer.by_name: expected a table, got []"),
        ({"by_name": {"k": {}}}, "Outer.by_name.k: missing field 'count'"),
        ({"flag": 1}, "Outer.flag: expected true or false, got 1"),
        ({"note": 1}, "Outer.note: expected a string, got 1"),
        ({"either": 1.5}, "Outer.either: expected int | str, got 1.5"),
    ],
)
def test_a_bad_field_is_told_by_its_path(change, complaint):
    assert from_plain(Outer, GOOD).note is None
    with pytest.raises(FormatError) as caught:
        from_plain(Outer, {**GOOD, **change})
    assert complaint in str(caught.value)


def test_numbers_keep_their_kind_and_infinities_their_value():
    assert isinstance(from_plain(Inner, {"count": 2.0}).count, int)
    assert isinstance(from_plain(Inner, {"count": 2, "rate": 3}).rate, float)
    for rate in (math.inf, -math.inf):
        assert from_json(Inner, to_json(Inner(count=1, rate=rate))).rate == rate
    assert math.isnan(from_json(Inner, to_json(Inner(count=1, rate=math.nan))).rate)


def test_a_value_that_has_no_plain_form_is_a_type_error():
    with pytest.raises(TypeError, match="object cannot be written"):
        to_plain({"a": object()})


def test_text_that_is_no_json_or_toml_is_refused():
    with pytest.raises(FormatError, match="mine: not JSON"):
        from_json(Inner, "{", "mine")
    with pytest.raises(FormatError, match="Inner: not JSON"):
        from_json(Inner, b"\xff\xfe\xfd")
    with pytest.raises(FormatError, match="not JSON"):
        from_json(Inner, "[" * 100_000)
    with pytest.raises(FormatError, match="Inner: not TOML"):
        from_toml(Inner, "= 1")


def test_files_are_read_by_their_ending_and_named_in_errors(tmp_path):
    for ending, text in ((".json", '{"count": 3}'), (".toml", "count = 3")):
        path = tmp_path / f"value{ending}"
        path.write_text(text)
        assert load(Inner, path) == Inner(count=3)
        path.write_text(text.replace("3", '"x"'))
        with pytest.raises(FormatError, match=f"value{ending}.count: expected an integer"):
            load(Inner, path)
    with pytest.raises(FormatError, match="cannot be read"):
        load(Inner, tmp_path / "none.json")
    with pytest.raises(FormatError, match=r"expected a \.json or \.toml file"):
        load(Inner, tmp_path / "value.yaml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff")
    with pytest.raises(FormatError, match="cannot be read"):
        load(Inner, tmp_path / "bytes.toml")
