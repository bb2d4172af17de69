"""Lists of revocations: what is signed is what is read, and a decoder fed anything raises its own error alone."""

from __future__ import annotations

import base64
import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.signing import SigningKey

from asapd.core.canonical import canonical
from asapd.core.types import SECOND_US
from asapd.wire.keys import key_id
from asapd.wire.revocations import (
    MAX_ENTRIES,
    Entry,
    ListMalformed,
    RevocationList,
    daemon_name,
    decode_list,
    sign_list,
    verify_list,
)

KEY, OTHER = SigningKey(b"k" * 32), SigningKey(b"o" * 32)
PUBLIC, FOREIGN = bytes(KEY.verify_key), bytes(OTHER.verify_key)
NOW_US = 1_795_169_203_000_000
names = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=40)
times = st.integers(0, 253_402_300_799 * SECOND_US)
entries = st.lists(st.builds(Entry, names, names, times, times), max_size=8)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=10,
)
LIST = sign_list(
    [Entry("urn:asap:agent:a", "del_1", NOW_US, NOW_US + SECOND_US)],
    KEY,
    issuer="asapd/x",
    number=7,
    updated_us=NOW_US,
)


def signed(**changes: Any) -> bytes:
    """The list with other members, signed anew; a member that is ... is left out."""
    document = {**json.loads(LIST), **changes}
    document.pop("signature")
    document = {name: value for name, value in document.items() if value is not ...}
    signature = KEY.sign(canonical(document)).signature
    return json.dumps({**document, "signature": base64.b64encode(signature).decode()}).encode()


@given(entries, names, st.integers(0, 2**53 - 1), st.none() | times)
def test_what_is_signed_comes_back_and_is_verified(
    given_entries: list[Entry], issuer: str, number: int, updated_us: int | None
) -> None:
    raw = sign_list(given_entries, KEY, issuer=issuer, number=number, updated_us=updated_us)
    found = decode_list(raw)
    assert (found.issuer, found.number, found.entries) == (issuer, number, given_entries)
    assert found.key_id == key_id(PUBLIC)
    assert verify_list(found, [FOREIGN, PUBLIC]) == PUBLIC
    assert verify_list(found, [FOREIGN]) is None
    assert verify_list(found, []) is None


@given(entries)
def test_what_is_signed_is_the_canonical_form(given_entries: list[Entry]) -> None:
    raw = sign_list(given_entries, KEY, issuer="asapd/x", number=1, updated_us=NOW_US)
    document = json.loads(raw)
    del document["signature"]
    assert decode_list(raw).signed == canonical(document)


@given(st.integers(0, len(LIST) - 1), st.integers(0, 255))
def test_no_byte_can_be_changed_without_its_being_seen(place: int, value: int) -> None:
    changed = LIST[:place] + bytes([value]) + LIST[place + 1 :]
    try:
        found = decode_list(changed)
    except ListMalformed:
        return
    assert changed == LIST or verify_list(found, [PUBLIC]) is None


@given(st.binary(max_size=300) | anything.map(lambda value: json.dumps(value).encode()))
def test_whatever_is_no_list_is_malformed(raw: bytes) -> None:
    with pytest.raises(ListMalformed):
        decode_list(raw)


@given(st.dictionaries(st.sampled_from(sorted(json.loads(LIST))), anything, max_size=3), anything)
def test_a_member_of_the_wrong_kind_raises_nothing_else(changes: dict[str, Any], entry: Any) -> None:
    document = {**json.loads(LIST), "entries": [entry], **changes}
    with suppress(ListMalformed):
        assert isinstance(decode_list(json.dumps(document).encode()), RevocationList)


ENTRY = json.loads(LIST)["entries"][0]


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"version": True},
        {"version": ...},
        {"issuer": ...},
        {"issuer": ""},
        {"issuer": "x" * 257},
        {"issuer": "two words"},
        {"key_id": None},
        {"number": -1},
        {"number": True},
        {"entries": {}},
        {"entries": [None]},
        {"entries": [ENTRY] * (MAX_ENTRIES + 1)},
        {"entries": [{**ENTRY, "id": "ä"}]},
        {"entries": [{**ENTRY, "issuer": None}]},
        {"entries": [{**ENTRY, "revoked_at": 1}]},
        {"entries": [{**ENTRY, "expires_at": "soon"}]},
        {"entries": [{**ENTRY, "expires_at": "9999-12-31T23:59:59-12:00"}]},
        {"entries": [{**ENTRY, "expires_at": "0001-01-01T00:00:00Z"}]},
    ],
    ids=lambda changes: f"{changes}"[:60],
)
def test_a_list_that_says_something_odd_is_malformed_though_it_is_signed(changes: dict[str, Any]) -> None:
    with pytest.raises(ListMalformed):
        decode_list(signed(**changes))


@pytest.mark.parametrize(
    "text",
    [
        LIST.replace(b'"version":1', b'"version":1,"version":1'),
        LIST.replace(b'"version":1', b'"version":1,"x":1.5'),
        LIST.replace(b'"version":1', b'"version":1,"x":"\\ud800"'),
        LIST.replace(b'"signature":"', b'"signature":" '),
        LIST.replace(b'"signature":', b'"other":'),
        LIST.replace(b'"number":7', b'"number":9007199254740992'),
    ],
)
def test_what_has_two_meanings_or_no_canonical_form_is_malformed(text: bytes) -> None:
    with pytest.raises(ListMalformed):
        decode_list(text)


def test_members_that_are_not_known_are_covered_by_the_signature() -> None:
    assert verify_list(decode_list(signed(note="kept")), [PUBLIC]) == PUBLIC
    assert verify_list(decode_list(signed(note="kept").replace(b"kept", b"lost")), [PUBLIC]) is None


def test_an_entry_without_an_issuer_is_of_the_lists_own() -> None:
    entry = {name: value for name, value in ENTRY.items() if name != "issuer"}
    (found,) = decode_list(signed(issuer="urn:asap:agent:me", entries=[entry])).entries
    assert found.issuer == "urn:asap:agent:me"


def test_a_daemon_is_named_after_its_key() -> None:
    assert daemon_name(PUBLIC) == f"asapd/{key_id(PUBLIC)}"
