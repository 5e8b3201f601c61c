"""The benchmark scripts run, and the documentation shows what they wrote."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "benchmarks"
PAGE = ROOT / "docs" / "benchmarks.md"
QUICK = ("codec", "transport", "mobility", "machines", "replication_policies")
"""Scripts that a quick try takes a few seconds of."""


@pytest.fixture
def render(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    spec = importlib.util.spec_from_file_location("render", SCRIPTS / "render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_shows_what_the_result_files_say(render):
    text = PAGE.read_text()
    assert render.BLOCK.search(text)
    assert render.render(text) == text


def test_the_page_of_policies_shows_what_their_result_file_says(render):
    text = render.SPLIT_PAGE.read_text()
    assert len(render.SPLIT.findall(text)) == 4
    assert render.render(text) == text


def test_a_changed_figure_changes_the_page(render, tmp_path):
    for path in render.RESULTS.glob("*.json"):
        result = json.loads(path.read_text())
        for row in result.get("figures", ()):
            row["value"] = 1234.5
        (tmp_path / path.name).write_text(json.dumps(result))
    assert "1234.5" in render.render(PAGE.read_text(), tmp_path)


def test_a_figure_that_misses_what_is_asked_says_so(render):
    def verdict(**asked):
        figure = render.Figure(name="f", value=2.0, low=1.0, high=3.0, repeats=7, **asked)
        return render.row(figure).split("|")[-2].strip()

    assert verdict(at_most=1.9) == verdict(at_least=2.1) == "**missed**"
    assert verdict(at_most=2.0) == verdict(at_least=2.0) == "met"
    assert verdict() == ""


@pytest.mark.parametrize(("value", "is_met"), [(0.8, False), (0.9, True), (1.2, False)])
def test_a_figure_may_have_to_lie_between_two_bounds(render, value, is_met):
    made = sys.modules["_measure"].figure("memory", [value], at_least=0.85, at_most=1.15)
    assert made.is_met is is_met
    assert made.asked == "at least 0.85, at most 1.15"


def test_every_result_with_figures_is_on_the_page_and_was_repeated_enough(render):
    shown = {name for _, name, _ in render.BLOCK.findall(PAGE.read_text())}
    for path in render.RESULTS.glob("*.json"):
        result = json.loads(path.read_text())
        if "figures" not in result:
            continue
        assert path.stem in shown
        assert {"command", "date", "machine", "versions"} <= result.keys()
        assert " /" not in result["command"], "a path of the machine that it was measured on"
        for figure in render.read_figures(result):
            assert figure.low <= figure.value <= figure.high
            assert figure.repeats >= 7, figure


def test_make_bench_runs_every_script():
    lines = re.findall(r"^BENCHMARKS [:+]= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    listed = [name for line in lines for name in line.split()]
    scripts = {path.stem for path in SCRIPTS.glob("[!_]*.py")} - {"render", "drift"}
    assert sorted(listed) == sorted(scripts)


def test_every_script_can_be_imported():
    """What `--quick` takes minutes of is at least read to its end."""
    names = [path.stem for path in SCRIPTS.glob("*.py") if path.stem != "_torch_peer"]
    code = "import sys; sys.argv[1:] = []\n" + "".join(f"import {name}\n" for name in names)
    path = os.pathsep.join((str(ROOT / "src"), str(ROOT / "tests"), str(SCRIPTS)))
    environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)


@pytest.mark.parametrize("script", QUICK)
def test_a_script_runs(script):
    path = os.pathsep.join((str(ROOT / "src"), str(ROOT / "tests")))
    environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    before = sorted((SCRIPTS / "results").iterdir())
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / f"{script}.py"), "--quick"],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "a quick try" in done.stdout
    assert sorted((SCRIPTS / "results").iterdir()) == before
