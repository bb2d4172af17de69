"""Entry hashes are what anyone computes from the RFC 8785 form; a walk stops at the first entry that does not fit."""

import copy
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import astuple, replace

from asapd.core.audit import (
    GENESIS,
    Entry,
    Fault,
    Walk,
    as_they_are,
    canonical_details,
    entry_hash,
    payload_hash,
    read_details,
    verify,
    verify_raw,
)
from asapd.core.canonical import exact
from asapd.core.types import MAX_INT, format_us

NOW_US = 1_795_169_203_000_000

texts = st.text(st.characters(exclude_categories=["Cs"]))
keys = st.text(st.characters(codec="ascii"))
values = st.recursive(
    st.none() | st.booleans() | st.integers(-MAX_INT, MAX_INT) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)
details = st.dictionaries(keys, values, max_size=5)


@given(details)
def test_details_are_written_in_their_canonical_form(content: dict[str, Any]) -> None:
    before = copy.deepcopy(content)
    assert canonical_details(content) == rfc8785.dumps(content)
    assert content == before


large = st.integers(-(2**63), 2**63 - 1) | st.integers(MAX_INT - 3, MAX_INT + 3) | st.integers(-MAX_INT - 3, -MAX_INT)


@given(st.dictionaries(keys, st.recursive(large | texts, lambda inner: st.lists(inner) | st.dictionaries(keys, inner))))
def test_no_details_hold_an_integer_that_has_no_canonical_form(content: dict[str, Any]) -> None:
    assert canonical_details(content) == rfc8785.dumps(exact(content))


@pytest.mark.parametrize("written", [canonical_details, as_they_are])
def test_times_and_amounts_are_read_as_integers_in_either_form(written: Callable[[dict[str, Any]], bytes]) -> None:
    told: dict[str, Any] = {
        "id": "9007199254740992",
        "spent_microusd": 2**60,
        "at_us": -(2**60),
        "end_us": MAX_INT,
        "then_us": None,
        "given_microusd": {"one": 2**62, "other": 5},
    }
    assert read_details(written(told).decode()) == told
    assert read_details(written({"end_us": 5}).decode()) == {"end_us": 5}


@given(st.binary(min_size=16, max_size=16), texts, details, texts)
def test_the_payload_hash_covers_salt_actor_details_and_subject(
    salt: bytes, actor: str, content: dict[str, Any], subject: str
) -> None:
    canonical = rfc8785.dumps({"actor": actor, "details": content, "subject": subject})
    expected = sha256(salt + canonical).digest()
    text = canonical_details(content)
    assert payload_hash(salt, actor, text, subject) == expected
    assert payload_hash(salt, actor.encode(), text, subject.encode()) == expected


@given(
    st.integers(1, MAX_INT),
    st.integers(0, 4_000_000_000_000_000),
    st.binary(min_size=32, max_size=32),
    st.binary(min_size=32, max_size=32),
)
def test_the_entry_hash_covers_everything_else(seq: int, timestamp_us: int, payload: bytes, previous: bytes) -> None:
    canonical = rfc8785.dumps(
        {
            "event_type": "usage.recorded",
            "id": "aud_1",
            "payload_hash": payload.hex(),
            "previous_hash": previous.hex(),
            "seq": seq,
            "timestamp": format_us(timestamp_us),
        }
    )
    assert entry_hash(seq, "aud_1", timestamp_us, "usage.recorded", payload, previous) == sha256(canonical).digest()


def log(length: int) -> list[Entry]:
    entries: list[Entry] = []
    for seq in range(1, length + 1):
        previous = entries[-1].hash if entries else GENESIS
        payload = payload_hash(b"s" * 16, "actor", b'{"n":1}', f"subject {seq}")
        digest = entry_hash(seq, f"aud_{seq}", NOW_US, "noted", payload, previous)
        subject = f"subject {seq}".encode()
        entries.append(
            Entry(
                seq, f"aud_{seq}", NOW_US, "noted", b"actor", subject, b'{"n":1}', b"s" * 16, payload, previous, digest
            )
        )
    return entries


def raw(entries: list[Entry]) -> list[Any]:
    """Entries as rows whose text is read as bytes."""
    return [
        (entry.seq, entry.id.encode(), entry.timestamp_us, entry.event_type.encode(), *astuple(entry)[4:])
        for entry in entries
    ]


