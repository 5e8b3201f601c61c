"""The single cut between a device and the cloud, by hand."""

from __future__ import annotations

import pytest
from hand_problems import by_hand, lengths

from crowdmesh_jax.errors import InfeasibleError, InvalidCrowdError, InvalidValueError
from crowdmesh_jax.solvers.partition.baselines.cloud_device import CloudDeviceSolver

SLOW, FAST, MIDDLE = [(1.0, 1.0)] * 3, [(0.5, 0.5)] * 3, [(0.75, 0.75)] * 3


def test_the_best_single_cut_is_taken():
    # One microbatch. The phone takes 2 s a layer, the cloud 1 s. Links carry 10 bytes/s.
    # Cut 1: 2 + 100/10 + 2 = 14 s. Cut 2: 4 + 1/10 + 1 = 5.1 s. All on the phone: 6 s.
    problem = by_hand(
        {"phone": SLOW, "cloud": FAST},
        microbatches=1, cuts=[100, 1], back=False, pins={0: "phone"},
    )  # fmt: skip
    result = CloudDeviceSolver().solve(problem)
    assert result.plan.devices == ("phone", "cloud")
    assert lengths(result.plan) == [2, 1]
    assert result.predicted.step_s == pytest.approx(5.1)


def test_all_layers_go_to_one_of_the_two_where_that_is_fastest():
    # Nothing pinned: 3 s on the cloud alone.
    free = by_hand({"phone": SLOW, "cloud": FAST}, microbatches=1, cuts=[100, 1], back=False)
    assert CloudDeviceSolver().solve(free).plan.devices == ("cloud",)
    # Pinned at home, and the wire is slow: 6 s on the phone, 4 + 30/10 + 1 = 8 s at best else.
    home = by_hand(
        {"phone": SLOW, "cloud": FAST},
        microbatches=1, cuts=[100, 30], back=False, pins={0: "phone"},
    )  # fmt: skip
    assert CloudDeviceSolver().solve(home).plan.devices == ("phone",)


def test_who_is_device_and_who_is_cloud():
    crowd = {"phone": SLOW, "tablet": MIDDLE, "cloud": FAST}
    assert "device 'phone', cloud 'cloud'" in CloudDeviceSolver().solve(by_hand(crowd)).notes
    pinned = by_hand(crowd, pins={0: "tablet"})
    assert "device 'tablet', cloud 'cloud'" in CloudDeviceSolver().solve(pinned).notes
    named = CloudDeviceSolver(device="cloud", cloud="phone").solve(by_hand(crowd))
    assert "device 'cloud', cloud 'phone'" in named.notes


def test_options_that_mean_nothing_are_refused():
    problem = by_hand({"phone": SLOW, "cloud": FAST})
    with pytest.raises(InvalidValueError, match=r"CM-101.*must differ"):
        CloudDeviceSolver(device="phone", cloud="phone").solve(problem)
    with pytest.raises(InvalidCrowdError, match="nobody"):
        CloudDeviceSolver(device="nobody").solve(problem)


def test_a_third_device_that_must_have_a_layer_is_told():
    crowd = {"phone": SLOW, "tablet": MIDDLE, "cloud": FAST}
    with pytest.raises(InfeasibleError, match=r"CM-203.*cloud_device"):
        CloudDeviceSolver().solve(by_hand(crowd, requires=["tablet"]))
