"""`report.html` opened in Chromium, in light and dark, wide and narrow: whole in itself, legible, within its window."""

import json
import shutil

import pytest
from playwright.sync_api import expect

from so8t.labels import LABELS
from so8t.policy import Policy, Threshold, adapter_digest, save_policy
from so8t.report import panels, render
from so8t.run_folder import read_run
from tests.browser import illegible, open_page, sticking_out

SECTIONS = [
    "setup", "metrics", "calibration", "stream", "confusion", "reliability", "trade-off", "risk-coverage",
    "grouped-curves", "robustness", "group", "losses", "gates", "memory", "mistakes",
]  # fmt: skip
HOSTILE = "</td></table><script>alert(1)</script><img src=x onerror=alert(2)><style>body{display:none}</style>"


@pytest.fixture(scope="module")
def report(finished_run, tmp_path_factory) -> str:
    """The address of a report on both sets, with texts in it that are hard to lay out or were written to harm."""
    folder = tmp_path_factory.mktemp("browser") / "a_run"
    shutil.copytree(finished_run, folder, ignore=shutil.ignore_patterns("prefix", "checkpoints", "baselines"))
    shutil.copy(folder / "test.json", folder / "unseen.json")
    rows = [json.loads(line) for line in (folder / "test_predictions.jsonl").read_text().splitlines()]
    for row, request in zip(rows, (HOSTILE, "w" * 390, "これは長い依頼です。" * 30, "اكتب رسالة إلى جارك"), strict=False):
        row |= {"user_request": request, "safety_label": "REFUSE", "decision": "ALLOW"}
        row["probabilities"] = {"ALLOW": 0.999, "ESCALATE": 0.001, "REFUSE": 0.0}
        row["tokens"] = [[request[k : k + 9], LABELS[k // 9 % 3]] for k in range(0, len(request), 9)]
    for name in ("test_predictions.jsonl", "unseen_predictions.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = folder / "report.html"
    digest, never = adapter_digest(folder / "adapter"), Threshold(None, 0.05, 0.05, 300, 0.0, 0.01)
    save_policy(folder / "adapter", Policy(1.2, never, never, 100, "held_out.jsonl", 0.07, 0.04, digest))
    run = read_run(folder)
    page.write_text(render(run, panels(run)), encoding="utf-8")
    return page.as_uri()


def test_the_report_opens_without_a_complaint_and_asks_for_nothing_but_itself(browser, report):
    opened = open_page(browser, report)
    assert opened.complaints == []
    assert [url for url in opened.asked if not url.startswith("data:image/png;base64,")] == [report]


def test_every_section_is_there_and_its_link_leads_to_it(browser, report):
    page = open_page(browser, report).page
    assert page.eval_on_selector_all("section", "all => all.map(s => s.id)") == SECTIONS
    for key in SECTIONS:
        page.click(f"nav a[href='#{key}']")
        expect(page.locator(f"#{key} h2")).to_be_in_viewport()


def test_every_picture_of_the_report_decodes(browser, report):
    page = open_page(browser, report).page
    sizes = page.eval_on_selector_all(
        "img", "all => Promise.all(all.map(i => i.decode().then(() => [i.naturalWidth, i.naturalHeight, i.alt.length])))"
    )
    assert len(sizes) == 12, "two of each that is drawn by set, of reliability before and after, and one of the others"
    assert all(width > 300 and height > 200 and alt for width, height, alt in sizes)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_of_the_report_is_legible(browser, report, scheme):
    page = open_page(browser, report, scheme=scheme).page
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") is (scheme == "light")
    assert illegible(page) == []


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_on_the_report_sticks_out_of_the_window(browser, report, width):
    assert sticking_out(open_page(browser, report, width=width).page) == []


def test_markup_in_a_request_stays_text_in_the_browser(browser, report):
    opened = open_page(browser, report)
    cell = opened.page.locator("#mistakes td", has_text="onerror").first
    assert cell.inner_text() == HOSTILE
    assert opened.page.locator("script").count() == 0
    assert opened.complaints == []
