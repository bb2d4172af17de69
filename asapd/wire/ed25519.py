"""Ed25519 signatures that stand apart from what they sign (RFC 8032), verified by libsodium.

Keys of small order, points and scalars in another than the canonical form are refused (section 5.1.7).
"""

from __future__ import annotations

import nacl.bindings  # which prepares the library
from nacl._sodium import ffi, lib  # type: ignore[import-not-found]  # compiled, and without stubs

from asapd.wire.token_claims import SIGNATURE_BYTES

KEY_BYTES = nacl.bindings.crypto_sign_PUBLICKEYBYTES
_NOWHERE = ffi.NULL


def is_signed(messages: tuple[bytes, ...], signature: bytes, public_key: bytes) -> bool:
    """Whether the key (32 raw bytes) made the signature of one of the messages; of other lengths nothing did."""
    # libsodium reads the lengths it expects, whatever the buffers hold.
    if len(signature) != SIGNATURE_BYTES or len(public_key) != KEY_BYTES:
        return False
    for message in messages:
        signed = signature + message
        # `nacl.bindings.crypto_sign_open` is the same, and hands back a copy of the message: a twentieth of the whole.
        if lib.crypto_sign_open(_NOWHERE, _NOWHERE, signed, len(signed), public_key) == 0:
            return True
    return False
