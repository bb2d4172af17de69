"""The offline check of proofs: that an entry is in a log, and that a log went on from what it was."""

from __future__ import annotations

from typing import Any

from asapd.cli.verified import CannotVerifyError, Verified
from asapd.cli.verify_checkpoint import NEEDS_KEY, signed
from asapd.core import audit, merkle
from asapd.core.audit import Entry, Walk
from asapd.core.merkle import leaf_hash
from asapd.wire.checkpoint import Checkpoint
from asapd.wire.export import BadEntryError, read_entry
from asapd.wire.signed_note import NoteMalformedError
from asapd.wire.strict_json import TokenMalformed, parse_strict_json
from asapd.wire.tlog_proof import read_proof


def verify_text(content: str, public_key: bytes | None) -> Verified:
    """The verdict over a `tlog-proof` whose extra data is the entry."""
    if public_key is None:
        raise CannotVerifyError(NEEDS_KEY)
    try:
        proof = read_proof(content)
    except NoteMalformedError as error:
        return Verified(False, f"bad: {error}")
    if proof.extra is None:
        raise CannotVerifyError("is a proof without the entry it is about: asapctl audit proof writes one that has it")
    try:
        row = parse_strict_json(proof.extra)
    except TokenMalformed as error:
        return Verified(False, f"bad: the entry in it {error.reason}")
    found = signed(proof.checkpoint, public_key)
    return _included(row, proof.index, list(proof.hashes), found)


def is_inclusion(document: dict[str, Any]) -> bool:
    """Whether a document is a proof that an entry is in a log."""
    return document.keys() >= {"entry", "leaf_index", "hashes", "checkpoint"}


def verify_inclusion(document: dict[str, Any], public_key: bytes | None) -> Verified:
    """The verdict over a proof of inclusion as JSON."""
    if public_key is None:
        raise CannotVerifyError(NEEDS_KEY)
    hashes, index, checkpoint = read_hashes(document["hashes"]), document["leaf_index"], document["checkpoint"]
    if hashes is None or type(index) is not int or not isinstance(checkpoint, str):
        return Verified(False, "bad: leaf_index, hashes or checkpoint is not of its form")
    found = signed(checkpoint, public_key)
    verified = _included(document["entry"], index, hashes, found)
    if not verified.is_good or isinstance(found, str):
        return verified
    # Who reads the file reads these too, so they have to say what the signed checkpoint and the entry say.
    leaf = leaf_hash(bytes.fromhex(document["entry"]["hash"])).hex()
    for name, value in (("tree_size", found.size), ("root_hash", found.root.hex()), ("leaf_hash", leaf)):
        if name in document and (document[name] != value or isinstance(document[name], bool)):
            return Verified(False, f"bad: {name} is not what the checkpoint and the entry say")
    return verified


def read_hashes(value: Any) -> list[bytes] | None:
    """Hashes from their hex; None of anything else."""
    if not isinstance(value, list) or not all(isinstance(text, str) and len(text) == 64 for text in value):
        return None
    try:
        return [bytes.fromhex(text) for text in value]
    except ValueError:
        return None


def sound_entry(row: Any) -> Entry | str:
    """An entry whose hashes fit its content, or why they do not."""
    try:
        entry = read_entry(row)
    except BadEntryError as error:
        return error.reason
    fault = audit.verify((entry,), Walk(entry.seq - 1, entry.previous_hash)).fault
    return entry if fault is None else fault.reason


def included(item: Any, checkpoint: Checkpoint) -> Entry | str:
    """The `entry` of an item whose `hashes` lead from it to a checkpoint, or why it is none."""
    hashes = read_hashes(item.get("hashes")) if isinstance(item, dict) else None
    if hashes is None:
        return "it has no proof"
    entry = sound_entry(item.get("entry"))
    if isinstance(entry, Entry) and not _leads(entry, hashes, checkpoint):
        return f"entry {entry.seq} ({entry.id}) is not in the log of the checkpoint"
    return entry


def _leads(entry: Entry, hashes: list[bytes], checkpoint: Checkpoint) -> bool:
    return merkle.includes(leaf_hash(entry.hash), entry.seq - 1, checkpoint.size, hashes, checkpoint.root)


def _included(row: Any, index: int, hashes: list[bytes], checkpoint: Checkpoint | str) -> Verified:
    entry = sound_entry(row)
    if isinstance(entry, str):
        return Verified(False, f"bad: the entry in it: {entry}")
    if isinstance(checkpoint, str):
        return Verified(False, f"bad: the checkpoint in it {checkpoint}")
    if index != entry.seq - 1:
        return Verified(False, f"bad: entry {entry.seq} is leaf {entry.seq - 1}, and the proof is of leaf {index}")
    if not _leads(entry, hashes, checkpoint):
        return Verified(False, f"bad: entry {entry.seq} ({entry.id}) is not in the log of this checkpoint")
    return Verified(
        True, f"ok: entry {entry.seq} ({entry.id}) is one of the {checkpoint.size} entries of {checkpoint.origin}"
    )


def is_consistency(document: dict[str, Any]) -> bool:
    """Whether a document is a proof that a log went on from what it was."""
    return document.keys() >= {"first_size", "first_root", "second_size", "second_root", "hashes"}


def verify_consistency(document: dict[str, Any], public_key: bytes | None) -> Verified:
    """The verdict over a proof of consistency; the larger size has to be one that was signed."""
    if public_key is None:
        raise CannotVerifyError(NEEDS_KEY)
    hashes, roots = read_hashes(document["hashes"]), read_hashes([document["first_root"], document["second_root"]])
    first, second = document["first_size"], document["second_size"]
    if hashes is None or roots is None or not isinstance(first, int) or not isinstance(second, int):
        return Verified(False, "bad: sizes, roots or hashes are not of their form")
    if not isinstance(document.get("checkpoint"), str):
        raise CannotVerifyError("holds no checkpoint of its larger size: ask for a proof to the size of a checkpoint")
    found = signed(document["checkpoint"], public_key)
    if isinstance(found, str):
        return Verified(False, f"bad: the checkpoint in it {found}")
    if (found.size, found.root) != (second, roots[1]):
        return Verified(False, "bad: the checkpoint in it is of another size or root than the proof leads to")
    if not merkle.is_consistent(first, second, hashes, *roots):
        return Verified(False, f"bad: the log of {second} entries is not that of {first} with more behind it")
    return Verified(
        True, f"ok: the log of {second} entries of {found.origin} began with {first}, whose root was {roots[0].hex()}"
    )
