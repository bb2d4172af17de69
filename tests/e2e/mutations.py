"""Bodies that nearly are what they should be: valid documents, mutated by their structure, then by their bytes."""

from __future__ import annotations

import gzip
import json
import struct
import sys
from collections.abc import Callable
from typing import Any

import msgspec
from hypothesis import strategies as st

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Draw = Callable[..., Any]


class Pairs:
    """An object whose names may stand twice, or be no text."""

    def __init__(self, pairs: list[tuple[Any, Any]]) -> None:
        self.pairs = pairs


class Text:
    """Something that is written into JSON as it is."""

    def __init__(self, text: str) -> None:
        self.text = text


def tree(value: Any) -> Any:
    """A document in the form that mutations work on."""
    match value:
        case dict():
            return Pairs([(name, tree(item)) for name, item in value.items()])
        case list():
            return [tree(item) for item in value]
        case _:
            return value


def as_json(value: Any) -> bytes:
    """JSON, or what comes near it: NaN, lone surrogates, names twice."""
    match value:
        case Pairs():
            return b"{" + b",".join(as_json(str(name)) + b":" + as_json(item) for name, item in value.pairs) + b"}"
        case list():
            return b"[" + b",".join(as_json(item) for item in value) + b"]"
        case Text():
            return value.text.encode("utf-8", "surrogatepass")
        case bytes():
            return as_json(value.decode("latin1"))
        case _:
            return json.dumps(value).encode()


def as_msgpack(value: Any) -> bytes:
    """MessagePack, with names of any type, twice, and text that is not UTF-8."""
    match value:
        case Pairs():
            items = b"".join(as_msgpack(name) + as_msgpack(item) for name, item in value.pairs)
            return struct.pack(">BH", 0xDE, len(value.pairs)) + items
        case list():
            return struct.pack(">BH", 0xDC, len(value)) + b"".join(as_msgpack(item) for item in value)
        case Text():
            return as_msgpack(value.text)
        case str():
            raw = value.encode("utf-8", "surrogatepass")
            return struct.pack(">BI", 0xDB, len(raw)) + raw
        case int() if not -(2**63) <= value < 2**64:
            return msgspec.msgpack.encode(float(value) if abs(value) < 10**300 else "9" * 400)
        case _:
            return msgspec.msgpack.encode(value)


def _nested(depth: int) -> Any:
    found: Any = []
    for _ in range(depth):
        found = [found]
    return found


def _labyrinth(depth: int) -> Text:
    return Text('{"a":' * depth + "1" + "}" * depth)


ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    *(0, -1, 1, 127, 2**31, 2**53 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 10**400, -(2**63), -(2**70)),
    *(0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"), float("-inf")),
    *("", " ", "0", "-1", "1e999", "1e999999999", "NaN", "Infinity", "0x10", "1_000", "٣", "true", "null"),
    *("\0", "a\0b", "\x7f", "\r\n", "\t", "\u2028", "\u202e", "\ud800", "\udfff\ud800", "é", "𝒳" * 64, "\ufeff"),
    *("x" * 128, "x" * 129, "x" * 256, "x" * 257, "x" * 2_001, "x" * 20_000),
    *(
        "urn:asap:agent:",
        "urn:asap:agent:\0",
        "urn:asap:agent:x y",
        "URN:ASAP:AGENT:X",
        "*",
        "../..",
        "'; DROP TABLE usage",
    ),
    *("1970-01-01T00:00:00Z", "9999-12-31T23:59:59.999999999Z", "0001-01-01T00:00:00+23:59", "2026-02-30T00:00:00Z"),
    *(
        "2026-11-20T24:00:00Z",
        "2026-11-20T09:00:60Z",
        "2026-11-20t09:00:01z",
        "2026-W47-5T09:00:00Z",
        "20261120T090001Z",
    ),
    *([], {}, [[]], {"": ""}, {"a": {"b": []}}, [None], b"", b"\xff\x00"),
    *(
        Text("1e400"),
        Text("-"),
        Text("01"),
        Text("1."),
        Text("+1"),
        Text(".5"),
        Text("nul"),
        Text("'x'"),
        Text("/**/1"),
    ),
    *(Text('"\\u12"'), Text('"\\x"'), Text('"\\ud83d\\u0041"'), Text('"\x01"'), Text('"\ud800"'), Text("9" * 5_000)),
    *(Text("-0"), Text("1E+2"), Text("1e-400"), Text("0." + "1" * 400), _nested(40), _labyrinth(2_000)),
)
odd = st.sampled_from(ODD).map(tree) | st.text(max_size=20) | st.integers() | st.floats() | st.binary(max_size=8)


