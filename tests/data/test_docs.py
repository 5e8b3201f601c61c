"""docs/data.md: every block runs, in order, and its error is the one it shows."""

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()


def test_every_block_of_the_page_runs_and_prints_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 6
    names: dict = {}
    for block in blocks:
        exec(compile(block, "docs/data.md", "exec"), names)
    (said,) = re.findall(r"print\(error\)  # (.*)$", PAGE, re.MULTILINE)
    assert capsys.readouterr().out.strip() == said
