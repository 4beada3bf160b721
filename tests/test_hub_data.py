"""Data sets on a hub: their columns become requests and labels; huggingface_hub fetches them from a server on this machine."""

import csv
import gzip
import hashlib
import json
import lzma
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from so8t.config import validate
from so8t.data.datamodule import DataSpec, SafetyData
from so8t.data.records import Record
from so8t.data.sources import HubSpec, Rule, SourceSpec, load_source, load_sources, sample
from so8t.data.splits import split_by_group
from so8t.data.tables import stem
from so8t.errors import DataError, FetchError
from so8t.labels import Label
from tests.conftest import composed

ALLOW, ESCALATE, REFUSE = Label
COMMIT = "0123456789abcdef0123456789abcdef01234567"

HARMS = (
    "animal_abuse", "child_abuse", "controversial_topics,politics", "discrimination,stereotype,injustice",
    "drug_abuse,weapons,banned_substance", "financial_crime,property_crime,theft", "hate_speech,offensive_language",
    "misinformation_regarding_ethics,laws_and_safety", "non_violent_unethical_behavior", "privacy_violation", "self_harm",
    "sexually_explicit,adult_content", "terrorism,organized_crime", "violence,aiding_and_abetting,incitement",
)  # fmt: skip


def beaver(prompt: str, *harms: str) -> dict:
    return {"prompt": prompt, "response": "r", "category": {h: h in harms for h in HARMS}, "is_safe": not harms}


def wild(prompt: str, harm: str | None, subcategory: str = "benign", adversarial: bool = False) -> dict:
    return {
        "prompt": prompt, "adversarial": adversarial, "response": None, "prompt_harm_label": harm,
        "response_refusal_label": None, "response_harm_label": None, "subcategory": subcategory,
    }  # fmt: skip


def aegis(prompt: str, label: str, categories: str = "") -> dict:
    return {
        "id": "0", "reconstruction_id_if_redacted": None, "prompt": prompt, "response": None, "prompt_label": label,
        "response_label": None, "violated_categories": categories, "prompt_label_source": "human",
        "response_label_source": None,
    }  # fmt: skip


def toxic(text: str, toxicity: int, jailbreaking: int = 0) -> dict:
    return {
        "conv_id": "c", "user_input": text, "model_output": "m,\n\"o\"", "human_annotation": True, "toxicity": toxicity,
        "jailbreaking": jailbreaking, "openai_moderation": "[]",
    }  # fmt: skip


def xs(prompt: str, kind: str) -> dict:
    return {"prompt": prompt, "focus": "kill", "type": kind, "note": None, "label": "safe"}


ROWS = {
    "beavertails": [
        beaver("one", "animal_abuse", "self_harm"), beaver("two", "privacy_violation"), beaver("three"), beaver("two"),
    ],
    "wildguard": [
        wild("one", "harmful", "cyberattack"), wild("two", "harmful", "mental_health_over-reliance_crisis"),
        wild("three", "unharmful"), wild("four", None), wild("wrapped one", "harmful", "cyberattack", adversarial=True),
        wild("wrapped three", "unharmful", adversarial=True),
    ],
    "aegis": [
        aegis("one", "unsafe", "Violence, PII/Privacy"), aegis("two", "unsafe", "PII/Privacy"), aegis("three", "safe"),
        aegis("REDACTED", "unsafe", "Suicide and Self Harm"), aegis("four", "unsafe", "Suicide and Self Harm, Other"),
    ],
    "toxicchat": [
        toxic("one, \"two\"\nthree", 1), toxic("three", 0), toxic("wrapped one", 1, 1), toxic("wrapped three", 0, 1),
    ],
    "or_bench": [{"prompt": "one", "category": "violence"}],
    "or_bench_toxic": [{"prompt": "one", "category": "violence"}],
    "xstest": [xs("one", "contrast_homonyms"), xs("two", "homonyms")],
}  # fmt: skip
WANTED = {
    "beavertails": ({"one": REFUSE, "two": ESCALATE}, 2),
    "wildguard": ({"one": REFUSE, "two": ESCALATE, "three": ALLOW}, 3),
    "aegis": ({"one": REFUSE, "two": ESCALATE, "three": ALLOW, "four": ESCALATE}, 1),
    "toxicchat": ({'one, "two"\nthree': REFUSE, "three": ALLOW}, 2),
    "or_bench": ({"one": ALLOW}, 0),
    "or_bench_toxic": ({"one": REFUSE}, 0),
    "xstest": ({"one": REFUSE, "two": ALLOW}, 0),
}


