"""The request `add-checkpoint` of https://c2sp.org/tlog-witness: a checkpoint, and the proof from what was seen."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence

import msgspec

from asapd.wire.checkpoint import Checkpoint, read_checkpoint
from asapd.wire.signed_note import NoteMalformedError, read_base64
from asapd.wire.tlog_proof import MAX_HASHES

SIZE_TYPE = "text/x.tlog.size"
MAX_BYTES = 64 << 10
_OLD = re.compile(r"old (0|[1-9][0-9]{0,17})\Z")
_HASH_BYTES = 32


class AddCheckpoint(msgspec.Struct, frozen=True):
    """What a log asks of a witness; nothing of it is verified."""

    old_size: int
    proof: tuple[bytes, ...]
    checkpoint: Checkpoint


def write_request(old_size: int, proof: Sequence[bytes], note: str) -> bytes:
    """A request as text."""
    lines = [f"old {old_size}", *(base64.b64encode(node).decode() for node in proof)]
    return ("\n".join(lines) + "\n\n" + note).encode()


def read_request(body: bytes) -> AddCheckpoint:
    """A request from its text.

    Raises:
        NoteMalformedError: it is none.
    """
    if len(body) > MAX_BYTES:
        raise NoteMalformedError(f"is longer than {MAX_BYTES} bytes")
    try:
        head, _, note = body.decode().partition("\n\n")
    except UnicodeDecodeError:
        raise NoteMalformedError("is not text") from None
    first, *lines = head.split("\n")
    old = _OLD.match(first)
    if old is None:
        raise NoteMalformedError("does not begin with the size that was seen before")
    proof = [read_base64(line) for line in lines]
    nodes = tuple(node for node in proof if node is not None and len(node) == _HASH_BYTES)
    if len(nodes) != len(proof) or len(nodes) > MAX_HASHES:
        raise NoteMalformedError(f"has a proof that is not of at most {MAX_HASHES} hashes in base64")
    return AddCheckpoint(int(old[1]), nodes, read_checkpoint(note))
