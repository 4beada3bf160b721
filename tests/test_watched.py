"""An answer under watch: what is read of it, that nothing goes before it was looked at, and that nothing is out of view."""

import asyncio
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from so8t.labels import Label
from so8t.serving.watched import DONE, Garbled, LeftAllow, WatchedAnswer, pieces, released
from tests.upstreams import chunk, chunks, completion


def data(events):
    return [event.decode().removeprefix("data: ").removesuffix("\n\n") for event in events]


class Looks:
    """A rule in place of the head, and what it was asked."""

    def __init__(self, rule=lambda text: Label.ALLOW):
        self.rule, self.asked = rule, []

    async def __call__(self, text):
        self.asked.append(text)
        await asyncio.sleep(0)
        return self.rule(text) is Label.ALLOW


def collected(events, looks, *, every=8, most=20):
    """What is released, with how many looks there had been; and what ended it."""

    async def run():
        async def coming():
            for event in events:
                await asyncio.sleep(0)
                yield event

        out, ended = [], None
        try:
            async for event in released(
                coming(), WatchedAnswer(looks, len, most), every=every, until=asyncio.get_running_loop().time() + 60
            ):
                out.append((event, len(looks.asked)))
        except (Garbled, LeftAllow) as error:
            ended = error
        return out, ended

    return asyncio.run(run())


def content(event):
    return "".join(c["delta"].get("content") or "" for c in json.loads(event)["choices"])


texts = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=8)


@given(texts, st.integers(1, 12), st.integers(1, 20), st.integers(0, 120))
@settings(max_examples=60, deadline=None)
def test_no_text_is_released_before_it_was_looked_at_and_all_of_it_is_while_allowed(parts, every, most, limit):
    whole = "".join(parts)
    looks = Looks(lambda text: Label.ALLOW if len(text) <= limit else Label.REFUSE)
    sent = data(chunks(*parts))
    out, ended = collected(sent, looks, every=every, most=most)
    shown = ""
    for event, looked in out:
        shown += content(event)
        assert not shown or any(asked.startswith(shown) for asked in looks.asked[:looked])
    assert len(shown) <= limit
    assert [event for event, _ in out] == sent[: len(out)]  # unchanged, in order, none left out
    if len(whole) <= limit:
        assert ended is None
        assert len(out) == len(sent) - 1
    else:
        assert isinstance(ended, LeftAllow)
    for before, after in zip(["", *looks.asked], looks.asked, strict=False):
        assert after.startswith(before)
        assert len(after) - len(before) <= most


@given(st.text(max_size=200), st.integers(1, 9))
def test_pieces_are_the_whole_text_in_order_and_none_is_longer_than_it_may_be(text, most):
    parts = list(pieces(text, lambda piece: len(piece.encode("utf-8", "surrogatepass")), most))
    assert "".join(parts) == text
    assert all(len(part.encode("utf-8", "surrogatepass")) <= most or len(part) == 1 for part in parts)


@pytest.mark.parametrize(
    "message",
    [
        {"content": "poison"},
        {"content": [{"type": "text", "text": "poison"}]},
        {"content": None, "refusal": "poison"},
        {"content": "", "reasoning_content": "poison"},
        {"content": None, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "poison"}}]},
        {"content": None, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "poison", "arguments": ""}}]},
        {"content": None, "function_call": {"name": "f", "arguments": "poison"}},
        {"content": None, "something_new": {"deep": [["poison"]]}},
        {"content": None, "id": "the poison"},
    ],
)
def test_every_string_of_an_answer_is_looked_at_wherever_it_stands(message):
    for payload in (json.dumps(completion(message)), *data([chunk(message)])):
        looks = Looks(lambda text: Label.REFUSE if "poison" in text else Label.ALLOW)
        answer = WatchedAnswer(looks, len, 1000)
        answer.take(payload.encode())
        with pytest.raises(LeftAllow):
            asyncio.run(answer.look())


def test_strings_beside_the_choices_are_looked_at_and_do_not_break_the_answer_apart():
    looks = Looks()
    answer = WatchedAnswer(looks, len, 1000)
    for text in ("po", "ison"):
        event = json.loads(data([chunk({"content": text})])[0])
        event["citation"] = "see page 3"
        event["choices"][0]["content_filter_results"] = {"hate": {"filtered": False, "severity": "safe"}}
        answer.take(json.dumps(event).encode())
    asyncio.run(answer.look())
    assert sorted(looks.asked) == ["poison", "see page 3see page 3"]


def test_fragments_of_a_tool_call_are_read_as_one_text():
    def call(**function):
        return chunk({"tool_calls": [{"index": 0, "function": function}]})

    looks = Looks()
    events = [call(name="send_mail", arguments=""), call(arguments='{"to": '), call(arguments='"me"}'), chunk({}, "tool_calls")]
    out, ended = collected(data([*events, b"data: [DONE]\n\n"]), looks, every=100, most=100)
    assert (len(out), ended) == (4, None)
    assert looks.asked == ['send_mail\n{"to": "me"}']


def test_each_choice_is_watched_on_its_own():
    events = [chunk({"content": "a1"}), chunk({"content": "b1"}, index=1), chunk({"content": "a2"}, "stop")]
    looks = Looks()
    out, ended = collected(data([*events, b"data: [DONE]\n\n"]), looks)
    assert isinstance(ended, Garbled)  # choice 1 has no finish reason
    out, ended = collected(data([*events, chunk({}, "stop", index=1), b"data: [DONE]\n\n"]), looks)
    assert (len(out), ended) == (4, None)
    assert sorted(looks.asked[-2:]) == ["a1a2", "b1"]


@pytest.mark.parametrize(
    "bad",
    [
        "nonsense",
        "[1, 2]",
        "[" * 100_000,
        '{"choices": 3}',
        '{"choices": [3]}',
        '{"choices": [{"delta": {"content": "x"}}]}',
        '{"error": {"message": "out of memory"}}',
        '{"choices": [{"index": 0, "delta": {"token_ids": [72, 105]}}]}',
    ],
)
def test_what_is_no_chunk_ends_the_stream_and_what_was_held_back_is_never_shown(bad):
    out, ended = collected([*data(chunks("held")[:2]), bad], Looks(), every=100)
    assert isinstance(ended, Garbled)
    assert "".join(content(event) for event, _ in out) == ""


@pytest.mark.parametrize("end", [[], [DONE]])
def test_a_stream_that_ends_before_its_answer_is_garbled(end):
    _, ended = collected(data(chunks("a", "b")[:3]) + end, Looks())
    assert isinstance(ended, Garbled)


def test_a_stream_may_end_without_done_once_every_choice_has_its_finish_reason():
    out, ended = collected(data(chunks("a", "b")[:-1]), Looks())
    assert (len(out), ended) == (4, None)


def test_nothing_is_read_after_done():
    out, ended = collected([*data(chunks("a")), "garbage"], Looks())
    assert (len(out), ended) == (3, None)


def test_a_slow_upstream_is_looked_at_every_few_tokens_and_a_quick_one_less_often():
    async def run(pause):
        async def coming():
            for event in data(chunks(*["abcd"] * 12)):
                await asyncio.sleep(pause)
                yield event

        looks = Looks()
        answer = WatchedAnswer(looks, len, 100)
        assert (
            len([event async for event in released(coming(), answer, every=8, until=asyncio.get_running_loop().time() + 60)])
            == 14
        )
        return len(looks.asked)

    assert asyncio.run(run(0.03)) == 6
    assert asyncio.run(run(0.0)) == 1
