"""Backups of the database while it is in use: a copy of one moment, handed out as it is read."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, BinaryIO

import trio

from asapd.actors.sealer import Sealer
from asapd.core.errors import Refusal
from asapd.runtime.clock import Clock
from asapd.store.backup import CopyFailedError, copy_database
from asapd.store.database import Database
from asapd.store.units.house import Note

CHUNK = 1 << 20


class Backup:
    """A copy of `size` bytes, with what its log is known by; it is gone once it was read, or closed."""

    def __init__(self, file: BinaryIO, size: int, entries: int, root: bytes, off_loop: Callable[..., Awaitable[Any]]):
        self.size, self.entries, self.root = size, entries, root
        self._file = file
        self._off_loop = off_loop

    async def chunks(self) -> AsyncIterator[bytes]:
        """The copy, in parts."""
        try:
            while chunk := await self._off_loop(self._file.read, CHUNK):
                yield chunk
        finally:
            self.close()

    def close(self) -> None:
        """Let go of it."""
        self._file.close()


class Backups:
    """Makes copies of a database file beside it, one at a time."""

    def __init__(
        self,
        database: Database,
        clock: Clock,
        sealer: Sealer,
        path: Path,
        copy: Path,
        off_loop: Callable[..., Awaitable[Any]] = trio.to_thread.run_sync,
    ) -> None:
        self._database = database
        self._clock = clock
        self._sealer = sealer
        self._path = path
        self._copy = copy
        self._off_loop = off_loop
        self._lock = trio.Lock()

    async def make(self, actor: str) -> Backup | Refusal:
        """Copy the database, with an entry that says who had it and a checkpoint over that.

        The copy has no name from the moment it is whole: nothing of it is left, whatever becomes of whoever reads it.
        """
        async with self._lock:
            noted = await self._database.submit(Note("backup.made", actor, "database", {}, self._clock.now_us()))
            if isinstance(noted, Refusal):
                return noted
            sealed = await self._sealer.seal()
            if isinstance(sealed, Refusal):
                return sealed
            try:
                await self._off_loop(copy_database, self._path, self._copy)
            except CopyFailedError as error:
                code = "storage_full" if error.is_full else "storage_failed"
                return Refusal(code, f"no backup was made, the copy failed: {error}", retry_after_s=60)
            file: BinaryIO = await self._off_loop(self._open)
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            return Backup(file, size, sealed.size, sealed.root, self._off_loop)

    def _open(self) -> BinaryIO:
        file = self._copy.open("rb")
        self._copy.unlink()
        return file
