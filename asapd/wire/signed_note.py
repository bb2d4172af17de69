"""Signed notes: a text and Ed25519 signatures of it, by https://c2sp.org/signed-note and tlog-cosignature."""

from __future__ import annotations

import base64
import binascii
from hashlib import sha256

import msgspec
from nacl.bindings import crypto_sign_open
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey

from asapd.core.types import SECOND_US

ED25519 = 1
COSIGNATURE = 4
MAX_SIGNATURES = 64
"""Four times what every reader has to take; a note is a few hundred bytes."""

SIGNATURE_MARK = "— "
"""What a signature line begins with."""

_ID_BYTES = 4
_KEY_BYTES = 32
SIGNATURE_BYTES = 64
_STAMP_BYTES = 8


class NoteMalformedError(ValueError):
    """The text is no signed note; whoever made it, or cut it, is to blame. The message says what is wrong."""


class Signature(msgspec.Struct, frozen=True):
    """One signature line: the key's name, its 4-byte id, and what it signed with."""

    name: str
    key: bytes
    signature: bytes

    def line(self) -> str:
        """The line as it stands in a note."""
        return f"{SIGNATURE_MARK}{self.name} {base64.b64encode(self.key + self.signature).decode()}\n"


class SignedNote(msgspec.Struct, frozen=True):
    """A text, which ends with a newline, and its signatures. Reading it verifies nothing."""

    text: str
    signatures: tuple[Signature, ...]

    def encode(self) -> str:
        """The note as it is written."""
        return self.text + "\n" + "".join(signature.line() for signature in self.signatures)


def read_note(content: str) -> SignedNote:
    """A note from its text.

    Raises:
        NoteMalformedError: it is none.
    """
    if any(ord(sign) < 32 and sign != "\n" for sign in content):
        raise NoteMalformedError("holds control characters")
    text, blank, lines = content.rpartition("\n\n")
    if not blank or not lines.endswith("\n"):
        raise NoteMalformedError("has no signature lines behind an empty line")
    rows = lines[:-1].split("\n")
    if len(rows) > MAX_SIGNATURES:
        raise NoteMalformedError(f"has more than {MAX_SIGNATURES} signatures")
    return SignedNote(text + "\n", tuple(map(read_signature, rows)))


def read_signature(line: str) -> Signature:
    """A signature from its line, without the newline.

    Raises:
        NoteMalformedError: it is none.
    """
    name, space, encoded = line.removeprefix(SIGNATURE_MARK).partition(" ")
    if not line.startswith(SIGNATURE_MARK) or not space or not _is_name(name):
        raise NoteMalformedError("has a signature line of another form")
    raw = read_base64(encoded)
    if raw is None or len(raw) <= _ID_BYTES:
        raise NoteMalformedError(f"has a signature of {name} that is not in base64")
    return Signature(name, raw[:_ID_BYTES], raw[_ID_BYTES:])


def _is_name(name: str) -> bool:
    return bool(name) and "+" not in name and not any(sign.isspace() for sign in name)


def read_base64(text: str) -> bytes | None:
    """Bytes from base64 in its one canonical form; None of anything else."""
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return raw if base64.b64encode(raw).decode() == text else None


def note_key_id(name: str, public_key: bytes, kind: int = ED25519) -> bytes:
    """The four bytes that stand for a key in a note."""
    return sha256(name.encode() + b"\n" + bytes([kind]) + public_key).digest()[:_ID_BYTES]


def sign_note(text: str, name: str, key: SigningKey) -> SignedNote:
    """A text, which ends with a newline, signed by one key."""
    signature = key.sign(text.encode()).signature
    return SignedNote(text, (Signature(name, note_key_id(name, bytes(key.verify_key)), signature),))


def cosign(text: str, name: str, key: SigningKey, now_us: int) -> Signature:
    """A witness's signature of a checkpoint's text at a time (https://c2sp.org/tlog-cosignature, Ed25519)."""
    now_s = now_us // SECOND_US
    signature = key.sign(_cosigned(text, now_s)).signature
    key_id = note_key_id(name, bytes(key.verify_key), COSIGNATURE)
    return Signature(name, key_id, now_s.to_bytes(_STAMP_BYTES, "big") + signature)


def _cosigned(text: str, time_s: int) -> bytes:
    return f"cosignature/v1\ntime {time_s}\n{text}".encode()


def is_signed(note: SignedNote, name: str, public_key: bytes) -> bool:
    """Whether this key, under this name, signed the note; a signature of it that fails says no whatever others say."""
    key_id = note_key_id(name, public_key)
    own = [found.signature for found in note.signatures if (found.name, found.key) == (name, key_id)]
    return bool(own) and all(_verifies(signature, note.text.encode(), public_key) for signature in own)


def cosigned_us(text: str, signature: Signature, name: str, public_key: bytes) -> int | None:
    """When a witness cosigned a checkpoint's text; None when this is no valid signature of it by this key."""
    if (signature.name, signature.key) != (name, note_key_id(name, public_key, COSIGNATURE)):
        return None
    time_s = int.from_bytes(signature.signature[:_STAMP_BYTES], "big")
    if not _verifies(signature.signature[_STAMP_BYTES:], _cosigned(text, time_s), public_key):
        return None
    return time_s * SECOND_US


def _verifies(signature: bytes, message: bytes, public_key: bytes) -> bool:
    # libsodium reads the lengths it expects, whatever the buffers hold.
    if len(signature) != SIGNATURE_BYTES or len(public_key) != _KEY_BYTES:
        return False
    try:
        crypto_sign_open(signature + message, public_key)
    except BadSignatureError:
        return False
    return True
