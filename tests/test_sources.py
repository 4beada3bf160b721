"""Sources: rules in a table, wheels that are checked and never half-written, and shipped sets that need no network."""

import hashlib
import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from so8t.config import validate
from so8t.data.datamodule import DataSpec, SafetyData
from so8t.data.sources import Rule, SourceSpec, WheelSpec, load_source, load_sources
from so8t.errors import DataError, FetchError
from so8t.fetch import Wheel, extract_member, read_member, sha256, wheel_path
from so8t.labels import Label
from tests.conftest import synthetic_rows, write_rows

NAME, VERSION = "so8t-test-prompts", "1.2.3"

ROWS = [
    {"prompt": "first in a", "kind": "bad", "turns": ["hello", "again"]},
    {"prompt": "second in a\u2028with a separator", "kind": ["odd", "fine"], "turns": ["bonjour"]},
    {"prompt": "talk to me", "kind": "chat", "turns": ["hi"]},
]
FILES = {
    "prompts/a.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS),
    "prompts/b.json": json.dumps([{"prompt": "from b", "kind": "bad"}]),
    "prompts/c.txt": "line one\n\n  line two  \n",
    "prompts/d.prompt": "name: d\nseeds:\n  - value: seed one\n  - value: |\n      seed\n      two\n",
    "prompts/broken.jsonl": '{"prompt": "x"}\n{"prompt": \n',
    "prompts/latin.txt": "café".encode("latin-1"),
    "prompts/__init__.py": "raise RuntimeError('a wheel was imported')\n",
}


def build_wheel(folder: Path, files: dict[str, str | bytes] = FILES) -> Path:
    """A wheel as pip accepts it."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{NAME.replace('-', '_')}-{VERSION}"
    path = folder / f"{stem}-py3-none-any.whl"
    info = {
        f"{stem}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n",
        f"{stem}.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{stem}.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in {**files, **info}.items():
            archive.writestr(zipfile.ZipInfo(member), data)
    return path


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder that stands for the package index, and an empty cache: pip itself runs, the network is out of reach."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("SO8T_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("SO8T_OFFLINE", raising=False)
    return folder


@pytest.fixture
def wheel(index) -> WheelSpec:
    """The test's own wheel in the index, pinned by its sum."""
    return WheelSpec(NAME, VERSION, sha256(build_wheel(index)))


@pytest.fixture
def cached(wheel, tmp_path) -> WheelSpec:
    """The same wheel in the cache already (as a copied cache folder would have it)."""
    target = tmp_path / "cache" / "wheels" / f"{NAME}-{VERSION}-{wheel.sha256[:12]}.whl"
    build_wheel(tmp_path / "cache" / "wheels").rename(target)
    assert sha256(target) == wheel.sha256
    return wheel


def pinned(spec: WheelSpec) -> Wheel:
    return Wheel(spec.name, spec.version, spec.sha256)


def source(wheel: WheelSpec | None, member: str = "a.jsonl", **changes) -> SourceSpec:
    plain = SourceSpec(
        kind="wheel", wheel=wheel, members=(f"prompts/{member}",), rules=(Rule(label="REFUSE"),), language="en", licence="MIT"
    )
    return replace(plain, **changes)


def load(spec: SourceSpec):
    return load_source("mine", spec, on_bad_row="error")


def left_in_cache(tmp_path) -> list[str]:
    """Everything in the cache but the locks."""
    cache = tmp_path / "cache"
    return sorted(str(p.relative_to(cache)) for p in cache.rglob("*") if p.suffix != ".lock" and p.is_file())


# -- rules -------------------------------------------------------------------------------------------------------------


def test_a_rule_without_conditions_fits_every_row():
    assert Rule(label="ALLOW").fits("any", {})


