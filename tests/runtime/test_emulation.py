"""What speed and which core emulated devices get."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crowdmesh_jax.core import Crowd
from crowdmesh_jax.runtime.emulation import CORE_SHARE, emulate


def test_the_fastest_gets_a_core_to_itself_and_is_not_slowed():
    emulation = emulate(Crowd.local((0.1, 1.0, 0.2, 0.1)), cores=(4, 7))
    assert emulation.factor == 1.0
    assert emulation.cores == {"device-1": 4, "device-2": 7, "device-0": 7, "device-3": 7}


def test_those_that_share_a_core_leave_a_fifth_of_it():
    emulation = emulate(Crowd.local((1.0, 1.0, 1.0)), cores=(0, 1))
    assert emulation.factor == pytest.approx(CORE_SHARE / 2)
    assert "scaled by 0.400" in emulation.describe()


def test_devices_that_all_have_a_core_run_at_the_machines_own_pace():
    emulation = emulate(Crowd.local((1.0, 1.0)), cores=(0, 1))
    assert emulation.cores == {"device-0": 0, "device-1": 1}
    assert emulation.describe() == "each device has a core of its own, at the machine's own speed"


def test_slow_devices_are_sped_up_to_what_the_machine_can():
    emulation = emulate(Crowd.local((0.2, 0.1)), cores=(0, 1))
    assert [device.speed for device in emulation.crowd.devices] == [1.0, 0.5]


@given(
    st.lists(st.floats(0.01, 1.0), min_size=1, max_size=12),
    st.integers(1, 8),
)
def test_no_core_is_promised_more_than_it_has(speeds, cores):
    emulation = emulate(Crowd.local(tuple(speeds)), cores=tuple(range(cores)))
    loads: dict[int, list[float]] = {}
    for device in emulation.crowd.devices:
        loads.setdefault(emulation.cores[device.id], []).append(device.speed)
    for load in loads.values():
        assert sum(load) <= (1.0 if len(load) == 1 else CORE_SHARE) + 1e-9
    first = emulation.crowd.devices[0].speed / speeds[0]
    for device, asked in zip(emulation.crowd.devices, speeds, strict=True):
        assert device.speed / asked == pytest.approx(first), "ratios are kept"
