"""Writes the tables of docs/benchmarks.md from the result files. `--check` only compares.

Between `<!-- figures: NAME -->` and `<!-- end -->` stands what `results/NAME.json` says; nothing
else is touched. So figures are retaken by `make bench` and shown by this command, never typed.

    python benchmarks/render.py [--check]
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _measure import RESULTS, Figure, read_figures

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(text: str, results: Path = RESULTS) -> str:
    """The page with all its tables made anew."""

    def block(match: re.Match[str]) -> str:
        path = results / f"{match[2]}.json"
        if not path.exists():
            return f"{match[1]}Not taken yet: `python benchmarks/{match[2]}.py`.\n{match[3]}"
        result = json.loads(path.read_text())
        return f"{match[1]}{table(result)}{match[3]}"

    return BLOCK.sub(block, text)


def table(result: Mapping[str, Any]) -> str:
    """One result file as a table and a line that says how and where it was taken."""
    lines = ["| | median | range | repeats | asked | |", "| --- | --- | --- | --- | --- | --- |"]
    lines += [row(figure) for figure in read_figures(result)]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        "\n".join(lines)
        + f"\n\n`{result['command']}`, {result['date']}: {result['what']}."
        + f" {result['machine']}. {versions}.\n"
    )


def row(figure: Figure) -> str:
    """A figure with what is asked of it; one that misses it says so."""
    verdict = {None: "", True: "met", False: "**missed**"}[figure.is_met]
    unit = "" if figure.unit == "x" else f" {figure.unit}"
    value = f"{figure.value:g}{unit}"
    if figure.is_met is not None:
        value = f"**{value}**"
    asked = figure.asked
    return (
        f"| {figure.name} | {value} | {figure.low:g} - {figure.high:g}"
        f" | {figure.repeats} | {asked} | {verdict} |"
    )


def main() -> int:
    old = PAGE.read_text()
    new = render(old)
    if sys.argv[1:] == ["--check"]:
        if new != old:
            print(f"{PAGE.name} is not what the result files say: python benchmarks/render.py")
        return int(new != old)
    PAGE.write_text(new)
    print(f"{PAGE.name}: {len(BLOCK.findall(new))} tables")
    return 0


if __name__ == "__main__":
    sys.exit(main())
