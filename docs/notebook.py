"""Makes notebooks in examples/ of pages, and runs them so that their outputs are in them.

pip install 'crowdmesh-jax[dev]'
python docs/notebook.py
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

DOCS = Path(__file__).parent
EXAMPLES = DOCS.parent / "examples"
PAGES = ("quickstart", "comparing_solvers")
CELL_DEADLINE_S = 300


def from_page(text: str) -> nbformat.NotebookNode:
    """The page as a notebook: prose and code in turn, links seen from `examples/`."""
    cells = []
    for index, part in enumerate(re.split(r"^```python\n(.*?)^```$", text, flags=re.M | re.S)):
        source = part.strip()
        if index % 2:
            cells.append(nbformat.v4.new_code_cell(source))
        elif source:
            source = re.sub(r"\]\((?!https?:)([^)]+)\)", r"](../docs/\1)", source)
            cells.append(nbformat.v4.new_markdown_cell(source))
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"  # the default ones are random
    return nbformat.v4.new_notebook(cells=cells)


def run(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Executes all cells in a kernel of its own; raises on the first that fails."""
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=CELL_DEADLINE_S, resources=resources).execute()


def main() -> None:
    """Writes the notebooks of all pages, or of those that are named."""
    for page in sys.argv[1:] or PAGES:
        notebook = from_page((DOCS / f"{page}.md").read_text())
        with tempfile.TemporaryDirectory() as folder:
            run(notebook, Path(folder))
        for cell in notebook.cells:
            cell["metadata"].pop("execution", None)  # times of day: different at each run
        notebook["metadata"].pop("widgets", None)
        nbformat.write(notebook, EXAMPLES / f"{page}.ipynb")


if __name__ == "__main__":
    main()
