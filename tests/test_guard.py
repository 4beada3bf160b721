"""The guard before a real upstream: what reaches it, what comes back, and everything that can go wrong between."""

import json
import socket
import time

import httpx2
import openai
import pytest
from fastapi.responses import JSONResponse, Response
from hypothesis import given, settings
from hypothesis import strategies as st

from so8t.adapter import load_agent
from so8t.agent import SPOKEN, SafeAgent
from so8t.audit import AuditLog, files_of, verify
from so8t.conversation import with_answer
from so8t.escalations import EscalationQueue
from so8t.labels import Label
from so8t.serving import approvals
from so8t.serving.app import make_app
from so8t.serving.guard import Guard
from so8t.serving.guard_app import guard_routes
from so8t.serving.service import make_service
from so8t.serving.upstream import Upstream as Behind
from so8t.serving.watched import pieces
from so8t.serving.worker import Limits
from tests.ruled import FRAUD, Ruled
from tests.upstreams import Upstream, chunk, chunks, completion, running, until


def words(text):
    """The rule of most tests."""
    if "poison" in text:
        return Label.REFUSE
    return Label.ESCALATE if "wire the money" in text else Label.ALLOW


@pytest.fixture(scope="module")
def loaded(finished_run):
    return load_agent(finished_run)


class Guarded:
    """A guard in front of an upstream, both on threads; `kill` ends what stands behind it."""

    def __init__(self, agent, folder, upstream, *, url, seconds=5.0, limit=20.0, key=None, waiting=64, **options):
        self.audit, self.queue = AuditLog(folder / "audit"), EscalationQueue(folder / "escalations.sqlite")
        self.agent, self.upstream = agent, upstream
        safe = SafeAgent(agent, audit=self.audit, queue=self.queue, keep_text=True)
        service = make_service(safe, self.queue, Limits(seconds=limit, queue=waiting))
        self.metrics = service.metrics
        behind = Behind(url, self.metrics.upstream, seconds=seconds, key=key)
        guard = Guard(service, behind, watch_every=options.pop("watch_every", 8))
        self.app = make_app(service, routes=(lambda _: guard_routes(guard),), max_bytes=2**16, **options)

    def told(self):
        return [json.loads(line) for file in files_of(self.audit.folder) for line in file.read_text().splitlines()]

    def events(self):
        return [entry["event"] for entry in self.told()]

    def counted(self, name, **labels):
        return self.metrics.registry.get_sample_value(name, labels)


@pytest.fixture
def upstream():
    found = Upstream()
    with running(found.app) as found.url:
        yield found


