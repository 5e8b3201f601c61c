"""Hand-over: when, to whom, whether it is worth it, and that it does not flap."""

import math
from dataclasses import replace

import pytest

from crowdmesh_jax.core import DeviceId
from crowdmesh_jax.errors import InvalidValueError
from crowdmesh_jax.propagation import (
    Departure,
    HandoverRule,
    Target,
    decide_handover,
    lead_s,
    worth_s,
)

RULE = HandoverRule()
X = Target(device=DeviceId("x"), lacks_bytes=8000, rate_bytes_per_s=1000.0, rank=0.8)
Y = replace(X, device=DeviceId("y"), rank=0.6)


def going(leaves_s, sd_s=0.0):
    return Departure(device=DeviceId("o"), leaves_s=leaves_s, sd_s=sd_s)


def decide(departure, *targets, **more):
    options = {"rule": RULE, "step_s": 1.0, "loss_s": 30.0, **more}
    return decide_handover(departure, 2, 3, targets, **options)


def test_the_lead_by_hand():
    # Set-up 1 s, 8 s of bytes, one step.
    assert lead_s(X, RULE, step_s=1.0) == pytest.approx(10.0)
    noisy = replace(X, rate_sd_share=0.3)
    assert lead_s(noisy, RULE, step_s=1.0) == pytest.approx(2 + 8 / (1 - 0.3 * 1.2815515655))
    # However noisy, a tenth of the rate is counted on.
    assert lead_s(replace(X, rate_sd_share=5.0), RULE, step_s=1.0) == pytest.approx(82.0)
    assert math.isinf(lead_s(replace(X, rate_bytes_per_s=0.0), RULE, step_s=1.0))


def test_it_starts_when_the_departure_is_a_margin_of_leads_away():
    assert decide(going(15.1), X) is None
    assert decide(going(14.9), X).target == "x"
    # With noise, as early as it may be.
    assert decide(going(20.0), X) is None
    assert decide(going(20.0, sd_s=5.0), X).target == "x"


def test_what_cannot_be_done_in_time_is_not_begun():
    assert decide(going(3.0), X) is None
    assert decide(going(3.0), replace(X, lacks_bytes=1000)).target == "x"


def test_it_must_be_worth_it():
    assert decide(going(12.0), X, loss_s=0.9) is None
    assert decide(going(12.0), X, loss_s=30.0, slowdown=5.0) is None
    assert worth_s(going(12.0), X, 10.0, RULE, loss_s=30.0, slowdown=0.5) == pytest.approx(24.5)
    # One that leaves as well saves nothing.
    also = replace(X, stay=Departure(device=DeviceId("x"), leaves_s=12.0))
    assert decide(going(12.0), also) is None
    assert decide(going(12.0), also, Y).target == "y"


def test_nobody_leaves_nobody_takes():
    assert decide(going(math.inf), X) is None
    assert decide(going(12.0)) is None
    assert decide(going(12.0), replace(X, device=DeviceId("o"))) is None


def test_the_best_target_in_any_order():
    assert decide(going(12.0), X, Y) == decide(going(12.0), Y, X)
    assert decide(going(12.0), X, Y).target == "x"


def test_it_does_not_flap_between_moments():
    standing = decide(going(14.9), X)
    # Estimates that go to and fro around the start: begun, it stays.
    for leaves_s in (15.1, 14.0, 16.0, 20.0, 22.4):
        assert decide(going(leaves_s), X, standing=standing) is not None
    assert decide(going(22.6), X, standing=standing) is None


def test_it_does_not_flap_between_targets():
    standing = decide(going(12.0), Y)
    assert decide(going(12.0), X, Y, standing=standing).target == "y"
    much = replace(X, rank=0.91)
    assert decide(going(12.0), much, Y, standing=standing).target == "x"
    # A target that is no good any more is left at once.
    gone = replace(Y, rate_bytes_per_s=0.0)
    assert decide(going(12.0), X, gone, standing=standing).target == "x"


def test_departures_as_probabilities():
    assert going(10.0, 2.0).within(10.0) == pytest.approx(0.5)
    assert (going(10.0).within(9.9), going(10.0).within(10.0)) == (0.0, 1.0)
    assert going(math.inf).within(1e9) == 0.0


def test_bad_numbers_are_refused():
    for options in ({"quantile": 0.2}, {"margin": 0.5}, {"keep": 0.9}, {"switch": 0},
                    {"setup_s": -1}, {"stall_s": math.inf}):  # fmt: skip
        with pytest.raises(InvalidValueError, match=next(iter(options))):
            HandoverRule(**options)
    with pytest.raises(InvalidValueError, match="leaves_s"):
        going(-1.0)
    with pytest.raises(InvalidValueError, match="leaves_s"):
        going(1.0, math.nan)
