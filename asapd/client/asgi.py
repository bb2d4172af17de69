"""Middleware that meters an ASGI application, under asyncio or Trio."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, TypeAlias

from asapd.client.async_meter import AsyncMeter, NoThreadError, in_thread
from asapd.client.meter import Meter
from asapd.client.middleware import Answer, Request, Rules
from asapd.client.task import leave

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Application: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]


class AsgiMiddleware:
    """Each HTTP request, and each WebSocket connection, is a task: `current_task()`, and `scope["asapd.task"]`.

    It lasts until the last byte of the response was handed over, and its id is in the header `x-asap-task-id`. It is
    recorded when the application returns, with what background tasks have used by then; whether they fail is not said.
    """

    def __init__(self, app: Application, meter: Meter | AsyncMeter, rules: Rules | None = None) -> None:
        self._app = app
        self._meter = meter.meter if isinstance(meter, AsyncMeter) else meter
        self._rules = Rules() if rules is None else rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI interface."""
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        request = Request(self._meter, self._rules, scope.get("path", ""), _headers(scope))
        if request.is_guarded:
            try:
                answer = await in_thread(request.authorize, lambda _: request.abandon())
            except NoThreadError as error:
                answer = request.unasked(str(error))
            if answer is not None:
                await _refuse(scope, receive, send, answer)
                return
        await self._metered(request, scope, receive, send)

    async def _metered(self, request: Request, scope: Scope, receive: Receive, send: Send) -> None:
        task = request.task
        status: int | None = None

        async def watched(message: Message) -> None:
            nonlocal status
            kind = message["type"]
            if kind in {"http.response.start", "websocket.accept"}:
                status = message.get("status", 101)
                own = [(name.encode(), value.encode("latin-1", "replace")) for name, value in request.shown]
                message = {**message, "headers": [*message.get("headers", ()), *own]}
            elif kind in {"websocket.close", "websocket.http.response.start"} and status is None:
                status = message.get("status", 403)
            await send(message)
            if kind == "http.response.body" and not message.get("more_body", False):
                request.answered()

        outer = task.enter()
        task.start()
        try:
            await self._app({**scope, "asapd.task": task}, receive, watched)
        except BaseException as error:
            request.finish(status, error)
            raise
        else:
            request.finish(status, None)
        finally:
            leave(outer)


def _headers(scope: Scope) -> Mapping[str, str]:
    found: dict[str, str] = {}
    for name, value in scope.get("headers", ()):
        found.setdefault(bytes(name).decode("latin-1").lower(), bytes(value).decode("latin-1"))
    return found


async def _refuse(scope: Scope, receive: Receive, send: Send, answer: Answer) -> None:
    if scope["type"] == "websocket":
        # Closing before accepting makes the server answer the handshake with 403.
        await receive()
        await send({"type": "websocket.close", "code": 1008, "reason": ""})
        return
    headers = [(name.encode(), value.encode()) for name, value in answer.headers]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})
