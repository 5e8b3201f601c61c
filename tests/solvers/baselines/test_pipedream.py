"""PipeDream's program over mean workers, by hand."""

from __future__ import annotations

from hand_problems import by_hand, lengths

from crowdmesh_jax.core import Link
from crowdmesh_jax.solvers.partition.baselines.pipedream import PipeDreamSolver


def scaled(seconds: list[float], scale: float) -> list[tuple[float, float]]:
    return [(0.5 * s * scale, 0.5 * s * scale) for s in seconds]


def test_unequal_devices_are_taken_for_their_mean():
    # 1 + 1 + 1 + 3 s on `fast`, three times that on `slow`: 2 2 2 6 on the mean, least slowest 6.
    base = [1, 1, 1, 3]
    problem = by_hand({"fast": scaled(base, 1), "slow": scaled(base, 3)})
    plan = PipeDreamSolver().solve(problem).plan
    assert plan.devices == ("fast", "slow")
    assert lengths(plan) == [3, 1]


def test_transfers_count_at_the_mean_bandwidth_of_all_links():
    # Links of 10 and 30 bytes/s: 20 on the mean. Cut 3 carries 100 bytes each way: 10 s.
    # Cut 2 carries 10 each way: 1 s beside stages of 4 and 8 s. One stage: 12 s. So cut 2.
    base = [1, 1, 1, 3]
    links = [
        Link(source="fast", target="slow", bandwidth_bytes_per_s=10.0),
        Link(source="slow", target="fast", bandwidth_bytes_per_s=30.0),
    ]
    crowd = {"fast": scaled(base, 1), "slow": scaled(base, 3)}
    problem = by_hand(crowd, cuts=[100, 10, 100], links=links)
    assert lengths(PipeDreamSolver().solve(problem).plan) == [2, 2]
    # With 60 bytes each way cut 3 takes 6 s, no more than its stages: 6 beats 8.
    problem = by_hand(crowd, cuts=[100, 10, 60], links=links)
    assert lengths(PipeDreamSolver().solve(problem).plan) == [3, 1]


def test_a_stage_is_replicated_where_its_sync_is_cheap():
    # 1 + 3 s. Two stages: 3 s. Both workers on both layers: max(4, sync) / 2.
    crowd = {"a": scaled([1, 3], 1), "b": scaled([1, 3], 1)}
    # Ring: 2 x 1/2 x 100 bytes / 100 bytes/s = 1 s a step of one microbatch: max(4, 1) / 2 = 2.
    cheap = by_hand(crowd, microbatches=1, rows=5, params=[50, 50], rate=100.0, share=True)
    (stage,) = PipeDreamSolver().solve(cheap).plan.stages
    assert [(share.device, share.rows) for share in stage.shares] == [("a", 3), ("b", 2)]
    # At 10 bytes/s the ring takes 10 s: 5 s a microbatch, so two stages.
    dear = by_hand(crowd, microbatches=1, rows=5, params=[50, 50], rate=10.0, share=True)
    assert lengths(PipeDreamSolver().solve(dear).plan) == [1, 1]
    # Spread over 4 microbatches it is 2.5 s again, below the compute: shared.
    spread = by_hand(crowd, microbatches=4, rows=5, params=[50, 50], rate=10.0, share=True)
    assert lengths(PipeDreamSolver().solve(spread).plan) == [2]


def test_no_more_replicas_than_rows():
    crowd = {"a": scaled([4], 1), "b": scaled([4], 1)}
    one_row = by_hand(crowd, rows=1, share=True)
    assert PipeDreamSolver().solve(one_row).plan.stages[0].shares == ()
