"""A piece of work that is metered: timed, counted, and marked failed when it raises."""

from __future__ import annotations

import contextvars
import functools
import inspect
import os
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping
from decimal import Decimal
from types import TracebackType
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, Self, TypeVar, Unpack, cast

from asapd.client.event import (
    TOKEN_FIELD,
    Details,
    Metrics,
    Usd,
    add_dollars,
    build,
    clean,
    count,
    error_text,
    new_id,
    token_text,
)
from asapd.client.stats import Counters

P = ParamSpec("P")
F = TypeVar("F", bound=Callable[..., Any])

_NAMES = frozenset(Details.__annotations__)
_current: contextvars.ContextVar[Task | None] = contextvars.ContextVar("asapd_task", default=None)


def current_task() -> Task | None:
    """The innermost task of this thread or async task that was entered and not left; for code deep inside the work."""
    return _current.get()


class Recorder(Protocol):
    """What a task needs of its meter."""

    @property
    def counters(self) -> Counters:
        """Where a misuse is counted."""
        ...

    def submit(self, event: dict[str, Any]) -> bool:
        """Take an event in; never raises."""
        ...


def _harmless(method: Callable[Concatenate[Task, P], None]) -> Callable[Concatenate[Task, P], None]:
    """A method that at worst counts and logs what went wrong, and changes nothing then."""

    @functools.wraps(method)
    def guarded(self: Task, /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception as error:  # noqa: BLE001 -- metering never breaks the work that it measures
            self.recorder.counters.add("misused")
            self.recorder.counters.complain(f"{method.__name__}() of a metered task changed nothing", error=error)

    return guarded


class Task:
    """What one piece of work uses. A context manager for `with`, or a decorator: each call is then a task of its own.

    Its methods never raise and never wait for the daemon; counts add up. `failed()` and exceptions make it a failed
    task. An exception passes on as it is.
    """

    def __init__(
        self, recorder: Recorder, agent: str, consumer: str, task_id: str | None, /, **details: Unpack[Details]
    ) -> None:
        self.recorder = recorder
        self.agent = agent
        self.consumer = consumer
        self._given_id = task_id
        self.task_id = new_id()
        if task_id is not None:
            try:
                self.task_id = str(task_id)
            except Exception as error:  # noqa: BLE001 -- metering never breaks the work that it measures
                recorder.counters.add("misused")
                recorder.counters.complain("the id of a metered task is left out", error=error)
        self._locks: dict[int, threading.RLock] = {}
        self.details: Details = {}
        for name, value in details.items():  # one by one: what makes no sense is left out, and nothing else
            self.describe(**cast("Details", {name: value}))
        self.outcome: Literal["completed", "failed"] = "completed"
        self.error: str | None = None
        self.cost_usd: Decimal | None = None
        self.metrics: Metrics = {}
        self._began_ns: int | None = None
        self._is_over = False
        self._outer: contextvars.Token[Task | None] | None = None

    # --- what was used

    @_harmless
    def tokens(
        self,
        in_: int | None = None,
        out: int | None = None,
        *,
        cached_in: int | None = None,
        cache_write: int | None = None,
        cache_write_1h: int | None = None,
        reasoning: int | None = None,
    ) -> None:
        """Add tokens; None adds nothing.

        `in_` includes cached and cache-write tokens, `cache_write` those kept for an hour, `out` reasoning tokens.
        """
        self._add(
            tokens_in=in_,
            tokens_out=out,
            cached_tokens_in=cached_in,
            cache_write_tokens=cache_write,
            cache_write_1h_tokens=cache_write_1h,
            reasoning_tokens=reasoning,
        )

    @_harmless
    def calls(self, number: int = 1) -> None:
        """Add API calls."""
        self._add(api_calls=number)

    @_harmless
    def cost(self, usd: Usd) -> None:
        """Add what the work cost in US dollars; without it the daemon's price table decides."""
        with self._own_lock():
            while True:
                known = self.cost_usd
                total = add_dollars(known, usd)
                if self.cost_usd is known:
                    self.cost_usd = total
                    return

    @_harmless
    def describe(self, **details: Unpack[Details]) -> None:
        """Say or correct the model, the provider, labels and so on, when they are known only now."""
        check_names(details)
        with self._own_lock():
            while True:
                known = self.details
                described: Details = {**known, **details}
                labels = {**(known.get("labels") or {}), **(details.get("labels") or {})}
                if labels:
                    described["labels"] = labels
                if self.details is known:  # else something of this thread came between, and is kept
                    self.details = described
                    return

    @_harmless
    def failed(self, error: BaseException | str | None = None) -> None:
        """Mark the work as failed without an exception."""
        self.outcome = "failed"
        if error is not None:
            self.error = error_text(error) if isinstance(error, BaseException) else clean(error)

    def _add(self, **counts: int | None) -> None:
        added = {name: count(more) for name, more in counts.items() if more is not None}
        with self._own_lock():
            while True:
                known = cast("dict[str, int]", self.metrics)
                sums = {**known, **{name: count(known.get(name, 0) + more) for name, more in added.items()}}
                if self.metrics is known:  # else something of this thread came between, and is added to
                    self.metrics = cast("Metrics", sums)
                    return

    def _own_lock(self) -> threading.RLock:
        """This process's: a child that was forked while another thread held it would wait for its parent's for ever.

        One that its thread can take twice: a finalizer or the handler of a signal may count too.
        """
        return self._locks.setdefault(os.getpid(), threading.RLock())

    # --- begin and end

    @_harmless
    def start(self) -> None:
        """Begin to time. `with` does it; for work that does not begin and end in one place.

        After its end it is the next piece of work, of which nothing was counted yet.
        """
        if self._is_over:
            self._is_over = False
            self.metrics, self.cost_usd, self.outcome, self.error = {}, None, "completed", None
        self._began_ns = time.perf_counter_ns()

    @_harmless
    def stop(self) -> None:
        """End to time; what is used until `finish` counts still. For work that goes on after it was answered."""
        if (began_ns := self._began_ns) is not None:
            self._measure(began_ns)

    def _measure(self, began_ns: int) -> None:
        if "duration_ms" not in self.metrics:
            self._add(duration_ms=(time.perf_counter_ns() - began_ns + 500_000) // 1_000_000)

    @_harmless
    def finish(self, error: BaseException | None = None) -> None:
        """Record the work; the second time does nothing."""
        began_ns, self._began_ns = self._began_ns, None  # nothing can come between, another end neither
        if began_ns is None:
            return
        self._is_over = True
        self._measure(began_ns)
        if _is_failure(error):
            assert error is not None
            self.outcome, self.error = "failed", error_text(error)
        self.recorder.submit(
            build(
                agent=self.agent,
                consumer=self.consumer,
                task_id=self.task_id,
                now_ns=time.time_ns(),
                metrics=self.metrics,
                outcome=self.outcome,
                error=self.error,
                cost=self.cost_usd,
                details=as_details(self.details),
            )
        )

    def __enter__(self) -> Self:
        self._outer = _current.set(self)
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        outer, self._outer = self._outer, None
        self.finish(error)
        if outer is not None:
            leave(outer)

    def enter(self) -> contextvars.Token[Task | None]:
        """Make this the current task; `leave` undoes it."""
        return _current.set(self)

    # --- as a decorator

    def __call__(self, function: F) -> F:
        """Meter each call of a function, a coroutine function, or a generator function (until it ends).

        Inside a function `current_task()` is the task; inside a generator, whose context is its caller's, it is not.
        """
        wrapper: Any
        if inspect.iscoroutinefunction(function):
            wrapper = self._around_coroutine(function)
        elif inspect.isasyncgenfunction(function):
            wrapper = self._around_async_generator(function)
        elif inspect.isgeneratorfunction(function):
            wrapper = self._around_generator(function)
        else:
            wrapper = self._around_function(function)
        return cast("F", functools.wraps(function)(wrapper))

    def _another(self) -> Task:
        return Task(self.recorder, self.agent, self.consumer, self._given_id, **self.details)

    def _around_function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._another():
                return function(*args, **kwargs)

        return call

    def _around_coroutine(self, function: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def call(*args: Any, **kwargs: Any) -> Any:
            with self._another():
                return await function(*args, **kwargs)

        return call

    def _around_generator(self, function: Callable[..., Generator[Any, Any, Any]]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
            task = self._another()
            task.start()
            try:
                result = yield from function(*args, **kwargs)
            except BaseException as error:
                task.finish(error)
                raise
            task.finish()
            return result

        return call

    def _around_async_generator(self, function: Callable[..., AsyncGenerator[Any, Any]]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
            return _Stream(self._another(), function(*args, **kwargs))

        return call


class _Stream(AsyncGenerator[Any, Any]):
    """An async generator that is metered from its first step to its end, also when it is left halfway."""

    def __init__(self, task: Task, inner: AsyncGenerator[Any, Any]) -> None:
        self._task = task
        self._inner = inner
        self._has_begun = False

    async def asend(self, value: Any) -> Any:
        """The next step."""
        if not self._has_begun:
            self._has_begun = True
            self._task.start()
        return await self._step(self._inner.asend(value))

    async def athrow(self, *thrown: Any) -> Any:
        """A step that begins with an exception, about which the generator decides."""
        return await self._step(self._inner.athrow(*thrown))

    async def aclose(self) -> None:
        """The end before the end."""
        await self._step(self._inner.aclose())
        self._task.finish()

    async def _step(self, step: Awaitable[Any]) -> Any:
        try:
            return await step
        except StopAsyncIteration:
            self._task.finish()
            raise
        except BaseException as error:
            self._task.finish(error)
            raise

    def __del__(self) -> None:
        self._task.finish()


def leave(outer: contextvars.Token[Task | None]) -> None:
    """Go back to the task before; elsewhere than where it was entered, as in a generator, nothing is to be undone."""
    try:
        _current.reset(outer)
    except ValueError:
        return


def _is_failure(error: BaseException | None) -> bool:
    """A generator that is closed early and an exit without a complaint have not failed."""
    if error is None or isinstance(error, GeneratorExit):
        return False
    return not (isinstance(error, SystemExit) and error.code in {None, 0})


def check_names(details: Mapping[str, Any]) -> None:
    """Look that there are such details: the daemon would refuse the whole event for one that it does not know.

    Raises:
        TypeError: for a name that is none of `Details`, such as one that is mistyped.
    """
    unknown = [name for name in details if name not in _NAMES]
    if unknown:
        raise TypeError(f"an event has no {', '.join(unknown)}; there are {', '.join(sorted(_NAMES))}")


def as_details(details: Mapping[str, Any]) -> Details:
    """Details as they are sent: names as text, labels as text.

    Raises:
        TypeError: for a name that is none of `Details`.
    """
    check_names(details)
    known: dict[str, Any] = {}
    for name, value in details.items():
        if name == "labels" and value is not None:
            known[name] = {str(key): str(label) for key, label in value.items()}
        elif name == TOKEN_FIELD and value is not None:
            known[name] = token_text(str(value))
        elif value is not None:
            known[name] = str(value)
    return cast("Details", known)
