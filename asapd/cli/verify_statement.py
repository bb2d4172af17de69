"""What receipts and evidence packs have in common: who signed one, and with which key that was verified."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from asapd.cli.verified import Verified
from asapd.wire.checkpoint import origin_of
from asapd.wire.keys import KeyFormatError, key_id, load_public


def signer_of(
    document: dict[str, Any],
    public_key: bytes | None,
    kind: str,
    version: int,
    is_signed: Callable[[dict[str, Any], bytes], bool],
) -> bytes | Verified:
    """The key that signed a document: the one given, else its own, which only says that it fits itself. Or the no."""
    try:
        own = load_public(str(document.get("public_key")))
    except KeyFormatError as error:
        return Verified(False, f"bad: public_key {error}")
    key = own if public_key is None else public_key
    if document.get("version") != version:
        return Verified(False, f"bad: it is a {kind} of version {document.get('version')}, not {version}")
    if not is_signed(document, key):
        return Verified(False, f"bad: it was not signed by the key {key_id(key)}, or was changed since")
    if (own, document.get("issuer")) != (key, origin_of(key)):
        return Verified(False, f"bad: public_key or issuer is another than the key {key_id(key)} that signed it")
    return key


def remarks_on(key: bytes, public_key: bytes | None, kind: str) -> tuple[str, ...]:
    """What whoever gave no key has to do."""
    return () if public_key is not None else (f"the key is the one in the {kind}: compare its id, {key_id(key)}",)
