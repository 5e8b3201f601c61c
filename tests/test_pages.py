"""The pages' code runs as written, top to bottom, and so do the docstrings' examples."""

import doctest
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page.name for page in (ROOT / "docs").glob("*.md") if "runs as written" in page.read_text()
)
"""Pages that promise it."""
SOURCES = ROOT / "src"
WITH_EXAMPLES = sorted(
    ".".join(path.relative_to(SOURCES).with_suffix("").parts).removesuffix(".__init__")
    for path in SOURCES.rglob("*.py")
    if ">>> " in path.read_text()
)


def code_of(page: str) -> str:
    text = (ROOT / "docs" / page).read_text()
    return "\n\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


@pytest.mark.system
@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_a_pages_code_runs_as_written(page, tmp_path):
    script = tmp_path / "page.py"
    script.write_text(code_of(page))
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, env=os.environ, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_the_examples_of_docstrings_give_what_they_say(module):
    failed, tried = doctest.testmod(importlib.import_module(module))
    assert tried > 0
    assert failed == 0


def test_quick_start_and_how_tos_have_code_and_docstrings_have_examples():
    assert {"quickstart.md", "own_model.md", "own_optimizer_and_loss.md", "training.md"} <= set(
        PAGES
    )
    assert len(WITH_EXAMPLES) >= 5


def test_every_page_is_reached_from_the_index_and_every_link_leads_somewhere():
    index = (ROOT / "docs" / "index.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        if page.name != "index.md":
            assert re.search(rf"^{page.stem}$", index, re.MULTILINE), (
                f"{page.name} is in no toctree"
            )
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.system
@pytest.mark.slow
@pytest.mark.parametrize("page", ["quickstart", "comparing_solvers"])
def test_a_notebook_is_its_page_and_runs_in_a_kernel(page, tmp_path):
    import nbformat

    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import notebook as maker
    finally:
        sys.path.pop(0)
    assert page in maker.PAGES
    kept = nbformat.read(maker.EXAMPLES / f"{page}.ipynb", as_version=4)
    made = maker.from_page((ROOT / "docs" / f"{page}.md").read_text())
    sources = [[(cell.cell_type, cell.source) for cell in book.cells] for book in (kept, made)]
    assert sources[0] == sources[1], "run `python docs/notebook.py`"
    assert any(cell.get("outputs") for cell in kept.cells), "it is committed with its outputs"
    maker.run(made, tmp_path)  # in a running event loop, as a user's notebook is
