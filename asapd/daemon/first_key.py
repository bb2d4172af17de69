"""The key that lets the operator in over HTTP, made where there is none."""

from __future__ import annotations

import os
from pathlib import Path

from asapd.actors.gatekeeper import KEY_PREFIX, digest_of
from asapd.core.errors import Refusal
from asapd.core.types import Role
from asapd.daemon.boot import BootError, write_private
from asapd.runtime.clock import Clock
from asapd.store.database import Database
from asapd.store.units.house import ApiKey, CreateKey


async def make_first_key(database: Database, clock: Clock, path: Path) -> None:
    """Write an admin key to a file, before it counts.

    Raises:
        BootError: it could not be kept.
    """
    secret, name, now_us = os.urandom(32).hex(), os.urandom(5).hex(), clock.now_us()
    write_private(path, f"{KEY_PREFIX}_{name}_{secret}\n".encode())
    key = ApiKey(name, "admin", Role.ADMIN, ["*"], None, True, digest_of(secret), now_us)
    made = await database.submit(CreateKey(key, "asapd", now_us))
    if isinstance(made, Refusal):
        raise BootError(f"the first API key could not be stored: {made.detail}")
