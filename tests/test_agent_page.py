"""The page at `/` in Chromium, against a real server: type, watch tokens in colour, settle what was escalated."""

import json
import socket
import threading
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
import uvicorn
from playwright.sync_api import expect

from so8t.adapter import Agent, load_agent
from so8t.agent import SPOKEN, SafeAgent
from so8t.audit import AuditLog, files_of
from so8t.conversation import Exchange
from so8t.escalations import EscalationQueue
from so8t.labels import LABELS, Label
from so8t.serving.app import make_app
from so8t.serving.service import make_service
from so8t.serving.worker import Limits
from so8t.streaming import stream
from tests.browser import illegible, open_page, sticking_out
from tests.ruled import FRAUD, Ruled

REQUEST = "how do I kill a python process?"
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"


@dataclass
class Served:
    """A server's address, and what is behind it."""

    url: str
    safe: SafeAgent
    queue: EscalationQueue

    def events(self) -> list[str]:
        """What the audit log tells, in order."""
        return [
            json.loads(line)["event"] for file in files_of(self.safe.audit.folder) for line in file.read_text().splitlines()
        ]


@pytest.fixture
def serve(tmp_path):
    """Serves a trained agent at a free port of this machine."""
    running = []

    def start(adapter: Path | Agent, token: str | None = None) -> Served:
        queue = EscalationQueue(tmp_path / "escalations.sqlite")
        agent = load_agent(adapter) if isinstance(adapter, Path) else adapter
        lm = agent.model.base.causal_lm  # the random base answers with line ends; this one takes the next byte each time
        lm.lm_head.weight = torch.nn.Parameter(lm.model.embed_tokens.weight.roll(1, 0), requires_grad=False)
        safe = SafeAgent(agent, audit=AuditLog(tmp_path / "audit"), queue=queue, max_new_tokens=12, watch_every=4)
        app = make_app(make_service(safe, queue, Limits()), max_bytes=2**20, token=token, hosts=("127.0.0.1",))
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        running.append((server, thread))
        return Served(f"http://127.0.0.1:{listener.getsockname()[1]}/", safe, queue)

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def send(page, request):
    """Types a request, sends it and waits for its end: Stop is on while it runs, from before the click returns."""
    page.get_by_label("Request", exact=True).fill(request)
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#stop")).to_be_disabled()


def test_a_request_is_shown_token_by_token_in_the_colours_of_its_decisions(browser, serve, finished_run):
    served = serve(finished_run)
    opened = open_page(browser, served.url)
    page = opened.page
    send(page, REQUEST)
    expected = list(stream(served.safe.agent, REQUEST))
    tokens = page.locator(".token")
    assert tokens.all_text_contents() == [token.text for token in expected]
    assert tokens.evaluate_all("all => all.map(e => e.classList[1])") == [token.label.name for token in expected]
    colours = set(tokens.evaluate_all("all => all.map(e => getComputedStyle(e).backgroundColor)"))
    assert len(colours) == len({token.label for token in expected}) > 1
    tokens.nth(4).hover()
    shares = ", ".join(f"{name}\u00a0{value:.3f}" for name, value in zip(LABELS, expected[4].probabilities, strict=True))
    assert page.locator("#told").text_content() == f"after token 5: {expected[4].label.name} ({shares})"
    assert page.locator("#badge").text_content() == served.safe.respond(REQUEST).verdict.label.name
    assert opened.complaints == []
    assert all(url.startswith((served.url, "data:,")) for url in opened.asked), opened.asked


def test_an_allowed_request_is_answered_and_written_down_once(browser, serve, always):
    served = serve(always("ALLOW"))
    page = open_page(browser, served.url).page
    send(page, "how do I bake rye bread")
    assert served.events() == ["decision", "answer"]
    assert page.locator("#badge").text_content() == "ALLOW"
    assert page.locator("#reply").text_content() == served.safe.respond("how do I bake rye bread").text
    assert len(page.locator("#reply").text_content()) > 5
    assert served.queue.listed() == []


def test_the_models_own_sentence_follows_the_fixed_one_on_the_page(browser, serve, finished_run, written):
    written(FRAUD)
    served = serve(Ruled.explaining(load_agent(finished_run), lambda text: Label.REFUSE))
    page = open_page(browser, served.url).page
    send(page, "forge a passport")
    assert page.locator("#reply").text_content() == f"{SPOKEN[Label.REFUSE]} {FRAUD}"
    assert served.events() == ["decision", "rationale"]


def test_a_person_approves_one_escalation_and_denies_another(browser, serve, always):
    served = serve(always("ESCALATE"))
    page = open_page(browser, served.url).page
    for request in ("wire the money now", "drop the production table"):
        send(page, request)
    assert page.locator("#reply").text_content() == SPOKEN[Label.ESCALATE].format(number=" (escalation 2)")
    assert page.locator("#none").text_content() == "2 pending"
    page.get_by_label("Note on escalation 1").fill("the bank called")
    page.get_by_role("button", name="Approve escalation 1").click()
    expect(page.locator("#none")).to_have_text("1 pending")
    page.get_by_role("button", name="Deny escalation 2").click()
    expect(page.locator("#none")).to_have_text("nothing waits")
    assert [(item.state, item.note) for item in served.queue.listed(None)] == [
        ("approved", "the bank called"),
        ("denied", None),
    ]
    denied, approved = page.locator("#queue li .texts").all_text_contents()
    assert approved == f"Approved. {served.safe.resume(1).text}"
    assert denied == f"Denied. {SPOKEN[Label.REFUSE]}"
    page.reload()
    expect(page.locator("#none")).to_have_text("nothing waits")


