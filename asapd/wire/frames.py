"""Ingest frames: a 4-byte big-endian length and a body; docs/http.md."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

LENGTH_BYTES = 4
MAX_FRAME_BYTES = (1 << 24) - 1
"""The first byte of a length stays zero below this, which tells a frame from the letters of an HTTP method."""

Frame: TypeAlias = bytes
"""One frame's body, without its length; may be empty."""


class Oversized(msgspec.Struct, frozen=True):
    """A frame announced more bytes than the limit; nothing after it can be read."""

    announced_bytes: int


class FrameDecoder:
    """Turns a byte stream, however it is cut, into frames; never raises on any input.

    `max_bytes` bounds a body and must be within 1 and MAX_FRAME_BYTES. The decoder holds at most one unfinished frame.
    """

    def __init__(self, max_bytes: int) -> None:
        if not 1 <= max_bytes <= MAX_FRAME_BYTES:
            raise ValueError(f"max_bytes must be within 1 and {MAX_FRAME_BYTES}, not {max_bytes}")
        self._max_bytes = max_bytes
        self._buffer = bytearray()
        self._broken = False

    @property
    def partial(self) -> bool:
        """Whether a frame has begun and is not complete."""
        return bool(self._buffer)

    @property
    def announced_bytes(self) -> int:
        """The size of the unfinished frame's body; 0 without one, or before its length is there."""
        return int.from_bytes(self._buffer[:LENGTH_BYTES]) if len(self._buffer) >= LENGTH_BYTES else 0

    def feed(self, data: bytes) -> list[Frame | Oversized]:
        """The frames that `data` completes, in order; an `Oversized` is the last item there will ever be."""
        if self._broken:
            return []
        buffer = self._buffer
        buffer += data
        items: list[Frame | Oversized] = []
        start = 0
        with memoryview(buffer) as view:
            while len(view) - start >= LENGTH_BYTES:
                body_start = start + LENGTH_BYTES
                length_bytes = int.from_bytes(view[start:body_start])
                if length_bytes > self._max_bytes:
                    items.append(Oversized(announced_bytes=length_bytes))
                    self._broken = True
                    start = len(view)
                elif len(view) - body_start < length_bytes:
                    break
                else:
                    start = body_start + length_bytes
                    items.append(bytes(view[body_start:start]))
        del buffer[:start]
        return items


def encode(body: bytes) -> bytes:
    """A body as one frame; ValueError when it is longer than MAX_FRAME_BYTES."""
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a frame holds at most {MAX_FRAME_BYTES} bytes, not {len(body)}")
    return len(body).to_bytes(LENGTH_BYTES) + body