@pytest.mark.parametrize(
    ("rule", "fits"),
    [
        (Rule(label="ALLOW", field="kind", equals=("bad", "worse")), [True, False, False, False]),
        (Rule(label="ALLOW", field="kind", startswith=("ba",)), [True, True, False, False]),
        (Rule(label="ALLOW", field="kind", equals=("worse",), startswith=("bad-",)), [False, True, False, False]),
        (Rule(label="ALLOW", field="kind", equals=("odd",)), [False, False, True, False]),
        (Rule(label="ALLOW", field="level", equals=("3",)), [False, False, False, True]),
    ],
)
def test_a_rule_looks_at_one_field_which_may_be_a_list_or_a_number(rule, fits):
    rows = [{"kind": "bad"}, {"kind": "bad-er"}, {"kind": ["fine", "odd"]}, {"level": 3}]
    assert [rule.fits("m", row) for row in rows] == fits


def test_a_rule_may_ask_for_the_file():
    rule = Rule(label="REFUSE", member="malicious_*")
    assert rule.fits("malicious_uses", {})
    assert not rule.fits("human_chatbox", {})


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=8), st.lists(st.text(max_size=4), max_size=3))
def test_a_rule_with_a_field_and_nothing_to_compare_with_fits_no_row(value, values):
    rule = Rule(label="ALLOW", field="kind")
    assert not rule.fits("m", {"kind": value})
    assert not rule.fits("m", {"kind": values})


def test_the_first_rule_that_fits_decides_and_skip_is_counted(cached):
    rules = (
        Rule(label="SKIP", field="kind", equals=("chat",)),
        Rule(label="REFUSE", field="kind", startswith=("ba",)),
        Rule(label="ESCALATE"),
        Rule(label="ALLOW", field="kind", equals=("bad",)),
    )
    loaded = load(source(cached, rules=rules))
    assert [r.safety_label for r in loaded.records] == [Label.REFUSE, Label.ESCALATE]
    assert loaded.skipped == 1


def test_a_row_that_no_rule_fits_is_an_error_that_says_where(cached):
    rules = (Rule(label="REFUSE", field="kind", equals=("bad", "odd")),)
    with pytest.raises(DataError, match=rf"{NAME}==1\.2\.3:prompts/a\.jsonl:3: no rule of data\.sources\.mine\.rules fits"):
        load(source(cached, rules=rules))


# -- reading wheels ----------------------------------------------------------------------------------------------------


def test_each_row_keeps_its_source_language_and_licence(cached):
    for record in load(source(cached)).records:
        assert (record.source, record.language, record.licence) == ("mine", "en", "MIT")


def test_languages_may_differ_by_file(cached):
    spec = source(cached, members=("prompts/a.jsonl", "prompts/b.json"), languages={"a": "ja"})
    spec = replace(spec, members=("prompts/a.jsonl",))
    assert {r.language for r in load(spec).records} == {"ja"}
    assert {r.language for r in load(replace(spec, languages={"b": "ja"})).records} == {"en"}


@pytest.mark.parametrize(
    ("member", "form", "text", "want"),
    [
        ("a.jsonl", "jsonl", "prompt", ["first in a", "second in a\u2028with a separator", "talk to me"]),
        ("a.jsonl", "jsonl", "turns.0", ["hello", "bonjour", "hi"]),
        ("b.json", "json", "prompt", ["from b"]),
        ("c.txt", "lines", "prompt", ["line one", "line two"]),
        ("d.prompt", "yaml_seeds", "value", ["seed one", "seed\ntwo"]),
    ],
)
def test_every_format_is_read(cached, member, form, text, want):
    assert [r.user_request for r in load(source(cached, member, format=form, text=text)).records] == want


@pytest.mark.parametrize(
    ("member", "form", "text", "why"),
    [
        ("broken.jsonl", "jsonl", "prompt", r"broken\.jsonl: cannot be read as jsonl"),
        ("c.txt", "json", "prompt", r"c\.txt: cannot be read as json"),
        ("c.txt", "yaml_seeds", "value", r"c\.txt: cannot be read as yaml_seeds"),
        ("latin.txt", "lines", "prompt", r"latin\.txt: cannot be read as lines"),
        ("a.jsonl", "jsonl", "question", r"a\.jsonl:1: question: no text"),
        ("a.jsonl", "jsonl", "turns.1", r"a\.jsonl:2: turns\.1: no text"),
    ],
)
def test_a_file_that_is_not_what_the_table_says_is_an_error_that_names_it(cached, member, form, text, why):
    with pytest.raises(DataError, match=why):
        load(source(cached, member, format=form, text=text))


