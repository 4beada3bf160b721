"""The queue of escalated requests: each waits for one decision, and gets one."""

import sqlite3
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing

import pytest

from so8t.cli import main
from so8t.conversation import Exchange
from so8t.errors import ArtefactError, SO8TError
from so8t.escalations import EscalationQueue

PROBABILITIES = {"ALLOW": 0.1, "ESCALATE": 0.8, "REFUSE": 0.1}


@pytest.fixture
def queue(tmp_path):
    queue = EscalationQueue(tmp_path / "escalations.sqlite")
    for request in ("wire the money", "drop the table", "日本語"):
        queue.add(request, None, PROBABILITIES, "decision")
    return queue


def test_what_was_put_in_comes_out_oldest_first(queue):
    assert [item.request for item in queue.listed()] == ["wire the money", "drop the table", "日本語"]
    item = queue.get(2)
    assert (item.state, item.probabilities, item.context, item.reason) == ("pending", PROBABILITIES, None, "decision")


def test_a_request_keeps_the_conversation_it_came_in(queue):
    earlier = (Exchange("hello", "Good day."), Exchange("日本語", "はい"))
    assert queue.get(queue.add("and now?", "at home", PROBABILITIES, "decision", earlier)).earlier == earlier
    assert queue.get(1).earlier == ()


def test_a_queue_from_before_conversations_is_gone_on_with(queue):
    with closing(sqlite3.connect(queue.path)) as database:
        database.execute("ALTER TABLE escalations DROP COLUMN earlier")
    again = EscalationQueue(queue.path)
    assert [item.earlier for item in again.listed()] == [(), (), ()]
    assert again.get(again.add("a", None, PROBABILITIES, "decision", [Exchange("b", "c")])).earlier == (Exchange("b", "c"),)


def test_what_is_held_is_given_to_one_sender_at_a_time_and_for_its_own_upstream(queue):
    for number in (1, 2, 3):
        queue.hold(number, f"ticket {number}", "{}", "a" if number < 3 else "b")
        queue.decide(number, "approved")
    assert [held.number for held in queue.to_send("a", seconds=100)] == [1, 2]
    assert queue.to_send("a", seconds=100) == [], "they are being sent"
    queue.send_again(1, seconds=0)
    queue.send_again(2, seconds=100)
    assert [held.number for held in queue.to_send("a", seconds=0)] == [1]
    queue.keep_reply(1, "{}", "done")
    assert queue.to_send("a", seconds=100) == []
    assert [held.number for held in queue.to_send("b", seconds=100)] == [3]


def test_what_an_old_queue_holds_does_not_say_for_whom_and_is_anybodys(queue):
    queue.hold(1, "ticket", "{}", "a")
    queue.decide(1, "approved")
    with closing(sqlite3.connect(queue.path)) as database:
        database.execute("ALTER TABLE held DROP COLUMN upstream")
        database.execute("ALTER TABLE held DROP COLUMN until")
    assert [held.number for held in EscalationQueue(queue.path).to_send("b", seconds=100)] == [1]


def test_a_place_where_no_queue_can_be_is_an_error(tmp_path):
    (tmp_path / "escalations.sqlite").mkdir()
    with pytest.raises(ArtefactError, match="cannot be used as a queue"):
        EscalationQueue(tmp_path / "escalations.sqlite")


def test_what_a_person_approves_is_what_is_shown(queue, so8t, tmp_path):
    hiding = "wire 10 \x1b[8mand 90000\x1b[0m \u202e:smile: [bold]x[/]"
    number = queue.add(hiding, None, PROBABILITIES, "decision", [Exchange("a\x9bb", "c\rd")])
    for arguments in (["list"], ["show", number]):
        code, out, _ = so8t("escalations", *arguments, "--state", tmp_path)
        assert code == 0
        assert not {c for c in out if ord(c) < 32 or 127 <= ord(c) < 160} - {"\n"}
        assert all(piece in out for piece in (r"\x1b[8mand", r"90000\x1b[0m", r"\u202e:smile: [bold]x[/]"))
    assert r"a\x9bb" in out
    assert r"c\rd" in out


def test_a_number_that_no_table_holds_is_an_error(so8t, queue, tmp_path):
    code, _, err = so8t("escalations", "show", 2**63, "--state", tmp_path)
    assert code == 2
    assert "too large" in err


def test_a_request_is_decided_once(queue):
    assert queue.decide(1, "approved", "known customer").note == "known customer"
    with pytest.raises(SO8TError, match="was approved before"):
        queue.decide(1, "denied")
    assert queue.get(1).state == "approved"
    assert [item.id for item in queue.listed()] == [2, 3]
    assert len(queue.listed(None)) == 3


def decided(path, state):
    try:
        EscalationQueue(path).decide(1, state)
    except SO8TError:
        return 0
    return 1


def test_of_two_that_decide_at_once_one_wins(queue):
    with ProcessPoolExecutor(2) as pool:
        won = list(pool.map(decided, [queue.path] * 6, ["approved", "denied"] * 3))
    assert sum(won) == 1


def test_a_file_that_is_no_queue_is_an_error_and_stays_as_it_is(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("my notes " * 200)
    with pytest.raises(ArtefactError, match=r"notes.txt: cannot be used"):
        EscalationQueue(path)
    assert path.read_text() == "my notes " * 200


def test_a_number_that_is_not_there_is_an_error(queue):
    with pytest.raises(SO8TError, match="no escalation 9"):
        queue.decide(9, "approved")


def test_the_command_lists_approves_and_denies(queue, capsys):
    state = ["--state", str(queue.path.parent)]
    main(["escalations", "approve", "1", "--note", "fine", *state])
    main(["escalations", "deny", "3", *state])
    main(["escalations", "list", *state])
    told = capsys.readouterr().out
    assert "drop the table" in told.split("id")[-1]
    assert [queue.get(k).state for k in (1, 2, 3)] == ["approved", "pending", "denied"]
    for wrong in (["escalations", "approve", *state], ["escalations", "list", "--state", str(queue.path.parent / "no")]):
        with pytest.raises(SystemExit) as end:
            main(wrong)
        assert end.value.code == 2