def verified_raw(entries: list[Entry]) -> Walk:
    """What a walk of stored rows comes to, which is what a walk of entries does."""
    hashes: list[bytes] = []
    walk = verify_raw(raw(entries), Walk(), hashes)
    assert walk == verify(entries)
    assert hashes == [entry.hash for entry in entries[: walk.verified]]
    return walk


def test_a_whole_log_verifies_at_once_and_in_parts() -> None:
    entries = log(5)
    walk = verify(entries)
    assert walk == Walk(5, entries[-1].hash, 5)
    assert verify(entries[2:], verify(entries[:2])) == walk
    hashes: list[bytes] = []
    assert verify_raw(raw(entries[2:]), verify_raw(raw(entries[:2]), Walk(), hashes), hashes) == walk
    assert hashes == [entry.hash for entry in entries]
    assert verify([]) == Walk()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"seq": 4}, "entry 3 is missing"),
        ({"seq": 2}, "sequence goes back to 2"),
        ({"previous_hash": GENESIS}, "previous_hash is not the hash of the entry before it"),
        ({"actor": b"\xff"}, "actor or subject is not UTF-8"),
        ({"subject": b"another"}, "payload_hash does not match actor, subject, details and salt"),
        ({"details": b'{"n": 1}'}, "payload_hash does not match actor, subject, details and salt"),
        ({"salt": None}, "payload is only partly erased"),
        ({"actor": None, "subject": None, "details": None}, "payload is only partly erased"),
        ({"timestamp_us": 2**62}, "timestamp is outside the calendar"),
        ({"timestamp_us": NOW_US + 1}, "hash does not match the entry"),
        ({"id": 'aud_3","x":"'}, "hash does not match the entry"),
        ({"event_type": "other"}, "hash does not match the entry"),
        ({"hash": GENESIS}, "hash does not match the entry"),
    ],
)
def test_the_first_entry_that_does_not_fit_ends_the_walk_and_is_named(changes: dict[str, Any], reason: str) -> None:
    entries = log(5)
    entries[2] = replace(entries[2], **changes)
    walk = verified_raw(entries)
    assert walk == Walk(2, entries[1].hash, 2, Fault(entries[2].seq, entries[2].id, reason))


def test_a_fault_is_said_with_an_id_where_an_entry_has_it() -> None:
    assert str(Fault(4, "aud_1", "is wrong")) == "entry 4 (aud_1): is wrong"
    assert str(Fault(4, None, "a checkpoint is wrong")) == "at entry 4: a checkpoint is wrong"


def test_an_erased_entry_verifies_without_its_payload() -> None:
    entries = log(3)
    entries[1] = replace(entries[1], actor=None, subject=None, details=None, salt=None)
    assert verified_raw(entries).verified == 3
    forged = replace(entries[1], payload_hash=GENESIS)
    assert verify([entries[0], forged]).fault == Fault(2, "aud_2", "hash does not match the entry")


def test_erased_entries_are_counted_apart() -> None:
    entries = log(3)
    bare = replace(entries[1], actor=None, subject=None, details=None, salt=None)
    walk = verified_raw([entries[0], bare, entries[2]])
    assert (walk.fault, walk.verified, walk.erased) == (None, 3, 1)


@given(st.lists(st.tuples(texts, texts, details, st.integers(0, 3)), max_size=6), st.integers(0, 5))
def test_rows_as_stored_verify_as_entries_do(said: list[tuple[str, str, dict[str, Any], int]], bad: int) -> None:
    entries: list[Entry] = []
    for seq, (actor, subject, content, late_us) in enumerate(said, 1):
        previous, text = entries[-1].hash if entries else GENESIS, canonical_details(content)
        payload = payload_hash(b"s" * 16, actor, text, subject)
        digest = entry_hash(seq, f"aud_{seq}", NOW_US + late_us, "noted", payload, previous)
        names = (actor.encode(), subject.encode())
        entries.append(
            Entry(seq, f"aud_{seq}", NOW_US + late_us, "noted", *names, text, b"s" * 16, payload, previous, digest)
        )
    assert verified_raw(entries).verified == len(said)
    if bad < len(entries):
        entries[bad] = replace(entries[bad], details=(entries[bad].details or b"") + b" ")
        assert verified_raw(entries).verified == bad


def test_an_id_or_a_type_that_is_no_text_is_named() -> None:
    rows = raw(log(3))
    rows[1] = (2, b"\xff", *rows[1][2:])
    walk = verify_raw(rows, Walk(), [])
    assert walk.verified == 1
    assert walk.fault == Fault(2, "\ufffd", "hash does not match the entry")