def test_a_file_that_the_wheel_does_not_have_is_named(cached):
    with pytest.raises(FetchError, match=rf"{NAME}==1\.2\.3 has no file prompts/z\.jsonl"):
        load(source(cached, "z.jsonl"))


@pytest.mark.parametrize("lacking", ["wheel", "members", "rules"])
def test_an_incomplete_table_says_what_it_needs(cached, lacking):
    spec = replace(source(cached), **{lacking: None if lacking == "wheel" else ()})
    with pytest.raises(DataError, match=r"data\.sources\.mine: a wheel source needs wheel, members and rules"):
        load(spec)


def test_a_cached_file_that_is_no_wheel_is_told(index, tmp_path):
    spec = WheelSpec(NAME, VERSION, "0" * 64)
    target = tmp_path / "cache" / "wheels" / f"{NAME}-{VERSION}-{'0' * 12}.whl"
    target.parent.mkdir(parents=True)
    target.write_bytes(b"not a zip")
    with pytest.raises(FetchError, match="not a readable wheel: delete it"):
        read_member(pinned(spec), "prompts/a.jsonl")
    with pytest.raises(FetchError, match="not a readable wheel: delete it"):
        extract_member(pinned(spec), "prompts/a.jsonl", tmp_path / "out" / "a.jsonl", "0" * 64)
    assert not list((tmp_path / "out").iterdir())


# -- fetching ----------------------------------------------------------------------------------------------------------


def test_pip_fetches_the_pinned_wheel_once_and_nothing_in_it_is_imported(wheel, index, tmp_path, monkeypatch):
    assert len(load(source(wheel)).records) == 3
    assert left_in_cache(tmp_path) == [f"wheels/{NAME}-{VERSION}-{wheel.sha256[:12]}.whl"]
    next(index.glob("*.whl")).unlink()
    monkeypatch.setenv("SO8T_OFFLINE", "1")
    assert len(load(source(wheel)).records) == 3, "the second time it is cached"


def test_a_wrong_sum_keeps_nothing(wheel, tmp_path):
    with pytest.raises(FetchError, match=rf"SHA-256 is {wheel.sha256}, expected {'f' * 64}; nothing was kept"):
        wheel_path(Wheel(NAME, VERSION, "f" * 64))
    assert left_in_cache(tmp_path) == []
    assert not [p for p in (tmp_path / "cache" / "wheels").iterdir() if p.is_dir()], "no download folder either"


def test_what_cannot_be_downloaded_is_a_clear_error_and_leaves_nothing(index, tmp_path):
    with pytest.raises(FetchError) as caught:
        wheel_path(Wheel(NAME, VERSION, "0" * 64))
    message = str(caught.value)
    assert message.startswith(f"cannot download {NAME}==1.2.3, and it is not cached in {tmp_path / 'cache' / 'wheels'}")
    assert "\n" not in message
    assert left_in_cache(tmp_path) == []
    assert not [p for p in (tmp_path / "cache" / "wheels").iterdir() if p.is_dir()]


