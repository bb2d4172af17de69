"""Proofs that an entry is in a log, as https://c2sp.org/tlog-proof defines them: they verify without the log."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence

import msgspec

from asapd.wire.signed_note import NoteMalformedError, read_base64

HEADER = "c2sp.org/tlog-proof@v1"
MAX_HASHES = 63
_INDEX = re.compile(r"index (0|[1-9][0-9]{0,18})\Z")
_HASH_BYTES = 32


class TlogProof(msgspec.Struct, frozen=True):
    """`index` counts from 0; `checkpoint` is the signed note; `extra` is no part of what is proved."""

    index: int
    hashes: tuple[bytes, ...]
    checkpoint: str
    extra: bytes | None = None


def write_proof(index: int, hashes: Sequence[bytes], checkpoint: str, extra: bytes | None = None) -> str:
    """A proof as text."""
    lines = [HEADER]
    if extra is not None:
        lines.append(f"extra {base64.b64encode(extra).decode()}")
    lines.append(f"index {index}")
    lines += [base64.b64encode(node).decode() for node in hashes]
    return "\n".join(lines) + "\n\n" + checkpoint


def read_proof(content: str) -> TlogProof:
    """A proof from its text; nothing of it is verified.

    Raises:
        NoteMalformedError: it is none.
    """
    head, _, checkpoint = content.partition("\n\n")
    lines = head.split("\n")
    if lines[0] != HEADER:
        raise NoteMalformedError(f"does not begin with {HEADER}")
    lines = lines[1:]
    extra = None
    if lines and lines[0].startswith("extra "):
        extra = read_base64(lines.pop(0).removeprefix("extra "))
        if extra is None:
            raise NoteMalformedError("is a proof whose extra data is not in base64")
    index = _INDEX.match(lines[0]) if lines else None
    if index is None:
        raise NoteMalformedError("is a proof without an index")
    hashes = [read_base64(line) for line in lines[1:]]
    found = tuple(node for node in hashes if node is not None and len(node) == _HASH_BYTES)
    if len(found) != len(hashes) or len(found) > MAX_HASHES:
        raise NoteMalformedError(f"is a proof whose hashes are not at most {MAX_HASHES} of 32 bytes in base64")
    return TlogProof(int(index[1]), found, checkpoint, extra)
