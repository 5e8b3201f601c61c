"""Cuts by parameter bytes, by hand."""

from __future__ import annotations

from hand_problems import by_hand, lengths

from crowdmesh_jax.solvers.partition.baselines.by_params import ByParamsSolver


def cut(sizes: list[int], devices: int, **options) -> list[int]:
    layers = [(1.0, 1.0)] * len(sizes)
    problem = by_hand({f"d{i}": layers for i in range(devices)}, params=sizes, **options)
    result = ByParamsSolver().solve(problem)
    assert result.notes == ()  # the rule's own cut, nothing repaired
    return lengths(result.plan)


def test_each_device_gets_about_the_same_bytes():
    # 16 bytes, running sums 4 5 6 8 16 16. Two devices: 8 is exact after 4 layers.
    assert cut([4, 1, 1, 2, 8, 0], 2) == [4, 2]
    # Three: 5.33 is nearest to 5 (2 layers), 10.67 to 8 (4 layers; 16 is twice as far).
    assert cut([4, 1, 1, 2, 8, 0], 3) == [2, 2, 2]


def test_each_stage_has_a_layer_even_where_one_layer_has_all_bytes():
    # A third of 9 bytes is as far from the sums 0, 0 and 0: the earliest boundaries that are left.
    assert cut([0, 0, 0, 9], 3) == [1, 1, 2]
    assert cut([9, 0, 0, 0], 3) == [1, 1, 2]


def test_without_parameters_layers_count():
    assert cut([0] * 6, 3) == [2, 2, 2]


def test_the_first_devices_are_taken_where_there_are_more_than_layers_or_stages():
    assert cut([1, 1], 3) == [1, 1]
    assert cut([1, 1, 1, 1], 3, max_stages=2) == [2, 2]


def test_devices_stand_in_the_order_given():
    problem = by_hand({"a": [(1, 1)] * 2, "b": [(1, 1)] * 2}, devices=["b", "a"])
    assert ByParamsSolver().solve(problem).plan.devices == ("b", "a")
