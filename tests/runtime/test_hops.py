"""A measured round trip becomes the latencies that explain it."""

import pytest

from crowdmesh_jax.core import CutTimes
from crowdmesh_jax.runtime.predict import with_round_trip


def cut() -> CutTimes:
    return CutTimes(
        forward_latency_s=0.002,
        forward_transfer_s=0.010,
        backward_latency_s=0.001,
        backward_transfer_s=0.005,
    )


def test_what_the_links_rate_does_not_explain_is_latency_shared_by_both_ways():
    found = with_round_trip(cut(), 0.024)
    assert found.round_trip_s == pytest.approx(0.024)
    assert (found.forward_transfer_s, found.backward_transfer_s) == (0.010, 0.005)
    assert found.forward_latency_s == pytest.approx(0.005)
    assert found.backward_latency_s == pytest.approx(0.004)


def test_a_round_trip_faster_than_the_link_was_said_to_be_leaves_no_negative_latency():
    found = with_round_trip(cut(), 0.001)
    assert (found.forward_latency_s, found.backward_latency_s) == (0.0, 0.0)
    assert found.forward_transfer_s == 0.010, "the next microbatch still waits for the wire"
