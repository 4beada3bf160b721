"""Wrappings: the request stays in them, codes can be read back, and nothing that is trained on was ever wrapped."""

import base64
import codecs

import pytest
from hypothesis import given
from hypothesis import strategies as st

from so8t.config import validate
from so8t.data.records import Record
from so8t.data.sources import load_source, load_sources
from so8t.data.splits import apart_from, folded, near_duplicates
from so8t.data.wrappings import LEET, REWORDED, WRAPPINGS, base64_code, leetspeak, rot13
from so8t.labels import Label
from tests.conftest import composed

CODES = {"Base64", "ROT13", "leetspeak"}
requests = st.text(st.characters(codec="utf-8"), min_size=1)


@pytest.mark.parametrize("name", sorted(WRAPPINGS.keys() - CODES))
@given(request=requests)
def test_a_wrapping_in_words_holds_the_request_and_says_something_more(name, request):
    wrapped = WRAPPINGS[name](request)
    assert request in wrapped
    assert len(wrapped) > len(request) + 20
    assert wrapped == WRAPPINGS[name](request)


@given(requests)
def test_base64_decodes_to_the_request(request):
    code = base64_code(request).split("\n")[1]
    assert base64.b64decode(code, validate=True).decode() == request


@given(requests)
def test_rot13_decodes_to_the_request_and_leaves_alone_what_it_cannot_change(request):
    wrapped = rot13(request)
    if codecs.encode(request, "rot13") == request:
        assert wrapped == request
    else:
        assert codecs.decode(wrapped.split("\n", 1)[1], "rot13") == request


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Nd"]), min_size=1))
def test_leetspeak_is_read_back_by_turning_digits_into_letters_up_to_case(request):
    back = str.maketrans({chr(digit): chr(letter) for letter, digit in LEET.items() if chr(letter).islower()})
    assert leetspeak(request).translate(back) == "".join(c.lower() if c in "AEIOST" else c for c in request)


@pytest.mark.parametrize("wrap", [rot13, leetspeak])
def test_a_japanese_request_has_no_letters_to_change(wrap):
    assert wrap("包丁の研ぎ方を教えて") == "包丁の研ぎ方を教えて"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The default data's sources, and every text of theirs, the unseen ones too."""
    config = validate(composed("base=tiny", output_dir=tmp_path_factory.mktemp("sources")))
    loaded, missing = load_sources(config.data.sources, on_bad_row="error")
    assert not missing
    return config.data.sources, [r.user_request for part in loaded.values() for r in part.records]


def test_no_source_holds_a_reworded_request_and_near_ones_are_left_out_of_the_test(sources):
    specs, texts = sources
    assert {spec.wheel for spec in REWORDED.values()} <= {spec.wheel for spec in specs.values()}, "one wheel, fetched once"
    known = {folded(text) for text in texts}
    reworded = [r for name, spec in REWORDED.items() for r in load_source(name, spec, on_bad_row="error").records]
    assert not known & {folded(r.user_request) for r in reworded}
    apart = apart_from([Record(text, Label.REFUSE) for text in texts], reworded)
    assert 1000 < len(apart) < len(reworded)
    both = texts + [r.user_request for r in apart]
    assert not [(i, j) for i, j in near_duplicates(both) if i < len(texts) <= j]


@pytest.mark.parametrize("name", WRAPPINGS)
def test_no_source_holds_wrapped_requests(sources, name):
    texts = sources[1]
    known = {folded(text) for text in texts}
    assert not {w for text in texts if (w := WRAPPINGS[name](text)) != text and folded(w) in known}
    for part in WRAPPINGS[name]("\0").split("\0"):  # the words around a request
        if part.strip():
            assert not [text for text in texts if folded(part) in folded(text)]
