"""One POST of text to an address that the operator named, and the whole answer to it."""

from __future__ import annotations

import ssl
from contextlib import aclosing

import httpcore2
import msgspec
import trio


class Posted(msgspec.Struct, frozen=True):
    """An answer of any status."""

    status: int
    body: bytes


class PostFailed(msgspec.Struct, frozen=True):
    """No whole answer; `detail` is for people."""

    detail: str


async def post_text(url: str, body: bytes, *, deadline_s: float, max_bytes: int) -> Posted | PostFailed:
    """POST a text within `deadline_s` seconds, everything included; redirects are not followed, proxies ignored."""
    parts: list[bytes] = []
    size = 0
    try:
        with trio.fail_after(deadline_s):
            async with (
                httpcore2.AsyncConnectionPool(ssl_context=ssl.create_default_context()) as pool,
                pool.stream(
                    "POST",
                    url,
                    headers={"Content-Type": "text/plain", "Content-Length": str(len(body)), "User-Agent": "asapd"},
                    content=body,
                ) as response,
            ):
                async with aclosing(response.aiter_stream()) as stream:
                    async for part in stream:
                        parts.append(part)
                        size += len(part)
                        if size > max_bytes:
                            return PostFailed(f"the answer is longer than {max_bytes} bytes")
                return Posted(response.status, b"".join(parts))
    except trio.TooSlowError:
        return PostFailed(f"no answer within {deadline_s:g} s")
    except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.UnsupportedProtocol, OSError) as error:
        return PostFailed(f"cannot be reached: {str(error) or type(error).__name__}")
