"""Publishing to any number of followers without waiting for any: one log or level for all, never a queue each."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

import trio

T = TypeVar("T")


class FeedClosed(Exception):  # noqa: N818 -- named for what the follower meets
    """Nobody's bug: the feed ended, at shutdown. Say goodbye to whoever is being served and stop following."""


class Feed(Generic[T]):
    """The newest `capacity` published items with their sequence numbers, for followers that each keep a cursor.

    A follower loops over `wait_after(cursor)` and `after(cursor)`. One that falls behind by more than the capacity is
    told of the gap and reads the store; it never holds up the publisher nor the others.
    """

    __slots__ = ("_capacity", "_closed", "_followers", "_forgotten", "_items", "_last")

    def __init__(self, capacity: int, last: int = 0) -> None:
        """Keep at most `capacity` (from 1) items; `last` is the newest sequence number before the first is published.

        Raises ValueError for a capacity below 1.
        """
        if capacity < 1:
            raise ValueError(f"a feed needs a capacity of at least 1, not {capacity}")
        self._capacity = capacity
        self._items: deque[tuple[int, T]] = deque()
        self._last = last
        self._forgotten = last  # the newest sequence number that is no longer in memory
        self._closed = False
        self._followers = trio.lowlevel.ParkingLot()

    @property
    def last(self) -> int:
        """The newest sequence number published."""
        return self._last

    def publish(self, seq: int, item: T) -> None:
        """Append an item and wake every waiting follower; sequence numbers rise strictly but need not be contiguous.

        A closed feed still takes items, for at shutdown commits outlive followers. Raises ValueError when `seq` is not
        above `last`.
        """
        if seq <= self._last:
            raise ValueError(f"sequence number {seq} is not above the last one, {self._last}")
        if len(self._items) == self._capacity:
            self._forgotten, _ = self._items.popleft()
        self._items.append((seq, item))
        self._last = seq
        self._followers.unpark_all()

    def after(self, seq: int) -> list[tuple[int, T]] | None:
        """All items above `seq`, oldest first, or None when some of them are no longer in memory."""
        if seq < self._forgotten:
            return None
        newer: list[tuple[int, T]] = []
        for entry in reversed(self._items):
            if entry[0] <= seq:
                break
            newer.append(entry)
        newer.reverse()
        return newer

    async def wait_after(self, seq: int) -> None:
        """Return once something above `seq` was published, at once if it was before.

        Raises FeedClosed once the feed is closed, whether or not there are items left: `after` still hands those out.
        """
        if self._closed or self._last > seq:
            await trio.lowlevel.checkpoint()
        while not self._closed and self._last <= seq:
            await self._followers.park()
        if self._closed:
            raise FeedClosed("the feed has ended")

    def close(self) -> None:
        """End the feed for every follower, waiting or not; closing again does nothing."""
        self._closed = True
        self._followers.unpark_all()


class Wakeup:
    """A counter to wait on: each waiter says which count it has seen, so no notification is ever missed.

    Notifications that come faster than a waiter reads them are one wake-up.
    """

    __slots__ = ("_count", "_waiters")

    def __init__(self) -> None:
        self._count = 0
        self._waiters = trio.lowlevel.ParkingLot()

    @property
    def count(self) -> int:
        """How many notifications there have been."""
        return self._count

    def notify(self) -> None:
        """Raise the count and wake all waiters."""
        self._count += 1
        self._waiters.unpark_all()

    async def wait(self, seen: int) -> int:
        """Return the count once it is above `seen`, at once if it is already."""
        if self._count > seen:
            await trio.lowlevel.checkpoint()
        while self._count <= seen:
            await self._waiters.park()
        return self._count
