"""An authorisation that could not be sent to the store gives its place back."""

from __future__ import annotations

from pathlib import Path

import pytest

from asapd.actors import registry
from asapd.runtime.ask import HandlerFailed
from asapd.store.database import Database, InlineReaders
from asapd.store.units.delegations import Reserved
from asapd.store.writer import Writer
from tests.actors.choking import Choking
from tests.actors.test_registry import Desk, Inline, token


async def test_a_unit_that_cannot_be_sent_gives_its_place_back(
    inline_database: Inline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "DECISIONS_IN_FLIGHT", 1)
    (tmp_path / "keys").mkdir()
    connection = inline_database[1]
    runner = Choking(Writer(connection))
    async with Desk((Database(runner, InlineReaders(connection)), connection), tmp_path / "keys").open() as desk:
        with pytest.raises(HandlerFailed):
            await desk.authorize(token())
        runner.chokes = False
        for number in range(2):
            assert isinstance(await desk.authorize(token(), task_id=f"t{number}"), Reserved)
    assert runner.posted == 2
