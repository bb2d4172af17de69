"""A body that has to be JSON: whether it says so, and what it is without its encoding."""

from __future__ import annotations

from asapd.core.errors import Refusal
from asapd.wire.bodies import unpack

_JSON = "application/json"


def json_body(content_type: str | None, content_encoding: str | None, body: bytes, max_bytes: int) -> bytes | Refusal:
    """The JSON of a request, unpacked to at most `max_bytes`; JSON is what a body without a content type is taken for.

    Another type is refused, also because a page of another origin can send a few of those without asking first. What
    has no body has no type either, whatever a client writes.
    """
    if not body:
        return body
    if not is_json(content_type):
        return Refusal("unsupported_media_type", f"{_kind(content_type)} is not taken here: send {_JSON}")
    return unpack(body, content_encoding, max_bytes)


def is_json(content_type: str | None) -> bool:
    """Whether a body of this type is taken for JSON."""
    return _kind(content_type) == _JSON


def _kind(content_type: str | None) -> str:
    return (content_type or _JSON).partition(";")[0].strip().lower()
