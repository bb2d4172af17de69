"""Going on together: work that is in no hurry waits a moment, so that what it costs is shared."""

from __future__ import annotations

import trio


class Together:
    """Lets all that come within `while_s` seconds of the first go on at the same moment, with one timer for all."""

    def __init__(self, while_s: float) -> None:
        self._while_s = while_s
        self._others = trio.lowlevel.ParkingLot()
        self._is_waiting = False

    async def wait(self) -> None:
        """Wait for the others; for `while_s` at most. When the first is cancelled, the others go on at once."""
        if self._is_waiting:
            await self._others.park()
            return
        self._is_waiting = True
        try:
            await trio.sleep(self._while_s)
        finally:
            self._is_waiting = False
            self._others.unpark_all()
