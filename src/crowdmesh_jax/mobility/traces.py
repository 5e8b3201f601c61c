"""Readers of recorded positions: plain csv, and the floating-car data that SUMO writes.

Both stream: a file is never in memory as a whole, and bytes, rows and nodes are bounded.
"""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any
from xml.parsers import expat

from ..errors import DataFileError
from . import checks
from .opening import MAX_BYTES, MAX_ROWS, decimal, opened, rows_of
from .recorded import Trace

MAX_NODES = 1_000_000
MAX_NAME = 256
COLUMNS = ("t_s", "node", "x_m", "y_m")


class _Rows:
    """Rows of a trace as they come, in flat arrays."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.numbers: dict[str, int] = {}
        self.node_of_row, self.times_s, self.places_m = array("q"), array("d"), array("d")

    def add(self, place: str, node: str, time_s: float, x_m: float, y_m: float) -> None:
        if not node or len(node) > MAX_NAME or not node.isprintable():
            raise DataFileError(
                f"{self.path}, {place}: a node's name must have 1-{MAX_NAME} printable characters,"
                f" got {node[:40]!r}"
            )
        number = self.numbers.setdefault(node, len(self.numbers))
        if number >= MAX_NODES:
            raise DataFileError(f"{self.path}: more than {MAX_NODES} nodes; cut the file")
        self.node_of_row.append(number)
        self.times_s.append(time_s)
        self.places_m.extend((x_m, y_m))

    def trace(self, max_gap_s: float) -> Trace:
        import numpy as np

        if not self.times_s:
            raise DataFileError(f"{self.path}: there is no position in it")
        return Trace(
            tuple(self.numbers),
            np.array(self.node_of_row, np.int64),
            np.array(self.times_s, np.float64),
            np.array(self.places_m, np.float64).reshape(-1, 2),
            max_gap_s=max_gap_s,
            where=str(self.path),
        )


def read_csv_trace(
    path: str | Path,
    *,
    max_gap_s: float = 5.0,
    max_bytes: int = MAX_BYTES,
    max_rows: int = MAX_ROWS,
) -> Trace:
    """Positions from a csv file, plain or gzip's.

    The first line names the columns: `t_s` (seconds), `node` (any name), `x_m`, `y_m` (metres);
    others are passed over. Rows may come in any order.

    Args:
        max_gap_s: Silence of a node beyond which it counts as away in between.
        max_bytes: Of the file, unpacked.

    Raises:
        DataFileError: Missing, damaged, without such columns, values that are no finite numbers;
            names the line.
    """
    path = Path(path)
    rows = _Rows(path)
    with opened(path, max_bytes) as stream:
        for number, (time, node, x, y) in rows_of(stream, path, COLUMNS, max_rows):
            place = f"line {number}"
            values = (
                decimal(path, place, name, text)
                for name, text in (("t_s", time), ("x_m", x), ("y_m", y))
            )
            rows.add(place, node, *values)
    return _checked(rows, max_gap_s)


def read_sumo_fcd(
    path: str | Path,
    *,
    max_gap_s: float = 5.0,
    max_bytes: int = MAX_BYTES,
    max_rows: int = MAX_ROWS,
) -> Trace:
    """Positions of vehicles, persons and containers from SUMO's `--fcd-output`, plain or gzip's.

    `timestep` elements with a `time`, in them `vehicle`, `person` and `container` with `id`, `x`,
    `y` (metres in SUMO's network; files written with `--fcd-output.geo` hold degrees and are not
    for this reader). Velocities come from the positions. A document type is refused, so that no
    entity can be declared, expanded or fetched.

    Source of the format: SUMO user documentation, "FCDOutput", and its `fcd_file.xsd`.

    Raises:
        DataFileError: Missing, damaged, truncated, too large, no such file; names the line.
    """
    path = Path(path)
    reader = _FcdReader(path, max_rows)
    with opened(path, max_bytes) as stream:
        while chunk := stream.read():
            reader.feed(chunk)
        reader.close()
    return _checked(reader.rows, max_gap_s)


def _checked(rows: _Rows, max_gap_s: float) -> Trace:
    from ..errors import DataError

    checks.number("max_gap_s", max_gap_s, above=True)
    try:
        return rows.trace(max_gap_s)
    except DataFileError:
        raise
    except DataError as exc:
        raise DataFileError(exc.message) from exc


class _FcdReader:
    """Expat with handlers: no tree is kept."""

    MOVING = frozenset(("vehicle", "person", "container"))

    def __init__(self, path: Path, max_rows: int) -> None:
        self.path, self.rows, self.max_rows = path, _Rows(path), max_rows
        self._depth = 0
        self._time_s: float | None = None
        self._parser: Any = expat.ParserCreate()
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.StartDoctypeDeclHandler = self._refuse
        self._parser.EntityDeclHandler = self._refuse

    def feed(self, chunk: bytes, *, final: bool = False) -> None:
        try:
            self._parser.Parse(chunk, final)
        except expat.ExpatError as exc:
            ends = "; it is cut off" if final else ""
            raise DataFileError(f"{self.path}: not well-formed XML: {exc}{ends}") from exc

    def close(self) -> None:
        self.feed(b"", final=True)

    def _place(self) -> str:
        return f"line {self._parser.CurrentLineNumber}"

    def _refuse(self, *_: object) -> None:
        raise DataFileError(
            f"{self.path}, {self._place()}: it declares a document type or an entity, which SUMO"
            " never writes; refused"
        )

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self._depth += 1
        if self._depth == 1 and name != "fcd-export":
            raise DataFileError(
                f"{self.path}: its root is <{name[:40]}>, expected <fcd-export> as"
                " `sumo --fcd-output` writes it"
            )
        if self._depth > 100:
            raise DataFileError(f"{self.path}, {self._place()}: elements are nested too deep")
        if name == "timestep" and self._depth == 2:
            self._time_s = decimal(self.path, self._place(), "time", attributes.get("time"))
        elif name in self.MOVING and self._depth == 3 and self._time_s is not None:
            self._add(name, attributes)

    def _add(self, name: str, attributes: dict[str, str]) -> None:
        place = self._place()
        if "id" not in attributes:
            raise DataFileError(f"{self.path}, {place}: a {name} without an id")
        if len(self.rows.times_s) >= self.max_rows:
            raise DataFileError(
                f"{self.path}: more than {self.max_rows} rows; cut it, or raise max_rows"
            )
        x_m, y_m = (decimal(self.path, place, axis, attributes.get(axis)) for axis in ("x", "y"))
        assert self._time_s is not None
        self.rows.add(place, attributes["id"], self._time_s, x_m, y_m)

    def _end(self, name: str) -> None:
        self._depth -= 1
        if name == "timestep":
            self._time_s = None
