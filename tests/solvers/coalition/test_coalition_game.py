"""The hedonic game: potential, stability re-checked by brute force, baselines, re-formation."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import subprocess
import sys

import pytest

import crowdmesh_jax as cm
from crowdmesh_jax.core import (
    CoalitionStructure,
    Crowd,
    Device,
    DeviceId,
    LayerProfile,
    ModelProfile,
    from_json,
    to_json,
)
from crowdmesh_jax.errors import (
    InfeasibleError,
    InvalidCoalitionError,
    InvalidCrowdError,
    InvalidValueError,
    SolverError,
    UnknownSolverError,
)
from crowdmesh_jax.solvers import HedonicSolver, coalition_solvers, form_coalitions
from crowdmesh_jax.solvers.coalition import CoalitionProblem, make_coalition_solver
from crowdmesh_jax.solvers.coalition.game import Game
from crowdmesh_jax.solvers.coalition.problem import CoalitionResult, Cost

PROFILE = ModelProfile(
    layers=tuple(
        LayerProfile(
            name=f"layer{index}",
            forward_flops=1e9 * (1 + index % 3),
            backward_flops=2e9 * (1 + index % 3),
            parameter_bytes=2_000_000,
            optimizer_bytes=4_000_000,
            output_bytes=100_000,
            gradient_bytes=100_000,
            residual_bytes=200_000,
        )
        for index in range(8)
    ),
    microbatches=8,
    microbatch_size=4,
    input_bytes=10_000,
)


def crowd_of(count: int, seed: int) -> Crowd:
    return cm.crowds.campus(count, seed=seed)


def cost_of(problem: CoalitionProblem, groups: list[set[str]]) -> Cost:
    """Phi of a structure, by a game of its own."""
    game = Game(problem)
    index = game.facts.index
    return game.potential([sum(1 << index[d] for d in group) for group in groups if group])


def best_gain(result: CoalitionResult) -> float:
    """The most that any device could lower Phi by, by trying every switch there is."""
    problem = result.problem
    groups = [set(members) for members in result.structure.coalitions]
    game = Game(problem)
    index = game.facts.index

    def cost(group: set[str]) -> Cost:
        return game.cost(sum(1 << index[device] for device in group)) if group else Cost(0.0, 0.0)

    best = -math.inf
    for home in groups:
        for device in home:
            for target in [*groups, set()]:
                if target is home or len(target) >= problem.size_limit:
                    continue
                before = cost(home).plus(cost(target))
                after = cost(home - {device}).plus(cost(target | {device}))
                gain = before - after
                assert gain.lack <= 0, "nobody could bring a model to devices without one"
                if gain.lack == 0:
                    best = max(best, gain.phi)
    return best


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("size", [3, None])
def test_the_certificate_is_what_trying_every_switch_finds(seed, size):
    result = form_coalitions(PROFILE, crowd_of(10, seed), max_size=size, seed=seed)
    assert result.certificate.is_nash_stable
    assert not result.certificate.is_sampled
    assert best_gain(result) <= result.certificate.epsilon
    if size is not None:
        assert max(map(len, result.structure.coalitions)) <= size


def test_forty_devices_are_stable_by_brute_force():
    result = form_coalitions(PROFILE, crowd_of(40, 1), max_size=8, starts=1)
    assert result.certificate.is_nash_stable
    assert best_gain(result) <= result.certificate.epsilon


def test_a_structure_that_is_not_stable_is_not_called_so():
    grand = form_coalitions(PROFILE, crowd_of(10, 0), solver="grand")
    assert not grand.certificate.is_nash_stable
    worst = grand.certificate.worst
    assert worst is not None
    assert worst.gain.phi == pytest.approx(best_gain(grand))


@pytest.mark.parametrize("seed", range(2))
def test_every_accepted_move_lowers_the_potential_by_exactly_its_gain(seed):
    problem = CoalitionProblem(profile=PROFILE, crowd=crowd_of(9, seed), max_size=4)
    game = Game(problem)
    moves = []
    HedonicSolver(
        seed=seed, observer=lambda kind, before, after, gain: moves.append((before, after, gain))
    ).form(problem)
    assert moves
    for before, after, gain in moves:
        fall = game.potential(before) - game.potential(after)
        assert fall.lack == gain.lack
        assert fall.phi == pytest.approx(gain.phi, rel=1e-6, abs=1e-9)
        assert fall > Cost(0.0, 0.0)
        assert sum(before) == sum(after), "the same devices"


@pytest.mark.parametrize("seed", range(3))
def test_tiny_crowds_end_near_the_best_structure_there_is(seed):
    crowd = crowd_of(6, seed)
    best = form_coalitions(PROFILE, crowd, solver="exhaustive")
    found = form_coalitions(PROFILE, crowd, seed=seed)
    assert best.potential <= found.potential
    assert found.potential.phi <= 1.1 * best.potential.phi
    for name in coalition_solvers():
        other = form_coalitions(PROFILE, crowd, solver=name)
        assert best.potential.phi <= other.potential.phi * (1 + 1e-9), name


@functools.cache
def _campus_of_fourteen() -> CoalitionResult:
    return form_coalitions(PROFILE, crowd_of(14, 2), max_size=6)


@pytest.mark.parametrize("name", [name for name in coalition_solvers() if name != "exhaustive"])
def test_no_baseline_beats_the_game_on_a_campus(name):
    crowd = crowd_of(14, 2)
    ours = _campus_of_fourteen()
    theirs = form_coalitions(PROFILE, crowd, solver=name, max_size=6)
    assert theirs.structure.devices == ours.structure.devices
    assert max(map(len, theirs.structure.coalitions)) <= 6
    assert ours.potential <= theirs.potential


def test_the_potential_is_worked_out_as_it_is_written_down():
    crowd = crowd_of(5, 0)
    problem = CoalitionProblem(profile=PROFILE, crowd=crowd, kappa=0.7, power=3.0)
    result = HedonicSolver().form(problem)
    total = sum(device.rows for device in crowd.devices)
    reference = Game(problem).reference_s
    phi = 0.0
    for value in result.values:
        assert value.holds_model
        rows = sum(crowd.device(device).rows for device in value.members)
        assert value.share == pytest.approx(rows / total)
        assert value.steps == pytest.approx(rows / (8 * 4))
        phi += rows / total * (value.round_s * (1 + 0.7 * value.imbalance**2) / reference) ** 3.0
    assert result.potential.phi == pytest.approx(phi)


def test_imbalance_is_the_distance_from_the_crowds_labels():
    devices = tuple(
        Device(id=DeviceId(name), label_counts=counts, memory_bytes=2**32)
        for name, counts in (("a", (10, 0)), ("b", (0, 10)))
    )
    crowd = Crowd(devices=devices, default_link=cm.DefaultLink())
    alone = form_coalitions(PROFILE, crowd, solver="singletons", imbalance="emd", kappa=0.0)
    assert [value.imbalance for value in alone.values] == pytest.approx([1.0, 1.0])
    together = form_coalitions(PROFILE, crowd, solver="grand", imbalance="emd")
    assert together.values[0].imbalance == pytest.approx(0.0)
    # Half of each label against all of one: JS is 3/4 log2(4/3) ... in bits 0.311, its root 0.558.
    js = form_coalitions(PROFILE, crowd, solver="singletons", kappa=0.0)
    divergence = 0.5 * math.log2(1 / 0.75) + 0.5 * (0.5 * math.log2(0.5 / 0.75) + 0.5)
    assert js.values[0].imbalance == pytest.approx(math.sqrt(divergence))


def test_unequal_amounts_count_as_work():
    devices = tuple(
        Device(id=DeviceId(name), label_counts=(rows,), memory_bytes=2**32)
        for name, rows in (("a", 320), ("b", 32))
    )
    crowd = Crowd(devices=devices, default_link=cm.DefaultLink())
    values = form_coalitions(PROFILE, crowd, solver="singletons").values
    assert values[0].round_s == pytest.approx(10 * values[1].round_s)
    equal = form_coalitions(PROFILE, crowd, solver="singletons", amounts="equal").values
    assert equal[0].round_s == pytest.approx(equal[1].round_s)


@pytest.mark.parametrize("change", ["joined", "left", "faster"])
def test_a_structure_re_formed_is_stable_in_the_new_crowd(change):
    crowd = crowd_of(9, 3)
    solver = HedonicSolver(seed=3, starts=2)
    before = solver.form(CoalitionProblem(profile=PROFILE, crowd=crowd, max_size=4))
    devices = list(crowd.devices)
    if change == "joined":
        devices.append(dataclasses.replace(devices[0], id=DeviceId("newcomer")))
    elif change == "left":
        del devices[4]
    else:
        devices[2] = dataclasses.replace(devices[2], flops_per_s=5 * devices[2].flops_per_s)
    changed = dataclasses.replace(crowd, devices=tuple(devices))
    after = solver.reform(before, changed, hysteresis=0.0)
    after.structure.check(changed)
    assert after.certificate.is_nash_stable
    assert best_gain(after) <= after.certificate.epsilon


def test_hysteresis_keeps_a_structure_that_a_small_change_would_move():
    crowd = crowd_of(9, 3)
    solver = HedonicSolver(seed=3, starts=2)
    before = solver.form(CoalitionProblem(profile=PROFILE, crowd=crowd, max_size=4))
    devices = tuple(
        dataclasses.replace(device, flops_per_s=device.flops_per_s * (1.01 if i % 2 else 0.99))
        for i, device in enumerate(crowd.devices)
    )
    nudged = dataclasses.replace(crowd, devices=devices)
    assert solver.reform(before, nudged, hysteresis=0.2).structure == before.structure
    with pytest.raises(InvalidValueError, match=r"hysteresis must lie in \[0, 1\)"):
        solver.reform(before, nudged, hysteresis=1.0)


SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
from test_coalition_game import PROFILE, crowd_of
from crowdmesh_jax.solvers import form_coalitions
print(form_coalitions(PROFILE, crowd_of(8, 5), seed=1).structure.coalitions)
many = form_coalitions(PROFILE, crowd_of(70, 5), value="closed_form", seed=1)
print(many.structure.coalitions, many.potential)
"""


