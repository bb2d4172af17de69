"""The offline check behind `asapd verify`: looks what kind of file it is, and has the module of that kind check it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from asapd.cli import verify_checkpoint, verify_evidence, verify_export, verify_pack, verify_proof, verify_receipt
from asapd.cli.verified import CannotVerifyError, Verified
from asapd.wire.audit_archive import MAGIC, read_archive
from asapd.wire.audit_export import COLUMNS
from asapd.wire.export import NotAnExportError
from asapd.wire.keys import public_base64
from asapd.wire.signed_note import SIGNATURE_MARK, NoteMalformedError
from asapd.wire.statement import is_statement
from asapd.wire.strict_json import TokenMalformed, parse_strict_json
from asapd.wire.tlog_proof import HEADER

MAX_BYTES = 256 << 20
"""Of what is read as a whole; an export of one entry a line may be of any length."""

DOCUMENTS: tuple[tuple[Callable[[dict[str, Any]], bool], Callable[[dict[str, Any], bytes | None], Verified]], ...] = (
    (verify_proof.is_inclusion, verify_proof.verify_inclusion),
    (verify_proof.is_consistency, verify_proof.verify_consistency),
    (verify_receipt.is_receipt, verify_receipt.verify_receipt),
    (verify_pack.is_pack, verify_pack.verify_pack),
    (verify_checkpoint.is_wrapped, verify_checkpoint.verify_wrapped),
)
"""JSON documents by what they hold: whether one is of a kind, and what verifies it."""


def verify_file(path: Path, public_key: bytes | None) -> Verified:
    """Check a file with the signer's raw public key, where the kind has a signature.

    Raises:
        CannotVerifyError: it is of no kind that can be checked, or needs a key.
        OSError: it cannot be read.
    """
    # A FIFO would keep whoever opens it waiting, and a device never ends.
    if not path.is_file() and path.exists() and not path.is_dir():
        raise CannotVerifyError("is no regular file: write it into one")
    with path.open("rb") as file:
        start = file.read(1 << 12)
    if start.startswith(MAGIC):
        return _verify_archive(path, public_key)
    first = start.lstrip()[:1]
    if first not in {b"{", b"["}:
        return _verify_text(path, start, public_key)
    if (document := _document(path)) is not None:
        if is_statement(document):
            return _verify_evidence(_bounded(path) or b"", public_key)
        for is_kind, verify in DOCUMENTS:
            if is_kind(document):
                return verify(document, public_key)
        if document.keys() >= _REVOCATIONS:
            raise CannotVerifyError(
                "is a signed list of revocations: asapctl delegation revocations import FILE has a daemon check its "
                "signature, and take it in"
            )
    if public_key is not None:
        raise CannotVerifyError(UNSIGNED)
    try:
        with path.open("rb") as lines:
            return verify_export.verify(lines)
    except NotAnExportError as error:
        raise CannotVerifyError(f"{error}; {KINDS} can be verified") from None


# The members of one, of whatever version.
_REVOCATIONS = frozenset({"entries", "issuer", "key_id", "number", "signature"})
_CSV = ",".join(COLUMNS)

UNSIGNED = "is an export of the audit log, which carries no signature to check"


def _verify_archive(path: Path, public_key: bytes | None) -> Verified:
    if public_key is not None:
        raise CannotVerifyError(UNSIGNED)
    with path.open("rb") as file:
        return verify_export.verify_entries(read_archive(file))


def _verify_evidence(raw: bytes, public_key: bytes | None) -> Verified:
    found = verify_evidence.verify_evidence(raw, None if public_key is None else public_base64(public_key))
    if found.faults:
        return Verified(False, "\n".join(f"bad: {fault}" for fault in found.faults))
    remark = "the key is the one in the file: compare it, or name it with --public-key"
    return Verified(True, f"ok: {found.summary}", (*found.on_trust, *(() if public_key is not None else (remark,))))


KINDS = "an export of the audit log, a checkpoint, a proof or a signed statement"


def _verify_text(path: Path, start: bytes, public_key: bytes | None) -> Verified:
    content = _bounded(path)
    if content is None:
        raise CannotVerifyError(f"is larger than {MAX_BYTES >> 20} MiB; {KINDS} can be verified")
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise CannotVerifyError(f"is not text; {KINDS} can be verified") from None
    if text.startswith((_CSV, f"\ufeff{_CSV}")):
        raise CannotVerifyError(
            "is an export of the audit log as CSV, which is changed for spreadsheets and not what was hashed: write it "
            "again as lines of JSON, asapctl audit export FILE --format ndjson, and verify that"
        )
    try:
        if start.startswith(HEADER.encode()):
            return verify_proof.verify_text(text, public_key)
        if f"\n{SIGNATURE_MARK}" in text:
            return verify_checkpoint.verify(text, public_key)
    except NoteMalformedError as error:
        raise CannotVerifyError(f"{error}; {KINDS} can be verified") from None
    raise CannotVerifyError(f"{'holds something else' if text.strip() else 'is empty'}; {KINDS} can be verified")


def _bounded(path: Path) -> bytes | None:
    """A whole file, or None when it is too long for that, whatever its size was said to be."""
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    return content if len(content) <= MAX_BYTES else None


def _document(path: Path) -> dict[str, Any] | None:
    """The file as one JSON object; None when it is a list, lines, too long or no JSON, as an export may be."""
    content = _bounded(path)
    if content is None:
        return None
    try:
        document = parse_strict_json(content)
    except TokenMalformed:
        return None
    return document if isinstance(document, dict) else None
