"""Answers made before the application is asked, after which the connection is closed."""

from __future__ import annotations

from http import HTTPStatus
from typing import Final

import msgspec

from asapd.core.errors import Refusal
from asapd.wire.otlp import CONTENT_TYPES, Encoding, encode_status
from asapd.wire.problem import PROBLEM_JSON, encode_json, problem

OTLP_PATHS: Final = ("/v1/traces", "/v1/metrics")
VALIDATIONS: Final = ("/usage/validate", "/asap/usage/validate")
"""What always has an answer, which may be that a report of this would be refused."""

OTLP_TYPES: Final[dict[Encoding, str]] = {encoding: name for name, encoding in CONTENT_TYPES.items()}

# With codes that the application uses as well.
_REFUSALS = {
    400: Refusal("malformed", "This is not a well-formed HTTP/1.1 request."),
    403: Refusal("forbidden", "The WebSocket was refused."),
    408: Refusal("request_timeout", "The request did not arrive in time: send it again, without pauses."),
    413: Refusal("too_large", "The body is over the limit of {limit}: send smaller batches."),
    431: Refusal("headers_too_large", "The request line and headers are over the limit."),
    500: Refusal("internal", "The request failed inside the daemon; its log says why."),
    501: Refusal(
        "not_implemented",
        "This socket does not serve that; a body comes with a Content-Length, or chunked and no other way.",
    ),
    503: Refusal("overloaded", "Too many connections, or large bodies at once: try again in a moment."),
}


class Asked(msgspec.Struct, frozen=True):
    """What is known of the request: where it went, and the type of its body."""

    path: str
    content_type: str


def refusal_response(
    status: int, asked: Asked | None = None, limit: str = "http.max_body"
) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Status, headers and body: a problem document, for exporters of OpenTelemetry what those understand.

    What would be too large to report is the verdict of a validation. `limit` is what a body is over.
    """
    refusal = _REFUSALS.get(status, _REFUSALS[400])
    if status == 413:
        refusal = Refusal(refusal.code, refusal.detail.format(limit=limit))
    content_type, body = PROBLEM_JSON, encode_json(problem(refusal, status=status))
    if asked is not None and asked.path in OTLP_PATHS:
        content_type, body = otlp_error(refusal.code, refusal.detail, asked.content_type)
    elif asked is not None and asked.path in VALIDATIONS and status == 413:
        verdict = {"valid": False, "error": refusal.detail, "code": refusal.code}
        status, content_type, body = 200, "application/json", encode_json(verdict)
    headers = [
        (b"content-type", content_type.encode()),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    if status == 503:
        headers.append((b"retry-after", b"1"))
    return status, headers, body


def bare_response(status: int) -> bytes:
    """The same as a whole HTTP/1.1 response."""
    _, headers, body = refusal_response(status)
    first = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}".encode()
    return b"\r\n".join([first, *(name + b": " + value for name, value in headers), b"", body])


def otlp_error(code: str, detail: str, content_type: str) -> tuple[str, bytes]:
    """An error as a `google.rpc.Status` in the encoding of its request: content type and body."""
    # What is neither JSON nor protobuf is a person's try, who reads JSON.
    encoding = CONTENT_TYPES.get(content_type.partition(";")[0].strip().lower(), "json")
    return OTLP_TYPES[encoding], encode_status(f"{code}: {detail}", encoding)
