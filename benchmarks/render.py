"""Writes the tables of docs/benchmarks.md from the result files. `--check` only compares.

Between `<!-- figures: NAME -->` and `<!-- end -->` stands what `results/NAME.json` says, between
`<!-- split: NAME PART -->` and `<!-- end -->` (docs/policies_compared.md) the rows of one part of
its details; nothing else is touched. So figures are retaken by `make bench` and shown by this
command, never typed.

    python benchmarks/render.py [--check]
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _measure import RESULTS, Figure, read_figures

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
SPLIT_PAGE = PAGE.with_name("policies_compared.md")
BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
SPLIT = re.compile(r"(<!-- split: (\w+) (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(text: str, results: Path = RESULTS) -> str:
    """The page with all its tables made anew."""

    def block(match: re.Match[str]) -> str:
        path = results / f"{match[2]}.json"
        if not path.exists():
            return f"{match[1]}Not taken yet: `python benchmarks/{match[2]}.py`.\n{match[3]}"
        result = json.loads(path.read_text())
        return f"{match[1]}{table(result)}{match[3]}"

    def split(match: re.Match[str]) -> str:
        path = results / f"{match[2]}.json"
        details = json.loads(path.read_text())["details"] if path.exists() else {}
        if match[3] not in details:
            return f"{match[1]}Not taken yet: `python benchmarks/{match[2]}.py`.\n{match[4]}"
        return f"{match[1]}{split_table(details[match[3]]['rows'])}{match[4]}"

    return SPLIT.sub(split, BLOCK.sub(block, text))


CAUSES = (
    "useful", "redone", "waiting", "detection", "transfer", "restart", "switching", "overhead",
)  # fmt: skip


def split_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Mean seconds of each policy, cause by cause."""
    heads = ("policy", "seconds", *CAUSES, "losses", "stages moved")
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for row in rows:
        around = row["half_width_s"]
        time = f"{row['elapsed_s']:.0f} ± {around:.0f}"
        if row["finished"] < row["runs"]:
            time = f"over {time} ({row['finished']} of {row['runs']} done)"
        cells = [f"{row[f'{cause}_s']:.0f}" for cause in CAUSES]
        cells += [f"{row['losses']:.1f}", f"{row['handovers']:.1f}"]
        lines.append(f"| {row['policy']} | {time} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


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
    stale = 0
    for page in (PAGE, SPLIT_PAGE):
        old = page.read_text()
        new = render(old)
        if sys.argv[1:] == ["--check"]:
            if new != old:
                print(f"{page.name} is not what the result files say: python benchmarks/render.py")
            stale += new != old
            continue
        page.write_text(new)
        print(f"{page.name}: {len(BLOCK.findall(new)) + len(SPLIT.findall(new))} tables")
    return int(stale > 0)


if __name__ == "__main__":
    sys.exit(main())
