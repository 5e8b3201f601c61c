"""Makes demo.svg and demo_trace.svg: the demo in a real terminal, and its trace round the kill.

pip install pyte
python docs/demo_picture.py [folder]

The command runs in a pseudo-terminal; what its last screen shows is drawn. Lines are cut out only
where the picture says so.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

import crowdmesh_jax as cm

COLUMNS, LINES = 108, 80
COMMAND = ("demo", "--name", "demo")
LEFT_OUT = ("memory is for training", "alone:", "data:", "solver:", "run folder", "a step takes")
"""Lines that begin so stay out of the picture, with those that they wrap into."""
DIMMED = Style(dim=True)


def capture(folder: Path) -> pyte.Screen:
    """Runs the command in a terminal of its own; returns the screen as it stands at the end."""
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    command = [sys.executable, "-m", "crowdmesh_jax.cli", *COMMAND, "--runs-dir", str(folder)]
    environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    with contextlib.suppress(OSError):  # it ends with the child
        while select.select([ours], [], [], 300)[0]:
            data = os.read(ours, 1 << 16)
            if not data:
                break
            stream.feed(data)
    os.close(ours)
    if child.wait() != 0:
        raise SystemExit(f"the demo ended with status {child.returncode}")
    return screen


def shown(screen: pyte.Screen) -> list[Text]:
    """The screen's lines with their colours, without those that are left out."""
    kept = [Text("$ make demo", style="bold")]
    is_out = is_full = False
    for y in range(screen.cursor.y + 1):
        row = screen.buffer[y]
        plain = "".join(row[x].data for x in range(COLUMNS)).rstrip()
        is_out = plain.startswith(LEFT_OUT) or (is_out and is_full)
        is_full = len(plain) >= COLUMNS - 12  # it goes on in the next row
        if is_out:
            if kept[-1].plain != "[...]":
                kept.append(Text("[...]", style=DIMMED))
            continue
        if not plain and not kept[-1].plain:
            continue
        line = Text()
        for x in range(len(plain)):
            cell = row[x]
            style = Style(color=None if cell.fg == "default" else _colour(cell.fg), bold=cell.bold)
            line.append(cell.data, style)
        kept.append(line)
    return kept


def _colour(name: str) -> str:
    if re.fullmatch(r"[0-9a-f]{6}", name):
        return f"#{name}"
    return {"brown": "yellow"}.get(name, name)


def main(folder: Path) -> None:
    """Both pictures, of one run."""
    with tempfile.TemporaryDirectory() as runs:
        screen = capture(Path(runs))
        made = cm.report(Path(runs) / "demo")
        (drawn,) = (path for path in made.plots if path.name == "recovery-1.svg")
        shutil.copy(drawn, folder / "demo_trace.svg")
    with Path(os.devnull).open("w") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True)
        for line in shown(screen):
            console.print(line, soft_wrap=True)
        console.save_svg(str(folder / "demo.svg"), title="crowdmesh demo")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
