"""What counts as a signature: one form of each, by keys that bind; whatever the library under it is built with."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from asapd.wire.token import SignedToken, decode, verify
from tests.wire.curve import BASE, NON_CANONICAL, NONCE, ORDER, PUBLIC, TORSION, add, encode, multiply, signature
from tests.wire.hostile_tokens import doc, jws

TOKEN = decode(jws())
(MESSAGE,) = TOKEN.signed
KEY = encode(PUBLIC)
R = multiply(NONCE, BASE)


def signed(bytes_: bytes, token: SignedToken = TOKEN) -> SignedToken:
    return replace(token, signature=bytes_)


def test_the_textbook_signs_as_the_library_verifies() -> None:
    assert verify(signed(signature(MESSAGE, encode(R), KEY)), KEY)
    token = decode(doc())
    for message in token.signed:
        assert verify(signed(signature(message, encode(R), KEY), token), KEY)


@pytest.mark.parametrize("times", range(1, 16))
def test_a_scalar_at_or_above_the_order_is_refused(times: int) -> None:
    honest = signature(MESSAGE, encode(R), KEY)
    scalar = int.from_bytes(honest[32:], "little") + times * ORDER
    if scalar < 2**256:
        assert not verify(signed(honest[:32] + scalar.to_bytes(32, "little")), KEY)


@pytest.mark.parametrize("point", [encode(point) for point in TORSION] + NON_CANONICAL, ids=bytes.hex)
def test_a_point_of_small_order_or_in_another_form_is_refused_as_r(point: bytes) -> None:
    assert not verify(signed(signature(MESSAGE, point, KEY, nonce=0)), KEY)


@pytest.mark.parametrize("key", [encode(point) for point in TORSION] + NON_CANONICAL, ids=bytes.hex)
def test_a_key_of_small_order_or_in_another_form_verifies_nothing(key: bytes) -> None:
    for point in (*(encode(point) for point in TORSION), *NON_CANONICAL[::7], encode(R)):
        for scalar in (0, NONCE):
            assert not verify(signed(point + scalar.to_bytes(32, "little")), key)


@pytest.mark.parametrize("torsion", TORSION[1:], ids=lambda point: encode(point).hex()[:8])
def test_a_part_of_small_order_in_r_is_refused(torsion: tuple[int, int]) -> None:
    """Verifiers that multiply by the cofactor would take these: two readers would see two verdicts."""
    mixed = encode(add(R, torsion))
    assert not verify(signed(signature(MESSAGE, mixed, KEY)), KEY)


def test_both_inputs_of_a_document_are_tried_and_no_third() -> None:
    token = decode(doc())
    assert len(token.signed) == 2
    assert not verify(signed(signature(b"another", encode(R), KEY), token), KEY)
