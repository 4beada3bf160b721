"""Splits: what belongs together never straddles, and a row's place is its own affair."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from so8t.data.records import Record
from so8t.data.splits import NEAR_DUPLICATE, group_ids, near_duplicates, split_by_group
from so8t.labels import Label

_TEXT = (
    "river kettle marble seventeen violin harbour pepper lantern orchard glacier tunnel biscuit falcon ribbon saddle "
    "thunder quarry velvet walnut zephyr compass dolphin ember fiddle grammar hollow island jungle"
)
WORDS = _TEXT.split()


def record(text: str, group: str | None = None, source: str = "file") -> Record:
    return Record(text, Label.ALLOW, group=group, source=source)


def distinct(count: int, seed: int = 0) -> list[str]:
    """Texts of six words each, drawn until no two are near-duplicates."""
    rng = random.Random(seed)
    texts: list[str] = []
    while len(texts) < count:
        text = " ".join(rng.sample(WORDS, 6)) + f" {rng.randrange(10**6)}"
        if all(similarity(text, other) < NEAR_DUPLICATE for other in texts):
            texts.append(text)
    return texts


def grams(text: str) -> set[str]:
    padded = f" {' '.join(text.lower().split())} ".ljust(4, "\0")
    return {padded[i : i + 4] for i in range(len(padded) - 3)}


def similarity(a: str, b: str) -> float:
    """Jaccard similarity of character 4-grams, by sets: a reference of our own."""
    x, y = grams(a), grams(b)
    return len(x & y) / len(x | y)


# -- near-duplicates ---------------------------------------------------------------------------------------------------

TEXTS = st.lists(
    st.one_of(
        st.lists(st.sampled_from(WORDS[:5]), min_size=1, max_size=6).map(" ".join),
        st.text(alphabet="abAB 包丁を", min_size=1, max_size=12).filter(str.strip),
    ),
    min_size=0,
    max_size=12,
)


@given(TEXTS)
@settings(max_examples=60, deadline=None)
def test_near_duplicates_are_the_pairs_whose_sets_of_four_grams_overlap_enough(texts):
    want = {(i, j) for j in range(len(texts)) for i in range(j) if similarity(texts[i], texts[j]) >= NEAR_DUPLICATE}
    assert set(near_duplicates(texts)) == want


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("How do I kill a process?", "how do i  KILL a process?"),
        ("Write a poem about the sea", "Write a poem about the sea!"),
        ("包丁の研ぎ方を教えてください", "包丁の研ぎ方を教えてくださいね"),
        ("hi", "HI "),
        ("a", "A"),
        ("殺", " 殺 "),
    ],
)
def test_case_white_space_and_a_changed_letter_make_no_new_request(a, b):
    assert near_duplicates([a, "something else entirely", b]) == [(0, 2)]


def test_requests_that_share_words_only_are_no_duplicates():
    assert near_duplicates(["How do I kill a python process?", "How do I kill my neighbour's python?"], 0.6) == []


def test_requests_of_one_letter_are_requests():
    assert near_duplicates(["a"]) == []
    assert near_duplicates(["a", "b", "殺"]) == []


def test_blocks_of_many_texts_are_compared_with_each_other():
    texts = distinct(20) + [f"{i} " + "filler " * (i % 7) + str(i * 7919) for i in range(1030)]
    texts += [texts[3].upper(), texts[700] + "!"]
    pairs = near_duplicates(texts, 0.75)
    assert (3, 1050) in pairs
    assert (700, 1051) in pairs


# -- groups ------------------------------------------------------------------------------------------------------------


def test_groups_join_twins_near_duplicates_and_what_hangs_on_either():
    a, b, c, d = distinct(4)
    ids = group_ids(
        [record(a, "g"), record(b, "g"), record(b + "!"), record(c), record(c, "h"), record(d, "h"), record(a[::-1])]
    )
    assert ids[0] == ids[1] == ids[2], "twin of the first, and a near-duplicate of the twin"
    assert ids[3] == ids[4] == ids[5]
    assert len({ids[0], ids[3], ids[6]}) == 3


def test_a_group_name_means_nothing_to_another_source():
    a, b = distinct(2)
    ids = group_ids([record(a, "1", "x"), record(b, "1", "y")])
    assert ids[0] != ids[1]


@st.composite
def leaky_rows(draw):
    """Rows among which some are twins and some are edited copies of others."""
    texts = distinct(draw(st.integers(8, 20)), draw(st.integers(0, 10**6)))
    rng = random.Random(draw(st.integers(0, 10**6)))
    rows = []
    for text in texts:
        rows.append(record(text, rng.choice([None, None, "a", "b", "c"]), rng.choice(["x", "y"])))
        if rng.random() < 0.5:
            edited = rng.choice([text.upper(), text + "?", text.replace(" ", "  "), text[:-1]])
            rows.append(record(edited, rng.choice([None, "a", "d"]), rng.choice(["x", "y"])))
    rng.shuffle(rows)
    return rows


@given(rows=leaky_rows(), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_twins_and_near_duplicates_never_straddle_and_no_row_is_lost(rows, seed):
    split = split_by_group(rows, val=0.3, test=0.3, seed=seed)
    place = {i: name for name in ("train", "val", "test") for i in getattr(split, name)}
    assert sorted(split.train + split.val + split.test) == list(range(len(rows)))
    for j, second in enumerate(rows):
        for i, first in enumerate(rows[:j]):
            twins = first.group is not None and (first.source, first.group) == (second.source, second.group)
            if twins or similarity(first.user_request, second.user_request) >= NEAR_DUPLICATE:
                assert place[i] == place[j], (first, second)


# -- determinism -------------------------------------------------------------------------------------------------------


def parts(rows: list[Record], seed: int = 0) -> dict[str, str]:
    split = split_by_group(rows, val=0.3, test=0.3, seed=seed)
    return {rows[i].user_request: name for name in ("train", "val", "test") for i in getattr(split, name)}


ROWS = [record(text) for text in distinct(120)]


def test_the_same_seed_gives_the_same_split_and_another_seed_another():
    assert parts(ROWS, 3) == parts(ROWS, 3)
    first, second = parts(ROWS, 3), parts(ROWS, 4)
    moved = sum(first[text] != second[text] for text in first)
    # 0.4, 0.3, 0.3: two draws differ with probability 1 - 0.16 - 0.09 - 0.09 = 0.66, so about 79 of 120
    assert 55 < moved < 105


@given(keep=st.sets(st.integers(0, 119), min_size=5), shuffle=st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_a_rows_place_depends_neither_on_the_other_rows_nor_on_their_order(keep, shuffle):
    some = [ROWS[i] for i in keep]
    shuffle.shuffle(some)
    whole = parts(ROWS)
    assert parts(some) == {r.user_request: whole[r.user_request] for r in some}


@given(seed=st.integers(0, 10**6), val=st.floats(0, 0.5), test=st.floats(0, 0.4))
@settings(max_examples=25, deadline=None)
def test_the_parts_are_about_as_large_as_asked(seed, val, test):
    split = split_by_group(ROWS, val=val, test=test, seed=seed)
    for share, part in ((val, split.val), (test, split.test), (1 - val - test, split.train)):
        # six standard deviations of a binomial, at most 6 * sqrt(0.25 / 120) = 0.27
        assert abs(len(part) / len(ROWS) - share) < 0.28


def test_a_part_that_is_not_asked_for_is_empty():
    split = split_by_group(ROWS, val=0.0, test=0.0, seed=0)
    assert (split.train, split.val, split.test) == (list(range(120)), [], [])
    assert split_by_group([], val=0.1, test=0.1, seed=0).train == []


def test_the_label_has_no_say_in_where_a_row_goes():
    relabelled = [Record(r.user_request, Label.REFUSE) for r in ROWS]
    assert parts(relabelled) == parts(ROWS)
