"""Doors that tests of this room knock at."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import apsw
import pytest

from asapd.store.database import Database
from tests.edge.house import Edge, open_edge


@pytest.fixture
async def edge(inline_database: tuple[Database, apsw.Connection], tmp_path: Path) -> AsyncIterator[Edge]:
    """All actors over one store, with the application in front."""
    async with open_edge(inline_database[1], tmp_path) as opened:
        yield opened
