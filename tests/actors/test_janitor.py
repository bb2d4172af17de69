"""The janitor in virtual time: what is over goes, in small steps, and a store that is away stops nothing."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import apsw
import pytest
import trio
from trio.testing import MockClock

from asapd import config
from asapd.actors.janitor import EVERY_S, IDEMPOTENCY_US, JanitorSettings, run_janitor
from asapd.core.errors import Refusal
from asapd.core.types import DAY_US, SECOND_US
from asapd.runtime.clock import TrioClock
from asapd.store.database import WRITER_AWAY, Database, InlineReaders
from asapd.store.units import Answer, AnyUnit, Idempotency, RecordProbe, Sweep, Swept

A = "urn:asap:agent:a"
T0 = 1_800_000_000 * SECOND_US
log = logging.getLogger("test.janitor")
Inline = tuple[Database, apsw.Connection]


@dataclass
class ScriptedRunner:
    """Answers sweeps from a list, then finds nothing to do; says when each came."""

    outcomes: list[Swept | Refusal]
    units: list[Sweep] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)

    async def execute(self, unit: AnyUnit, *, urgent: bool, idempotency: Idempotency | None) -> Answer | Refusal:
        await trio.lowlevel.checkpoint()
        assert isinstance(unit, Sweep)
        assert not urgent
        self.units.append(unit)
        self.at_s.append(trio.current_time())
        outcome = self.outcomes.pop(0) if self.outcomes else Swept(0, 0, more=False)
        return outcome if isinstance(outcome, Refusal) else Answer(0, outcome)


async def sweep_for(seconds: float, database: Database, probes: str = "35d") -> int:
    beats = 0

    def beat() -> None:
        nonlocal beats
        beats += 1

    settings = JanitorSettings(config.Retention(probes=probes))
    with trio.move_on_after(seconds):
        await run_janitor(database=database, clock=TrioClock(T0), settings=settings, beat=beat, log=log)
    return beats


async def test_a_sweep_that_found_more_goes_on_at_once_and_the_others_wait(
    inline_database: Inline, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    runner = ScriptedRunner([Swept(3, 500, more=True), Swept(0, 10, more=False), WRITER_AWAY])
    start_s = trio.current_time()
    assert await sweep_for(2.5, Database(runner, InlineReaders(inline_database[1]))) == 4
    assert [round(at_s - start_s, 3) for at_s in runner.at_s] == [0, 0, EVERY_S, 2 * EVERY_S]
    assert runner.units[0] == Sweep(T0, T0 - 35 * DAY_US, T0 - IDEMPOTENCY_US)
    assert "3 reservations expired" in caplog.text
    assert "nothing was swept" in caplog.text


async def test_old_probes_are_dropped_and_young_ones_stay(inline_database: Inline, autojump_clock: MockClock) -> None:
    database, connection = inline_database
    for age_us in (2 * DAY_US, DAY_US // 2):
        unit = RecordProbe(A, T0 - age_us, True, None, 1, None, None, SECOND_US, "healthy", T0, 1, 0)
        assert not isinstance(await database.submit(unit), Refusal)
    await sweep_for(0.5, database, probes="1d")
    assert list(connection.execute("SELECT ts_us FROM probe")) == [(T0 - DAY_US // 2,)]
