"""The README's example runs as written, and its commands exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def _example() -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return code


def test_the_example_has_about_twenty_lines():
    assert len(_example().strip().splitlines()) <= 22


@pytest.mark.system
@pytest.mark.slow
def test_the_example_runs_as_written(tmp_path):
    script = tmp_path / "example.py"
    script.write_text(_example())
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path, capture_output=True, text=True, timeout=180, env=os.environ, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (losses,) = re.findall(r"^loss ([\d.]+) -> ([\d.]+)$", done.stdout, re.MULTILINE)
    assert float(losses[1]) < 0.5 * float(losses[0])
    (trace,) = re.findall(r"^open (.*trace\.json) in", done.stdout, re.MULTILINE)
    assert Path(trace).is_file()
    assert "bound by" in done.stdout


def test_its_commands_are_make_targets():
    commands = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert commands == ["demo", "test"]
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for command in [*commands, "help", "check", "exact", "bench", "docs"]:
        assert re.search(rf"^ +make {command} ", listed.stdout, re.MULTILINE), command


def test_its_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target
