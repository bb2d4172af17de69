"""Exports of the log: what each format writes, and that nothing in an entry breaks out of its line or cell."""

from __future__ import annotations

import csv
import io
import json
import re
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from asapd.wire.audit_export import COLUMNS, FORMATS

ENTRY: dict[str, Any] = {
    "seq": 7,
    "id": "aud_1",
    "timestamp": "2026-11-20T09:00:01.123456Z",
    "event_type": "key.created",
    "actor": 'uid:0 "]\\',
    "subject": "=1+1",
    "details": {"name": "käthe 😀", "n": 1},
    "salt": "00" * 16,
    "payload_hash": "11" * 32,
    "previous_hash": "22" * 32,
    "hash": "33" * 32,
}
ERASED = {**ENTRY, "seq": 8, **dict.fromkeys(("actor", "subject", "details", "salt"))}


def whole(name: str, *rows: dict[str, Any]) -> str:
    form = FORMATS[name]()
    return (form.begin() + b"".join(form.rows([row]) for row in rows) + form.end()).decode()


def test_json_and_lines_hold_the_entries_as_they_are() -> None:
    assert json.loads(whole("json", ENTRY, ERASED)) == {"data": [ENTRY, ERASED], "count": 2, "next_cursor": None}
    assert [json.loads(line) for line in whole("ndjson", ENTRY, ERASED).splitlines()] == [ENTRY, ERASED]
    assert json.loads(whole("json"))["count"] == 0


def test_csv_has_a_record_for_each_and_no_formulas() -> None:
    header, first, second = csv.reader(io.StringIO(whole("csv", ENTRY, ERASED)))
    assert tuple(header) == COLUMNS
    assert first[5] == "'=1+1"
    assert json.loads(first[6]) == ENTRY["details"]
    assert second[4:8] == ["", "", "", ""]


def test_syslog_lines_are_of_rfc_5424() -> None:
    first, second = whole("syslog", ENTRY, ERASED).splitlines()
    assert first == (
        '<110>1 2026-11-20T09:00:01.123456Z - asapd - key.created [asapd@32473 seq="7" id="aud_1" '
        r'actor="uid:0 \"\]\\" subject="=1+1" hash="' + "33" * 32 + '"] '
        r'{"name":"k\u00e4the \ud83d\ude00","n":1}'
    )
    assert second.endswith(f'[asapd@32473 seq="8" id="aud_1" hash="{"33" * 32}"]')


@given(st.text(), st.text())
def test_nothing_in_an_entry_breaks_out_of_its_line(actor: str, text: str) -> None:
    row = {**ENTRY, "actor": actor.encode("utf-8", "replace").decode(), "details": {"t": text}}
    try:
        line = whole("syslog", row)
    except UnicodeEncodeError:
        return  # half of a surrogate pair, which no entry holds
    assert len(line.splitlines()) == 1
    assert re.match(r'<110>1 \S+ - asapd - \S+ \[asapd@32473( \w+="([^"\\\]]|\\.)*")+\] \{[ -~]*\}\n\Z', line)
    assert json.loads(line[line.index("] {") + 2 :]) == {"t": text}