def test_neither_the_order_of_the_crowd_nor_the_hash_seed_changes_anything():
    crowd = crowd_of(8, 5)
    turned = dataclasses.replace(crowd, devices=crowd.devices[::-1])
    one = form_coalitions(PROFILE, crowd, seed=1)
    assert form_coalitions(PROFILE, turned, seed=1).structure == one.structure
    many = form_coalitions(PROFILE, crowd_of(70, 5), value="closed_form", seed=1)
    expected = f"{one.structure.coalitions}\n{many.structure.coalitions} {many.potential}"
    script = SCRIPT.format(folder=os.path.dirname(__file__))
    for hash_seed in ("1", "2"):
        said = subprocess.check_output(
            [sys.executable, "-c", script],
            text=True,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
        )
        assert said.strip() == expected


@pytest.mark.parametrize("preference", ["equal_share", "selfish", "pareto", lambda switch: 0.0])
def test_other_preferences_end_and_say_how(preference):
    result = form_coalitions(PROFILE, crowd_of(8, 1), preference=preference, starts=1)
    assert any("history rule" in note for note in result.notes)
    assert result.structure.devices == tuple(sorted(d.id for d in crowd_of(8, 1).devices))


def test_coalitions_that_cannot_hold_the_model_are_finite_and_join_others():
    small = tuple(
        Device(id=DeviceId(f"d{i}"), label_counts=(32,), memory_bytes=30_000_000) for i in range(6)
    )
    crowd = Crowd(devices=small, default_link=cm.DefaultLink())
    result = form_coalitions(PROFILE, crowd, compile_peak_bytes=0)
    assert all(value.holds_model for value in result.values)
    assert all(len(value.members) > 1 for value in result.values)
    assert math.isfinite(result.potential.phi)
    tiny = tuple(dataclasses.replace(device, memory_bytes=9_000_000) for device in small)
    with pytest.raises(InfeasibleError, match="CM-203"):
        form_coalitions(PROFILE, Crowd(devices=tiny, default_link=cm.DefaultLink()))


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"solver": "hedonik"}, UnknownSolverError, "did you mean 'hedonic'"),
        ({"preference": "selfsh"}, InvalidValueError, "did you mean 'selfish'"),
        ({"max_size": 0}, InvalidValueError, "max_size must be >= 1"),
        ({"kappa": math.nan}, InvalidValueError, "kappa must be finite"),
        ({"power": 0.5}, InvalidValueError, "power must be finite and >= 1"),
        ({"imbalance": "kl"}, InvalidValueError, "imbalance must be one of"),
        ({"starts": 0}, InvalidValueError, "starts must be >= 1"),
        ({"choose": "best"}, InvalidValueError, "choose must be 'potential' or 'rounds'"),
        ({"rivals": ("kmean",)}, InvalidValueError, "no rival 'kmean' to start from"),
        ({"colour": 1}, InvalidValueError, "does not take these options"),
        ({"preference": lambda switch: "yes", "starts": 1}, InvalidValueError, "return a number"),
        ({"solver": object()}, SolverError, "no coalition solver"),
    ],
)
def test_bad_input_is_one_clear_error(fields, error, says):
    with pytest.raises(error, match=says):
        form_coalitions(PROFILE, crowd_of(5, 0), **fields)


