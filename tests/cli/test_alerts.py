"""Acknowledging, silencing and looking after push targets from the command line."""

from __future__ import annotations

from asapd.cli.outcome import Exit
from tests.cli.programs import Daemon, Program


def test_silences_are_added_listed_and_removed(ctl: Program, daemon: Daemon) -> None:
    added = ctl("silences", "add", "--agent", "urn:asap:agent:cli-*", "--for", "2h", "--comment", "moving")
    assert added.code == Exit.DONE
    silence = added.out.split()[1]
    (row,) = [one for one in ctl("silences", "list", "--json").json["data"] if one["id"] == silence]
    assert (row["agent"], row["comment"], row["state"]) == ("urn:asap:agent:cli-*", "moving", "active")
    assert silence in ctl("silences", "list").out
    assert ctl("silences", "remove", silence).out == f"ended: {silence}\n"
    assert silence not in ctl("silences", "list").out
    assert silence in ctl("silences", "list", "--expired").out
    assert ctl("silences", "remove", silence, "--json").json["state"] == "expired"
    until = ctl("silences", "add", "--type", "budget", "--until", "2099-01-01T00:00:00Z")
    assert (until.code, "within a year" in until.err) == (Exit.USAGE, True)
    made = ctl("silences", "add", "--severity", "warning", "--for", "1s", "--author", "anna", "--json").json
    assert made["author"] == "anna"


def test_what_is_not_there_is_told(ctl: Program, daemon: Daemon) -> None:
    for arguments in (
        ("breaches", "ack", "brc_none", "--comment", "x"),
        ("silences", "remove", "sil_none"),
        ("alerts", "redeliver", "7"),
    ):
        ran = ctl(*arguments)
        assert (ran.code, "there is no" in ran.err) == (Exit.USAGE, True)


def test_targets_and_dead_letters_are_listed(ctl: Program, daemon: Daemon) -> None:
    assert ctl("alerts", "targets", "--json").json == {"data": [], "count": 0, "next_cursor": None}
    assert ctl("alerts", "targets").out.split()[:3] == ["NAME", "KIND", "STATE"]
    assert ctl("alerts", "dead", "--json").json["count"] == 0
    assert ctl("alerts", "dead", "--target", "x").out.split()[:3] == ["ID", "TARGET", "SEQ"]


def test_an_open_breach_is_acknowledged(ctl: Program, answers: object) -> None:
    reply = b'{"breach":{},"acknowledged":{"at":"2026-11-20T10:00:00.000000Z","by":"uid:0 pid:1","comment":"on it"}}'
    head = b"HTTP/1.1 201 Created\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(reply)
    answers(head + reply)  # type: ignore[operator]  # a callable fixture
    assert ctl("breaches", "ack", "brc_1").out.startswith("acknowledged: brc_1 by uid:0 pid:1 at 2026")
    assert ctl("breaches", "ack", "brc_1", "--json").json["acknowledged"]["comment"] == "on it"


def test_many_breaches_are_put_together_and_acknowledged_together(ctl: Program, answers: object) -> None:
    def say(reply: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(reply)
        answers(head + reply)  # type: ignore[operator]  # a callable fixture

    say(b'{"acknowledged":["brc_1","brc_2"],"count":2}')
    assert ctl("breaches", "ack", "--type", "latency").out.splitlines()[-1] == "2 acknowledged"
    assert ctl("breaches", "ack", "--severity", "critical", "--json").json["count"] == 2
    for wrong in ((), ("brc_1", "--type", "latency")):
        assert ctl("breaches", "ack", *wrong).code == Exit.USAGE
    group = b'{"breach_type":"latency","count":3,"open":2,"critical":1,"unacknowledged":0,'
    group += b'"first_detected_at":"2026-11-20","last_detected_at":"2026-11-21","seq":9}'
    say(b'{"data":[%b],"count":1,"next_cursor":null}' % group)
    assert ctl("breaches", "groups", "--by", "type").out.split()[:3] == ["BREACH", "TYPE", "OPEN"]
    assert ctl("breaches", "groups", "--json").json["data"][0]["open"] == 2
    say(b'{"data":[],"count":0,"next_cursor":null}')
    assert ctl("breaches", "groups").code == Exit.DONE


def test_dead_letters_and_targets_in_trouble_are_shown(ctl: Program, answers: object) -> None:
    target = b'{"name":"pager","kind":"webhook","state":"failing","cursor":1,"backlog":2,"dead_letters":1,'
    target += b'"delivered_at":null,"failing_since":"2026-11-20T10:00:00.000000Z","last_error":"refused: x"}'
    letter = b'{"id":7,"target":"pager","seq":1,"alert":{"event":"opened"},"died_at":"2026-11-20","error":"no"}'
    for arguments, row, shown in (
        (("alerts", "targets"), target, "refused: x"),
        (("alerts", "dead"), letter, "opened"),
        (("alerts", "redeliver", "7"), b"{}", "redelivering: 7"),
    ):
        body = b'{"data":[%b],"count":1,"next_cursor":null,"id":7}' % row
        answers(  # type: ignore[operator]  # a callable fixture
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        assert shown in ctl(*arguments).out
    assert ctl("alerts", "redeliver", "7", "--json").json["id"] == 7
