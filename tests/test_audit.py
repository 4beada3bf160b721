"""The audit log: every line stays, and whatever is done to it afterwards shows."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from so8t.audit import AuditLog, files_of, verify
from so8t.cli import main
from so8t.errors import ArtefactError


def filled(folder, lines=6, **settings):
    log = AuditLog(folder, **settings)
    for k in range(lines):
        log.append({"event": "decision", "decision": "ALLOW", "request": f"é {k}"})
    return log


def test_every_line_is_json_and_the_chain_is_whole(tmp_path):
    filled(tmp_path)
    entries = [json.loads(line) for line in files_of(tmp_path)[0].read_text().splitlines()]
    assert [e["number"] for e in entries] == [1, 2, 3, 4, 5, 6]
    assert all(later["previous"] == earlier["hash"] for earlier, later in itertools.pairwise(entries))
    found = verify(tmp_path)
    assert (found.lines, found.last, found.problems) == (6, entries[-1]["hash"], [])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10_000), flip=st.integers(1, 255))
def test_no_byte_of_the_log_can_be_changed_unseen(tmp_path, place, flip):
    folder = tmp_path / f"{time.time_ns()}"
    filled(folder, lines=3)
    file = files_of(folder)[0]
    data = bytearray(file.read_bytes())
    data[place % len(data)] ^= flip
    file.write_bytes(bytes(data))
    assert verify(folder).problems


def test_a_time_that_is_written_otherwise_is_a_change_though_it_reads_as_the_same_number(tmp_path, monkeypatch):
    monkeypatch.setattr("so8t.audit.time.time", lambda: 1796023047.2424574)
    filled(tmp_path, lines=1)
    file = files_of(tmp_path)[0]
    same = file.read_text().replace("1796023047.2424574", "1796023047.24245739")
    assert json.loads(same) == json.loads(file.read_text())
    file.write_text(same)
    assert [problem.split(": ")[1] for problem in verify(tmp_path).problems] == ["changed"]


@pytest.mark.parametrize("number", [1, 3, 5])
def test_a_line_that_is_missing_is_told_with_its_place(tmp_path, number):
    filled(tmp_path)
    file = files_of(tmp_path)[0]
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[: number - 1] + lines[number:]))
    problems = verify(tmp_path).problems
    assert problems[0].startswith(f"audit-000001.jsonl:{number}: number {number + 1} where {number} was expected")


def test_lines_that_changed_places_are_told(tmp_path):
    filled(tmp_path)
    file = files_of(tmp_path)[0]
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:2], lines[3], lines[2], *lines[4:]]))
    assert len(verify(tmp_path).problems) >= 2


def test_lines_cut_off_at_the_end_show_when_the_last_hash_was_kept(tmp_path, capsys):
    last = filled(tmp_path).append({"event": "decision"})
    file = files_of(tmp_path)[0]
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    main(["audit", "verify", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        main(["audit", "verify", str(tmp_path), "--last", last])
    assert end.value.code == 2
    assert "no line has the hash" in capsys.readouterr().out


def test_rotation_overwrites_nothing_and_keeps_the_chain(tmp_path):
    filled(tmp_path, lines=20, max_bytes=700)
    assert len(files_of(tmp_path)) > 5
    assert all(file.stat().st_size <= 700 for file in files_of(tmp_path))
    found = verify(tmp_path)
    assert (found.lines, found.problems) == (20, [])


@pytest.mark.parametrize("max_bytes", [2**20, 700])
def test_lines_added_together_are_the_lines_added_one_by_one(tmp_path, max_bytes):
    log = AuditLog(tmp_path, max_bytes=max_bytes)
    for step in range(3):
        last = log.extend([{"event": "decision", "request": f"{step} {k}"} for k in range(4)])
    found = verify(tmp_path)
    assert (found.lines, found.last, found.problems) == (12, last, [])
    files = files_of(tmp_path)
    assert len(files) > 1 or max_bytes > 700
    assert all(file.stat().st_size <= max_bytes for file in files)
    told = [json.loads(line)["request"] for file in files for line in file.read_text().splitlines()]
    assert told == [f"{step} {k}" for step in range(3) for k in range(4)]


def test_a_log_is_gone_on_with_by_another_process(tmp_path):
    filled(tmp_path, lines=3, max_bytes=700)
    first, second = AuditLog(tmp_path, max_bytes=700), AuditLog(tmp_path, max_bytes=700)
    for k in range(4):
        (first, second)[k % 2].append({"event": "decision", "turn": k})
    found = verify(tmp_path)
    assert (found.lines, found.problems) == (7, [])


def test_a_killed_writer_leaves_a_log_that_goes_on(tmp_path):
    code = (
        "import sys; from pathlib import Path; from so8t.audit import AuditLog\n"
        "log = AuditLog(Path(sys.argv[1]), max_bytes=20_000)\n"
        "while True: print(log.append({'event': 'decision', 'text': 'x' * 300}), flush=True)"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    told = [writer.stdout.readline().strip() for _ in range(40)]
    os.kill(writer.pid, signal.SIGKILL)
    told += [line.strip() for line in writer.stdout if line.endswith("\n")]
    writer.wait()
    AuditLog(tmp_path).append({"event": "after"})
    found = verify(tmp_path)
    assert found.problems == []
    written = {json.loads(line)["hash"] for file in files_of(tmp_path) for line in file.read_text().splitlines()}
    assert set(told) <= written  # what append returned is on disk


def test_a_torn_line_is_told_and_set_aside_not_lost(tmp_path):
    filled(tmp_path)
    file = files_of(tmp_path)[0]
    with file.open("a") as out:
        out.write('{"event": "half a li')
    assert "torn" in verify(tmp_path).problems[0]
    AuditLog(tmp_path).append({"event": "after"})
    assert verify(tmp_path).problems == []
    (torn,) = tmp_path.glob("*.torn-*")
    assert torn.read_text() == '{"event": "half a li'


def test_a_damaged_last_line_is_not_chained_to(tmp_path):
    filled(tmp_path)
    file = files_of(tmp_path)[0]
    file.write_text(file.read_text() + "nonsense\n")
    with pytest.raises(ArtefactError, match=r"audit-000001.jsonl:7: the last line of the audit log is damaged"):
        AuditLog(tmp_path).append({"event": "after"})


def test_a_folder_without_a_log_is_an_error(tmp_path):
    with pytest.raises(ArtefactError, match="no audit log"):
        verify(tmp_path)