def write(path: Path, rows: list[dict]) -> Path:
    """In the form that the endings of the name tell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.name.removesuffix(".gz").removesuffix(".xz").rpartition(".")[2]
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    else:
        text = json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows)
        pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
        path.write_bytes(pack(text.encode()))
    return path


@pytest.fixture(scope="module")
def data_spec(tmp_path_factory) -> DataSpec:
    return validate(composed("data=hub_mix", "base=tiny", output_dir=tmp_path_factory.mktemp("run"))).data


@pytest.fixture
def mix(data_spec) -> dict[str, SourceSpec]:
    return data_spec.sources


def load(source: SourceSpec, name: str = "mine", on_bad_row: str = "error"):
    return load_source(name, source, on_bad_row=on_bad_row)


def mine(path: Path | None = None, **changes) -> SourceSpec:
    hub = HubSpec("owner/name", ("data/a.jsonl",), "main")
    plain = SourceSpec(kind="hub", hub=hub, rules=(Rule(label="REFUSE"),), path=None if path is None else str(path))
    return replace(plain, **changes)


# -- the sets' own columns ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_the_columns_of_each_set_become_requests_and_labels(mix, tmp_path, name):
    file = mix[name].hub.files[0]
    path = write(tmp_path / Path(file).name, ROWS[name])
    loaded = load(replace(mix[name], path=str(path)), name)
    wanted, skipped = WANTED[name]
    assert {r.user_request: r.safety_label for r in loaded.records} == wanted
    assert (len(loaded.records), loaded.skipped) == (len(wanted), skipped)
    assert {(r.source, r.language, r.licence) for r in loaded.records} == {(name, "en", mix[name].licence)}
    assert all(r.task_output is None for r in loaded.records), "a set's answers are not read"
    dangerous = name in ("or_bench", "xstest")
    assert all(r.sounds_dangerous == (dangerous and r.safety_label is ALLOW) for r in loaded.records)


def test_what_a_set_marks_as_a_jailbreak_is_left_out_and_counted(mix, tmp_path):
    marks = {"wildguard": ("adversarial", True), "toxicchat": ("jailbreaking", 1)}
    sources = {}
    for name, (column, mark) in marks.items():
        assert {row[column] == mark for row in ROWS[name]} == {True, False}
        path = write(tmp_path / Path(mix[name].hub.files[0]).name, ROWS[name])
        sources[name] = replace(mix[name], path=str(path))
    loaded, _ = load_sources(sources, on_bad_row="error")
    assert not [r for part in loaded.values() for r in part.records if "wrapped" in r.user_request]
    assert {name: part.skipped for name, part in loaded.items()} == {"wildguard": 3, "toxicchat": 2}, "one has no label"


def test_every_category_of_beavertails_has_a_label(mix, tmp_path):
    path = write(tmp_path / "b.jsonl", [beaver(harm, harm) for harm in HARMS])
    records = load(replace(mix["beavertails"], path=str(path))).records
    unclear = ("politics", "misinformation", "privacy", "self_harm")
    for harm, record in zip(HARMS, records, strict=True):
        assert record.safety_label == (ESCALATE if any(word in harm for word in unclear) else REFUSE), harm


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.json", "a.csv", "a.jsonl.gz", "a.json.xz"])
def test_the_same_rows_are_read_from_every_kind_of_file(mix, tmp_path, name):
    path = write(tmp_path / name, ROWS["wildguard"])
    records = load(replace(mix["wildguard"], path=str(path))).records
    assert {r.user_request: r.safety_label for r in records} == WANTED["wildguard"][0]


def test_a_request_that_is_told_several_times_is_one_row_with_the_strictest_label(mix, tmp_path):
    labels = [0, 1, 0]
    path = write(tmp_path / "t.jsonl", [toxic("same", toxicity) for toxicity in labels] + [toxic("other", 0)])
    loaded = load(replace(mix["toxicchat"], path=str(path)))
    assert [(r.user_request, r.safety_label) for r in loaded.records] == [("same", REFUSE), ("other", ALLOW)]
    assert loaded.skipped == 2


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.csv"])
def test_a_missing_column_is_an_error_that_names_file_and_column_and_what_is_there(mix, tmp_path, name):
    path = write(tmp_path / name, [{"question": "q", "toxicity": 0, "jailbreaking": 0}])
    told = rf"{name}:1: no column 'user_input'; there is question, toxicity, jailbreaking"
    with pytest.raises(DataError, match=told):
        load(replace(mix["toxicchat"], path=str(path)))


def test_a_missing_key_within_a_column_is_named(mix, tmp_path):
    row = beaver("one", "self_harm")
    del row["category"]["animal_abuse"]
    path = write(tmp_path / "a.jsonl", [beaver("fine"), row])
    with pytest.raises(DataError, match=r"a\.jsonl:2: no column 'category\.animal_abuse'; there is child_abuse, "):
        load(replace(mix["beavertails"], path=str(path)))


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("a.parquet", b"PAR1 and no more", "cannot be read as parquet"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prom', "cannot be read as jsonl"),
        ("a.json", b"[1, 2", "cannot be read as json"),
        ("a.json", b"[1, 2]", "a.json:1: no column 'prompt'; there is 1"),
        ("a.csv", b'prompt,b\n"x', "cannot be read as csv"),
        ("a.csv", b"prompt,b\nx,y,z\n", "row 1 has more values than there are columns"),
        ("a.csv", "prompt\ncafé\n".encode("latin-1"), "cannot be read as csv"),
        ("a.jsonl.gz", b"not packed", "cannot be unpacked"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03" + b"\xff" * 40, "cannot be unpacked"),
        ("a.jsonl.xz", b"not packed", "cannot be unpacked"),
        ("a.pkl", b"", r"\.pkl is not one of \.parquet"),
        ("a", b"", "no ending is not one of"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_one_line(tmp_path, name, data, told):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError, match=told) as error:
        load(mine(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_rows_without_text_are_an_error_or_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": None}, {"prompt": "fine"}, {"prompt": " "}, {"prompt": "half \ud83d"}])
    with pytest.raises(DataError, match=r"a\.jsonl:1: prompt: no text \(data\.on_bad_row=skip"):
        load(mine(path))
    loaded = load(mine(path), on_bad_row="skip")
    assert ([r.user_request for r in loaded.records], loaded.skipped) == (["fine"], 3)


def test_an_incomplete_table_or_a_path_that_is_not_there_is_told(tmp_path):
    for lacking in ({"hub": None}, {"rules": ()}):
        with pytest.raises(DataError, match=r"data\.sources\.mine: a hub source needs"):
            load(mine(**lacking))
    with pytest.raises(DataError, match=r"gone\.csv: no such file"):
        load(mine(tmp_path / "gone.csv"))


def test_a_test_set_is_not_trained_on(mix, rows_file):
    spec = DataSpec({"xstest": replace(mix["xstest"], path="gone"), "f": SourceSpec(kind="file", path=str(rows_file))})
    with pytest.raises(DataError, match=r"xstest: a test set \(test_only\) is not trained on: name it in data\.holdout_"):
        SafetyData(spec, seed=0).setup()
    unused = replace(spec, sources=spec.sources | {"xstest": replace(mix["xstest"], weight=0.0)})
    SafetyData(unused, seed=0).setup()


# -- samples -----------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 3))
def test_a_larger_sample_has_the_rows_of_a_smaller_one_and_keeps_their_order(few, more, seed):
    records = [Record(f"request {i}", ALLOW) for i in range(30)]
    small, large = (sample(records, count, seed) for count in sorted((few, more)))
    assert len(large) == min(max(few, more), 30)
    assert [r for r in large if r in small] == small
    assert [r for r in records if r in large] == large


@pytest.mark.parametrize("seed", range(4))
def test_a_sample_is_split_like_all_rows_are(seed):
    words = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(1200)]
    records = sample([Record(word, ALLOW) for word in words], 400, seed)
    split = split_by_group(records, val=0.1, test=0.15, seed=seed)
    assert 20 < len(split.val) < 65
    assert 35 < len(split.test) < 90


def test_the_seed_draws_the_sample_and_the_source_says_how_many(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": f"request {i}"} for i in range(50)])

    def drawn(seed: int, count: int | None) -> list[str]:
        loaded, _ = load_sources({"mine": mine(path, max_rows=count)}, on_bad_row="error", seed=seed)
        return [r.user_request for r in loaded["mine"].records]

    assert len(drawn(0, 10)) == 10
    assert drawn(0, 10) == drawn(0, 10) != drawn(1, 10)
    assert len(drawn(0, None)) == 50


# -- the mix -----------------------------------------------------------------------------------------------------------


def test_the_mix_trains_on_local_copies_and_holds_xstest_out(data_spec, tmp_path, monkeypatch):
    monkeypatch.setenv("SO8T_OFFLINE", "1")
    monkeypatch.setenv("SO8T_CACHE", str(tmp_path / "no-wheels"))
    rows = ROWS | {"xstest": [xs("pottery kiln question", "homonyms"), xs("quokka photo permit", "contrast_homonyms")]}
    local = {}
    for name, source in data_spec.sources.items():
        if name in rows:
            local[name] = replace(source, path=str(write(tmp_path / name / Path(source.hub.files[0]).name, rows[name])))
    data = SafetyData(replace(data_spec, sources=data_spec.sources | local), seed=0)
    data.setup()
    seen = {r.source for part in (data.train, data.val, data.test) for r in part}
    assert seen == {"starter", "everyday", "stakes", "detailed", "codes", *ROWS} - {"xstest"}
    assert (data.skipped["wildguard"], data.skipped["toxicchat"]) == (3, 2)
    assert [(r.source, r.safety_label) for r in data.unseen] == [("xstest", ALLOW), ("xstest", REFUSE)]


def test_every_source_on_a_hub_says_what_it_is_in_its_table(mix):
    hub = {name: source for name, source in mix.items() if source.kind == "hub"}
    assert set(hub) == set(ROWS)
    for name, source in hub.items():
        assert source.licence, name
        assert source.language, name
        assert source.hub.revision, name
        assert [stem(file) for file in source.hub.files], name
    assert [name for name, source in hub.items() if source.test_only] == ["xstest"]


# -- fetching ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A hub on this machine for huggingface_hub's own client, with an empty cache: what it serves, and what it was asked."""
    files: dict[str, bytes] = {}
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def answer(self, body: bool) -> None:
            asked.append(self.path)
            gated = "/gated/" in self.path
            data = files.get(self.path)
            self.send_response(401 if gated else 200 if data is not None else 404)
            if gated or data is None:
                self.send_header("X-Error-Code", "GatedRepo" if gated else "EntryNotFound")
                data = b""
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

        def do_HEAD(self) -> None:
            self.answer(False)

        def do_GET(self) -> None:
            self.answer(True)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}"
    template = "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", here)
    monkeypatch.setattr(template, here + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path / "hub-cache"), raising=False)
    monkeypatch.delenv("SO8T_OFFLINE", raising=False)
    yield files, asked
    server.shutdown()
    server.server_close()


