from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asapd.wire.frames import MAX_FRAME_BYTES, FrameDecoder, Oversized, encode

BODIES = st.lists(st.binary(max_size=60), max_size=8)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


@given(bodies=BODIES, places=st.lists(st.integers(0, 10_000), max_size=12))
def test_any_cutting_of_the_stream_gives_the_same_frames(bodies: list[bytes], places: list[int]) -> None:
    decoder = FrameDecoder(60)
    frames: list[bytes | Oversized] = []
    for piece in cut(b"".join(map(encode, bodies)), places):
        frames += decoder.feed(piece)
    assert frames == bodies
    assert not decoder.partial


@given(
    bodies=BODIES, announced=st.integers(61, 2**32 - 1), rest=st.binary(max_size=80), places=st.lists(st.integers(0))
)
def test_an_oversized_frame_is_reported_once_and_ends_everything(
    bodies: list[bytes], announced: int, rest: bytes, places: list[int]
) -> None:
    decoder = FrameDecoder(60)
    items: list[bytes | Oversized] = []
    for piece in cut(b"".join(map(encode, bodies)) + announced.to_bytes(4) + rest, places):
        items += decoder.feed(piece)
    assert items == [*bodies, Oversized(announced_bytes=announced)]
    assert decoder.feed(encode(b"more")) == []
    assert not decoder.partial


@given(pieces=st.lists(st.binary(max_size=40), max_size=10))
def test_garbage_never_raises_and_is_never_held_beyond_one_frame(pieces: list[bytes]) -> None:
    decoder = FrameDecoder(20)
    for piece in pieces:
        for item in decoder.feed(piece):
            assert isinstance(item, Oversized) or len(item) <= 20


def test_a_begun_frame_is_partial_until_its_last_byte() -> None:
    decoder = FrameDecoder(10)
    assert not decoder.partial
    assert decoder.feed(b"\0") == []
    assert decoder.partial
    assert decoder.feed(b"\0\0\2a") == []
    assert decoder.feed(b"b") == [b"ab"]
    assert not decoder.partial


def test_the_limit_itself_is_allowed() -> None:
    assert FrameDecoder(3).feed(encode(b"abc")) == [b"abc"]


@pytest.mark.parametrize("limit", [0, MAX_FRAME_BYTES + 1])
def test_a_limit_that_would_confuse_frames_with_http_is_refused(limit: int) -> None:
    with pytest.raises(ValueError, match="max_bytes"):
        FrameDecoder(limit)


def test_a_body_longer_than_any_frame_cannot_be_encoded() -> None:
    assert encode(bytes(MAX_FRAME_BYTES))[:4] == b"\0\xff\xff\xff"
    with pytest.raises(ValueError, match="at most"):
        encode(bytes(MAX_FRAME_BYTES + 1))