def test_a_crowd_without_data_is_told_what_to_do():
    crowd = Crowd.local((1.0, 0.5))
    with pytest.raises(InvalidCrowdError, match="amounts='equal'"):
        form_coalitions(PROFILE, crowd)
    assert form_coalitions(PROFILE, crowd, amounts="equal").values
    with pytest.raises(InvalidValueError, match="an object is made with its own"):
        make_coalition_solver(HedonicSolver(), seed=1)


def test_structures_are_partitions():
    structure = CoalitionStructure.of([["b", "a"], ["c"]])
    assert structure.coalition_of("b") == ("a", "b")
    assert from_json(CoalitionStructure, to_json(structure)) == structure
    with pytest.raises(InvalidCoalitionError, match="'a' stands twice"):
        CoalitionStructure.of([["a"], ["a"]])
    with pytest.raises(InvalidCoalitionError, match="'x' is in no coalition"):
        structure.coalition_of("x")
    with pytest.raises(InvalidCoalitionError, match="at least one"):
        CoalitionStructure.of([])
    devices = tuple(Device(id=DeviceId(name)) for name in "abd")
    with pytest.raises(InvalidCoalitionError, match="'c' is not in the crowd"):
        structure.check(Crowd(devices=devices))
    more = tuple(Device(id=DeviceId(name)) for name in "abcd")
    with pytest.raises(InvalidCoalitionError, match="'d' is in no coalition"):
        structure.check(Crowd(devices=more))


def test_the_result_is_told_in_words():
    text = form_coalitions(PROFILE, crowd_of(8, 0)).explain()
    assert "coalitions of 8 devices; a round takes" in text
    assert "Nash-stable under 'marginal'" in text
    assert "imbalance" in text
