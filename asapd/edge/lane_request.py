"""What the fast lane takes of a client: requests whose heads it knows, each with its body and who sends it."""

from __future__ import annotations

from typing import Any

import httptools
import msgspec

from asapd.core.access import Caller
from asapd.core.errors import Refusal
from asapd.edge.decisions import AUTHORIZE
from asapd.edge.json_body import is_json
from asapd.edge.usage_request import PATHS, UsageRequest, is_bare, is_plain

STARTS = (b"POST /usage", b"POST %b" % AUTHORIZE.encode())
"""How what the lane serves begins."""

Outcome = tuple[int, dict[str, Any]] | Refusal

_PATHS = {path.encode(): path for path in (*PATHS, AUTHORIZE)}


class Fields(dict[str, str]):
    """Header fields by their names in lower case, found in any."""

    def get(self, name: str, default: str | None = None) -> str | None:  # type: ignore[override]  # of one type here
        return super().get(name.lower(), default)


class Received(msgspec.Struct, frozen=True):
    """One request, who sends it, and whether they want an answer to another; a refused one comes without its body."""

    request: UsageRequest
    caller: Caller | Refusal
    keep_alive: bool
    is_plain: bool


class _HeadParser:
    """Receives what `httptools` finds in a head."""

    def __init__(self) -> None:
        self.fields = Fields()
        self.is_odd = False

    def on_header(self, name: bytes, value: bytes) -> None:
        key = name.decode("latin1").lower()
        # Said twice, a field is joined, overridden or refused, depending on the field.
        self.is_odd = self.is_odd or key in self.fields
        # httptools leaves the blanks behind a value. They are no part of it (RFC 9110, 5.5), and h11 takes them off.
        self.fields[key] = value.decode("latin1").strip(" \t")


class Head(msgspec.Struct, frozen=True):
    """The head of a request that the lane takes; `who` is what says on TCP whose it is: host, origin and key."""

    path: str
    query: bytes
    fields: Fields
    body_bytes: int
    keep_alive: bool
    is_plain: bool
    who: tuple[str | None, str | None, str | None]


def read_head(raw: bytes, max_body_bytes: int) -> Head | None:
    """A whole head, up to its empty line; None when the request is not one for the lane."""
    method, _, rest = raw.partition(b"\r\n")[0].partition(b" ")
    target, _, version = rest.partition(b" ")
    path, _, query = target.partition(b"?")
    if method != b"POST" or path not in _PATHS or version != b"HTTP/1.1":
        return None
    found = _HeadParser()
    parser = httptools.HttpRequestParser(found)
    try:
        parser.feed_data(raw)
    except (httptools.HttpParserError, httptools.HttpParserUpgrade):
        return None
    fields = found.fields
    length = fields.get("content-length") or ""
    if found.is_odd or parser.should_upgrade() or not (length.isascii() and length.isdigit()) or len(length) > 12:
        return None
    if "host" not in fields or "transfer-encoding" in fields or "expect" in fields or int(length) > max_body_bytes:
        return None
    name = _PATHS[path]
    if name == AUTHORIZE:
        plain = is_bare(query, fields) and is_json(fields.get("content-type"))
    else:
        plain = is_plain(name, query, fields)
    who = fields.get("host"), fields.get("origin"), fields.get("authorization")
    return Head(name, query, fields, int(length), parser.should_keep_alive(), plain, who)
