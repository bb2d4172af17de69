"""Checkpoints of a log as https://c2sp.org/tlog-checkpoint defines them: origin, size and root as a signed note."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator

import msgspec
from nacl.signing import SigningKey

from asapd.wire.keys import key_id
from asapd.wire.signed_note import (
    SIGNATURE_MARK,
    NoteMalformedError,
    SignedNote,
    is_signed,
    read_base64,
    read_note,
    sign_note,
)

MAX_CHARS = 64 << 10
_SIZE = re.compile(r"(?:0|[1-9][0-9]{0,18})\Z")
_ROOT_BYTES = 32


class Checkpoint(msgspec.Struct, frozen=True):
    """How large a log was and what its root was. `note` is the signed note it was read from, unverified."""

    origin: str
    size: int
    root: bytes
    note: SignedNote


def origin_of(public_key: bytes) -> str:
    """What a daemon with this raw public key calls its log: `asapd/<key id>`."""
    return f"asapd/{key_id(public_key)}"


def sign_checkpoint(size: int, root: bytes, key: SigningKey) -> Checkpoint:
    """A checkpoint of the log of the daemon whose key this is."""
    origin = origin_of(bytes(key.verify_key))
    text = f"{origin}\n{size}\n{base64.b64encode(root).decode()}\n"
    return Checkpoint(origin, size, root, sign_note(text, origin, key))


def read_checkpoint(content: str) -> Checkpoint:
    """A checkpoint from the text of its note. Who signed it is for `is_signed_by` to say.

    Raises:
        NoteMalformedError: it is none.
    """
    if len(content) > MAX_CHARS:
        raise NoteMalformedError(f"is longer than {MAX_CHARS} characters")
    note = read_note(content)
    lines = note.text[:-1].split("\n")
    if len(lines) < 3 or not all(lines):
        raise NoteMalformedError("is a note without the three lines of a checkpoint")
    origin, size, root = lines[0], lines[1], read_base64(lines[2])
    entries = read_size(size)
    if entries is None:
        raise NoteMalformedError("is a checkpoint whose size is no number")
    if root is None or len(root) != _ROOT_BYTES:
        raise NoteMalformedError(f"is a checkpoint whose root is not {_ROOT_BYTES} bytes in base64")
    return Checkpoint(origin, entries, root, note)


def read_size(text: str) -> int | None:
    """A number of entries in decimal, up to 2**63 - 1, as a checkpoint and a witness's answer say it."""
    return int(text) if _SIZE.match(text) is not None and int(text) < 2**63 else None


def is_signed_by(checkpoint: Checkpoint, public_key: bytes) -> bool:
    """Whether a daemon with this key signed the checkpoint as one of its own log."""
    origin = origin_of(public_key)
    return checkpoint.origin == origin and is_signed(checkpoint.note, origin, public_key)


def split_checkpoints(lines: Iterable[str]) -> Iterator[str]:
    """The notes of a file of checkpoints, which stand one behind the other; blank lines between them do not count.

    What is behind the last signature and has none is given as it is: whoever reads it finds that it is no note.
    """
    part: list[str] = []
    is_closing = is_blank = False
    for line in lines:
        is_signature = line.startswith(SIGNATURE_MARK)
        if part and not is_signature and (is_closing or is_blank):
            yield "".join(part)
            part, is_blank = [], False
        if part or line.strip():
            part.append(line)
            is_closing, is_blank = is_signature, not line.strip()
    if part:
        yield "".join(part)
