"""Charts: ticks that people can read, series that stay small, drawings that are well-formed."""

import itertools
import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from crowdmesh_jax.report import units
from crowdmesh_jax.report.charts import (
    Arrow,
    Bar,
    BarChart,
    Level,
    Line,
    LineChart,
    Row,
    log_ticks,
    nice_ticks,
    thinned,
)
from crowdmesh_jax.report.svg import NARROW, WIDE, draw, draw_file

numbers = st.floats(-1e9, 1e9)
anything = st.floats(-1e6, 1e6) | st.sampled_from([math.nan, math.inf, -math.inf])


@example(low=900719926.0, span=1e-06, about=10)
@given(numbers, st.floats(1e-6, 1e9), st.integers(2, 12))
def test_ticks_are_few_inside_and_evenly_apart(low, span, about):
    high = low + span
    ticks = nice_ticks(low, high, about)
    room = span * 1e-6 + abs(low) * 1e-9 + 1e-9
    assert all(low - room <= tick <= high + room for tick in ticks)
    assert len(ticks) <= 2.5 * about + 2
    gaps = {round((b - a) / span, 5) for a, b in itertools.pairwise(ticks)}
    assert len(gaps) <= 2


@given(st.floats(1e-6, 1e3), st.floats(2.0, 1e6))
def test_logarithmic_ticks_are_inside_and_never_missing_over_a_decade(low, ratio):
    ticks = log_ticks(low, low * ratio)
    assert all(low * 0.99 <= tick <= low * ratio * 1.01 for tick in ticks)
    assert ticks or ratio < 10


@given(st.lists(anything, max_size=60), st.integers(2, 20))
def test_a_thinned_series_keeps_its_extremes_in_the_band(ys, limit):
    points = [(float(i), y) for i, y in enumerate(ys)]
    shown, band = thinned(points, limit)
    assert len(shown) <= max(limit, 0) or len(points) <= limit
    finite = [y for y in ys if math.isfinite(y)]
    if band and finite:
        assert min(low for _, low, _ in band) == min(finite)
        assert max(high for *_, high in band) == max(finite)
    if len(points) <= limit:
        assert shown == tuple(points)


names = st.text(max_size=8)
lines = st.builds(
    Line,
    name=names,
    points=st.lists(st.tuples(st.floats(0, 1e5), anything), max_size=8).map(tuple),
    has_marks=st.booleans(),
)
line_charts = st.builds(
    LineChart,
    name=st.just("x"), title=names, x_label=names, y_label=names,
    lines=st.lists(lines, max_size=3).map(tuple),
    levels=st.lists(st.builds(Level, y=st.floats(0, 10), name=names), max_size=1).map(tuple),
    is_log=st.booleans(),
)  # fmt: skip
bars = st.builds(
    lambda row, start, length, **rest: Bar(row=row, start=start, end=start + length, **rest),
    st.integers(0, 1), st.floats(0, 100), st.floats(0, 100),
    role=st.sampled_from(["forward", "bubble"]), text=names, tip=names,
    is_predicted=st.booleans(),
)  # fmt: skip
bar_charts = st.builds(
    BarChart,
    name=st.just("x"), title=names, x_label=names,
    rows=st.tuples(st.builds(Row, label=names, note=names), st.builds(Row, label=names)),
    bars=st.lists(bars, max_size=6).map(tuple),
    legend=st.just((("forward", "forward"),)),
    arrows=st.just((Arrow(start_row=0, start=1, end_row=1, end=2, tip="a<b"),)),
    is_zoomable=st.booleans(),
)  # fmt: skip


@given(line_charts | bar_charts)
def test_every_chart_is_well_formed_at_both_widths_and_holds_no_odd_number(chart):
    for text in (draw(chart, WIDE), draw(chart, NARROW), draw_file(chart)):
        # XML knows no control characters; neither does a metric's name that came from Python code
        if all(ch.isprintable() for ch in repr(chart)) and "\\x" not in repr(chart):
            root = ElementTree.fromstring(text.replace("<svg class", "<svg data-c"))
            for element in root.iter():
                for key, value in element.attrib.items():
                    if key in ("x", "y", "cx", "cy", "width", "height", "d"):
                        assert "nan" not in value, (key, value)
                        assert "inf" not in value, (key, value)


def test_the_png_of_a_chart_is_a_picture():
    pytest.importorskip("matplotlib")
    from crowdmesh_jax.report.png import draw_png

    chart = BarChart(
        name="x", title="t", x_label="ms", rows=(Row(label="a", note="n"), Row(label="b")),
        bars=(
            Bar(row=0, start=0, end=5, role="forward", text="1"),
            Bar(row=1, start=1, end=2, role="bubble", is_predicted=True),
        ),
        legend=(("forward", "forward"),),
        arrows=(Arrow(start_row=0, start=1, end_row=1, end=2),),
    )  # fmt: skip
    line = LineChart(
        name="y", title="t", x_label="step", y_label="loss", is_log=True,
        lines=(Line(name="a", points=((0, 1.0), (1, 0.1)), band=((0, 0.5, 2.0), (1, 0.1, 0.2))),),
        levels=(Level(y=0.5, name="predicted"),),
    )  # fmt: skip
    for each in (chart, line):
        data = draw_png(each)
        assert data.startswith(b"\x89PNG\r\n")
        assert len(data) > 5000


def test_png_without_matplotlib_names_the_extra():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from crowdmesh_jax.report.png import draw_png\n"
        "from crowdmesh_jax.report.charts import LineChart\n"
        "try: draw_png(LineChart(name='x', title='', x_label='', y_label='', lines=()))\n"
        "except Exception as exc: print(type(exc).__name__, exc)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("MissingExtraError [CM-601]")
    assert "crowdmesh-jax[plot]" in done.stdout


@pytest.mark.parametrize(
    ("value_s", "told"),
    [
        (None, "\N{EN DASH}"), (0.0, "0 s"), (9.9999, "10.0 s"), (0.09996, "100 ms"),
        (4.5e-5, "45.0 \N{MICRO SIGN}s"), (1.2345, "1.23 s"), (200.0, "3 min 20 s"),
        (7500.0, "2 h 05 min"), (math.inf, "inf"), (3e-8, "0.03 \N{MICRO SIGN}s"),
    ],
)  # fmt: skip
def test_seconds_have_three_figures_and_a_unit(value_s, told):
    assert units.seconds(value_s) == told


def test_other_numbers_are_told_as_people_write_them():
    assert units.size(262_144) == "262 kB"
    assert units.size(4_500_000) == "4.50 MB"
    assert units.size(12) == "12 B"
    assert units.share(0.073) == "7.3 %"
    assert units.share(0.512) == "51 %"
    assert units.change(157.0, 100.0) == "+57 %"
    assert units.change(95.0, 100.0) == "\N{MINUS SIGN}5.0 %"
    assert units.change(230.0, 10.0) == "\N{MULTIPLICATION SIGN}23"
    assert units.change(1.0, None) == units.MISSING
    assert [units.clock(s) for s in (3.44, 725.0, 7509.0)] == ["3.4 s", "12:05", "2:05:09"]
    assert [units.plain(v) for v in (0.123456, 1e-7, math.nan)] == ["0.1235", "1.000e-07", "nan"]
