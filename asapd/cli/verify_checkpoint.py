"""The offline check of checkpoints: one, or a file of many."""

from __future__ import annotations

from typing import Any

from asapd.cli.verified import CannotVerifyError, Verified
from asapd.wire.checkpoint import Checkpoint, is_signed_by, origin_of, read_checkpoint, split_checkpoints
from asapd.wire.signed_note import NoteMalformedError

NEEDS_KEY = (
    "proves nothing without the key that has to have signed it: give it with --public-key "
    "(`asapctl audit checkpoint --json` shows it)"
)


def signed(content: str, public_key: bytes | None) -> Checkpoint | str:
    """A checkpoint that the key signed, or why it is none.

    Raises:
        CannotVerifyError: without a key.
    """
    if public_key is None:
        raise CannotVerifyError(NEEDS_KEY)
    try:
        checkpoint = read_checkpoint(content)
    except NoteMalformedError as error:
        return str(error)
    if checkpoint.origin != origin_of(public_key):
        return f"is of the log {checkpoint.origin}, and the key is of {origin_of(public_key)}"
    if not is_signed_by(checkpoint, public_key):
        return f"was not signed by the key of {checkpoint.origin}, or was changed since"
    return checkpoint


def verify(content: str, public_key: bytes | None) -> Verified:
    """The verdict over one checkpoint or many, one behind the other."""
    last: Checkpoint | None = None
    roots: dict[int, bytes] = {}
    count = 0
    for number, text in enumerate(split_checkpoints(content.splitlines(keepends=True)), 1):
        found = signed(text, public_key)
        if isinstance(found, str):
            return Verified(False, f"bad: checkpoint {number} of the file {found}")
        if roots.setdefault(found.size, found.root) != found.root:
            return Verified(False, f"bad: two checkpoints of {found.size} entries have different roots: the log forked")
        last, count = found, number
    assert last is not None, "an empty file is refused before"
    many = f"{count} checkpoints, the last " if count > 1 else "checkpoint "
    return Verified(True, f"ok: {many}of {last.size} entries of {last.origin}, root {last.root.hex()}")


def is_wrapped(document: dict[str, Any]) -> bool:
    """Whether a document is a checkpoint as JSON."""
    return isinstance(document.get("note"), str) and "root_hash" in document


def verify_wrapped(document: dict[str, Any], public_key: bytes | None) -> Verified:
    """The verdict over a checkpoint as JSON: what counts is its note, and the rest has to say the same."""
    found = signed(document["note"], public_key)
    if isinstance(found, str):
        return Verified(False, f"bad: the checkpoint {found}")
    if (document.get("origin"), document.get("size"), document["root_hash"]) != (
        found.origin,
        found.size,
        found.root.hex(),
    ):
        return Verified(False, "bad: origin, size or root_hash is not what the signed note says")
    return Verified(True, f"ok: checkpoint of {found.size} entries of {found.origin}, root {found.root.hex()}")
