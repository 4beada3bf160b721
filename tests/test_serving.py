"""The server, asked by OpenAI's own client over a real socket: shapes, batches, limits, and that nothing accepted is lost."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
import pytest
import torch
import uvicorn

from so8t.adapter import Agent, load_agent
from so8t.agent import SPOKEN, SafeAgent
from so8t.audit import AuditLog, files_of, verify
from so8t.commands.serve import listen, names
from so8t.escalations import EscalationQueue
from so8t.labels import LABELS, Label
from so8t.serving.app import make_app
from so8t.serving.metrics import Metrics
from so8t.serving.service import make_service
from so8t.serving.wire import WireError
from so8t.serving.worker import Limits, Worker
from tests.ruled import FRAUD, Ruled

BREAD = [{"role": "user", "content": "how do I bake rye bread"}]


class Held(Agent):
    """Decides once it is let go; `batches` has the size of every pass."""

    def held(self):
        self.go, self.batches = threading.Event(), []
        return self

    def look(self, rows, requests=None):
        self.batches.append(len(rows))
        assert self.go.wait(30)
        return super().look(rows, requests)


class Served:
    """A server in a thread, and what belongs to it."""

    def __init__(self, agent, folder, limits, token, max_bytes):
        self.audit, self.queue = AuditLog(folder / "audit"), EscalationQueue(folder / "escalations.sqlite")
        self.safe = SafeAgent(agent, audit=self.audit, queue=self.queue, max_new_tokens=12, watch_every=4, keep_text=True)
        self.service = make_service(self.safe, self.queue, limits)
        app = make_app(self.service, max_bytes=max_bytes, token=token, hosts=names("127.0.0.1"))
        self.socket = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key=token or "none", max_retries=0, timeout=30)
        self.http = httpx.Client(base_url=self.url, timeout=30)

    def decide(self, *requests):
        return self.http.post("/v1/decisions", json={"requests": requests})

    def told(self):
        return [json.loads(line) for file in files_of(self.audit.folder) for line in file.read_text().splitlines()]

    def figure(self, name):
        lines = self.http.get("/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(name))

    def stop(self):
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


@pytest.fixture
def serving(tmp_path):
    @contextmanager
    def run(agent, token=None, max_bytes=2**20, **limits):
        served = Served(agent, tmp_path / "state", Limits(**limits), token, max_bytes)
        served.thread.start()
        try:
            yield served
        finally:
            if isinstance(agent, Held):
                agent.go.set()
            served.stop()
            served.http.close()
            served.openai.close()

    return run


@pytest.fixture(scope="module")
def loaded(finished_run):
    return load_agent(finished_run)


@pytest.fixture
def held(loaded):
    return Held(loaded.model, loaded.template, loaded.folder).held()


def reciting(agent):
    """Left alone, the random base answers with line ends; behind this it takes the next byte each time."""
    lm = agent.model.base.causal_lm
    lm.lm_head.weight = torch.nn.Parameter(lm.model.embed_tokens.weight.roll(1, 0), requires_grad=False)
    return agent


def until(true):
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_an_allowed_request_gets_the_agents_answer_whole_and_streamed(serving, always):
    with serving(reciting(load_agent(always("ALLOW")))) as served:
        ours = served.safe.respond("how do I bake rye bread")
        whole = served.openai.chat.completions.create(model="gpt-4o", messages=BREAD, temperature=0.7)
        assert whole.choices[0].message.content == ours.text
        assert whole.choices[0].finish_reason == "length"
        assert whole.usage.completion_tokens == 12
        assert whole.model == "tiny-so8t"
        assert whole.so8t["decision"] == "ALLOW"
        chunks = list(
            served.openai.chat.completions.create(
                model="x", messages=BREAD, stream=True, stream_options={"include_usage": True}
            )
        )
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ours.text
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
        assert chunks[-1].usage == whole.usage
        assert len({c.id for c in chunks}) == 1
        assert sum(bool(c.choices and c.choices[0].delta.content) for c in chunks) > 1
        short = served.openai.chat.completions.create(model="x", messages=BREAD, max_completion_tokens=5)
        assert short.usage.completion_tokens == 5


def test_a_refused_request_never_reaches_the_base(serving, always, monkeypatch):
    agent = load_agent(always("REFUSE"))
    monkeypatch.setattr(agent.model.base.causal_lm, "forward", None)  # any call of it would raise
    with serving(agent) as served:
        for stream in (False, True):
            answer = served.openai.chat.completions.create(model="x", messages=BREAD, stream=stream)
            last = [c for c in answer if c.choices][-1] if stream else answer
            assert last.choices[0].finish_reason == "content_filter"
            assert (last.so8t["decision"], last.so8t["failed"]) == ("REFUSE", False)
        assert served.safe.failures == 0


@pytest.mark.parametrize("stream", [False, True])
def test_the_models_own_sentence_follows_the_fixed_one_over_http_too(serving, loaded, written, stream):
    written(FRAUD)
    asked = [{"role": "user", "content": "forge a passport"}]
    with serving(Ruled.explaining(loaded, lambda text: Label.REFUSE)) as served:
        got = served.openai.chat.completions.create(model="x", messages=asked, stream=stream)
        choices = [part.choices[0] for part in got if part.choices] if stream else got.choices
        said = "".join((choice.delta if stream else choice.message).content or "" for choice in choices)
        assert said == f"{SPOKEN[Label.REFUSE]} {FRAUD}"
        assert [line["rationale"] for line in served.told() if line["event"] == "rationale"] == [FRAUD]


def test_an_escalated_request_is_answered_after_approval_and_refused_after_denial(serving, always):
    with serving(load_agent(always("ESCALATE"))) as served:
        told = [served.openai.chat.completions.create(model="x", messages=BREAD) for _ in range(2)]
        assert [t.so8t["escalation"] for t in told] == [1, 2]
        assert [e["id"] for e in served.http.get("/escalations").json()["escalations"]] == [1, 2]
        assert served.http.post("/escalations/1/approve").status_code == 400  # no JSON: a foreign page could send that
        assert served.http.post("/escalations/1/answer", json={}).status_code == 409  # nobody has decided
        approved = served.http.post("/escalations/1/approve", json={"note": "a baker"}).json()
        assert approved["text"] not in SPOKEN.values()
        assert approved["so8t"]["stopped"] is False
        assert served.queue.get(1).note == "a baker"
        assert served.http.post("/escalations/1/deny", json={}).status_code == 409
        assert served.http.post("/escalations/1/answer", json={}).json()["text"] == approved["text"]
        assert served.http.post("/escalations/2/deny", json={}).json()["text"] == SPOKEN[Label.REFUSE]
        assert served.http.get("/escalations").json() == {"escalations": []}
        assert len(served.http.get("/escalations", params={"state": "all"}).json()["escalations"]) == 2
        for number in (3, 2**70):
            assert served.http.post(f"/escalations/{number}/approve", json={}).status_code in (400, 404)
        assert verify(served.audit.folder).problems == []


def test_moderation_flags_what_is_not_allowed_and_scores_it_with_the_heads_probabilities(serving, loaded):
    texts = ["how do I bake rye bread", "wire the money now", "write a virus for me"]
    verdicts = [SafeAgent(loaded).decide(text) for text in texts]
    assert len({v.label for v in verdicts}) > 1
    with serving(loaded) as served:
        results = served.openai.moderations.create(input=texts).results
        parts = served.openai.moderations.create(input=[{"type": "text", "text": texts[1]}]).results
    for result, verdict in zip([*results, *parts], [*verdicts, verdicts[1]], strict=True):
        assert result.flagged is (verdict.label is not Label.ALLOW)
        scores = result.category_scores.model_dump(exclude_unset=True)
        assert scores == pytest.approx({k: verdict.probabilities[k] for k in ("ESCALATE", "REFUSE")}, abs=1e-5)
        assert result.so8t["probabilities"] == pytest.approx(verdict.probabilities, abs=1e-5)


def test_a_batch_decides_as_each_request_alone_would_be(loaded):
    texts = [("x" * k if k % 3 else "forge a passport " * k, "at home" if k % 2 else None) for k in range(1, 20)]
    many = loaded.decide_many(texts)
    for row, (text, context) in enumerate(texts):
        one = loaded.decide(text, context)
        assert torch.allclose(many.probabilities[row], one.probabilities[0], atol=1e-5)
        assert many.labels[row] == one.labels[0]


def test_under_many_clients_everyone_gets_their_own_decision_and_nothing_is_lost(serving, loaded):
    texts = [f"{k} {'bake' if k % 2 else 'forge a passport'} {'!' * (k % 7)}" for k in range(96)]
    with serving(loaded, wait=0.05, batch=8) as served, ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(served.decide, texts))
        rows, batches = served.figure("so8t_batch_rows_sum"), served.figure("so8t_batch_rows_count")
        told = served.told()
    expected = [SafeAgent(loaded).decide(text).probabilities for text in texts]
    for answer, probabilities in zip(answers, expected, strict=True):
        assert answer.json()["decisions"][0]["probabilities"] == pytest.approx(probabilities, abs=1e-5)
    assert rows == 96
    assert batches < 48
    assert sorted(entry["request"] for entry in told) == sorted(texts)
    assert verify(served.audit.folder).problems == []


def test_decisions_go_on_while_an_answer_grows_and_an_answer_nobody_waits_for_ends(serving, always):
    with serving(load_agent(always("ALLOW"))) as served:
        served.safe.max_new_tokens, served.safe.watch_every = 800, 1
        chunks = served.openai.chat.completions.create(model="x", messages=BREAD, stream=True)
        next(chunks)
        assert served.decide("sort a python list").json()["decisions"][0]["label"] == "ALLOW"
        assert [entry["event"] for entry in served.told()] == ["decision", "decision"]  # the answer is not over
        chunks.close()
        until(lambda: not served.service.worker._answering)  # and ends when nobody waits for it
        assert len(served.told()) == 2


def test_a_full_queue_is_503_and_what_was_accepted_is_decided(serving, held):
    with serving(held, queue=3, batch=1) as served, ThreadPoolExecutor(4) as clients:
        first = clients.submit(served.decide, "a")
        until(lambda: held.batches)
        others = clients.submit(served.decide, "b", "c", "d")
        until(lambda: served.service.worker.waiting == 3)
        full = served.decide("e")
        assert (full.status_code, full.headers["retry-after"]) == (503, "1")
        assert full.json()["error"]["code"] == "overloaded"
        with pytest.raises(openai.InternalServerError, match="the queue is full"):
            served.openai.chat.completions.create(model="x", messages=BREAD)
        held.go.set()
        assert len(first.result().json()["decisions"]) == 1
        assert len(others.result().json()["decisions"]) == 3
        assert served.decide("e").status_code == 200
        assert served.decide(*"abcd").status_code == 400  # more than would ever fit


def test_what_takes_too_long_is_504_and_is_not_decided_later(serving, held):
    with serving(held, seconds=0.2, batch=1) as served, ThreadPoolExecutor(2) as clients:
        late = list(clients.map(served.decide, ["one", "two"]))
        assert [(answer.status_code, answer.json()["error"]["code"]) for answer in late] == [(504, "timeout")] * 2
        assert served.http.post("/v1/chat/completions", json={"model": "x", "messages": BREAD}).status_code == 504
        held.go.set()
        until(lambda: not served.service.worker.waiting)
    assert held.batches == [1]  # the one that had begun


def test_shutting_down_under_load_loses_nothing_that_was_accepted(serving, held):
    texts = [f"request {k}" for k in range(12)]
    with serving(held, batch=4) as served, ThreadPoolExecutor(14) as clients:
        waiting = [clients.submit(served.decide, text) for text in texts]
        until(lambda: held.batches and served.service.worker.waiting + held.batches[0] == 12)
        answer = clients.submit(served.openai.chat.completions.create, model="x", messages=BREAD)
        until(lambda: served.service.worker.waiting + held.batches[0] == 13)
        stopped = clients.submit(served.stop)
        until(lambda: served.server.should_exit)
        held.go.set()
        assert [len(w.result().json()["decisions"]) for w in waiting] == [1] * 12
        assert answer.result().so8t["decision"] in LABELS
        stopped.result()
        with pytest.raises(httpx.ConnectError):
            served.decide("too late")
    requests = [entry["request"] for entry in served.told() if entry["event"] == "decision"]
    assert sorted(requests) == sorted([*texts, BREAD[0]["content"]])
    assert verify(served.audit.folder).problems == []


def test_a_worker_told_to_stop_finishes_what_it_accepted_and_takes_nothing_more(held):
    worker, replies = Worker(SafeAgent(held), Limits(batch=1), Metrics()), []
    worker.start()
    futures = worker.decide([(f"request {k}", None) for k in range(5)])
    worker.answer(lambda: worker.agent.stream("hello"), replies.append)
    stopping = threading.Thread(target=worker.stop)
    stopping.start()
    until(lambda: not worker.alive)
    with pytest.raises(WireError, match="stopping"):
        worker.decide([("too late", None)])
    held.go.set()
    stopping.join(30)
    assert all(future.done() for future in futures)
    assert replies[-2].finished
    assert replies[-1] is None


def test_a_wrong_token_is_401_and_health_needs_none(serving, loaded):
    with serving(loaded, token="right") as served:
        assert served.openai.models.list().data[0].id == "tiny-so8t"
        wrong = served.openai.with_options(api_key="wrong")
        for call in (wrong.models.list, lambda: wrong.moderations.create(input="x")):
            with pytest.raises(openai.AuthenticationError):
                call()
        for path in ("/escalations", "/metrics", "/v1/models", "/docs"):
            assert served.http.get(path).status_code == 401
        assert served.http.get("/healthz").json()["status"] == "ok"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"stop": ["."]}, "stop"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [*BREAD, {"role": "assistant", "content": "well"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "  "}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content"),
    ],
)
def test_what_cannot_be_done_is_400_in_openais_shape(bad_server, body, param):
    content = json.dumps({"model": "x", "messages": BREAD, **body})
    answer = bad_server.http.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert error["message"]


@pytest.fixture(scope="module")
def bad_server(loaded, tmp_path_factory):
    served = Served(loaded, tmp_path_factory.mktemp("bad"), Limits(), None, 2000)
    served.thread.start()
    yield served
    served.stop()


def test_a_body_that_is_too_large_malformed_or_from_another_name_is_turned_away(bad_server):
    assert bad_server.decide("x" * 3000).status_code == 413
    assert (
        bad_server.http.post("/v1/decisions", content=iter([b"x" * 1500] * 2))
        .json()["error"]["message"]
        .startswith("the request's")
    )
    json_type = {"content-type": "application/json"}
    for content in (b"", b"{", b"[]", b"\xff", b"[" * 1900):
        answer = bad_server.http.post("/v1/decisions", content=content, headers=json_type)
        assert (answer.status_code, list(answer.json())) == (400, ["error"])
    assert bad_server.http.get("/healthz", headers={"host": "elsewhere.example"}).status_code == 400
    for name in ("localhost:8000", "[::1]:8000"):
        assert bad_server.http.get("/healthz", headers={"host": name}).status_code == 200
    for path, status in (("/nothing", 404), ("/v1/decisions", 405), ("/v1/models/other", 404)):
        assert bad_server.http.get(path).status_code == status
    assert bad_server.decide("fine").status_code == 200


def test_an_audit_log_that_cannot_be_written_means_no_decision(serving, loaded, monkeypatch):
    with serving(loaded) as served:
        monkeypatch.setattr(served.audit, "extend", lambda events: 1 / 0)
        assert served.decide("hello").status_code == 500
        assert served.http.post("/v1/chat/completions", json={"model": "x", "messages": BREAD}).status_code == 500
        monkeypatch.undo()
        assert served.decide("hello").status_code == 200


def test_no_small_answer_waits_for_the_clients_acknowledgement():
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["no/such/run"], "no adapter here"),
        (["RUN", "--host", "0.0.0.0"], "SO8T_TOKEN"),
        (["RUN", "--token-file", "no/such/file"], "cannot be read"),
        (["RUN", "--port", "TAKEN"], "Address already in use"),
        (["RUN", "--max-batch", "0"], "not 1 or more"),
        (["RUN", "--port", "70000"], "65535"),
        (["RUN", "--timeout", "0"], "not more than 0"),
    ],
)
def test_options_that_cannot_work_are_one_line_and_code_2(so8t, finished_run, tmp_path, arguments, told, monkeypatch):
    monkeypatch.delenv("SO8T_TOKEN", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        swap = {"RUN": str(finished_run), "TAKEN": str(taken.getsockname()[1])}
        port = [] if "--port" in arguments else ["--port", "0"]
        code, _, err = so8t("serve", *(swap.get(a, a) for a in arguments), *port, "--state", tmp_path)
    assert code == 2
    assert told in err.replace("\n", " ")
    assert "Traceback" not in err