def test_offline_and_not_cached_says_so_and_what_to_do(wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("SO8T_OFFLINE", "1")
    with pytest.raises(FetchError, match=rf"{NAME}==1\.2\.3 is not cached .* SO8T_OFFLINE is set: run once with network"):
        wheel_path(pinned(wheel))
    assert left_in_cache(tmp_path) == []


def test_unpacking_checks_the_sum_and_leaves_the_file_or_nothing(cached, tmp_path):
    target = tmp_path / "out" / "b.json"
    with pytest.raises(FetchError, match="SHA-256"):
        extract_member(pinned(cached), "prompts/b.json", target, "0" * 64)
    assert not list(target.parent.iterdir())
    good = hashlib.sha256(FILES["prompts/b.json"].encode()).hexdigest()
    assert extract_member(pinned(cached), "prompts/b.json", target, good).read_text() == FILES["prompts/b.json"]
    assert [p.name for p in target.parent.iterdir()] == ["b.json"]
    with pytest.raises(FetchError, match="has no file prompts/none"):
        extract_member(pinned(cached), "prompts/none", target, good)


# -- all sources of a run ----------------------------------------------------------------------------------------------


def test_a_source_of_weight_zero_is_not_even_looked_for(index, tmp_path):
    file = SourceSpec(kind="file", path=str(write_rows(tmp_path / "f.jsonl", synthetic_rows(3))))
    gone = source(WheelSpec(NAME, "9", "0" * 64), weight=0.0)
    loaded, missing = load_sources({"gone": gone, "file": file}, on_bad_row="error")
    assert (list(loaded), missing) == (["file"], [])


def test_a_public_source_out_of_reach_is_left_out_and_said_so(index, tmp_path, caplog):
    file = SourceSpec(kind="file", path=str(write_rows(tmp_path / "f.jsonl", synthetic_rows(3))))
    gone = source(WheelSpec(NAME, "9", "0" * 64))
    loaded, missing = load_sources({"gone": gone, "file": file}, on_bad_row="error")
    assert list(loaded) == ["file"]
    assert len(missing) == 1
    assert missing[0].startswith("source gone is left out: cannot download")
    assert missing[0] in caplog.text
    with pytest.raises(DataError, match="no source is left to train on"):
        load_sources({"gone": gone}, on_bad_row="error")


def test_rows_weigh_what_their_source_does_whatever_they_are_called(tmp_path):
    mine = write_rows(tmp_path / "mine.jsonl", [row | {"source": "elsewhere"} for row in synthetic_rows(4)])
    other = write_rows(tmp_path / "other.jsonl", synthetic_rows(4, seed=1))
    sources = {
        "a": SourceSpec(kind="file", path=str(mine), weight=5.0),
        "b": SourceSpec(kind="file", path=str(other), weight=0.1, max_rows=2),
    }
    loaded, _ = load_sources(sources, on_bad_row="error")
    assert {r.weight for r in loaded["a"].records} == {5.0}
    assert [r.weight for r in loaded["b"].records] == [0.1, 0.1]


def test_a_file_fills_in_language_and_licence_and_keeps_what_its_rows_say(tmp_path):
    rows = [*synthetic_rows(2), {**synthetic_rows(1)[0], "language": "ja", "licence": "CC0", "source": "elsewhere"}]
    spec = SourceSpec(kind="file", path=str(write_rows(tmp_path / "f.jsonl", rows)), language="en", licence="MIT")
    records = load(spec).records
    assert [(r.source, r.language, r.licence) for r in records] == [("f", "en", "MIT")] * 2 + [("elsewhere", "ja", "CC0")]


def test_bad_rows_of_a_file_are_an_error_or_counted_and_told(tmp_path, caplog):
    path = write_rows(tmp_path / "f.jsonl", [*synthetic_rows(3), {"user_request": "no label"}])
    spec = SourceSpec(kind="file", path=str(path))
    with pytest.raises(DataError, match=r"f\.jsonl:4: safety_label"):
        load(spec)
    assert load_source("mine", spec, on_bad_row="skip").skipped == 1
    assert "1 of 4 rows left out" in caplog.text


def test_a_file_source_without_a_path_says_how_to_give_one():
    with pytest.raises(DataError, match=r"data\.sources\.mine\.path is not set.*data\.path=FILE"):
        load(SourceSpec(kind="file"))


def test_without_network_and_cache_what_is_shipped_remains_and_it_says_so(index, make_config, monkeypatch):
    monkeypatch.setenv("SO8T_OFFLINE", "1")
    spec = validate(make_config()).data
    held = set(spec.holdout_sources)
    data = SafetyData(replace(spec, holdout_sources=()), seed=0)
    data.setup()
    assert {r.source for part in (data.train, data.val, data.test) for r in part} == {
        "starter",
        "everyday",
        "stakes",
        "detailed",
        "codes",
    }
    public = [name for name, s in spec.sources.items() if s.kind == "wheel" and s.weight]
    assert len(public) >= 5
    assert len(data.missing) == len(public)
    assert all(any(line.startswith(f"source {name} is left out: ") for line in data.missing) for name in public)
    assert held <= set(spec.sources)


def test_the_mapping_of_every_source_is_a_table_in_its_config(make_config):
    spec: DataSpec = validate(make_config()).data
    for name, one in spec.sources.items():
        if one.kind == "wheel":
            assert one.rules, name
            assert one.licence, name
            assert one.language or one.languages, name
            assert len(one.wheel.sha256) == 64, name


@pytest.mark.parametrize(
    ("name", "rows", "labels"),
    [
        ("do_not_answer", 939, {Label.ESCALATE, Label.REFUSE}),
        ("harmbench", 200, {Label.REFUSE}),
        ("advbench", 520, {Label.REFUSE}),
        ("action_risk", None, {Label.ALLOW, Label.ESCALATE, Label.REFUSE}),
        ("chat_bench", None, {Label.ALLOW}),
    ],
)
def test_the_public_sets_hold_what_the_issue_counted_in_them(make_config, name, rows, labels):
    """With network, or a cache that has the wheels. (HarmBench's last line has no line end, hence 199 by `wc -l`.)"""
    spec = validate(make_config()).data.sources[name]
    loaded = load_source(name, spec, on_bad_row="error")
    assert {r.safety_label for r in loaded.records} == labels
    assert {r.source for r in loaded.records} == {name}
    assert all(r.licence and r.language for r in loaded.records)
    if rows is not None:
        assert len(loaded.records) + loaded.skipped == rows
    if name == "chat_bench":
        assert {r.language for r in loaded.records} == {"en", "ja"}
    if name == "do_not_answer":
        assert {r.licence for r in loaded.records} == {"CC-BY-NC-SA-4.0"}


# -- files of one's own that are whole splits ---------------------------------------------------------------------------


def split(path, **more) -> SafetyData:
    spec = DataSpec({"file": SourceSpec(kind="file", path=str(path))}, val_fraction=0.2, test_fraction=0.2, **more)
    data = SafetyData(spec, seed=0)
    data.setup()
    return data


def test_a_test_file_is_kept_apart_from_what_teaches_and_from_what_chooses(tmp_path):
    rows = synthetic_rows(90)
    train, new = write_rows(tmp_path / "train.jsonl", rows[:60]), rows[60:]
    val = write_rows(tmp_path / "val.jsonl", new[:15])
    test = write_rows(tmp_path / "test.jsonl", [*new[15:], *rows[:5], *new[:5]])
    data = split(train, val_path=str(val), test_path=str(test))
    assert [r.user_request for r in data.val] == [row["user_request"] for row in new[:15]]
    assert [r.user_request for r in data.test] == [row["user_request"] for row in new[15:]]
    assert sum(data.skipped.values()) == 10


def test_twins_of_training_rows_are_left_out_of_files_too(tmp_path):
    rows = [row | {"group": f"g{k // 3 if k < 30 else k}"} for k, row in enumerate(synthetic_rows(60))]
    data = split(write_rows(tmp_path / "even.jsonl", rows[::2]), test_path=str(write_rows(tmp_path / "odd.jsonl", rows[1::2])))
    taught = {r.group for r in [*data.train, *data.val]}
    assert [r.group for r in data.test] == [row["group"] for row in rows[31::2]]
    assert taught.isdisjoint(r.group for r in data.test)
    assert data.skipped == {"test (of the same group as training and validation rows)": 15}


def test_a_split_that_overlap_has_emptied_says_so(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", synthetic_rows(60))
    with pytest.raises(DataError, match=r"test split has no rows .*60 left out: test \(near-duplicates"):
        split(path, val_path=str(write_rows(tmp_path / "val.jsonl", synthetic_rows(9, seed=5))), test_path=str(path))


def test_bad_rows_of_a_test_file_are_counted_and_told(tmp_path, caplog):
    rows = synthetic_rows(90)
    test = write_rows(tmp_path / "held.jsonl", [*rows[60:], {"user_request": "no label"}])
    data = split(write_rows(tmp_path / "train.jsonl", rows[:60]), test_path=str(test), on_bad_row="skip")
    assert data.skipped["test (bad rows)"] == 1
    assert "held.jsonl:31: safety_label" in caplog.text
