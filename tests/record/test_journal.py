"""The journal: what was promised is there, a crash is told from damage, one writer at a time."""

import json
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crowdmesh_jax.errors import RecordError
from crowdmesh_jax.record import Journal, journal_writer, read_journal, read_sound_records

texts = st.text(max_size=12)
names = st.text("abcdefg", min_size=1, max_size=6)
records = st.dictionaries(
    names, st.one_of(texts, st.integers(), st.booleans(), st.none(), st.floats(), st.lists(texts)),
    max_size=4,
)  # fmt: skip
no_fixture_worry = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def _plain(record):
    special = {"inf": "inf", "-inf": "-inf", "nan": "nan"}
    return {k: special.get(str(v), v) if isinstance(v, float) else v for k, v in record.items()}


@no_fixture_worry
@given(st.lists(st.lists(records, max_size=4), min_size=1, max_size=3))
def test_what_was_appended_is_read_back_across_openings(tmp_path, sessions):
    path = tmp_path / f"{os.urandom(6).hex()}.jsonl"
    told = []
    for session in sessions:
        with Journal(path) as journal:
            assert len(journal.records) == len(told)
            for record in session:
                assert journal.append(record) == len(told)
                told.append(_plain(record))
    read = read_journal(path)
    assert [record.pop("seq") for record in read] == list(range(len(told)))
    assert read == told


@no_fixture_worry
@given(st.lists(records, min_size=1, max_size=4), st.data())
def test_a_crash_at_any_byte_of_the_last_record_loses_that_record_alone(tmp_path, written, data):
    path = tmp_path / f"{os.urandom(6).hex()}.jsonl"
    with Journal(path) as journal:
        for record in written:
            journal.append(record)
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    cut = data.draw(st.integers(last, len(whole) - 1))
    path.write_bytes(whole[:cut])
    assert len(read_journal(path)) == len(written) - 1
    with Journal(path) as journal:
        assert len(journal.records) == len(written) - 1
        assert path.read_bytes() == whole[:last]
        journal.append({"after": True})
    assert read_journal(path)[-1] == {"seq": len(written) - 1, "after": True}


@no_fixture_worry
@given(st.lists(records, min_size=1, max_size=3), st.data())
def test_a_changed_byte_is_damage(tmp_path, written, data):
    path = tmp_path / f"{os.urandom(6).hex()}.jsonl"
    with Journal(path) as journal:
        for record in written:
            journal.append(record)
    whole = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(whole) - 2))  # not the last newline: that is a torn record
    whole[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole)
    with pytest.raises(RecordError, match="damaged") as caught:
        read_journal(path)
    assert "head -c" in str(caught.value)
    before = path.read_bytes()
    with pytest.raises(RecordError, match="damaged"):
        Journal(path)
    assert path.read_bytes() == before


def test_a_missing_record_is_damage(tmp_path):
    path = tmp_path / "events.jsonl"
    with Journal(path) as journal:
        for step in range(3):
            journal.append({"step": step})
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[2])
    with pytest.raises(RecordError, match=rf"record 1 at byte {len(lines[0])} is damaged"):
        read_journal(path)


def test_a_second_writer_is_told_who_holds_it(tmp_path):
    path = tmp_path / "events.jsonl"
    code = (
        "import sys; from crowdmesh_jax.record import Journal\n"
        "journal = Journal(sys.argv[1]); journal.append({'a': 1}, durable=True)\n"
        "print('ready', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        with pytest.raises(RecordError, match=rf"process {holder.pid} is writing it"):
            Journal(path)
        assert read_journal(path) == [{"seq": 0, "a": 1}]  # reading needs no lock
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with Journal(path) as journal:  # the lock went with the process
        journal.append({"a": 2})
        with pytest.raises(RecordError, match=f"process {os.getpid()} "):
            Journal(path)
    assert len(read_journal(path)) == 2


def test_lines_are_plain_json_with_the_callers_fields(tmp_path):
    with Journal(tmp_path / "metrics.jsonl") as journal:
        journal.append({"step": 3, "loss": float("nan")})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["seq"], record["step"], record["loss"]) == (0, 3, "nan")


@pytest.mark.parametrize("record", [{"seq": 1}, {"crc": 1}, {"x": object()}, {"x": b"bytes"}])
def test_records_that_do_not_fit_are_refused_and_leave_nothing(tmp_path, record):
    with Journal(tmp_path / "events.jsonl") as journal:
        with pytest.raises(RecordError):
            journal.append(record)
        assert journal.append({"fine": 1}) == 0
        journal.sync()
        assert [r["fine"] for r in journal] == [1]


def test_a_closed_or_missing_journal_is_told(tmp_path):
    journal = Journal(tmp_path / "events.jsonl")
    journal.close()
    journal.close()
    with pytest.raises(RecordError, match="is closed"):
        journal.append({})
    with pytest.raises(RecordError, match=r"cannot read: No such file"):
        read_journal(tmp_path / "none.jsonl")
    with pytest.raises(RecordError, match="No such file"):
        Journal(tmp_path / "no" / "folder.jsonl")


def test_what_is_sound_can_be_shown_beside_what_is_damaged(tmp_path):
    path = tmp_path / "events.jsonl"
    with Journal(path) as journal:
        for step in range(4):
            journal.append({"step": step})
    assert read_sound_records(path) == (read_journal(path), None)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1] + lines[2].replace(b"2", b"7", 1) + lines[3])
    records, damage = read_sound_records(path)
    assert records == [{"seq": 0, "step": 0}, {"seq": 1, "step": 1}]
    assert damage is not None
    assert "record 2 at byte" in damage


def test_who_holds_a_journal_is_told_while_he_does(tmp_path):
    path = tmp_path / "events.jsonl"
    assert journal_writer(path) is None  # none was ever made
    with Journal(path):
        assert journal_writer(path) == os.getpid()
    assert journal_writer(path) is None
    with Journal(path):  # asking took nothing that would keep the next writer out
        pass
