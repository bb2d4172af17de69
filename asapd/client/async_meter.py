"""The meter for asyncio and for Trio: what waits for the daemon is awaited, everything else is as it is in `Meter`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, Unpack

from asapd.client.delegation import Allowed, Authorization, Estimate, Unavailable
from asapd.client.event import Details
from asapd.client.meter import Meter, Settings
from asapd.client.stats import Stats
from asapd.client.task import Task

T = TypeVar("T")


class NoThreadError(Exception):
    """No thread takes work any more: the event loop or the interpreter is about to end, or the host has none left."""


class _Work(Generic[T]):
    """Work in a thread, and what to do with its result once nobody waits for it; whichever comes last does that."""

    def __init__(self, work: Callable[[], T], unwanted: Callable[[T], object]) -> None:
        self._work = work
        self._unwanted = unwanted
        self._results: deque[T] = deque()
        self._is_left = False
        self.has_failed = False

    def run(self) -> T:
        try:
            result = self._work()
        except BaseException:
            self.has_failed = True
            raise
        self._results.append(result)
        if self._is_left:
            self._drop()
        return result

    def leave(self) -> None:
        """Nobody waits for it any more."""
        self._is_left = True
        self._drop()

    def _drop(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._unwanted(self._results.popleft())


async def in_thread(work: Callable[[], T], unwanted: Callable[[T], object] = lambda _: None) -> T:
    """Run blocking work in a thread of the event loop that runs here, asyncio's or Trio's.

    Trio is looked for among the loaded modules and never imported. Cancelled under asyncio, the work goes on alone, and
    `unwanted` is called with its result, in whatever thread; under Trio it is waited for.

    Raises:
        NoThreadError: there is no thread for it.
    """
    one = _Work(work, unwanted)
    try:
        return await _in_thread(one.run)
    except RuntimeError as error:
        one.leave()
        if one.has_failed:
            raise
        raise NoThreadError(str(error)) from error
    except BaseException:
        one.leave()
        raise


async def _in_thread(work: Callable[[], T]) -> T:
    trio: Any = sys.modules.get("trio")
    if trio is not None:
        try:
            trio.lowlevel.current_trio_token()
        except RuntimeError:
            pass
        else:
            result: T = await trio.to_thread.run_sync(work)
            return result
    import asyncio

    return await asyncio.get_running_loop().run_in_executor(None, work)


class AsyncMeter:
    """A meter for async code, under asyncio or Trio; settings as for `Meter`.

    `task`, `record` and `settle` are plain functions here too: they write a line to the spool, on a local disk, and
    wait for nobody. `with meter.task(...)` is right in async code.
    """

    def __init__(self, address: str | os.PathLike[str] | None = None, **settings: Unpack[Settings]) -> None:
        self.meter = Meter(address, **settings)
        self.record = self.meter.record
        self.settle = self.meter.settle

    def task(
        self,
        *,
        agent: str | None = None,
        consumer: str | None = None,
        task_id: str | None = None,
        **details: Unpack[Details],
    ) -> Task:
        """See `Meter.task`."""
        return self.meter.task(agent=agent, consumer=consumer, task_id=task_id, **details)

    def stats(self) -> Stats:
        """See `Meter.stats`."""
        return self.meter.stats()

    async def authorize(
        self,
        credential: str,
        *,
        task_id: str,
        action: str = "task.execute",
        agent: str | None = None,
        consumer: str | None = None,
        project: str | None = None,
        estimate: Estimate | None = None,
        ttl_s: int | None = None,
    ) -> Authorization:
        """See `Meter.authorize`. Cancelled, what it is still allowed then is settled."""
        try:
            return await in_thread(
                lambda: self.meter.authorize(
                    credential,
                    task_id=task_id,
                    action=action,
                    agent=agent,
                    consumer=consumer,
                    project=project,
                    estimate=estimate,
                    ttl_s=ttl_s,
                ),
                self._settle_unwanted,
            )
        except NoThreadError as error:
            self.meter.counters.complain("an authorisation could not be asked for: %s", error)
            return Unavailable(str(error))

    def _settle_unwanted(self, outcome: Authorization) -> None:
        if isinstance(outcome, Allowed):
            self.meter.settle_unwanted(outcome.reservation)

    async def flush(self, timeout_s: float = 10.0) -> bool:
        """See `Meter.flush`."""
        try:
            return await in_thread(lambda: self.meter.flush(timeout_s))
        except NoThreadError as error:
            self.meter.counters.complain("the meter could not be flushed: %s", error)
            return False

    async def aclose(self, timeout_s: float = 5.0) -> None:
        """See `Meter.close`. Cancelled, it closes without waiting; what is in the spool stays there.

        Where no thread takes work any more it closes in this one, and the event loop waits.
        """
        try:
            await in_thread(lambda: self.meter.close(timeout_s))
        except NoThreadError:
            self.meter.close(timeout_s)
        finally:
            self.meter.close(0)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()
