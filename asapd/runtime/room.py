"""Room for bytes that many hold together: who finds none waits, first come, first served."""

from __future__ import annotations

from collections import deque

import trio


class Room:
    """`total_bytes` (from 1) to be shared.

    Somebody who wants more than there is at all takes all of it, so that everybody's turn comes.
    """

    def __init__(self, total_bytes: int) -> None:
        if total_bytes < 1:
            raise ValueError(f"total_bytes must be at least 1, not {total_bytes}")
        self._total_bytes = total_bytes
        self._free_bytes = total_bytes
        self._waiting: deque[tuple[int, trio.Event]] = deque()

    @property
    def free_bytes(self) -> int:
        """What nobody holds."""
        return self._free_bytes

    async def take(self, wanted_bytes: int) -> int:
        """Waits for its turn and for room; how much was taken, to be given back. Whoever is cancelled holds nothing."""
        wanted_bytes = min(wanted_bytes, self._total_bytes)
        if not self._waiting and wanted_bytes <= self._free_bytes:
            self._free_bytes -= wanted_bytes
            return wanted_bytes
        turn = (wanted_bytes, trio.Event())
        self._waiting.append(turn)
        try:
            await turn[1].wait()
        except BaseException:
            if turn[1].is_set():
                self._free_bytes += wanted_bytes
            else:
                self._waiting.remove(turn)
            self._serve()
            raise
        return wanted_bytes

    def give_back(self, taken_bytes: int) -> None:
        """Leaves room to others."""
        self._free_bytes += taken_bytes
        self._serve()

    def _serve(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._free_bytes:
            wanted_bytes, event = self._waiting.popleft()
            self._free_bytes -= wanted_bytes
            event.set()
