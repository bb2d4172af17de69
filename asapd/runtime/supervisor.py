"""One-for-one supervision: an actor that crashes is started again, its siblings do not notice.

Crashes are logged here and nowhere else.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec
import trio

State = Literal["starting", "running", "backoff", "stopped", "failed"]


class BootFailed(Exception):  # noqa: N818 -- named for what happened
    """An actor failed before all were up, most often over its environment: see the cause, mend it, start again."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"actor {name} failed at boot: {reason}")
        self.name = name


class RestartLimitExceeded(Exception):  # noqa: N818 -- named for what happened
    """Restarting does not mend this actor. Let the process end, so that the service manager starts it afresh."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"actor {name} crashes faster than it may be restarted: {reason}")
        self.name = name


@dataclass(frozen=True)
class Actor:
    """A long-running function under supervision.

    `run(task_status=...)` is called once for each incarnation. It calls `task_status.started()` when it is ready,
    returns when its work is over (its mailbox was closed), and raises when it has crashed. `mailbox_depth` is only
    reported.
    """

    name: str
    run: Callable[..., Awaitable[None]]
    mailbox_depth: Callable[[], int] = lambda: 0


@dataclass(frozen=True)
class RestartLimit:
    """More than `restarts` crashes of one actor within `within_s` end the supervision.

    The n-th crash within that time is followed by a wait between 0 and min(cap, base * 2^(n-1)) seconds.
    """

    restarts: int = 5
    within_s: float = 60.0
    backoff_base_s: float = 0.1
    backoff_cap_s: float = 5.0


class ActorStatus(msgspec.Struct, frozen=True):
    """What an actor is doing; `started_at_s` is Trio time and None unless it is running.

    `restarts` counts every start after the first, whatever its reason.
    """

    state: State
    restarts: int
    mailbox: int
    last_error: str | None
    started_at_s: float | None


@dataclass(slots=True, eq=False)
class _Seat:
    """What outlives an actor's incarnations."""

    actor: Actor
    state: State = "starting"
    booted: bool = False
    restarts: int = 0
    last_error: str | None = None
    started_at_s: float | None = None
    beat_at_s: float = 0.0
    crashes_at_s: deque[float] = field(default_factory=deque)
    scope: trio.CancelScope | None = None


