"""Losses worth a plan: by hand, and what groups and two causes at once take."""

import math

import pytest
from replica_worlds import plan

from crowdmesh_jax.errors import InvalidValueError
from crowdmesh_jax.propagation import HazardGroups, likely_losses


def test_likely_losses_by_hand():
    rates = {"a": 0.01, "b": 0.02}
    found = likely_losses(plan(), rates, horizon_s=10.0, doubles=3)
    pa, pb = 1 - math.exp(-0.1), 1 - math.exp(-0.2)
    assert [f.devices for f in found] == [("b",), ("a",), ("c",), ("a", "b")]
    assert [f.probability for f in found] == pytest.approx([pb, pa, 0.0, pa * pb])


def test_what_takes_two_together_makes_their_pair_likely():
    groups = HazardGroups(members={"van": ("b", "c")})
    found = likely_losses(
        plan(), dict.fromkeys("abc", 0.001), horizon_s=10.0, groups=groups,
        group_loss_per_s={"van": 0.01}, doubles=1,
    )  # fmt: skip
    single = 1 - math.exp(-0.01)
    van = 1 - math.exp(-0.1)
    assert found[-1].devices == ("b", "c")
    assert found[-1].probability == pytest.approx(van + (1 - van) * single**2)
    assert found[0].devices == ("b",)
    assert found[0].probability == pytest.approx(1 - math.exp(-0.11))


def test_bad_rates_are_refused():
    with pytest.raises(InvalidValueError, match="horizon_s"):
        likely_losses(plan(), {}, horizon_s=0.0)
    with pytest.raises(InvalidValueError, match="loss rate of 'a'"):
        likely_losses(plan(), {"a": -1.0}, horizon_s=1.0)
    with pytest.raises(InvalidValueError, match="doubles"):
        likely_losses(plan(), {}, horizon_s=1.0, doubles=-1)


def test_a_groups_event_takes_all_of_it_that_is_here():
    groups = HazardGroups(members={"van": ("b", "c", "e"), "far": ("x", "y")})
    rates = {"van": 0.01, "far": 1.0}
    terms = {"horizon_s": 10.0, "groups": groups, "group_loss_per_s": rates, "doubles": 9}
    (*_, only) = likely_losses(plan(), {}, **terms)
    assert only.devices == ("b", "c", "e"), "with the device that has no stage"
    assert only.probability == pytest.approx(1 - math.exp(-0.1))
    (*_, here) = likely_losses(plan(), {}, here="abcd", **terms)
    assert here.devices == ("b", "c")


def test_an_event_and_a_failure_beside_it_are_a_loss_of_three():
    groups = HazardGroups(members={"van": ("b", "e")})
    found = likely_losses(
        plan(), {"a": 0.02}, horizon_s=10.0, groups=groups, group_loss_per_s={"van": 0.01},
        doubles=9,
    )  # fmt: skip
    van, alone = 1 - math.exp(-0.1), 1 - math.exp(-0.2)
    several = {loss.devices: loss.probability for loss in found if len(loss.devices) > 1}
    assert several == pytest.approx({("b", "e"): van, ("a", "b", "e"): van * alone})


def test_chances_so_small_that_they_vanish_beside_one_are_kept_and_certain_ones_are_one():
    tiny = likely_losses(plan(), dict.fromkeys("abc", 1e-12), horizon_s=1.0, doubles=1)[-1]
    assert tiny.probability == pytest.approx(1e-24)
    sure = likely_losses(plan(), dict.fromkeys("abc", 100.0), horizon_s=10.0, doubles=1)[-1]
    assert (sure.devices, sure.probability) == (("a", "b"), 1.0)