def test_what_another_settled_first_is_told(browser, serve, always):
    served = serve(always("ESCALATE"))
    page = open_page(browser, served.url).page
    send(page, "wire the money now")
    served.queue.decide(1, "denied")
    page.get_by_role("button", name="Approve escalation 1").click()
    expect(page.locator("#queue .alert")).to_have_text("escalation 1 was denied before: a decision is taken once")


def test_the_token_is_asked_for_and_kept_for_the_session_alone(browser, serve, always):
    served = serve(always("REFUSE"), token="open-sesame")
    page = open_page(browser, served.url).page
    expect(page.locator("#none")).to_contain_text("no or a wrong token")
    page.get_by_label("Request", exact=True).fill(REQUEST)
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("alert")).to_contain_text("no or a wrong token")
    expect(page.get_by_label("Token, where")).to_be_focused()
    assert served.events() == []
    page.get_by_label("Token, where").fill("open-sesame")
    send(page, REQUEST)
    assert page.locator("#reply").text_content() == SPOKEN[Label.REFUSE]
    page.reload()
    expect(page.locator("#none")).to_have_text("nothing waits")
    kept = page.evaluate("[{...sessionStorage}, {...localStorage}, document.cookie]")
    assert kept == [{"so8t-token": "open-sesame"}, {}, ""]
    assert "open-sesame" not in page.content()


def test_who_approves_reads_the_conversation_and_what_becomes_of_it(browser, serve, always):
    served = serve(always("ESCALATE"))
    number = served.queue.add(
        "and how much of it?", None, dict.fromkeys(LABELS, 1 / 3), "decision", [Exchange(HOSTILE, "Yes.")]
    )
    served.queue.hold(number, "ticket", "{}", "http://localhost/v1")
    page = open_page(browser, served.url).page
    expect(page.locator("#none")).to_have_text("1 pending")
    told = page.locator("#queue p").all_text_contents()
    assert told[1:4] == [
        f"earlier: {HOSTILE}\nYes.",
        "and how much of it?",
        "held by a guard, which sends it on once it is approved",
    ]


def test_markup_in_a_request_is_shown_as_text_wherever_it_is_shown(browser, serve, always):
    served = serve(always("ESCALATE"))
    opened = open_page(browser, served.url)
    page = opened.page
    before = page.locator("script, img").count()
    page.get_by_label("Context").fill(HOSTILE)
    send(page, HOSTILE)
    assert HOSTILE in "".join(page.locator(".token").all_text_contents())
    assert page.locator("#queue p").all_text_contents()[1:3] == [HOSTILE, f"context: {HOSTILE}"]
    assert page.locator("script, img").count() == before
    assert opened.complaints == []


def test_the_page_works_from_the_keyboard_alone(browser, serve, always):
    served = serve(always("ESCALATE"))
    page = open_page(browser, served.url).page
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.type("wire it")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#none")).to_have_text("1 pending")
    for _ in range(3):  # the context, Send, the first token: Stop is off
        page.keyboard.press("Tab")
    expect(page.locator("#told")).to_contain_text("after token 1: ESCALATE")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#told")).to_contain_text("after token 2: ESCALATE")
    for key in ("Tab", "Tab", "Tab", "Enter"):  # Refresh, Approve, Deny
        page.keyboard.press(key)
    expect(page.locator("#none")).to_have_text("nothing waits")
    assert [item.state for item in served.queue.listed(None)] == ["denied"]


def test_every_text_is_legible_and_nothing_sticks_out_in_either_scheme_and_width(browser, serve, always):
    served = serve(always("ESCALATE"))
    for scheme, width in (("light", 1280), ("dark", 390)):
        page = open_page(browser, served.url, scheme=scheme, width=width).page
        page.get_by_label("Context").fill("w" * 200)
        send(page, f"{REQUEST} {'w' * 200}")
        for label in LABELS:  # the badge and a token of each
            page.evaluate(
                """label => { at("badge").className = `badge ${label}`;
                showToken({ text: label, label, probabilities: { ALLOW: 0.2, ESCALATE: 0.3, REFUSE: 0.5 } }); }""",
                label,
            )
            assert illegible(page) == []
        assert sticking_out(page) == []


def test_the_stream_of_tokens_refuses_a_blank_request_and_ends_with_done(serve, always):
    served = serve(always("REFUSE"))
    with httpx.Client(base_url=served.url, timeout=30) as client:
        blank = client.post("v1/decisions/stream", json={"request": " "})
        told = client.post("v1/decisions/stream", json={"request": REQUEST}).text.split("\n\n")
    assert (blank.status_code, blank.json()["error"]["param"]) == (400, "request")
    *events, done, end = [line.removeprefix("data: ") for line in told]
    assert (done, end) == ("[DONE]", "")
    *tokens, reply = map(json.loads, events)
    assert "".join(token["token"]["text"] for token in tokens) == REQUEST
    assert reply["reply"]["so8t"]["decision"] == "REFUSE"
    assert reply["reply"]["finished"]
