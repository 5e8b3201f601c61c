"""Recorded rates: readers, and transfers over rates that change."""

import gzip

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crowdmesh_jax.errors import DataError, DataFileError, InvalidValueError
from crowdmesh_jax.mobility import RateTrace, read_mahimahi, read_rate_trace

STEPS = RateTrace([5.0, 6.0, 8.0], [10.0, 0.0, 40.0], end_s=9.0)
"""10 B/s for a second, nothing for two, 40 B/s for one; then again."""


@pytest.fixture
def write(tmp_path):
    def written(content):
        path = tmp_path / "rates.csv"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return written


def test_rates_hold_until_the_next_and_are_repeated():
    assert STEPS.duration_s == 4
    assert STEPS.mean_bytes_per_s == 12.5
    times = np.array([0.0, 0.99, 1.0, 2.9, 3.0, 3.99, 4.0, 4.5, 7.0])
    assert STEPS.at(times).tolist() == [10, 10, 0, 0, 40, 40, 10, 10, 40]
    assert STEPS.carried_bytes([0.0, 0.5, 1.0, 2.0, 3.5, 4.0, 9.0]).tolist() == [
        0, 5, 10, 10, 30, 50, 110,
    ]  # fmt: skip


def test_a_transfer_takes_as_long_as_its_bytes():
    assert STEPS.transfer_s(5.0) == 0.5
    assert STEPS.transfer_s(10.0) == 1.0  # done before the pause begins
    assert STEPS.transfer_s(10.4) == pytest.approx(3.01)
    assert STEPS.transfer_s(50.0) == 4.0
    assert STEPS.transfer_s(100.0, 3.0) == pytest.approx(6.0)
    assert STEPS.transfer_s(0.0, 1.5) == 0
    assert STEPS.transfer_s(40.0, 1.5) == 2.5
    paused = RateTrace([0.0, 1.0], [10.0, 0.0], end_s=3.0)
    assert paused.transfer_s([10.0, 20.0, 25.0]).tolist() == [1.0, 4.0, 6.5]


@given(
    st.lists(st.sampled_from([0.0, 1.0, 2.5, 7.0]), min_size=1, max_size=6).filter(any),
    st.floats(0, 60),
    st.floats(0.01, 200),
)
def test_what_is_carried_in_the_time_of_a_transfer_is_the_transfer(rates, start_s, size):
    trace = RateTrace(np.arange(len(rates)) * 1.5, rates)
    took_s = float(trace.transfer_s(size, start_s))
    start = float(trace.carried_bytes(start_s))
    assert float(trace.carried_bytes(start_s + took_s)) - start == pytest.approx(size, abs=1e-6)
    # And not before: a hair less carries less.
    if took_s > 1e-3:
        assert float(trace.carried_bytes(start_s + took_s - 1e-3)) - start < size


def test_a_csv_file_of_rates_is_read_in_its_unit(write):
    path = write("t_s,rate_mbit_per_s\n0,8\n1,16\n2,0\n")
    trace = read_rate_trace(path, rate="rate_mbit_per_s")
    assert trace.at([0, 1, 2]).tolist() == [1e6, 2e6, 0]
    assert trace.duration_s == 3
    for unit, rate in (("bytes_per_s", 8), ("kbyte_per_s", 8e3), ("kbps", 1e3), ("mbps", 1e6)):
        text = f"t_s,x_{unit}\n0,8\n"
        assert read_rate_trace(write(text), rate=f"x_{unit}").at(0.0) == rate


def test_one_trace_of_many_is_chosen_and_rows_of_one_time_are_averaged(write):
    """The columns of the Irish 5G traces (Raca et al. 2020)."""
    text = (
        "trace,app,t_s,dl_kbps\n0,Download,0,8\n0,Download,0,24\n0,Download,1,40\n1,Netflix,0,4\n"
    )
    path = write(gzip.compress(text.encode()))
    trace = read_rate_trace(path, rate="dl_kbps", where={"trace": "0", "app": "Download"})
    assert trace.at([0.0, 1.0]).tolist() == [2000, 5000]
    with pytest.raises(DataFileError, match="times must ascend, got 0 after 1 s; if the file"):
        read_rate_trace(path, rate="dl_kbps")
    with pytest.raises(DataFileError, match="no rows with"):
        read_rate_trace(path, rate="dl_kbps", where={"trace": "7"})


def test_a_mahimahi_trace_is_read(write):
    trace = read_mahimahi(write("0\n10\n10\n150\n\n400\n"), bin_s=0.1)
    assert trace.duration_s == pytest.approx(0.4)
    assert trace.at([0.0, 0.1, 0.25, 0.35]) == pytest.approx([45_000, 15_000, 0, 15_000])
    assert trace.mean_bytes_per_s == pytest.approx(5 * 1500 / 0.4)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("t_s\n0\n", "no column 'rate_bytes_per_s'"),
        ("t_s,rate_bytes_per_s\n", "no rows"),
        ("t_s,rate_bytes_per_s\n0,-1\n", "line 2: rate_bytes_per_s must be >= 0, got -1"),
        ("t_s,rate_bytes_per_s\n0,x\n", "line 2: rate_bytes_per_s must be a finite number"),
        ("t_s,rate_bytes_per_s\n1,1\n0,1\n", "line 3: times must ascend"),
        ("t_s,rate_bytes_per_s\n0,0\n1,0\n", "every rate is 0"),
    ],
)
def test_a_file_that_is_none_is_one_clear_error(write, text, told):
    path = write(text)
    with pytest.raises(DataFileError, match="CM-141") as caught:
        read_rate_trace(path)
    assert told in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no rows"),
        ("1\n0.5\n", "line 2: expected a whole number of ms, got '0.5'"),
        ("5\n-1\n", "line 2: expected a whole number"),
        ("5\n4\n", "line 2: times must ascend, got 4"),
        ("9" * 13, "expected a whole number"),
    ],
)
def test_a_mahimahi_file_that_is_none_is_one_clear_error(write, text, told):
    with pytest.raises(DataFileError, match="CM-141") as caught:
        read_mahimahi(write(text))
    assert told in str(caught.value)


def test_bounds_and_units(write):
    path = write("t_s,rate_bytes_per_s\n" + "".join(f"{t},1\n" for t in range(100)))
    with pytest.raises(DataFileError, match="more than 10 rows"):
        read_rate_trace(path, max_rows=10)
    with pytest.raises(DataFileError, match="larger than 100 bytes"):
        read_rate_trace(path, max_bytes=100)
    with pytest.raises(DataFileError, match="raise bin_s"):
        read_mahimahi(write("0\n999999999999\n"), bin_s=0.001)
    with pytest.raises(InvalidValueError, match="the unit of column 'speed' is not known"):
        read_rate_trace(path, rate="speed")


@pytest.mark.parametrize(
    ("times", "rates", "options", "told"),
    [
        ([0, 0], [1, 1], {}, "times must ascend, got 0 then 0 s"),
        ([0], [1, 1], {}, "as many times as rates"),
        ([], [], {}, "as many times as rates"),
        ([0, 1], [1, 1], {"end_s": 1.0}, "end_s must be after 1 s"),
        ([0, 1], [0, 0], {}, "every rate is 0"),
    ],
)
def test_a_trace_that_cannot_be_is_refused(times, rates, options, told):
    with pytest.raises(DataError) as caught:
        RateTrace(times, rates, **options)
    assert told in str(caught.value)
