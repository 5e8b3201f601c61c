"""FTPipeHD's recurrence, by hand."""

from __future__ import annotations

from hand_problems import by_hand, lengths

from crowdmesh_jax.core import Link
from crowdmesh_jax.solvers.partition.baselines.ftpipehd import FTPipeHDSolver

ONE, TWO = [(0.5, 0.5)] * 6, [(1.0, 1.0)] * 6


def test_a_worker_gets_as_much_as_its_capacity():
    # Central 1 s a layer, the worker C = 2: max(i, 2 (6 - i)) is least at i = 4.
    plan = FTPipeHDSolver().solve(by_hand({"central": ONE, "worker": TWO})).plan
    assert plan.devices == ("central", "worker")
    assert lengths(plan) == [4, 2]


def test_a_dear_transfer_moves_the_cut():
    # At i = 4, 30 bytes each way over 10 bytes/s take 6 s. i = 5: max(5, 0, 2) = 5.
    problem = by_hand({"central": ONE, "worker": TWO}, cuts=[0, 0, 0, 30, 0])
    assert lengths(FTPipeHDSolver().solve(problem).plan) == [5, 1]


def test_both_directions_of_a_link_count():
    # The way back is 10 times faster: 30/10 + 30/100 = 3.3 s, less than i = 4's 4 s.
    back = Link(source="worker", target="central", bandwidth_bytes_per_s=100.0)
    problem = by_hand({"central": ONE, "worker": TWO}, cuts=[0, 0, 0, 30, 0], links=[back])
    assert lengths(FTPipeHDSolver().solve(problem).plan) == [4, 2]


def test_capacity_is_one_number_of_the_whole_model():
    # The worker is as fast as central on the last layer, 11/5 times slower on others: 12 s against
    # 6 s in all, so C = 2 and the cut is at 4, though it would take 1 + 2.2 s there.
    odd = [(1.1, 1.1)] * 5 + [(0.5, 0.5)]
    plan = FTPipeHDSolver().solve(by_hand({"central": ONE, "worker": odd})).plan
    assert lengths(plan) == [4, 2]


def test_every_worker_is_used_however_slow():
    slow = [(50.0, 50.0)] * 6
    plan = FTPipeHDSolver().solve(by_hand({"central": ONE, "worker": slow})).plan
    assert lengths(plan) == [5, 1]


def test_three_workers_of_one_two_and_two():
    # max(i, 2 (j - i), 2 (6 - j)): i = 3 and j = 5 give 3, 4, 2; i = 3, j = 4 give 3, 2, 4;
    # i = 4, j = 5 give 4, 2, 2. None gives less than 4: a worker has one layer, 2 s, or two, 4 s,
    # and with one each central has 4. Ties go to the earlier cut, from the last one on.
    plan = FTPipeHDSolver().solve(by_hand({"central": ONE, "b": TWO, "c": TWO})).plan
    assert lengths(plan)[2] == 2
    assert max(lengths(plan)[0], 2 * lengths(plan)[1], 2 * lengths(plan)[2]) == 4
