"""The audit log's bytes: canonical payloads, salted payload hashes, and the chain of entry hashes.

`payload_hash` = SHA-256(salt || JCS{actor, details, subject}); `hash` = SHA-256 of the RFC 8785 form of
{event_type, id, payload_hash, previous_hash, seq, timestamp}. Details hold no floats and only ASCII
keys, so that sorted compact JSON is the RFC 8785 form.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import Any

import msgspec

from asapd.core.canonical import exact, is_exact, whole
from asapd.core.types import format_us

GENESIS = bytes(32)
"""`previous_hash` of the first entry."""

_sorted_json = msgspec.json.Encoder(order="sorted")
_LARGE_TEXT = re.compile(r':"-?[0-9]{16,}"')
_text = msgspec.json.Encoder()


class Entry(msgspec.Struct, frozen=True):
    """One audit entry as stored. `details` is its RFC 8785 text; None in all four payload fields means erased."""

    seq: int
    id: str
    timestamp_us: int
    event_type: str
    actor: bytes | None
    subject: bytes | None
    details: bytes | None
    salt: bytes | None
    payload_hash: bytes
    previous_hash: bytes
    hash: bytes


class Fault(msgspec.Struct, frozen=True):
    """The first bad place of a log: the entry's number, its id where readable, and what is wrong."""

    seq: int
    id: str | None
    reason: str

    def __str__(self) -> str:
        """For people: what is no entry, such as a checkpoint that the log is too short for, has a number and no id."""
        return f"entry {self.seq} ({self.id}): {self.reason}" if self.id else f"at entry {self.seq}: {self.reason}"


def canonical_details(details: dict[str, Any]) -> bytes:
    """Details as RFC 8785 text: strings, integers, booleans, null, lists, objects with ASCII keys.

    Integers from 2**53 on become text, whoever gives them: nobody could verify the entry elsewhere.
    """
    return as_they_are(details if is_exact(details.values()) else exact(details))


def as_they_are(details: dict[str, Any]) -> bytes:
    """The same of details that were written before, by a build that made no text of any integer too."""
    return _sorted_json.encode(details)


def read_details(text: str) -> dict[str, Any]:
    """Details from their text, in which times (`*_us`) and amounts (`*_microusd`) are integers, however large.

    Raises:
        msgspec.MsgspecError: it is not what `canonical_details` makes.
    """
    details = msgspec.json.decode(text, type=dict[str, Any])
    if _LARGE_TEXT.search(text) is None:
        return details
    return {name: whole(value) if name.endswith(("_us", "_microusd")) else value for name, value in details.items()}


def payload_hash(salt: bytes, actor: str | bytes, details: bytes, subject: str | bytes) -> bytes:
    """SHA-256 of the 16 bytes of salt and the RFC 8785 form of {actor, details, subject}.

    `details` is already canonical text; hashing the stored text itself leaves no byte of it uncovered.
    """
    actor_json = _text.encode(actor if isinstance(actor, str) else actor.decode())
    subject_json = _text.encode(subject if isinstance(subject, str) else subject.decode())
    return sha256(b'%b{"actor":%b,"details":%b,"subject":%b}' % (salt, actor_json, details, subject_json)).digest()


def entry_hash(seq: int, entry_id: str, timestamp_us: int, event_type: str, payload: bytes, previous: bytes) -> bytes:
    """SHA-256 of the RFC 8785 form of the entry without its payload.

    Ids and event types are the daemon's own plain ASCII, so they need no JSON escape; a stored one
    that was altered to hold a quote or control character simply hashes to something else.
    """
    text = (
        f'{{"event_type":"{event_type}","id":"{entry_id}","payload_hash":"{payload.hex()}",'
        f'"previous_hash":"{previous.hex()}","seq":{seq},"timestamp":"{format_us(timestamp_us)}"}}'
    )
    return sha256(text.encode()).digest()


# Plain tuples: made for every event, they cost a tenth of what named ones do.
Sealed = tuple[str, bytes, bytes, bytes]
"""What an entry is to say: its subject, details (RFC 8785 text) and salt (16 random bytes), and the hash of it all."""

Chained = tuple[int, str, int, str, str, str, str, bytes, bytes, bytes, bytes]
"""An entry to be stored, in the order of `Entry`."""

Head = tuple[int, bytes]
"""The number and hash of the newest entry of a log."""


def seal(actor: str, notes: Iterable[tuple[str, bytes]], salts: bytes) -> list[Sealed]:
    """What entries of one actor are to say, each a subject and details; there are 16 bytes of `salts` for each."""
    before_details = b'{"actor":%b,"details":' % _text.encode(actor)
    sealed: list[Sealed] = []
    at = 0
    for subject, details in notes:
        salt = salts[at : at + 16]
        at += 16
        payload = sha256(b'%b%b%b,"subject":%b}' % (salt, before_details, details, _text.encode(subject))).digest()
        sealed.append((subject, details, salt, payload))
    return sealed


def chain(
    head: Head, event_type: str, actor: str, timestamp_us: int, ids: Iterable[str], sealed: Sequence[Sealed]
) -> list[Chained]:
    """Entries of one kind, actor and time, chained on from `head`.

    What is the same in all of them is written once, which is most of the text that is hashed.
    """
    seq, previous = head
    previous_hex = previous.hex()
    kind, timestamp = f'{{"event_type":"{event_type}","id":"', format_us(timestamp_us)
    chained: list[Chained] = []
    for entry_id, (subject, details, salt, payload) in zip(ids, sealed, strict=True):
        seq += 1
        text = (
            f'{kind}{entry_id}","payload_hash":"{payload.hex()}",'
            f'"previous_hash":"{previous_hex}","seq":{seq},"timestamp":"{timestamp}"}}'
        )
        own = sha256(text.encode())
        digest, previous_hex = own.digest(), own.hexdigest()
        chained.append(
            (seq, entry_id, timestamp_us, event_type, actor, subject, details.decode(), salt, payload, previous, digest)
        )
        previous = digest
    return chained


