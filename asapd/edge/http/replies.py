"""Replies: JSON with exact money, and refusals as problem documents."""

from __future__ import annotations

from typing import Any

from quart import Response

from asapd.core.errors import Refusal
from asapd.wire.problem import PROBLEM_JSON, encode_json, problem, status_of


def reply(value: Any, status: int = 200) -> Response:
    """A JSON reply, or the problem document of a refusal."""
    if isinstance(value, Refusal):
        return refuse(value)
    return Response(encode_json(value), status, content_type="application/json")


def refuse(refusal: Refusal, status: int | None = None) -> Response:
    """The problem document of a refusal, with the headers its status asks for."""
    code = status_of(refusal.code) if status is None else status
    response = Response(encode_json(problem(refusal, status=code)), code, content_type=PROBLEM_JSON)
    if refusal.retry_after_s is not None:
        response.headers["Retry-After"] = str(refusal.retry_after_s)
    if code == 401:
        response.headers["WWW-Authenticate"] = 'Bearer realm="asapd"'
    return response
