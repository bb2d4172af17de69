from __future__ import annotations

import gzip
import random
import zlib

import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from asapd.core.errors import Refusal
from asapd.wire.bodies import MAX_PARTS, unpack

PACKERS = {"gzip": gzip.compress, "x-gzip": gzip.compress, "ZSTD": zstd.compress}
LIMIT = 1_000_000


def code(found: bytes | Refusal) -> str:
    assert isinstance(found, Refusal)
    return found.code


@pytest.mark.parametrize("encoding", PACKERS)
@given(parts=st.lists(st.binary(max_size=2_000), min_size=1, max_size=5))
def test_what_was_packed_is_unpacked_in_however_many_parts(encoding: str, parts: list[bytes]) -> None:
    body = b"".join(map(PACKERS[encoding], parts))
    assert unpack(body, encoding, LIMIT) == b"".join(parts)


@pytest.mark.parametrize("encoding", PACKERS)
def test_a_body_may_unpack_to_the_limit_and_no_further(encoding: str) -> None:
    packed = PACKERS[encoding](b"x" * LIMIT)
    assert unpack(packed, encoding, LIMIT) == b"x" * LIMIT
    assert code(unpack(packed, encoding, LIMIT - 1)) == "too_large"
    assert code(unpack(packed + packed, encoding, LIMIT)) == "too_large"


def test_parts_longer_than_a_piece_are_joined() -> None:
    noise = random.Random(1).randbytes(200_000)
    for pack in PACKERS.values():
        name = "gzip" if pack is gzip.compress else "zstd"
        assert unpack(pack(noise) + pack(noise), name, LIMIT) == noise + noise


@pytest.mark.parametrize("encoding", PACKERS)
def test_a_body_that_is_cut_off_or_followed_by_rubbish_is_malformed(encoding: str) -> None:
    packed = PACKERS[encoding](b"usage" * 1_000)
    assert code(unpack(packed[:-1], encoding, LIMIT)) == "malformed"
    assert code(unpack(packed + b"rubbish", encoding, LIMIT)) == "malformed"
    assert code(unpack(b"", encoding, LIMIT)) == "malformed"


@pytest.mark.parametrize("encoding", PACKERS)
def test_the_number_of_parts_is_bounded(encoding: str) -> None:
    empty = PACKERS[encoding](b"")
    assert unpack(empty * MAX_PARTS, encoding, LIMIT) == b""
    assert code(unpack(empty * (MAX_PARTS + 1), encoding, LIMIT)) == "malformed"


def test_a_zstd_window_beyond_eight_mebibytes_is_not_given_memory() -> None:
    options = {zstd.CompressionParameter.window_log: 24, zstd.CompressionParameter.content_size_flag: 0}
    compressor = zstd.ZstdCompressor(options=options)
    packed = compressor.compress(b"x" * 100) + compressor.flush()
    assert code(unpack(packed, "zstd", LIMIT)) == "malformed"


@pytest.mark.parametrize("encoding", [None, "", "identity", " Identity "])
def test_a_body_without_encoding_is_taken_as_it_is(encoding: str | None) -> None:
    assert unpack(b"{}", encoding, 2) == b"{}"
    assert code(unpack(b"{}", encoding, 1)) == "too_large"


@pytest.mark.parametrize("encoding", ["br", "deflate", "gzip, zstd"])
def test_other_encodings_are_refused_by_name(encoding: str) -> None:
    found = unpack(zlib.compress(b"{}"), encoding, LIMIT)
    assert code(found) == "unsupported_media_type"
    assert isinstance(found, Refusal)
    assert encoding in found.detail


@given(body=st.binary(max_size=300), encoding=st.sampled_from(["gzip", "zstd"]))
def test_arbitrary_bytes_never_raise(body: bytes, encoding: str) -> None:
    for start in (b"", PACKERS["gzip"](b"ab")[:12], PACKERS["ZSTD"](b"ab")[:6]):
        found = unpack(start + body, encoding, 1_000)
        assert isinstance(found, Refusal) or len(found) <= 1_000