def head_behind(head: Head, entries: Sequence[Chained]) -> Head | None:
    """The head with entries that were chained on from it; None when they were from another, or there are none."""
    if not entries or (entries[0][0] - 1, entries[0][-2]) != head:
        return None
    return entries[-1][0], entries[-1][-1]


class Walk(msgspec.Struct, frozen=True):
    """How far a verification got: the last good entry, and the fault that ended it, if any.

    `erased` of the `verified` entries have no payload any more: their place in the chain is proved, not their content.
    """

    seq: int = 0
    hash: bytes = GENESIS
    verified: int = 0
    fault: Fault | None = None
    erased: int = 0


def verify(entries: Iterable[Entry], start: Walk = Walk()) -> Walk:  # noqa: B008 -- frozen, so sharing the default is safe
    """Walk entries in `seq` order from `start` and stop at the first that does not fit the chain."""
    seq, previous, verified, erased = start.seq, start.hash, start.verified, start.erased
    for entry in entries:
        reason = _fault(entry, seq + 1, previous)
        if reason is not None:
            return Walk(seq, previous, verified, Fault(entry.seq, entry.id, reason), erased)
        seq, previous, verified, erased = entry.seq, entry.hash, verified + 1, erased + (entry.salt is None)
    return Walk(seq, previous, verified, None, erased)


RawEntry = tuple[int, bytes, int, bytes, bytes | None, bytes | None, bytes | None, bytes | None, bytes, bytes, bytes]
"""The columns of an entry in the order of `Entry`, all text as the bytes it is stored as."""


def verify_raw(rows: Iterable[RawEntry], start: Walk, hashes: list[bytes]) -> Walk:
    """Like `verify`, for rows as stored, in a fraction of its time; the hash of each that fits is added to `hashes`.

    What entries have in common is made once. Rows that come one by one take the memory of the one before, which is
    still in the processor's cache; a list of them costs a tenth more.
    """
    seq, previous, erased = start.seq, start.hash, start.erased
    behind = len(hashes) - start.verified
    keep, digest_of, join, encode = hashes.append, sha256, b"".join, _text.encode
    previous_hex, shown_us, timestamp = previous.hex(), None, ""
    heads: dict[bytes, bytes] = {}
    fronts: dict[bytes, str] = {}
    for number, entry_id, timestamp_us, kind, actor, subject, details, salt, payload, before, digest in rows:
        seq += 1
        try:
            if salt is None or actor is None or subject is None or details is None:
                fits = salt is actor is subject is details is None
            else:
                head = heads.get(actor)
                if head is None:
                    head = heads[actor] = b'{"actor":%b,"details":' % encode(actor.decode())
                text = join((salt, head, details, b',"subject":', encode(subject.decode()), b"}"))
                fits = digest_of(text).digest() == payload
            if timestamp_us != shown_us:
                timestamp, shown_us = format_us(timestamp_us), timestamp_us
            front = fronts.get(kind)
            if front is None:
                front = fronts[kind] = f'{{"event_type":"{kind.decode()}","id":"'
            own = digest_of(
                f'{front}{entry_id.decode()}","payload_hash":"{payload.hex()}","previous_hash":"{previous_hex}",'
                f'"seq":{number},"timestamp":"{timestamp}"}}'.encode()
            ).digest()
        except (UnicodeDecodeError, OverflowError, ValueError):
            fits = False
        if not fits or own != digest or before != previous or number != seq:
            shown = (entry_id.decode("utf-8", "replace"), kind.decode("utf-8", "replace"))
            entry = Entry(
                number, shown[0], timestamp_us, shown[1], actor, subject, details, salt, payload, before, digest
            )
            reason = _fault(entry, seq, previous) or "id or event_type is not UTF-8"
            fault = Fault(number, entry.id, reason)
            return Walk(seq - 1, previous, len(hashes) - behind, fault, erased)
        previous, previous_hex = digest, digest.hex()
        keep(digest)
        if salt is None:
            erased += 1
    return Walk(seq, previous, len(hashes) - behind, None, erased)


def _fault(entry: Entry, seq: int, previous: bytes) -> str | None:
    if entry.seq != seq:
        return f"entry {seq} is missing" if entry.seq > seq else f"sequence goes back to {entry.seq}"
    if entry.previous_hash != previous:
        return "previous_hash is not the hash of the entry before it"
    if entry.actor is not None and entry.subject is not None and entry.details is not None and entry.salt is not None:
        try:
            payload = payload_hash(entry.salt, entry.actor, entry.details, entry.subject)
        except UnicodeDecodeError:
            return "actor or subject is not UTF-8"
        if payload != entry.payload_hash:
            return "payload_hash does not match actor, subject, details and salt"
    elif (entry.actor, entry.subject, entry.details, entry.salt) != (None, None, None, None):
        return "payload is only partly erased"
    try:
        own = entry_hash(entry.seq, entry.id, entry.timestamp_us, entry.event_type, entry.payload_hash, previous)
    except (OverflowError, ValueError):
        return "timestamp is outside the calendar"
    if own != entry.hash:
        return "hash does not match the entry"
    return None
