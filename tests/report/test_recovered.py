"""What a report says of a run that lost a device."""

import pytest
from report.run_folders import PLAN, TIMELINE, make_run, recovery
from report.test_report import SECTIONS, _Page, _plain, _text

import crowdmesh_jax as cm
from crowdmesh_jax.report import read_run
from crowdmesh_jax.report.figures import step_figures
from crowdmesh_jax.report.recovered import recovery_chart, recovery_gantts
from crowdmesh_jax.report.story import tell


def test_a_recovery_has_a_section_a_chart_and_a_picture(tmp_path):
    made = cm.report(make_run(tmp_path, lost_at=6).path)
    sections = [*SECTIONS[:3], "recovery", *SECTIONS[3:]]
    assert _Page(_text(made.html)).sections == sections
    assert {"recovery.svg", "recovery-1.svg"} <= {path.name for path in made.plots}
    told = _plain(made.html)
    assert (
        "lost slow: spare took layers 2-3 (a spare that had the copy); it replayed 2 steps, nobody"
        " else redid any. From here on: fast \N{RIGHTWARDS ARROW} spare" in told
    )
    assert "slow 600 ms 60.0 ms 10.0 ms 20.0 ms 400 ms 250 ms 110 ms 4.00 kB 2 0" in told, (
        "the table, part by part"
    )
    assert "recoveries 1 1 devices lost" in told
    assert "longest recovery 600 ms" in told
    assert "None" not in told


def test_a_run_that_lost_nobody_has_no_word_of_it(tmp_path):
    view = read_run(make_run(tmp_path).path)
    assert view.recoveries == ()
    assert recovery_chart(view) is None
    assert recovery_gantts(view) == ()
    assert 'id="recovery"' not in cm.report(view.path).html.read_text()


def test_recoveries_are_read_back_as_they_were_told(tmp_path):
    folder = make_run(tmp_path, lost_at=6)
    folder.add_recovery(recovery(9, epoch=3))
    assert read_run(folder.path).recoveries == (recovery(6), recovery(9, epoch=3))
    folder.recoveries_path.write_bytes(
        folder.recoveries_path.read_bytes().replace(b"slow", b"fast")
    )
    view = read_run(folder.path)
    assert view.recoveries == ()
    assert any("recoveries.jsonl: record 0 at byte 0 is damaged" in text for text in view.problems)


def test_a_recovery_of_a_later_release_is_named_and_left_out(tmp_path):
    folder = make_run(tmp_path, lost_at=6)
    from crowdmesh_jax.record import Journal

    with Journal(folder.recoveries_path) as lines:
        lines.append({"epoch": 3, "colour": "red"})
    view = read_run(folder.path)
    assert view.recoveries == (recovery(6),)
    assert any("colour" in text for text in view.problems)


def test_parts_of_a_recovery_leave_no_gap_and_add_up(tmp_path):
    event = recovery(6)
    ends = [span[2] for span in event.spans]
    assert [span[1] for span in event.spans[1:]] == ends[:-1]
    assert event.spans[1][1] == pytest.approx(event.opened_s)
    assert ends[-1] - event.spans[0][1] == pytest.approx(event.total_s)
    chart = recovery_chart(read_run(make_run(tmp_path, lost_at=6).path))
    assert [row.label for row in chart.rows] == ["slow lost, step 6"]
    assert sum(bar.end - bar.start for bar in chart.bars) == pytest.approx(600)


def test_void_and_replayed_work_is_drawn_as_such_in_the_row_of_who_did_it(tmp_path):
    (chart,) = recovery_gantts(read_run(make_run(tmp_path, lost_at=6).path))
    labels = [row.label for row in chart.rows]
    assert labels == ["fast", "slow", "spare", "recovery"]
    by_role = {role: {labels[b.row] for b in chart.bars if b.role == role} for role in
               ("link", "forward")}  # fmt: skip
    assert by_role["link"] >= {"spare"}
    assert by_role["forward"] >= {"fast"}
    assert {"replayed", "void, done again"} <= {words for _, words in chart.legend}
    parts = [bar.text for bar in chart.bars if labels[bar.row] == "recovery"]
    assert parts == ["noticed", "all stopped", "decided", "moved, loaded, replayed", "first step"]
    assert all(bar.start >= 0 and bar.end <= chart.x_max + 1e-9 for bar in chart.bars)


def test_figures_of_a_step_are_of_the_undisturbed_stretch_before(tmp_path):
    calm = step_figures(read_run(make_run(tmp_path, "calm", steps=7).path))
    view = read_run(make_run(tmp_path, "lost", lost_at=6).path)
    assert view.measured_step_s == pytest.approx(1.25 * TIMELINE.step_s), "as it was predicted"
    figures = step_figures(view)
    assert figures.plan == PLAN
    assert figures.window.step < 6
    for mine, other in zip(figures.measured_shares, calm.measured_shares, strict=True):
        assert mine.bubble == pytest.approx(other.bubble, abs=0.02)
    late = step_figures(view, 9)
    assert late.plan.devices == ("fast", "spare")
    assert [share.device for share in late.measured_shares] == ["fast", "spare"]
    assert late.predicted_shares == (), "the prediction was of another plan"


def test_the_story_tells_copies_losses_and_reasons(tmp_path):
    entries = tell(read_run(make_run(tmp_path, lost_at=9).path).records)
    told = [(entry.title, entry.text) for entry in entries]
    text = "loss 2 to 0.2222, copies of versions 4 to 8 complete (2 times) with 2 devices"
    assert ("Steps 0 to 8 committed", text) in told
    assert ("Epoch 2 opened", "slow was lost: killed by signal 9") in told
    assert any(title == "Plan decided, from version 9" and text.endswith("; why")
               for title, text in told)  # fmt: skip
    assert ("Checkpoint of version 12", "complete on disk") in told, "that one is on the disk"
    ledger = [{"first_layer": 0, "last_layer": 1, "devices": ["a", "b"]}]
    (alone,) = tell([{"kind": "Wave", "version": 3, "ledger": ledger}])
    assert alone.title == "Copies of version 3 complete with 2 devices"