@pytest.fixture
def guarded(loaded, upstream, tmp_path):
    """Starts a guard before the upstream; gives it and an OpenAI client of it."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def start(rule=words, make=Ruled.of, **options):
            agent = make(loaded, rule)
            options.setdefault("url", f"{upstream.url}/v1")
            guard = Guarded(agent, tmp_path, upstream, **options)
            guard.url = stack.enter_context(running(guard.app))
            guard.client = stack.enter_context(
                openai.OpenAI(base_url=f"{guard.url}/v1", api_key="of-the-client", max_retries=0)
            )
            return guard

        yield start


def ask(guard, *contents, **more):
    turns = [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(contents)]
    return guard.client.chat.completions.create(model="up", messages=more.pop("messages", turns), **more)


def post(guard, body, **more):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json", **more.pop("headers", {})}
    return httpx2.post(f"{guard.url}/v1/chat/completions", content=content, headers=headers, timeout=20, **more)


HELLO = {"model": "up", "messages": [{"role": "user", "content": "hello"}]}

# -- requests --------------------------------------------------------------------------------------------------------------


def test_what_is_allowed_reaches_the_upstream_byte_for_byte_and_its_answer_comes_back_so(guarded, upstream):
    guard = guarded()
    upstream.whole = completion({"content": "bread"}, service_tier="default", of_its_own={"deep": [None, True]})
    body = b'{ "model":"up", "messages":[{"role":"user","content":"caf\\u00e9?"}],  "temperature":0.30, "top_k": 5 }'
    answer = post(guard, body)
    assert answer.json() == upstream.whole
    [(path, _, sent)] = upstream.asked
    assert (path, sent) == ("/v1/chat/completions", body)
    assert guard.events() == ["decision", "answer"]
    assert guard.told()[1]["answer"].startswith("bread")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("text", "label"), [("poison her", Label.REFUSE), ("wire the money", Label.ESCALATE)])
def test_what_is_not_allowed_never_reaches_the_upstream(guarded, upstream, text, label, stream):
    guard = guarded()
    if stream:
        got = list(ask(guard, text, stream=True, stream_options={"include_usage": True}))
        said = "".join(c.choices[0].delta.content or "" for c in got if c.choices)
        reason, told, used = got[-2].choices[0].finish_reason, got[-2].so8t, got[-1].usage
    else:
        got = ask(guard, text)
        said, reason, told, used = got.choices[0].message.content, got.choices[0].finish_reason, got.so8t, got.usage
    number = " (escalation 1)" if label is Label.ESCALATE else ""
    assert said == SPOKEN[label].format(number=number)
    assert (reason, told["decision"], used.total_tokens) == ("content_filter", label.name, 0)
    assert upstream.asked == []
    assert guard.events() == ["decision"]
    assert len(guard.queue.listed()) == (label is Label.ESCALATE)
    assert guard.counted("so8t_decisions_total", decision=label.name) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_the_models_own_sentence_follows_the_fixed_one_before_an_upstream_too(guarded, upstream, written, stream):
    written(FRAUD)
    guard = guarded(make=Ruled.explaining)
    got = ask(guard, "sell poison", stream=stream)
    choices = [part.choices[0] for part in got] if stream else got.choices
    said = "".join((choice.delta if stream else choice.message).content or "" for choice in choices)
    assert said == f"{SPOKEN[Label.REFUSE]} {FRAUD}"
    assert guard.events() == ["decision", "rationale"]
    assert upstream.asked == []


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "poison"}, {"role": "user", "content": "go on"}],
        [{"role": "user", "content": [{"type": "text", "text": "go on"}, {"type": "text", "text": "poison"}]}],
        [{"role": "user", "content": "go on", "name": "poison"}],
        [{"role": "user", "content": "go on"}, {"role": "assistant", "content": "poison"}],
        [
            {"role": "user", "content": "go on"},
            {
                "role": "assistant",
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "the page says: poison"},
        ],
        [{"role": "user", "content": "go on"}, {"role": "developer", "content": "poison"}],
        [{"role": "user", "content": "a " * 400 + "poison" + " a" * 400}],
        [{"role": "system", "content": "a " * 400 + "poison" + " a" * 400}, {"role": "user", "content": "go on"}],
    ],
)
def test_every_text_of_a_conversation_is_read_however_long_and_wherever_it_stands(guarded, upstream, messages):
    guard = guarded()
    assert ask(guard, messages=messages).choices[0].finish_reason == "content_filter"
    assert upstream.asked == []


def test_definitions_of_tools_and_formats_are_read(guarded, upstream):
    guard = guarded()
    tool = {"type": "function", "function": {"name": "f", "description": "poison", "parameters": {}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"description": "poison"}}}
    assert ask(guard, "go on", tools=[tool]).choices[0].finish_reason == "content_filter"
    assert ask(guard, "go on", response_format=form).choices[0].finish_reason == "content_filter"
    assert upstream.asked == []


@pytest.mark.parametrize("exchange", [("poison her", "no"), ("hello", "then poison her")])
def test_an_earlier_exchange_that_is_not_allowed_is_kept_from_the_upstream(guarded, upstream, exchange):
    guard = guarded()
    assert ask(guard, "hi", "hi!", *exchange, "and now?").choices[0].finish_reason == "stop"
    sent = json.loads(upstream.asked[0][2])["messages"]
    assert [message["content"] for message in sent] == ["hi", "hi!", "and now?"]
    assert guard.told()[0]["left_out"] == 1


@pytest.mark.parametrize(
    "body",
    [
        b"not json",
        b"\xff\xfe{\x00}\x00",
        b"[1]",
        b'{"model": "up"}',
        b'{"model": "up", "messages": []}',
        b'{"model": "up", "messages": [{"role": "system", "content": "hi"}]}',
        b'{"model": "up", "messages": [{"role": "user", "content": " "}]}',
        b'{"model": "up", "messages": [{"role": "king", "content": "hi"}]}',
        b'{"model": "up", "messages": [{"role": "user", "content": "hi", "content": "poison"}]}',
        b'{"model": "up", "messages": [{"role": "user", "content": "\\ud83d"}]}',
        b'{"model": "up", "temperature": NaN, "messages": [{"role": "user", "content": "hi"}]}',
        b'{"model": "up", "prompt": "poison", "messages": [{"role": "user", "content": "hi"}]}',
        b'{"model": "up", "chat_template": "poison", "messages": [{"role": "user", "content": "hi"}]}',
        b'{"model": "up", "logprobs": true, "messages": [{"role": "user", "content": "hi"}]}',
        b'{"model": "up", "modalities": ["audio"], "messages": [{"role": "user", "content": "hi"}]}',
        b'{"model": "up", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}',
        b'{"model": "up", "messages": [{"role": "user", "content": "hi", "tokens": [72, 105]}]}',
        b"[" * 50_000,
    ],
)
def test_a_request_that_cannot_be_read_whole_is_an_error_in_openais_shape(guarded, upstream, body):
    guard = guarded()
    answer = post(guard, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert upstream.asked == []


def test_a_request_that_is_too_long_is_for_a_person_and_one_that_is_too_large_is_refused(guarded, upstream):
    guard = guarded()
    told = ask(guard, "a" * 20_000).so8t
    assert (told["decision"], told["unread"], told["failed"]) == ("ESCALATE", True, False)
    assert guard.queue.get(1).reason == "length"
    assert post(guard, {"model": "up", "messages": [{"role": "user", "content": "a" * 70_000}]}).status_code == 413
    assert upstream.asked == []


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/chat/completions/", "/completions"]
)
def test_no_other_path_of_the_upstream_can_be_reached(guarded, upstream, path):
    guard = guarded()
    answer = httpx2.post(guard.url + path, json={**HELLO, "prompt": "hi", "input": "hi"}, follow_redirects=False)
    assert answer.status_code in (307, 404)
    assert answer.status_code == 307 or answer.json()["error"]["type"] == "invalid_request_error"
    assert upstream.asked == []


def test_the_list_of_models_is_handed_through(guarded, upstream):
    guard = guarded()
    assert [model.id for model in guard.client.models.list()] == ["up"]
    assert [path for path, _, _ in upstream.asked] == ["/v1/models"]


def test_headers_are_handed_on_but_not_those_of_one_connection_or_of_another_path(guarded, upstream):
    guard = guarded()
    given = {
        "Authorization": "Bearer of-the-client",
        "OpenAI-Organization": "org",
        "X-Original-URL": "/v1/completions",
        "X-HTTP-Method-Override": "PUT",
        "Connection": "keep-alive, X-Mine",
        "X-Mine": "1",
        "TE": "trailers",
    }
    assert post(guard, HELLO, headers=given).status_code == 200
    [(_, seen, _)] = upstream.asked
    assert (seen["authorization"], seen["openai-organization"]) == ("Bearer of-the-client", "org")
    assert seen["host"] == upstream.url.removeprefix("http://")
    assert not {"x-original-url", "x-http-method-override", "x-mine", "te"} & seen.keys()


def test_with_a_token_of_its_own_the_guard_keeps_it_and_sends_the_upstreams_key(guarded, upstream):
    guard = guarded(token="of-the-guard", key="of-the-upstream")
    assert post(guard, HELLO).status_code == 401
    assert post(guard, HELLO, headers={"Authorization": "Bearer of-the-guard"}).status_code == 200
    assert [headers["authorization"] for _, headers, _ in upstream.asked] == ["Bearer of-the-upstream"]


def test_cookies_of_the_upstream_do_not_reach_the_next_client(guarded, upstream):
    guard = guarded()
    upstream.whole = JSONResponse(completion({"content": "hi"}), headers={"Set-Cookie": "who=first; Path=/"})
    assert "set-cookie" not in post(guard, HELLO).headers
    post(guard, HELLO)
    assert all("cookie" not in headers for _, headers, _ in upstream.asked)


# -- answers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["poison", "wire the money"])
def test_a_whole_answer_that_leaves_allow_is_withheld(guarded, upstream, label):
    guard = guarded()
    upstream.whole = completion({"content": "a " * 300 + label + " b" * 300})
    got = ask(guard, "hello")
    assert "a a" not in got.model_dump_json()
    assert (got.choices[0].finish_reason, got.so8t["stopped"]) == ("content_filter", True)
    assert guard.events() == ["decision", "stopped"]
    assert len(guard.queue.listed()) == (label != "poison")


def test_no_part_of_an_answer_is_shown_before_it_was_looked_at(guarded, upstream):
    guard = guarded(watch_every=2)
    texts = [f"word{k} " for k in range(12)]
    upstream.parts = [part for event in chunks(*texts) for part in (event, 0.005)]
    shown = ""
    for event in ask(guard, "hello", stream=True):
        shown += event.choices[0].delta.content or ""
        assert not shown or any(text.startswith(f"hello\n\n{shown}") for text in list(guard.agent.asked))
    assert shown == "".join(texts)
    assert len(guard.agent.asked) > 4
    assert guard.events() == ["decision", "answer"]


def test_a_stream_that_leaves_allow_ends_there_and_the_upstream_is_left(guarded, upstream):
    guard = guarded(watch_every=1)
    upstream.parts = [*chunks("fine ", "so far ")[:3], 0.3, *chunks("poison", " more")[1:3], 30.0, b"never"]
    begun = time.monotonic()
    got = list(ask(guard, "hello", stream=True))
    assert time.monotonic() - begun < 10
    assert "".join(event.choices[0].delta.content or "" for event in got) == "fine so far "
    assert {event.id for event in got} == {"chatcmpl-up"}
    assert got[-1].choices[0].finish_reason == "content_filter"
    assert (got[-1].so8t["decision"], got[-1].so8t["stopped"]) == ("REFUSE", True)
    assert got[-2].choices[0].delta.refusal == SPOKEN[Label.REFUSE]
    assert until(upstream.closed.is_set)
    assert guard.events() == ["decision", "stopped"]


def test_arguments_of_a_tool_call_are_watched_in_a_stream(guarded, upstream):
    guard = guarded(watch_every=1)

    def call(**function):
        return chunk({"tool_calls": [{"index": 0, "id": "1", "type": "function", "function": function}]})

    upstream.parts = [call(name="send", arguments=""), call(arguments='{"text": "poi'), 0.2, call(arguments='son"}'), 5.0]
    got = list(ask(guard, "hello", stream=True))
    arguments = [c.function.arguments for e in got for c in e.choices[0].delta.tool_calls or []]
    assert "son" not in "".join(arguments)
    assert got[-1].choices[0].finish_reason == "content_filter"


def test_chunks_that_are_cut_anywhere_are_put_together_and_go_on_unchanged(guarded, upstream):
    guard = guarded()
    sent = [json.loads(event[6:]) for event in chunks("日本語 ", "é", "🦀 done")[:-1]]
    wire = b": hello\r\n\r\nevent: message\r\nid: 3\r\n" + b"".join(chunks("日本語 ", "é", "🦀 done")).replace(b"\n", b"\r\n")
    upstream.parts = [wire[k : k + 1] for k in range(len(wire))]
    with httpx2.stream("POST", f"{guard.url}/v1/chat/completions", json={**HELLO, "stream": True}, timeout=20) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert [json.loads(line.removeprefix("data: ")) for line in lines[:-1]] == sent
    assert lines[-1] == "data: [DONE]"


@given(st.text(max_size=60), st.text(min_size=1, max_size=60))
@settings(max_examples=40, deadline=None)
def test_the_newest_piece_of_an_answer_is_in_view_however_long_it_is(loaded, before, newest):
    template = loaded.template
    pieces_of_it = list(pieces(newest, template.length, template.room // 3))
    text = before * 30 + pieces_of_it[0]
    encoded = template.encode(with_answer("go on", text))
    seen = template.tokenizer.decode(encoded.tokens[slice(*encoded.span)])
    assert seen.endswith(pieces_of_it[0]) or not text.strip()


# -- failures --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "whole",
    [
        Response(b"<html>busy</html>", media_type="text/html"),
        Response(b"{", media_type="application/json"),
        Response(b'{"choices": [], "choices": []}', media_type="application/json"),
        Response(b"\xff" * 9 * 2**20, media_type="application/json"),
        Response(b"", status_code=302, headers={"Location": "/v1/elsewhere"}),
        Response(b"poison", status_code=500),
        {"object": "chat.completion", "choices": []},
    ],
)
def test_an_upstream_that_answers_nonsense_is_a_bad_gateway(guarded, upstream, whole):
    guard = guarded()
    upstream.whole = whole
    answer = post(guard, HELLO)
    assert (answer.status_code, answer.json()["error"]["type"]) == (502, "server_error")
    assert "poison" not in answer.text
    assert len(upstream.asked) == 1
    assert sum(guard.counted("so8t_upstream_failures_total", code=f"upstream_{c}") or 0 for c in ("garbled", "refused")) == 1
    assert until(lambda: guard.events() == ["decision", "interrupted"])


def test_what_the_upstream_refuses_keeps_its_status_but_not_its_words(guarded, upstream):
    guard = guarded()
    failed = {"message": "poison", "code": "slow_down", "param": "poison her"}
    upstream.whole = JSONResponse({"error": failed}, 429, {"Retry-After": "7"})
    answer = post(guard, HELLO)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
    assert "slow_down" in answer.text
    assert "poison" not in answer.text
    with pytest.raises(openai.RateLimitError):
        ask(guard, "hello")


@pytest.mark.parametrize("stream", [False, True])
def test_an_upstream_that_is_not_there_is_a_bad_gateway_and_a_silent_one_times_out(guarded, stream):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        slow = guarded(url=f"http://127.0.0.1:{port}/v1", seconds=0.3)
        assert post(slow, {**HELLO, "stream": stream}).status_code == 504
    answer = post(slow, {**HELLO, "stream": stream})
    assert answer.status_code == 502
    assert answer.json()["error"]["code"] == "upstream_failed"


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ([b"data: nonsense\n\n"], 502),
        ([b"data: \xff\xfe\n\n"], 502),
        ([b'data: {"error": {"message": "poison"}}\n\n'], 502),
        ([b"x" * 2 * 2**20], 502),
        ([b": still here\n\n", 3.0], 504),
        ([], 502),
    ],
)
def test_a_stream_that_fails_before_anything_of_it_was_shown_has_a_status(guarded, upstream, parts, status):
    guard = guarded(seconds=0.5)
    upstream.parts = parts
    answer = post(guard, {**HELLO, "stream": True})
    assert (answer.status_code, answer.json()["error"]["type"]) == (status, "server_error")
    assert "poison" not in answer.text


@pytest.mark.parametrize(("end", "rest"), [([-1.0], ""), ([], "x"), ([b"data: {\n\n"], ""), ([3.0], "")])
def test_a_stream_that_dies_in_the_middle_ends_with_an_error_and_what_was_not_looked_at_stays_back(
    guarded, upstream, end, rest
):
    guard = guarded(seconds=0.5, watch_every=4)
    upstream.parts = [*chunks("shown, ", "quite surely")[:3], 0.3, chunk({"content": "x"}), *end]
    shown = ""

    def read():
        nonlocal shown
        for event in ask(guard, "hello", stream=True):
            shown += event.choices[0].delta.content or ""

    with pytest.raises(openai.APIError):
        read()
    assert shown == "shown, quite surely" + rest
    assert until(lambda: guard.events() == ["decision", "interrupted"])
    assert guard.told()[1]["answer"] == shown


def test_an_answer_that_takes_longer_than_the_limit_ends(guarded, upstream):
    guard = guarded(limit=0.6, watch_every=1)
    upstream.parts = [chunk({"content": "drip "}), *[0.1, chunk({"content": "drop "})] * 100]
    with pytest.raises(openai.APIError, match="in time"):
        list(ask(guard, "hello", stream=True))
    assert until(upstream.closed.is_set)


@pytest.mark.parametrize("parts", [[60.0], [*chunks("begun ")[:2], 60.0]])
def test_a_client_that_leaves_takes_the_upstream_with_it(guarded, upstream, parts):
    guard = guarded(seconds=90.0, limit=90.0, watch_every=1)
    upstream.parts = parts
    with (
        pytest.raises(httpx2.TimeoutException),
        httpx2.stream("POST", f"{guard.url}/v1/chat/completions", json={**HELLO, "stream": True}, timeout=0.4) as answer,
    ):
        list(answer.iter_raw())
    assert until(upstream.closed.is_set)
    assert until(lambda: guard.events() == ["decision", "interrupted"])


def broken(text):
    raise RuntimeError("out of memory")


def test_a_failure_inside_is_escalate_and_counted_and_nothing_is_sent(guarded, upstream):
    guard = guarded(broken)
    got = ask(guard, "hello")
    assert (got.so8t["decision"], got.so8t["failed"]) == ("ESCALATE", True)
    assert upstream.asked == []
    assert guard.queue.get(1).reason == "failure"
    assert guard.counted("so8t_failures_total") == 1


def test_a_failure_while_watching_withholds_the_answer(guarded, upstream):
    guard = guarded(lambda text: broken(text) if "there" in text else Label.ALLOW)
    got = ask(guard, "hello")
    assert (got.choices[0].finish_reason, got.so8t["failed"]) == ("content_filter", True)
    assert "there" not in got.model_dump_json()


def test_a_guard_whose_queue_is_full_turns_requests_away(guarded, upstream):
    answer = post(guarded(waiting=0), HELLO)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert upstream.asked == []


def test_many_clients_at_once_each_get_their_own_answer_and_the_log_stays_whole(guarded, upstream):
    from concurrent.futures import ThreadPoolExecutor

    guard = guarded()
    texts = ["hello", "poison", "wire the money"] * 5
    with ThreadPoolExecutor(15) as pool:
        reasons = list(pool.map(lambda text: ask(guard, text).choices[0].finish_reason, texts))
    assert reasons == ["stop", "content_filter", "content_filter"] * 5
    assert len(upstream.asked) == 5
    assert verify(guard.audit.folder).problems == []


def test_looks_of_many_clients_share_passes(guarded, upstream):
    from concurrent.futures import ThreadPoolExecutor

    def slow(text):
        time.sleep(0.005)
        return Label.ALLOW

    guard, clients = guarded(slow), 16
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(lambda k: ask(guard, f"hello {k}"), range(clients)))
    assert sum(guard.agent.passes) >= 2 * clients  # each request and each answer
    assert len(guard.agent.passes) < clients


# -- approved --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(approvals, "EVERY_SECONDS", 0.02)
    monkeypatch.setattr(approvals, "AGAIN_SECONDS", 0.1)


@pytest.mark.parametrize("stream", [False, True])
def test_an_approved_request_is_sent_on_and_its_reply_is_kept_for_its_ticket(guarded, upstream, often, so8t, tmp_path, stream):
    guard = guarded(key="of-the-upstream")
    upstream.whole = completion({"content": "wire the money, then ring me"})  # is ESCALATE, which a person has allowed
    got = ask(guard, "wire the money", stream=stream)
    told = list(got)[-1].so8t if stream else got.so8t
    waiting = guard.client.chat.completions.retrieve(told["ticket"])
    assert waiting.choices[0].message.content == SPOKEN[Label.ESCALATE].format(number=" (escalation 1)")
    assert upstream.asked == []
    assert so8t("escalations", "approve", 1, "--state", tmp_path)[0] == 0
    assert until(lambda: guard.queue.get(1).reply)
    [(_, headers, sent)] = upstream.asked
    assert json.loads(sent) == {"model": "up", "messages": [{"role": "user", "content": "wire the money"}]}
    assert headers["authorization"] == "Bearer of-the-upstream"
    url = f"{guard.url}/v1/chat/completions/{told['ticket']}"
    assert httpx2.get(url).json() == upstream.whole
    assert "wire the money, then ring me" in so8t("escalations", "show", 1, "--state", tmp_path)[1]
    assert guard.events() == ["decision", "decision", "answer"]
    assert guard.told()[1]["approved"]
    time.sleep(0.1)
    assert len(upstream.asked) == 1


def test_an_approved_request_whose_answer_is_refused_is_withheld_and_a_denied_one_is_not_sent(guarded, upstream, often):
    guard = guarded()
    upstream.whole = completion({"content": "poison her"})
    tickets = [ask(guard, "wire the money").so8t["ticket"] for _ in range(2)]
    guard.queue.decide(2, "denied")
    guard.queue.decide(1, "approved")
    assert until(lambda: guard.queue.get(1).reply)
    for ticket in tickets:
        told = guard.client.chat.completions.retrieve(ticket)
        assert told.choices[0].message.content == SPOKEN[Label.REFUSE]
        assert told.so8t["decision"] == "REFUSE"
    assert len(upstream.asked) == 1


def test_an_upstream_that_fails_is_asked_again_but_not_when_it_refuses(guarded, upstream, often):
    guard = guarded()
    ticket = ask(guard, "wire the money").so8t["ticket"]
    upstream.whole = Response(b"", status_code=500)
    guard.queue.decide(1, "approved")
    assert until(lambda: len(upstream.asked) > 1)
    assert guard.client.chat.completions.retrieve(ticket).so8t["decision"] == "ESCALATE"
    upstream.whole = JSONResponse({"error": {"message": "no such model"}}, 404)
    assert until(lambda: guard.queue.get(1).reply)
    with pytest.raises(openai.InternalServerError, match="404"):
        guard.client.chat.completions.retrieve(ticket)
    count = len(upstream.asked)
    time.sleep(0.2)
    assert len(upstream.asked) == count


def test_an_upstream_without_a_key_is_asked_again_when_there_may_be_one(guarded, upstream, often):
    guard = guarded()
    ask(guard, "wire the money")
    upstream.whole = JSONResponse({"error": {"message": "no key"}}, 401)
    guard.queue.decide(1, "approved")
    assert until(lambda: upstream.asked)
    assert guard.queue.get(1).reply is None
    upstream.whole = completion({"content": "done"})
    assert until(lambda: guard.queue.get(1).reply)


def test_of_two_guards_with_one_queue_each_sends_what_its_own_upstream_was_asked_and_once(guarded, upstream, often):
    others = Upstream()
    with running(others.app) as others.url:
        first, second, third = guarded(), guarded(url=f"{others.url}/v1"), guarded(url=f"{others.url}/v1/")
        ask(first, "wire the money to her")
        ask(second, "wire the money to him")
        for number in (1, 2):
            third.queue.decide(number, "approved")
        assert until(lambda: first.queue.get(1).reply and first.queue.get(2).reply)
        time.sleep(0.2)
        [(_, _, to_first)], [(_, _, to_second)] = upstream.asked, others.asked
    assert b"to her" in to_first
    assert b"to him" in to_second


def test_what_is_escalated_is_held_whatever_becomes_of_its_client(guarded, upstream, monkeypatch):
    guard = guarded()
    monkeypatch.setattr("so8t.agent.Watch.explained", lambda watch: 1 / 0)
    assert post(guard, {"model": "up", "messages": [{"role": "user", "content": "wire the money"}]}).status_code == 500
    assert guard.queue.get(1).held


def test_deciding_has_a_time_limit(guarded, upstream):
    def slow(text):
        time.sleep(0.2)
        return Label.ALLOW

    answer = post(guarded(slow, limit=0.05), HELLO)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    assert upstream.asked == []


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_what_a_web_page_may_send_unasked_is_turned_away(guarded, upstream, kind):
    answer = post(guarded(), HELLO, headers={"content-type": kind})
    assert (answer.status_code, answer.json()["error"]["param"]) == (415, "content-type")
    assert upstream.asked == []


def test_nobody_gets_a_completion_without_its_ticket(guarded):
    with pytest.raises(openai.NotFoundError):
        guarded().client.chat.completions.retrieve("1")


def test_the_real_head_decides_before_and_after_the_upstream(always, upstream, tmp_path):
    for label in Label:
        guard = Guarded(load_agent(always(label.name)), tmp_path / label.name, upstream, url=f"{upstream.url}/v1")
        with running(guard.app) as guard.url:
            answer = post(guard, HELLO).json()
        assert (answer["choices"][0]["finish_reason"] == "stop") is (label is Label.ALLOW)
        assert len(upstream.asked) == 1


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ([], "--upstream"),
        (["--upstream", "localhost:8000"], "no address"),
        (["--upstream", "http://localhost/v1?key=1"], "no address"),
        (["--upstream", "http://localhost/v1", "--host", "0.0.0.0"], "SO8T_TOKEN"),
        (["--upstream", "http://localhost/v1", "--upstream-key-file", "nowhere"], "nowhere"),
    ],
)
def test_a_command_line_that_cannot_work_is_told_before_anything_is_loaded(so8t, monkeypatch, more, told):
    monkeypatch.delenv("SO8T_TOKEN", raising=False)
    code, _, err = so8t("guard", "no-such-run", *more)
    assert code == 2
    assert told in err