def _holders(value: Any) -> list[Any]:
    """Every object and array of a document that holds something."""
    match value:
        case Pairs():
            parts = [item for _, item in value.pairs]
        case list():
            parts = value
        case _:
            return []
    return ([value] if parts else []) + [holder for part in parts for holder in _holders(part)]


def _mutate(draw: Draw, document: Any, words: tuple[str, ...]) -> Any:
    """One change somewhere."""
    holders = _holders(document)
    if not holders or draw(st.integers(0, 40)) == 0:
        return draw(odd)
    holder = draw(st.sampled_from(holders))
    parts: list[Any] = holder.pairs if isinstance(holder, Pairs) else holder
    place = draw(st.integers(0, len(parts) - 1))
    name, value = parts[place] if isinstance(holder, Pairs) else (None, parts[place])
    what = draw(st.integers(0, 8))
    if isinstance(holder, Pairs):
        match what:
            case 0:
                del parts[place]
            case 1:
                parts.insert(draw(st.integers(0, len(parts))), (name, draw(odd)))
            case 2:
                parts[place] = (draw(st.sampled_from(words) | st.text(max_size=8)), value)
            case 3:
                parts.append((draw(st.sampled_from(words)), draw(odd)))
            case 4:
                parts[place] = (draw(odd.filter(lambda key: not isinstance(key, Pairs | list))), value)
            case 5:
                parts[place] = (name, [value])
            case _:
                parts[place] = (name, draw(odd))
    else:
        match what:
            case 0:
                del parts[place]
            case 1:
                parts.insert(place, value)
            case 2:
                parts[place] = [value]
            case 3:
                parts[place] = Pairs([("a", value)])
            case _:
                parts[place] = draw(odd)
    return document


@st.composite
def mutated(draw: Draw, documents: st.SearchStrategy[Any], words: tuple[str, ...] = ("id",)) -> Any:
    """A document with up to three changes; with none it is as it was."""
    document = tree(draw(documents))
    for _ in range(draw(st.sampled_from((0, 0, 1, 1, 2, 3)))):
        document = _mutate(draw, document, words)
    return document


@st.composite
def damaged(draw: Draw, bodies: st.SearchStrategy[bytes]) -> bytes:
    """Bytes, mostly as they were; else cut off, flipped, doubled, or with something more."""
    body: bytes = draw(bodies)
    what = draw(st.sampled_from((*range(5), *(9,) * 12)))
    if what == 9:
        return body
    at = draw(st.integers(0, len(body)))
    match what:
        case 0:
            return body[:at]
        case 1:
            return body[:at] + draw(st.binary(min_size=1, max_size=4)) + body[at + 1 :]
        case 2:
            return body[:at] + body[max(0, at - 20) :]
        case 3:
            return body + draw(st.sampled_from((b"\0", b"\n", b" ", b"{}", b"]", b",", b"\xc1", b"\xff\xfe", body)))
        case _:
            return draw(st.sampled_from((b"\xef\xbb\xbf", b" ", b"\n", b"\0", b"[", b"\xff"))) + body


ENCODERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda body: gzip.compress(body, 1, mtime=0),
    "zstd": lambda body: zstd.compress(body, 1),
}
ENCODINGS = ("", "identity", "gzip", "zstd", "x-gzip", "GZIP", " zstd ", "br", "deflate", "gzip, gzip", "é", "\x00gzip")


@st.composite
def packed(draw: Draw, bodies: st.SearchStrategy[bytes]) -> tuple[bytes, str | None]:
    """A body and its content encoding, which are mostly right for each other."""
    plain: bytes = draw(bodies)
    what = draw(st.integers(0, 9))
    if what < 6:
        return plain, None
    name = draw(st.sampled_from(sorted(ENCODERS)))
    whole = ENCODERS[name](plain)
    if what == 6:
        return draw(damaged(st.just(whole))), name
    if what == 7:
        return plain, draw(st.sampled_from(ENCODINGS))
    if what == 8:
        half = len(plain) // 2
        return ENCODERS[name](plain[:half]) + ENCODERS[name](plain[half:]), name
    return whole, name