def test_a_file_is_fetched_by_huggingface_hub_once_and_then_read_without_network(served, tmp_path, monkeypatch):
    files, asked = served
    path = write(tmp_path / "a.jsonl", [{"prompt": "from the hub"}])
    files["/datasets/owner/name/resolve/v1/data/a.jsonl"] = path.read_bytes()
    source = mine(hub=HubSpec("owner/name", ("data/a.jsonl",), "v1"))
    assert [r.user_request for r in load(source).records] == ["from the hub"]
    assert "/datasets/owner/name/resolve/v1/data/a.jsonl" in asked
    cached = list((tmp_path / "hub-cache").rglob(f"snapshots/{COMMIT}/data/a.jsonl"))
    assert [p.read_bytes() for p in cached] == [path.read_bytes()]
    files.clear()
    asked.clear()
    monkeypatch.setenv("SO8T_OFFLINE", "1")
    assert [r.user_request for r in load(source).records] == ["from the hub"]
    assert asked == [], "SO8T_OFFLINE forbids the network"


def test_what_the_hub_does_not_give_is_one_line_with_what_to_do(served, monkeypatch):
    with pytest.raises(FetchError, match=r"owner/name/data/a\.jsonl: there is no such file at revision main") as error:
        load(mine())
    assert "\n" not in str(error.value)
    gated = HubSpec("gated/name", ("a.parquet",), "main", gated=True)
    with pytest.raises(FetchError, match=r"gated/name/a\.parquet: it is gated: .* `hf auth login`") as error:
        load(mine(hub=gated))
    assert "\n" not in str(error.value)
    monkeypatch.setenv("SO8T_OFFLINE", "1")
    with pytest.raises(FetchError, match=r"not in the cache.*SO8T_OFFLINE is set; a local copy"):
        load(mine())
    monkeypatch.delenv("SO8T_OFFLINE")
    monkeypatch.setattr("huggingface_hub.file_download._DEFAULT_RETRY_ON_EXCEPTIONS", ())  # it would for 24 s
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}"
    )
    with pytest.raises(FetchError, match=r"not in the cache.*the hub cannot be reached") as error:
        load(mine())
    assert "\n" not in str(error.value)
