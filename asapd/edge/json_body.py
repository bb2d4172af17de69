"""A body that has to be JSON: whether it says so, and what it is without its encoding."""

from __future__ import annotations

from asapd.core.errors import Refusal
from asapd.edge.unpacking import unpack_beside

_JSON = "application/json"
_UTF_8 = frozenset(("utf-8", "utf8", "us-ascii", "ascii"))
"""What JSON may be said to be in: ASCII is UTF-8 as well."""


async def json_body(
    content_type: str | None, content_encoding: str | None, body: bytes, max_bytes: int
) -> bytes | Refusal:
    """The JSON of a request, unpacked to at most `max_bytes`; JSON is what a body without a content type is taken for.

    Another type is refused, also because a page of another origin can send a few of those without asking first. What
    has no body has no type either, whatever a client writes.
    """
    if not body:
        return body
    if _kind(content_type) != _JSON:
        return Refusal("unsupported_media_type", f"{_kind(content_type)} is not taken here: send {_JSON}")
    return foreign_charset(content_type) or await unpack_beside(body, content_encoding, max_bytes)


def is_json(content_type: str | None) -> bool:
    """Whether a body of this type is taken for JSON."""
    return _kind(content_type) == _JSON and foreign_charset(content_type) is None


def foreign_charset(content_type: str | None) -> Refusal | None:
    """The refusal of JSON that is said to be something else than UTF-8: it would be misread (RFC 8259, section 8.1)."""
    for parameter in (content_type or "").split(";")[1:]:
        name, _, value = parameter.partition("=")
        charset = value.strip().strip('"').lower()
        if name.strip().lower() == "charset" and charset not in _UTF_8:
            return Refusal("unsupported_media_type", f"charset {charset} is not taken: JSON is UTF-8, send it in that")
    return None


def _kind(content_type: str | None) -> str:
    return (content_type or _JSON).partition(";")[0].strip().lower()
