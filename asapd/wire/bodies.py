"""Content encodings of request bodies: gzip and zstd, with a bound on what they unpack to."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from typing import Final

from asapd.core.errors import Refusal

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MAX_PARTS: Final = 1_024
"""Members of a gzip body, or frames of a zstd body, one after another (block-wise writers make one per 64 KiB)."""

# RFC 9659: a zstd content encoding has a window of at most 8 MiB, so that is all the memory it can ask for.
_ZSTD_OPTIONS = {int(zstd.DecompressionParameter.window_log_max): 23}
_PIECE_BYTES = 65_536


class _Gzip:
    """One gzip member, with the interface that the zstd decompressor has."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(zlib.MAX_WBITS | 16)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    def decompress(self, data: bytes | memoryview, max_length: int) -> bytes:
        return self._inner.decompress(data or self._inner.unconsumed_tail, max_length)


def _new_zstd() -> zstd.ZstdDecompressor:
    return zstd.ZstdDecompressor(options=_ZSTD_OPTIONS)


_DECOMPRESSORS: dict[str, tuple[str, Callable[[], _Gzip | zstd.ZstdDecompressor]]] = {
    "gzip": ("gzip", _Gzip),
    "x-gzip": ("gzip", _Gzip),
    "zstd": ("zstd", _new_zstd),
}


def unpack(body: bytes, content_encoding: str | None, max_bytes: int) -> bytes | Refusal:
    """The body without its content encoding; never raises.

    Members and frames that follow one another are joined, as RFC 1952 and RFC 8878 have it. Never more than `max_bytes`
    are unpacked. A `Refusal` is `unsupported_media_type`, `malformed` or `too_large`.
    """
    encoding = (content_encoding or "identity").strip().lower()
    if encoding in {"identity", ""}:
        return body if len(body) <= max_bytes else _too_large("has", max_bytes)
    if encoding not in _DECOMPRESSORS:
        return Refusal("unsupported_media_type", f"encoding {encoding} is not taken: send gzip, zstd or none")
    name, new = _DECOMPRESSORS[encoding]
    try:
        plain = _unpack_parts(memoryview(body), new, max_bytes)
    except (zlib.error, zstd.ZstdError) as error:
        return Refusal("malformed", f"the body is not {name}: {error}")
    if plain is None:
        return Refusal("malformed", f"the {name} body is cut off, or in more than {MAX_PARTS} parts")
    return plain if len(plain) <= max_bytes else _too_large("unpacks to", max_bytes)


def _too_large(does: str, max_bytes: int) -> Refusal:
    return Refusal("too_large", f"the body {does} more than {max_bytes} bytes: send it in parts")


def _unpack_parts(body: memoryview, new: Callable[[], _Gzip | zstd.ZstdDecompressor], max_bytes: int) -> bytes | None:
    """Up to one byte more than `max_bytes`; None when the last part has no end, or the parts are too many."""
    plain = bytearray()
    at = 0
    for _ in range(MAX_PARTS):
        part = new()
        while not part.eof:
            # Fed in pieces, for what is left over at the end of a part is copied.
            piece = body[at : at + _PIECE_BYTES] if part.needs_input else body[:0]
            if part.needs_input and not piece:
                return None
            at += len(piece)
            plain += part.decompress(piece, max_bytes + 1 - len(plain))
            if len(plain) > max_bytes:
                return bytes(plain)
        at -= len(part.unused_data)
        if at == len(body):
            return bytes(plain)
    return None
