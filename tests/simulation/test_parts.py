"""The parts of a simulated run: copies, transfers, who takes over."""

import numpy as np
import pytest

from crowdmesh_jax.simulation.copies import Copies
from crowdmesh_jax.simulation.takers import Vacancy, fastest, nearest, successors
from crowdmesh_jax.simulation.transfers import Air, Transfer


def vacancy(owners, links, lost=(), speeds=(1.0,) * 6):
    near = np.zeros((6, 6), bool)
    for a, b in links:
        near[a, b] = near[b, a] = True
    places = np.array([(10.0 * row, 0.0) for row in range(6)])
    return Vacancy(owners=owners, lost=frozenset(lost), near=near, speeds=speeds,
                   positions_m=places)  # fmt: skip


def test_as_few_stages_as_possible_change_hands():
    case = vacancy((0, 1, 2), [(0, 3), (3, 2), (0, 4), (4, 2), (4, 5), (3, 4)], lost=[1])
    assert sorted(successors(case)) == [(0, 3, 2), (0, 4, 2)]
    # Nobody reaches both 0 and 2: two stages change.
    case = vacancy((0, 1, 2), [(0, 3), (3, 4), (4, 2)], lost=[1])
    assert sorted(successors(case)) == [(0, 3, 4), (3, 4, 2)]
    assert list(successors(vacancy((0, 1, 2), [(0, 3)], lost=[1]))) == []


def test_the_fastest_and_the_nearest_take_over():
    links = [(0, 3), (3, 2), (0, 5), (5, 2)]
    case = vacancy((0, 1, 2), links, lost=[1], speeds=(1, 1, 1, 0.8, 1, 1.2))
    assert fastest(case) == (0, 5, 2)
    assert nearest(case) == (0, 3, 2)
    assert fastest(vacancy((0, 1, 2), [], lost=[1])) is None


def test_transfers_go_by_air_or_share_the_uplink():
    air = Air(6.0, 1.5, server=3)

    def send(source, target, left):
        air.all.append(Transfer(kind="fetch", stage=0, source=source, target=target, version=0,
                                left_bytes=left))  # fmt: skip

    send(0, 1, 60.0)
    send(0, 2, 60.0)
    send(3, 0, 60.0)
    linked = np.zeros((3, 3), bool)
    linked[0, 1] = linked[1, 0] = True
    air.retime(linked, [True] * 4)
    assert [t.rate_bytes_per_s for t in air.all] == [6.0, 0.75, 0.75]
    assert air.seconds_left() == 10.0
    assert [t.target for t in air.advance(10.0)] == [1]
    air.retime(linked, [True, True, False, True])
    assert [t.rate_bytes_per_s for t in air.all] == [0.0, 1.5]  # who is gone takes no share
    assert air.seconds_left() == pytest.approx((60 - 7.5) / 1.5)


def test_the_newest_common_version_is_found_among_those_that_are_there():
    copies = Copies(2)
    for stage, device, version in ((0, 1, 5), (0, 2, 9), (1, 3, 5), (1, 3, 9), (1, 4, 7)):
        copies.add(stage, device, version)
    assert copies.common((0, 1), {1, 2, 3, 4}) == 9
    assert copies.common((0, 1), {1, 3, 4}) == 5
    assert copies.common((0, 1), {1, 3, 4}, least=6) is None
    assert copies.common((1,), {4}) == 7
    copies.wipe(3)
    assert copies.common((0, 1), {1, 2, 3, 4}) is None
    copies.drop_after(6)
    assert not copies.holds(0, 2, 9)
    assert 2 in copies.old_bytes[0]  # its bytes are still worth something
