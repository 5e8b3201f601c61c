"""The page and its files: whole, self-contained, honest about what is missing, safe to open."""

import re
from html.parser import HTMLParser

import pytest
from report.run_folders import PREDICTION, make_run

import crowdmesh_jax as cm
from crowdmesh_jax.errors import InvalidValueError, RecordError
from crowdmesh_jax.record import RunFolder
from crowdmesh_jax.report import read_run
from crowdmesh_jax.report.compare import differences, flattened

SECTIONS = [
    "summary", "loss", "step-time", "gantt", "shares", "links", "memory", "plan", "events", "words",
]  # fmt: skip


class _Page(HTMLParser):
    """Element names, sections, addresses; complains where tags do not close."""

    VOID = ("meta", "link", "br", "rect", "path", "circle")

    def __init__(self, text):
        super().__init__()
        self.open, self.sections, self.addresses, self.tags = [], [], [], set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [v for k, v in attrs if k in ("href", "src", "xlink:href", "srcset")]
        if tag == "section":
            self.sections.append(dict(attrs)["id"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        if tag in self.VOID:
            if self.open and self.open[-1] == tag:
                self.open.pop()
            return
        assert self.open, tag
        assert self.open.pop() == tag


def _text(path):
    return re.sub(r"<(style|script)>.*?</\1>", "", path.read_text(), flags=re.DOTALL)


def _plain(path):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", _text(path)))


def test_a_run_becomes_a_page_with_all_sections_and_plots_beside_it(tmp_path):
    folder = make_run(tmp_path, evaluate_every=4)
    made = cm.report(folder.path)
    assert made.html == folder.path / "report.html"
    told = f"Report('{made.html}', '{folder.name}' (12 steps, finished))"
    assert repr(made) == told, "not pages of figures"
    assert _Page(_text(made.html)).sections == SECTIONS
    assert sorted(path.name for path in made.plots) == [
        "gantt.svg", "loss.svg", "memory.svg", "metric-accuracy.svg", "shares.svg",
        "step-time.svg",
    ]  # fmt: skip
    assert all(path.read_text().startswith("<svg xmlns") for path in made.plots)
    (summary,) = made.runs
    assert (summary.state, summary.steps, summary.problems) == ("finished", 12, ())
    assert summary.predicted_step_s == PREDICTION.step_s
    told = _plain(made.html)
    assert "measured is +25 %" in told
    assert "Memory was not measured in this run" in told
    assert "evaluation accuracy 0.9" in told
    assert re.search(r"evaluation accuracy 0\.9\S* version 12", told), "as API and terminal say"


def test_measured_memory_stands_beside_predicted(tmp_path):
    made = cm.report(make_run(tmp_path, has_memory=True).path)
    assert "fast 10.0 MB 9.00 MB 8.00 kB 4.29 GB parameters 4.00 kB" in _plain(made.html)
    assert ">peak above idle<" in (made.html.parent / "plots" / "memory.svg").read_text()


def test_memory_of_who_took_a_stage_over_is_shown_too(tmp_path):
    folder = make_run(tmp_path, has_memory=True)
    found = {**folder.read_memory(), "spare": {"idle_bytes": 70_000_000, "peak_bytes": 83_000_000}}
    folder.write_memory(found)
    made = cm.report(folder.path)
    assert "spare 13.0 MB" in _plain(made.html)
    assert "spare" in (made.html.parent / "plots" / "memory.svg").read_text()


def test_the_page_loads_nothing_from_anywhere(tmp_path):
    folder = make_run(tmp_path)
    page = _Page(_text(cm.report(folder.path).html))
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert not {"img", "iframe", "object", "embed", "audio", "video"} & page.tags
    assert "url(" not in folder.path.joinpath("report.html").read_text().replace("url(#clip", "")
    assert "@import" not in folder.path.joinpath("report.html").read_text()


def test_the_runs_own_files_stay_as_they_were(tmp_path):
    folder = make_run(tmp_path)
    before = {p.name: p.read_bytes() for p in folder.path.iterdir() if p.is_file()}
    cm.report(folder.path)
    after = {p.name: p.read_bytes() for p in folder.path.iterdir() if p.is_file()}
    after.pop("report.html")
    assert after == before


def test_equal_runs_give_equal_pages(tmp_path):
    folder = make_run(tmp_path)
    first = cm.report(folder.path, out=tmp_path / "a").html.read_bytes()
    assert cm.report(folder.path, out=tmp_path / "b").html.read_bytes() == first


def test_names_from_outside_cannot_become_markup(tmp_path):
    hostile = '<script>alert("x")</script>\'&'
    folder = make_run(tmp_path, end=None)
    text = folder.config_path.read_text().replace('"tiny"', repr(hostile).replace("\\'", "&"))
    folder.config_path.write_text(text.replace('"a",', f"'{hostile.replace(chr(39), '')}',"))
    with folder.events() as events, folder.metrics() as metrics:
        events.append({"kind": hostile, "text": hostile})
        fault = {"kind": hostile, "text": hostile}
        events.append({"kind": "Halted", "committed": 12, "fault": fault})
        metrics.append({"step": 12, "loss": 1.0, hostile: 1.0, "eval": {hostile: 1.0}})
        metrics.append({"step": 0, "loss": 1.0, hostile: 1.0})
    made = cm.report(folder.path)
    assert read_run(folder.path).config["job"]["model"].startswith("<script>")
    assert made.html.read_text().count("<script>") == 1  # our own
    assert "alert(&quot;x&quot;)" in made.html.read_text()
    for path in made.plots:
        assert "<script" not in path.read_text()
        assert path.parent == made.html.parent / "plots"
    _Page(_text(made.html))


@pytest.mark.parametrize(
    ("end", "has_trace", "told"),
    [
        (None, False, "Killed at 2023-11-14 22:13:2"),
        ("halt", True, "Stopped: CM-511"),
        (None, False, "this folder has no trace of a whole step"),
    ],
)
def test_an_unusual_end_is_told_first(tmp_path, end, has_trace, told):
    made = cm.report(make_run(tmp_path, end=end, has_trace=has_trace).path)
    assert told in _plain(made.html)
    assert {"loss", "step-time", "events"} <= set(_Page(_text(made.html)).sections)


@pytest.mark.parametrize(
    "missing",
    ["config.toml", "plan.json", "prediction.json", "metrics.jsonl", "trace.json", "events.jsonl"],
)
def test_any_missing_file_leaves_a_page(tmp_path, missing):
    folder = make_run(tmp_path)
    (folder.path / missing).unlink()
    made = cm.report(folder.path)
    assert {"loss", "events", "plan"} <= set(_Page(_text(made.html)).sections)
    assert "None" not in _plain(made.html)
    assert " nan" not in _plain(made.html)


def test_a_run_that_has_only_begun_leaves_a_page(tmp_path):
    folder = make_run(tmp_path, steps=0, end=None, has_trace=False)
    made = cm.report(folder.path)
    assert "No step was committed yet" in _plain(made.html)
    bare = RunFolder.create(tmp_path, "bare")
    bare.write_config({})
    bare.events().close()
    assert "This folder has no plan" in _plain(cm.report(bare.path).html)


def test_a_long_run_stays_a_small_page(tmp_path):
    folder = make_run(tmp_path, steps=8)
    with folder.metrics() as metrics, folder.events() as events:
        for step in range(8, 20_000):
            metrics.append({"step": step, "loss": 1.0 + step % 7, "step_s": 0.1})
            if step % 50 == 0:
                events.append({"kind": "Wave", "version": step})
    made = cm.report(folder.path)
    assert made.html.stat().st_size < 500_000
    assert "more</summary>" in made.html.read_text()


def test_the_drawn_step_can_be_chosen(tmp_path):
    folder = make_run(tmp_path)
    assert cm.report(folder.path, step=1).runs[0].shown_step == 1
    assert cm.report(folder.path).runs[0].shown_step in range(2, 11)
    with pytest.raises(RecordError, match=r"does not hold step 99 whole; it holds 0, 1"):
        cm.report(folder.path, step=99)
    with pytest.raises(InvalidValueError, match="step must be"):
        cm.report(folder.path, step=-1)


def test_where_it_cannot_write_it_says_so(tmp_path):
    folder = make_run(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="cannot make the folder"):
        cm.report(folder.path, out=tmp_path / "file")


def test_two_runs_are_laid_over_each_other(tmp_path):
    first = make_run(tmp_path, "one", evaluate_every=4)
    second = make_run(tmp_path, "two", steps=9, learning_rate=0.2, end="halt")
    made = cm.report(first.path, second.path)
    assert made.html == first.path / "versus-two" / "report.html"
    assert _Page(_text(made.html)).sections == [
        "summary", "loss", "step-time", "shares", "gantt", "differences", "plan",
    ]  # fmt: skip
    assert made.differences == (
        ("job.learning_rate", "0.1", "0.2"), ("run.steps", "12", "9"),
    )  # fmt: skip
    assert [run.state for run in made.runs] == ["finished", "halted"]
    assert {"gantt-A.svg", "gantt-B.svg", "loss.svg"} <= {path.name for path in made.plots}
    loss = (made.html.parent / "plots" / "loss.svg").read_text()
    assert ">A training<" in loss
    assert ">B training<" in loss
    ids = re.findall(r'id="([^"]+)"', made.html.read_text())
    assert len(ids) == len(set(ids))


def test_a_run_beside_itself_differs_in_nothing(tmp_path):
    folder = make_run(tmp_path)
    made = cm.report(folder.path, folder.path, out=tmp_path / "out")
    assert made.differences == ()
    assert "Nothing: configuration and plan are equal" in _plain(made.html)


def test_what_only_one_configuration_has_is_absent_from_the_other(tmp_path):
    first, second = make_run(tmp_path, "one"), make_run(tmp_path, "two")
    text = second.config_path.read_text()
    second.config_path.write_text(text.replace("[run]", "[run]\nextra = [1, 2]"))
    found = differences(read_run(first.path), read_run(second.path))
    assert found == (("run.extra", "absent", "1, 2"),)
    assert flattened({"a": [{"b": 1}], "c": [], "d": {}}) == {"a[0].b": "1", "c": ""}
