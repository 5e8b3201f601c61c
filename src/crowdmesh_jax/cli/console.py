"""How this command line prints: JSON lines, errors, tables. Knows no command."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from ..core import values
from ..errors import CrowdMeshError

FILE_WIDTH = 160
"""Of tables that go into a file or a pipe, where no window sets it."""


def print_json(value: Any) -> None:
    """One line of JSON; dataclasses become objects."""
    print(json.dumps(values.to_plain(value), allow_nan=False), flush=True)


def show_error(error: CrowdMeshError, *, as_json: bool) -> None:
    """The error as one line and what follows it, on stderr."""
    kind = type(error).__name__
    if as_json:
        told = {"kind": kind, "code": error.code, "message": error.message}
        print(json.dumps({"error": {**told, "docs": error.docs_anchor}}), file=sys.stderr)
    else:
        print(f"{kind} [{error.code}]: {error.message}", file=sys.stderr)


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = ()
) -> None:
    """A plain table. Columns named in `right` are aligned right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    class Teller(Console):
        def on_broken_pipe(self) -> None:
            """A reader that goes away is no error: `main` ends quietly. Rich would exit with 1."""
            raise BrokenPipeError

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        is_right = name in right
        table.add_column(
            name, justify="right" if is_right else "left", no_wrap=is_right or index == 0
        )
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console = Teller(highlight=False)
    if not console.is_terminal:
        console = Teller(highlight=False, width=FILE_WIDTH)
    console.print(table)


def format_seconds(seconds: float) -> str:
    """`1.24 s`, `88 ms`, `3.1 ms`, `45 us`."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds * 1e6:.3g} us"


def format_count(number: float) -> str:
    """`124.4 M`, `61.7 k`, `12`: flops, parameters, bytes; decimal."""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number:.0f}"
