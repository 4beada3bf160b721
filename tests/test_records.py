"""Reading records: aliases and a BOM are fine, and whatever is wrong is told with file, line and field."""

import json

import pytest

from so8t.data.records import Record, parse_record, read_jsonl
from so8t.errors import DataError
from so8t.labels import LABELS, Label

GOOD = {"user_request": "bake bread", "safety_label": "ALLOW"}


def file_of(tmp_path, *lines: object, name: str = "rows.jsonl"):
    path = tmp_path / name
    parts = [
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode() for line in lines
    ]
    path.write_bytes(b"\n".join(parts) + b"\n")
    return path


def complaint(path, **options) -> str:
    with pytest.raises(DataError) as caught:
        read_jsonl(path, **options)
    return str(caught.value)


def test_labels_are_one_enum_in_one_order():
    assert LABELS == ("ALLOW", "ESCALATE", "REFUSE")
    assert [int(Label[name]) for name in LABELS] == [0, 1, 2]


def test_every_field_of_a_record_is_read(tmp_path):
    row = {
        "user_request": "fais ça", "safety_label": "REFUSE", "context": "c", "task_output": "t", "safety_rationale": "r",
        "source": "s", "language": "fr", "licence": "MIT", "group": "g", "form": "command", "sounds_dangerous": True,
    }  # fmt: skip
    records, report = read_jsonl(file_of(tmp_path, row))
    assert records == [
        Record("fais ça", Label.REFUSE, "c", "t", "r", "s", "fr", "MIT", "g", "command", sounds_dangerous=True),
    ]
    assert (report.rows, report.skipped) == (1, [])


def test_what_is_optional_may_be_missing_null_or_empty(tmp_path):
    bare, null, empty = GOOD, {**GOOD, "context": None, "task_output": None}, {**GOOD, "context": "", "source": ""}
    records, _ = read_jsonl(file_of(tmp_path, bare, null, empty, name="mine.jsonl"))
    assert records == [Record("bake bread", Label.ALLOW, source="mine")] * 3


def test_aliases_are_read_too(tmp_path):
    records, _ = read_jsonl(file_of(tmp_path, {"prompt": "p", "label": "ESCALATE", "response": "a person decides"}))
    assert records[0].user_request == "p"
    assert records[0].safety_label is Label.ESCALATE
    assert records[0].task_output == "a person decides"


def test_beside_its_own_name_an_alias_is_some_other_column(tmp_path):
    row = {
        "user_request": "mine",
        "prompt": "theirs",
        "label": 1,
        "safety_label": "REFUSE",
        "response": "no",
        "task_output": "t",
    }
    for order in (row, dict(reversed(row.items()))):
        record = read_jsonl(file_of(tmp_path, order))[0][0]
        assert (record.user_request, record.safety_label, record.task_output) == ("mine", Label.REFUSE, "t")


def test_other_columns_are_passed_over(tmp_path):
    assert read_jsonl(file_of(tmp_path, {**GOOD, "id": 7, "tags": ["a"]}))[0] == [
        Record("bake bread", Label.ALLOW, source="rows")
    ]


@pytest.mark.parametrize("spelling", ["allow", " Allow ", "ALLOW"])
def test_labels_may_be_in_any_case(spelling):
    assert parse_record({**GOOD, "safety_label": spelling}, default_source="x").safety_label is Label.ALLOW


def test_a_bom_does_not_cost_row_one_and_empty_lines_are_no_rows(tmp_path):
    first = b"\xef\xbb\xbf" + json.dumps({**GOOD, "user_request": "first"}).encode()
    records, report = read_jsonl(file_of(tmp_path, first, b"", b"  \t", {**GOOD, "user_request": "last"}))
    assert [r.user_request for r in records] == ["first", "last"]
    assert report.rows == 2


def test_windows_line_ends_and_a_missing_last_one_are_fine(tmp_path):
    path = tmp_path / "crlf.jsonl"
    path.write_bytes(b"\r\n".join(json.dumps({**GOOD, "user_request": t}).encode() for t in ("a", "b")))
    assert [r.user_request for r in read_jsonl(path)[0]] == ["a", "b"]


def test_separators_of_unicode_inside_a_text_do_not_end_a_line(tmp_path):
    text = "one\u2028two\u0085three\x0cfour"
    path = tmp_path / "u.jsonl"
    path.write_text(
        json.dumps({**GOOD, "user_request": text}, ensure_ascii=False).replace("\x0c", "\\f") + "\n", encoding="utf-8"
    )
    assert [r.user_request for r in read_jsonl(path)[0]] == [text]