class Supervisor:
    """Runs actors and starts each again when it crashes, within a limit and after a jittered wait.

    `random` gives a number from [0, 1). Actor names are unique, else ValueError. An actor that is not ready
    `boot_deadline_s` after its start counts as crashed.
    """

    def __init__(
        self,
        actors: Sequence[Actor],
        *,
        random: Callable[[], float],
        log: logging.Logger,
        limit: RestartLimit = RestartLimit(),
        boot_deadline_s: float = 30.0,
    ) -> None:
        self._seats = {actor.name: _Seat(actor) for actor in actors}
        if len(self._seats) != len(actors):
            raise ValueError("two actors have the same name")
        self._random = random
        self._log = log
        self._limit = limit
        self._boot_deadline_s = boot_deadline_s

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Start the actors one after the other, each once the one before is ready, and return when all have returned.

        Raises BootFailed from the error of an actor that crashes before all are up, RestartLimitExceeded from the
        last crash of an actor, each after cancelling the others; a group of these if several happen at once.
        Cancellation and what is no Exception (KeyboardInterrupt) pass through; crashes that come with them are logged.
        """
        try:
            async with trio.open_nursery() as nursery:
                for seat in self._seats.values():
                    await nursery.start(self._keep, seat)
                task_status.started()
        except BaseExceptionGroup as group:
            match _innermost(group):
                case (BootFailed() | RestartLimitExceeded()) as alone:
                    raise alone from alone.__cause__
                case _:
                    raise

    def restart(self, name: str) -> bool:
        """Cancel an actor's incarnation, or its wait for the next, and start a new one; not counted as a crash.

        False when there is no such actor, or it has no incarnation to replace (not started yet, or stopped).
        """
        seat = self._seats.get(name)
        if seat is None or seat.scope is None:
            return False
        seat.scope.cancel()
        return True

    def status(self) -> dict[str, ActorStatus]:
        """What each actor is doing, in the order of their start."""
        return {
            name: ActorStatus(
                state=seat.state,
                restarts=seat.restarts,
                mailbox=seat.actor.mailbox_depth(),
                last_error=seat.last_error,
                started_at_s=seat.started_at_s,
            )
            for name, seat in self._seats.items()
        }

    def beat(self, name: str) -> None:
        """Note that an actor is alive; KeyError for a name that is not supervised."""
        self._seats[name].beat_at_s = trio.current_time()

    def beater(self, name: str) -> Callable[[], None]:
        """`beat` for one actor, to be handed to it; KeyError for a name that is not supervised."""
        seat = self._seats[name]

        def beat() -> None:
            seat.beat_at_s = trio.current_time()

        return beat

    def stale(self, max_age_s: float) -> list[str]:
        """The running actors whose last beat, or start, is more than `max_age_s` ago."""
        oldest_s = trio.current_time() - max_age_s
        return [name for name, seat in self._seats.items() if seat.state == "running" and seat.beat_at_s < oldest_s]

    async def _keep(self, seat: _Seat, *, task_status: trio.TaskStatus[None]) -> None:
        name = seat.actor.name

        def ready() -> None:
            seat.state = "running"
            seat.started_at_s = seat.beat_at_s = trio.current_time()
            if not seat.booted:
                seat.booted = True
                task_status.started()

        try:
            while True:
                seat.state = "starting"
                seat.scope = scope = trio.CancelScope()
                crash = await self._live(seat, scope, ready)
                seat.started_at_s = None
                if scope.cancel_called and (scope.cancelled_caught or crash is not None):
                    seat.restarts += 1
                    continue
                if crash is None:
                    return
                if not seat.booted:
                    seat.state = "failed"
                    raise BootFailed(name, _describe(crash)) from crash
                wait_s = self._wait_s(seat)
                if wait_s is None:
                    seat.state = "failed"
                    raise RestartLimitExceeded(name, _describe(crash)) from crash
                seat.state = "backoff"
                with trio.CancelScope() as seat.scope:
                    await trio.sleep(wait_s)
                seat.restarts += 1
        finally:
            seat.scope = None
            seat.started_at_s = None
            if seat.state != "failed":
                seat.state = "stopped"

    async def _live(self, seat: _Seat, scope: trio.CancelScope, ready: Callable[[], None]) -> Exception | None:
        """Run one incarnation to its end; returns what it crashed with."""
        name = seat.actor.name
        try:
            with scope:
                async with trio.open_nursery() as nursery:
                    with trio.move_on_after(self._boot_deadline_s) as start:
                        await nursery.start(seat.actor.run)
                    if start.cancelled_caught:
                        raise TimeoutError(f"not ready within {self._boot_deadline_s:g} s")
                    ready()
        except BaseExceptionGroup as group:
            # Not except*: a crash at boot is logged only when it cannot be raised as BootFailed, because a cancellation
            # or an operator's restart goes first.
            crashes, rest = group.split(Exception)
            crash = None
            if crashes is not None:
                crash = crashes.exceptions[0] if len(crashes.exceptions) == 1 else crashes
                seat.last_error = _describe(crash)
                if seat.booted or rest is not None or scope.cancel_called:
                    self._log.error("actor %s crashed", name, exc_info=crash)
            if rest is not None:
                raise rest from group.__cause__
            return crash
        return None

    def _wait_s(self, seat: _Seat) -> float | None:
        """Count a crash; how long to wait before the restart, None when the limit is exceeded."""
        limit = self._limit
        now_s = trio.current_time()
        seat.crashes_at_s.append(now_s)
        while seat.crashes_at_s[0] < now_s - limit.within_s:
            seat.crashes_at_s.popleft()
        crashes = len(seat.crashes_at_s)
        if crashes > limit.restarts:
            return None
        # 30 doublings are above any cap; without a bound a generous limit would overflow the float.
        ceiling_s = min(limit.backoff_cap_s, limit.backoff_base_s * 2.0 ** min(crashes - 1, 30))
        return self._random() * ceiling_s


def _innermost(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _describe(error: Exception) -> str:
    inner = _innermost(error)
    return f"{type(inner).__name__}: {inner}" if str(inner) else type(inner).__name__
