"""Rows of an export: every form is read, and what the daemon cannot have written is named."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asapd.wire.export import BadEntryError, NotAnExportError, read_entry, read_rows

ROW: dict[str, Any] = {
    "id": "aud_1",
    "seq": 1,
    "timestamp": "2026-11-20T09:00:01.123456Z",
    "event_type": "test.noted",
    "actor": "käthe",
    "subject": "s",
    "details": {"b": [1, None], "a": "é"},
    "salt": "01" * 16,
    "payload_hash": "02" * 32,
    "previous_hash": "00" * 32,
    "hash": "03" * 32,
}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROW) + "\n" + json.dumps(ROW) + "\n",
        "\n" + json.dumps(ROW) + "\n\n" + json.dumps(ROW),
        json.dumps([ROW, ROW]),
        json.dumps({"data": [ROW, ROW], "count": 2, "next_cursor": None}, indent=2),
    ],
)
def test_each_form_yields_the_same_rows(text: str) -> None:
    assert list(read_rows(text.encode().splitlines(keepends=True))) == [ROW, ROW]


def test_an_entry_keeps_the_canonical_text_of_its_details_and_leaves_other_fields_alone() -> None:
    entry = read_entry({**ROW, "note": 1.5})
    assert (entry.seq, entry.timestamp_us, entry.actor) == (1, 1_795_165_201_123_456, "käthe".encode())
    assert entry.details == '{"a":"é","b":[1,null]}'.encode()
    assert (entry.salt, entry.hash) == (b"\x01" * 16, b"\x03" * 32)


@pytest.mark.parametrize("text", [b"", b" \n", b"text", b"[5]", b'{"data": {}}', b'{"seq": 1, "seq": 1}', b"\xff"])
def test_what_holds_no_entries_is_no_export(text: bytes) -> None:
    with pytest.raises(NotAnExportError):
        list(read_rows([text]))


def test_a_key_that_stands_twice_is_refused() -> None:
    twice = json.dumps(ROW).replace('{"id"', '{"actor": "other", "id"')
    with pytest.raises(BadEntryError, match="entry 2 of the file"):
        list(read_rows([json.dumps(ROW).encode(), twice.encode()]))


@given(
    field=st.sampled_from(sorted(ROW)),
    value=st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists),
)
def test_any_value_in_any_field_is_read_or_refused_by_name(field: str, value: object) -> None:
    """A decoder raises nothing but its own error."""
    refused = None
    try:
        read_entry({**ROW, field: value})
    except BadEntryError as error:
        refused = error
    if refused is not None:
        assert refused.seq == (None if field == "seq" else 1)
        assert refused.id == ((value if isinstance(value, str) else None) if field == "id" else "aud_1")


def test_integers_of_an_entry_are_read_as_older_builds_hashed_them() -> None:
    line = json.dumps({**ROW, "details": {"spent": 2**53, "then_us": -(2**62)}}).encode()
    assert read_entry(next(read_rows([line]))).details == b'{"spent":9007199254740992,"then_us":-4611686018427387904}'
    with pytest.raises(BadEntryError, match="no canonical form"):
        read_entry({**ROW, "details": {"spent": 2**64}})
