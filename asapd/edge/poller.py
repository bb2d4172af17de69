"""Tells many connections that something has come for them, from one task."""

from __future__ import annotations

import select
from collections.abc import Callable

import trio

# Told in one go before other tasks get their turn: some two milliseconds of small requests.
BURST = 64


class Poller:
    """Calls whoever watches a descriptor as soon as it can be read, until they forget it.

    A task for each that waits costs a small request a quarter of what it needs. What is called must not raise, and is
    called again at once while there is something to read.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watched: dict[int, Callable[[], None]] = {}

    def watch(self, fd: int, ready: Callable[[], None]) -> None:
        """Have `ready` called when `fd` can be read, or has ended or broken."""
        self._epoll.register(fd, select.EPOLLIN)
        self._watched[fd] = ready

    def forget(self, fd: int) -> None:
        """Call nobody for `fd` any more; does nothing where nobody watches it."""
        if self._watched.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            await trio.lowlevel.wait_readable(self._epoll.fileno())
            for fd, _ in self._epoll.poll(0, BURST):
                # One that was called before may have forgotten another.
                if (ready := self._watched.get(fd)) is not None:
                    ready()
