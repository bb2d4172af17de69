"""Ed25519 keys as files, text and names."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re

from nacl.bindings import crypto_core_ed25519_is_valid_point
from nacl.signing import SigningKey

# RFC 8410: the DER of an Ed25519 key is a constant and then the 32 bytes, so no ASN.1 parser is needed.
_PRIVATE_PREFIX = bytes.fromhex("302e020100300506032b657004220420")
_PUBLIC_PREFIX = bytes.fromhex("302a300506032b6570032100")
_PEM = re.compile(r"-----BEGIN ([A-Z0-9 ]{1,40})-----\r?\n([A-Za-z0-9+/=\r\n]{1,4096}?)\r?\n-----END \1-----\s*\Z")
_KEY_BYTES = 32
# A PEM of such a key has 120 characters; what is far longer is another file.
_MAX_TEXT = 8192


class KeyFormatError(ValueError):
    """The text is not an Ed25519 key in the expected form; whoever supplied the key has to correct it.

    The message never holds any part of the text.
    """


def load_private_pem(text: bytes) -> SigningKey:
    """The key in an unencrypted PKCS#8 PEM (RFC 8410), as `asapd keygen` and `openssl genpkey` write it.

    Raises:
        KeyFormatError: anything else.
    """
    try:
        label, der = _read_pem(text.decode("ascii"))
    except UnicodeDecodeError:
        raise KeyFormatError("is not a PEM file") from None
    if label == "ENCRYPTED PRIVATE KEY":
        raise KeyFormatError("is encrypted; an unencrypted PKCS#8 key is needed")
    if label != "PRIVATE KEY":
        raise KeyFormatError(f"is a PEM of a {label.lower()}, not of a PKCS#8 private key")
    return SigningKey(_after_prefix(der, _PRIVATE_PREFIX))


def private_pem(key: SigningKey) -> bytes:
    """A key as unencrypted PKCS#8 PEM (RFC 8410)."""
    body = base64.b64encode(_PRIVATE_PREFIX + bytes(key))
    return b"-----BEGIN PRIVATE KEY-----\n" + body + b"\n-----END PRIVATE KEY-----\n"


def load_public(text: str) -> bytes:
    """The 32 raw bytes of a public key, from their base64 or a SubjectPublicKeyInfo PEM (RFC 8410).

    Raises:
        KeyFormatError: another form, or bytes that are no safe key: not on the curve, not in the
            canonical encoding, or of small order (one signature would fit every message).
    """
    text = text.strip()
    if text.startswith("-----"):
        label, der = _read_pem(text)
        if label != "PUBLIC KEY":
            raise KeyFormatError(f"is a PEM of a {label.lower()}, not of a public key")
        raw = _after_prefix(der, _PUBLIC_PREFIX)
    else:
        raw = _read_base64(text)
        if len(raw) != _KEY_BYTES:
            raise KeyFormatError(f"must be {_KEY_BYTES} bytes in base64, not {len(raw)}")
    if not crypto_core_ed25519_is_valid_point(raw):
        raise KeyFormatError("is not a safe Ed25519 public key")
    return raw


def public_base64(raw: bytes) -> str:
    """A raw public key in base64 with padding, as configuration and manifests carry it."""
    return base64.b64encode(raw).decode("ascii")


def key_id(raw: bytes) -> str:
    """The short name of a raw public key: the first 16 hex digits of its SHA-256."""
    return hashlib.sha256(raw).hexdigest()[:16]


def jwk_thumbprint(raw: bytes) -> str:
    """The JWK thumbprint of a raw public key (RFC 7638, RFC 8037 appendix A.3), base64url without padding."""
    x = base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")
    digest = hashlib.sha256(f'{{"crv":"Ed25519","kty":"OKP","x":"{x}"}}'.encode("ascii")).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode("ascii")


def public_jwk(raw: bytes) -> dict[str, str]:
    """A raw public key as a JWK for signatures (RFC 7517, RFC 8037), its thumbprint as `kid`."""
    x = base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")
    return {"kty": "OKP", "crv": "Ed25519", "x": x, "kid": jwk_thumbprint(raw), "use": "sig", "alg": "EdDSA"}


def _read_pem(text: str) -> tuple[str, bytes]:
    if len(text) > _MAX_TEXT or (match := _PEM.match(text)) is None:
        raise KeyFormatError("is not a PEM file")
    return match[1], _read_base64(re.sub(r"\r?\n", "", match[2]))


def _read_base64(text: str) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise KeyFormatError("is not base64") from None
    if base64.b64encode(raw).decode("ascii") != text:
        raise KeyFormatError("is not canonical base64")
    return raw


def _after_prefix(der: bytes, prefix: bytes) -> bytes:
    if len(der) != len(prefix) + _KEY_BYTES or not der.startswith(prefix):
        raise KeyFormatError("is not an Ed25519 key in the form of RFC 8410")
    return der[len(prefix) :]
