"""Ed25519 keys: what other programs write is read exactly, and anything else is refused."""

import base64
import contextlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from nacl.signing import SigningKey

from asapd.wire.keys import (
    KeyFormatError,
    jwk_thumbprint,
    key_id,
    load_private_pem,
    load_public,
    private_pem,
    public_base64,
)

# Written by `openssl genpkey -algorithm ed25519` and `openssl pkey -pubout`, OpenSSL 3.0.
OPENSSL_PRIVATE = b"""-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VwBCIEICpT2wEQiVvwADUqypavYfFyhhgPVrGPWovMs1YwfIdk
-----END PRIVATE KEY-----
"""
OPENSSL_PUBLIC = """-----BEGIN PUBLIC KEY-----
MCowBQYDK2VwAyEAaYWMIockQlEeXMT1Q7yZwry86i3QoNYGNow0V7xd61o=
-----END PUBLIC KEY-----
"""
PUBLIC_BASE64 = "aYWMIockQlEeXMT1Q7yZwry86i3QoNYGNow0V7xd61o="

# The points of small order and their other encodings, as libsodium lists them.
SMALL_ORDER = [
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0100000000000000000000000000000000000000000000000000000000000000",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
]


def pem(label: str, der: bytes) -> str:
    return f"-----BEGIN {label}-----\n{base64.b64encode(der).decode()}\n-----END {label}-----\n"


def test_reads_and_rewrites_the_private_key_of_openssl() -> None:
    key = load_private_pem(OPENSSL_PRIVATE)
    assert private_pem(key) == OPENSSL_PRIVATE
    assert public_base64(bytes(key.verify_key)) == PUBLIC_BASE64


def test_reads_a_private_key_with_crlf_and_without_final_newline() -> None:
    assert load_private_pem(OPENSSL_PRIVATE.replace(b"\n", b"\r\n")) == load_private_pem(OPENSSL_PRIVATE.strip())


def test_reads_a_public_key_as_pem_and_as_base64() -> None:
    assert load_public(OPENSSL_PUBLIC) == load_public(f"{PUBLIC_BASE64}\n") == base64.b64decode(PUBLIC_BASE64)


@given(st.binary(min_size=32, max_size=32))
def test_every_key_survives_its_files(seed: bytes) -> None:
    key = SigningKey(seed)
    raw = bytes(key.verify_key)
    assert load_private_pem(private_pem(key)) == key
    assert load_public(public_base64(raw)) == raw


def test_key_id_is_the_start_of_the_sha256_of_the_raw_key() -> None:
    assert key_id(bytes(32)) == "66687aadf862bd77"


def test_thumbprint_agrees_with_rfc_8037_appendix_a3() -> None:
    raw = load_public("11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=")
    assert jwk_thumbprint(raw) == "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"


@pytest.mark.parametrize("point", SMALL_ORDER)
def test_public_key_of_small_order_is_refused(point: str) -> None:
    with pytest.raises(KeyFormatError, match="safe"):
        load_public(public_base64(bytes.fromhex(point)))


RAW_SEED = bytes(range(32))
PRIVATE_DER = bytes.fromhex("302e020100300506032b657004220420") + RAW_SEED


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not a PEM"),
        (b"\xff\xfe", "not a PEM"),
        (PRIVATE_DER, "not a PEM"),
        (OPENSSL_PRIVATE[:-20], "not a PEM"),
        (b" " + OPENSSL_PRIVATE, "not a PEM"),
        (OPENSSL_PRIVATE * 2, "not a PEM"),
        (OPENSSL_PRIVATE + b"x", "not a PEM"),
        (b"A" * 10_000, "not a PEM"),
        (OPENSSL_PUBLIC.encode(), "public key, not"),
        (pem("ENCRYPTED PRIVATE KEY", PRIVATE_DER).encode(), "encrypted"),
        (pem("RSA PRIVATE KEY", PRIVATE_DER).encode(), "rsa private key"),
        (pem("PRIVATE KEY", PRIVATE_DER[:-1]).encode(), "RFC 8410"),
        (pem("PRIVATE KEY", PRIVATE_DER + b"\0").encode(), "RFC 8410"),
        (pem("PRIVATE KEY", PRIVATE_DER.replace(b"\x2b\x65\x70", b"\x2b\x65\x6e")).encode(), "RFC 8410"),
        (OPENSSL_PRIVATE.replace(b"MC4C", b"MC=C"), "not base64"),
        (OPENSSL_PRIVATE.replace(b"fIdk\n", b"fIdk=\n"), "base64"),
    ],
)
def test_what_is_no_private_key_is_refused_without_showing_it(text: bytes, message: str) -> None:
    with pytest.raises(KeyFormatError, match=message) as caught:
        load_private_pem(text)
    assert "MC4C" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "32 bytes"),
        ("AAAA", "32 bytes"),
        (PUBLIC_BASE64[:-1], "not base64"),
        (PUBLIC_BASE64.replace("61o=", "61p="), "canonical"),
        (PUBLIC_BASE64.replace("a", "é", 1), "not base64"),
        (PUBLIC_BASE64.replace("a", "-", 1), "not base64"),
        (OPENSSL_PUBLIC.replace("MCow", "MCox"), "RFC 8410"),
        (OPENSSL_PRIVATE.decode(), "private key, not"),
        ("-----BEGIN PUBLIC KEY-----", "not a PEM"),
        (public_base64(b"\x02" + bytes(31)), "safe"),
    ],
)
def test_what_is_no_public_key_is_refused(text: str, message: str) -> None:
    with pytest.raises(KeyFormatError, match=message):
        load_public(text)


@given(st.text())
@example("-----BEGIN A-----\n=\n-----END A-----")
def test_reading_a_public_key_raises_nothing_but_its_own_error(text: str) -> None:
    with contextlib.suppress(KeyFormatError):
        assert len(load_public(text)) == 32


@given(st.binary())
@example(b"-----BEGIN PRIVATE KEY-----\n\n\n-----END PRIVATE KEY-----")
def test_reading_a_private_key_raises_nothing_but_its_own_error(text: bytes) -> None:
    with contextlib.suppress(KeyFormatError):
        load_private_pem(text)