def test_records_come_in_the_order_of_the_file(tmp_path):
    rows = [{**GOOD, "user_request": f"r{i}"} for i in (3, 1, 2, 1)]
    assert [r.user_request for r in read_jsonl(file_of(tmp_path, *rows))[0]] == ["r3", "r1", "r2", "r1"]


BAD = {
    "missing request": ({"safety_label": "ALLOW"}, "user_request: missing"),
    "empty request": ({**GOOD, "user_request": "  "}, "user_request: expected a text"),
    "request that is no text": ({**GOOD, "user_request": 5}, "user_request: expected a text"),
    "request that is no Unicode": ('{"user_request": "a \\ud800 b", "safety_label": "ALLOW"}', "user_request: "),
    "missing label": ({"user_request": "x"}, "safety_label: missing"),
    "unknown label": ({**GOOD, "safety_label": "DENY"}, "safety_label: 'DENY' is not one of ALLOW, ESCALATE, REFUSE"),
    "label id": ({**GOOD, "safety_label": 2}, "safety_label: 2 is not one of"),
    "label true": ({**GOOD, "safety_label": True}, "safety_label: True is not one of"),
    "label list": ({**GOOD, "safety_label": ["ALLOW"]}, "safety_label: ['ALLOW'] is not one of"),
    "number for a text": ({**GOOD, "context": 5}, "context: expected a text, got int"),
    "list for a text": ({**GOOD, "task_output": ["a"]}, "task_output: expected a text, got list"),
    "word for a flag": ({**GOOD, "sounds_dangerous": "yes"}, "sounds_dangerous: expected true or false"),
    "list for a row": ([1, 2], "expected a JSON object, got list"),
    "broken JSON": ('{"user_request": "x", ', "row: not valid JSON"),
    "two objects on a line": ('{"user_request": "x"} {}', "row: not valid JSON"),
    "not UTF-8": ('{"user_request": "é", "safety_label": "ALLOW"}'.encode("latin-1"), "row: not valid UTF-8 at byte 18"),
    "nested too deep": ("[" * 100_000, "row: "),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_an_error_that_names_file_line_and_field(tmp_path, name):
    bad, why = BAD[name]
    path = file_of(tmp_path, GOOD, b"", bad, GOOD)
    message = complaint(path)
    assert message.startswith(f"{path}:3: {why}")
    assert "\n" not in message, "one line"
    assert len(message) < 600


@pytest.mark.parametrize("name", BAD)
def test_skip_leaves_bad_rows_out_counts_and_reports_them(tmp_path, name):
    bad, why = BAD[name]
    path = file_of(tmp_path, GOOD, bad, {**GOOD, "user_request": "after"}, bad)
    records, report = read_jsonl(path, on_bad_row="skip")
    assert [r.user_request for r in records] == ["bake bread", "after"]
    assert report.rows == 4
    assert len(report.skipped) == 2
    assert report.skipped[0].startswith(f"{path}:2: {why}")
    assert report.skipped[1].startswith(f"{path}:4: {why}")


def test_the_error_says_how_to_go_on(tmp_path):
    assert "on_bad_row=skip" in complaint(file_of(tmp_path, {}))


def test_a_file_of_utf16_is_told_at_its_first_row(tmp_path):
    path = tmp_path / "utf16.jsonl"
    path.write_text(json.dumps(GOOD), encoding="utf-16")
    assert complaint(path).startswith(f"{path}:1: row: not valid UTF-8 at byte 0")


@pytest.mark.parametrize("data", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_a_file_without_rows_is_an_error(tmp_path, data):
    path = tmp_path / "empty.jsonl"
    path.write_bytes(data)
    assert complaint(path) == f"{path}: no usable rows"


def test_skipping_every_row_is_an_error_too(tmp_path):
    path = file_of(tmp_path, "{", "{")
    assert complaint(path, on_bad_row="skip") == f"{path}: no usable rows (2 bad ones)"


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path):
    assert complaint(tmp_path / "nowhere.jsonl") == f"{tmp_path / 'nowhere.jsonl'}: no such file"
    assert complaint(tmp_path) == f"{tmp_path}: no such file (it is a folder)"


def test_where_no_label_is_needed_a_missing_one_is_escalate_and_a_wrong_one_still_an_error(tmp_path):
    path = file_of(tmp_path, {"user_request": "x"})
    assert read_jsonl(path, require_label=False)[0][0].safety_label is Label.ESCALATE
    assert "safety_label" in complaint(file_of(tmp_path, {"user_request": "x", "label": "OK"}), require_label=False)


def test_a_field_that_is_null_is_not_there_and_its_other_name_is_read():
    record = parse_record({"user_request": None, "prompt": "hi", "label": "ALLOW", "safety_label": None}, default_source="x")
    assert (record.user_request, record.safety_label) == ("hi", Label.ALLOW)
