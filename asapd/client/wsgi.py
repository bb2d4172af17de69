"""Middleware that meters a WSGI application."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from asapd.client.meter import Meter
from asapd.client.middleware import Request, Rules
from asapd.client.task import leave

Environ: TypeAlias = dict[str, Any]
StartResponse: TypeAlias = Callable[..., Callable[[bytes], object]]
Application: TypeAlias = Callable[[Environ, StartResponse], Iterable[bytes]]


class WsgiMiddleware:
    """Each request is a task: `current_task()`, and `environ["asapd.task"]`.

    It lasts until the last part of the response was handed over, and its id is in the header `x-asap-task-id`. It is
    recorded when the server closes the response, with what was used by then.
    """

    def __init__(self, app: Application, meter: Meter, rules: Rules | None = None) -> None:
        self._app = app
        self._meter = meter
        self._rules = Rules() if rules is None else rules

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """The WSGI interface."""
        request = Request(self._meter, self._rules, environ.get("PATH_INFO", ""), _headers(environ))
        if request.is_guarded:
            answer = request.authorize()
            if answer is not None:
                start_response(f"{answer.status} {answer.reason}", answer.headers)
                return [answer.body]
        response = _Response(request)

        def watched(status: str, headers: list[tuple[str, str]], *more: Any) -> Callable[[bytes], object]:
            response.status = _status(status)
            return start_response(status, [*headers, *request.shown], *more)

        request.task.start()
        outer = request.task.enter()
        try:
            response.parts = self._app({**environ, "asapd.task": request.task}, watched)
        except BaseException as error:
            request.finish(response.status, error)
            raise
        finally:
            leave(outer)
        return response


class _Response:
    """The application's response; closing it ends the task. Inside, the task is the current one."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._error: BaseException | None = None
        self._iterator: Iterator[bytes] | None = None
        self.status: int | None = None
        self.parts: Iterable[bytes] = ()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        outer = self._request.task.enter()
        try:
            if self._iterator is None:
                self._iterator = iter(self.parts)
            return next(self._iterator)
        except StopIteration:
            self._request.answered()
            raise
        except BaseException as error:
            self._error = error
            raise
        finally:
            leave(outer)

    def close(self) -> None:
        """What a server calls at the end, whatever happened."""
        try:
            close = getattr(self.parts, "close", None)
            if close is not None:
                close()
        except BaseException as error:
            self._error = error
            raise
        finally:
            self._request.finish(self.status, self._error)


def _headers(environ: Environ) -> Mapping[str, str]:
    return {
        name.removeprefix("HTTP_").replace("_", "-").lower(): value
        for name, value in environ.items()
        if name.startswith("HTTP_") and isinstance(value, str)
    }


def _status(line: str) -> int | None:
    number = line[:3]
    return int(number) if number.isdecimal() else None
