"""`so8t data check`: what is wrong with a file is found and told with its place."""

import json

import pytest

from so8t.cli import main
from so8t.data.check import check_files
from tests.conftest import write_rows


def row(request, label="ALLOW", **more):
    return {"user_request": request, "safety_label": label, **more}


@pytest.fixture
def files(tmp_path):
    train = [
        row("How do I bake a loaf of rye bread?", form="question", language="en"),
        row("Drop the production database right now", "ESCALATE", form="command", language="en"),
        row("how do I  bake a loaf of RYE bread?", "REFUSE"),
        row("How do I bake a loaf of rye bread, please?"),
        row("パンの焼き方を教えてください", language="ja"),
    ]
    test = [row("Drop the production database right now!", "ESCALATE"), row("x" * 3000, "REFUSE")]
    first = write_rows(tmp_path / "train.jsonl", train)
    first.write_text(first.read_text() + '{"user_request": "hi"}\n')
    return [first, write_rows(tmp_path / "test.jsonl", test)]


def test_counts_are_by_label_in_the_order_of_the_labels(files):
    train, test = check_files(files).files
    assert (train.rows, test.rows) == (5, 2)
    assert train.by_source == {"train": [3, 1, 1]}
    assert train.by_language == {"-": [1, 0, 1], "en": [1, 1, 0], "ja": [1, 0, 0]}
    assert train.by_form == {"-": [2, 0, 1], "command": [0, 1, 0], "question": [1, 0, 0]}
    assert test.lengths == {"up to 64": 1, "over 2048": 1}


def test_a_bad_row_is_told_with_file_and_line(files):
    (line,) = check_files(files).files[0].bad_rows
    assert line.startswith(f"{files[0]}:6: safety_label: missing")


def test_duplicates_conflicts_and_leaks_are_told_apart(files):
    found = check_files(files)
    rows = {(pair.first.rsplit(":", 1)[1], pair.second.rsplit(":", 1)[1]) for pair in found.within}
    assert rows == {("1", "3"), ("1", "4"), ("3", "4")}
    (conflict,) = found.conflicts
    assert (conflict.first, conflict.second) == (f"{files[0]}:1", f"{files[0]}:3")
    (leak,) = found.leaks
    assert (leak.first, leak.second, leak.same_label) == (f"{files[0]}:2", f"{files[1]}:1", True)


def test_a_pair_is_named_by_lines_of_the_file_whatever_is_between(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [row("Open the door")])
    path.write_text("not JSON\n\n" + path.read_text() + "\n" + path.read_text())
    (pair,) = check_files([path]).within
    assert (pair.first, pair.second) == (f"{path}:3", f"{path}:5")


def test_a_file_that_is_given_twice_leaks_into_itself(files):
    assert len(check_files([files[0], files[0]]).leaks) >= 5


def test_the_same_request_in_another_context_is_no_conflict(tmp_path):
    rows = [row("Open the door", context="a hotel guest"), row("Open the door", "REFUSE", context="a prison cell")]
    assert check_files([write_rows(tmp_path / "rows.jsonl", rows)]).conflicts == []


def test_the_command_prints_the_same_as_text_and_as_json(files, capsys):
    main(["data", "check", *map(str, files)])
    text = capsys.readouterr().out
    assert "label conflicts (same request and context, another label): 1" in text
    assert "leaks between files: 1" in text
    main(["data", "check", *map(str, files), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert [len(told[key]) for key in ("conflicts", "leaks", "within")] == [1, 1, 3]


def test_a_missing_file_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["data", "check", str(tmp_path / "no.jsonl")])
    assert end.value.code == 2
    assert "no such file" in capsys.readouterr().err
