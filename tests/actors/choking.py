"""A way to the store that cannot encode what it is given."""

from __future__ import annotations

from typing import Any

import trio

from asapd.store.database import InlineRunner


class Choking(InlineRunner):
    """A way to the store that cannot encode what it is given while `chokes`, and counts what was posted."""

    chokes = True
    posted = 0

    async def post(self, *arguments: Any, **options: Any) -> None:
        await trio.lowlevel.checkpoint()
        if self.chokes:
            raise TypeError("cannot be encoded")
        self.posted += 1
        await super().post(*arguments, **options)
