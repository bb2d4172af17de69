"""Agents that report by themselves, that are paused, and that flap: in virtual time, over a real store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from asapd.actors.messages import Heard, HeartbeatRequest, ProberMessage, SetPausedRequest
from asapd.core.errors import Refusal
from asapd.core.health import AgentStatus, Status
from asapd.core.types import SECOND_US
from asapd.runtime.ask import Reply, ask
from asapd.runtime.clock import TrioClock
from asapd.store import agent_history
from asapd.store.database import OUTCOME_UNKNOWN, WRITER_AWAY
from asapd.store.units.agents import AgentRecord, AgentsChanged, ChangeAgentState, RecordProbe
from asapd.store.units.exchange import AnyUnit
from asapd.store.visibility import EVERYTHING
from tests.actors.test_prober import EPOCH_US, REFUSED, A, B, Rig, agent, health, put, remove, settings

Inbox = trio.MemorySendChannel[ProberMessage]
SILENT = AgentRecord(A, "", "default", health="heartbeat")


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    made = Rig(tmp_path / "asapd.db")
    made.clock = TrioClock(EPOCH_US)
    yield made
    made.connection.close()


async def beat(
    inbox: Inbox,
    name: str = A,
    status: Status = "healthy",
    agent_status: AgentStatus | None = None,
    ttl_s: int | None = None,
) -> Heard | Refusal:
    def build(reply: Reply[Heard | Refusal]) -> ProberMessage:
        return HeartbeatRequest(name, status, agent_status, ttl_s, reply)

    answer: Heard | Refusal = await ask(inbox, build, deadline_s=100)
    return answer


async def set_paused(inbox: Inbox, paused: bool, name: str = A, reason: str | None = None) -> AgentsChanged | Refusal:
    def build(reply: Reply[AgentsChanged | Refusal]) -> ProberMessage:
        return SetPausedRequest(name, paused, reason, "uid:0", reply)

    answer: AgentsChanged | Refusal = await ask(inbox, build, deadline_s=100)
    return answer


def life(rig: Rig, name: str = A) -> list[tuple[str, str | None, str | None]]:
    found = agent_history.events(rig.connection, EVERYTHING, name, 1000, None)
    return [(event.event, event.new_state, event.reason) for event in reversed(found)]


def until_us(at_s: float) -> int:
    return EPOCH_US + round(at_s * SECOND_US)


# --- heartbeats


async def test_a_heartbeat_counts_as_a_probe_and_holds_for_its_ttl(autojump_clock: MockClock, rig: Rig) -> None:
    async with rig.running(SILENT) as inbox:
        await trio.sleep(1)
        assert await beat(inbox, agent_status="READY", ttl_s=20) == Heard("healthy", until_us(21))
        await trio.sleep(10)
        assert await beat(inbox, status="degraded", agent_status="BUSY", ttl_s=20) == Heard("degraded", until_us(31))
        await trio.sleep(10)
        assert await beat(inbox, ttl_s=500) == Heard("healthy", until_us(51))
    assert [(probe.pushed, probe.status, probe.agent_status) for probe in rig.probes()] == [
        (True, "healthy", "READY"),
        (True, "degraded", "BUSY"),
        (True, "healthy", None),
    ]
    assert [(part.start_us, part.end_us, part.up) for part in rig.segments()] == [(until_us(1), until_us(51), True)]
    assert rig.network.asked == []


async def test_one_that_calls_itself_unhealthy_is_down_from_then_on(autojump_clock: MockClock, rig: Rig) -> None:
    async with rig.running(SILENT) as inbox:
        await beat(inbox)
        await trio.sleep(5)
        assert await beat(inbox, status="unhealthy") == Heard("healthy", until_us(35))
        await trio.sleep(5)
        assert await beat(inbox, status="unhealthy") == Heard("unhealthy", until_us(40))
    assert [(part.up, (part.end_us - part.start_us) // SECOND_US) for part in rig.segments()] == [
        (True, 5),
        (False, 35),
    ]
    assert life(rig)[-1] == ("state", "unhealthy", "reports_unhealthy")


async def test_one_that_falls_silent_is_stale_when_its_word_holds_no_longer(
    autojump_clock: MockClock, rig: Rig
) -> None:
    async with rig.running(SILENT) as inbox:
        await trio.sleep(100)
        assert rig.row().state == "unknown"
        await beat(inbox, ttl_s=10)
        await trio.sleep(9)
        assert rig.row().state == "healthy"
        await trio.sleep(2)
        assert rig.row().state == "stale"
        await trio.sleep(1000)
        await beat(inbox, ttl_s=10)
        assert rig.row().state == "healthy"
    assert life(rig)[1:] == [
        ("state", "healthy", None),
        ("state", "stale", "no_heartbeat"),
        ("state", "healthy", None),
    ]
    assert [(part.end_us - part.start_us) // SECOND_US for part in rig.segments()] == [10, 10]


async def test_one_that_fell_silent_while_asapd_was_away_is_stale_at_its_start(
    autojump_clock: MockClock, rig: Rig
) -> None:
    async with rig.running(SILENT) as inbox:
        await beat(inbox, ttl_s=10)
    await trio.sleep(60)
    async with rig.running(SILENT):
        await trio.sleep(1)
    assert life(rig)[-1] == ("state", "stale", "no_heartbeat")


async def test_the_same_word_within_a_second_is_answered_and_not_written(autojump_clock: MockClock, rig: Rig) -> None:
    async with rig.running(SILENT) as inbox:
        first = await beat(inbox)
        for _ in range(50):
            assert await beat(inbox) == first
        assert await beat(inbox, agent_status="DRAINING") == first
        await trio.sleep(1)
        assert await beat(inbox, agent_status="DRAINING") == Heard("healthy", until_us(31))
    assert [probe.agent_status for probe in rig.probes()] == [None, "DRAINING", "DRAINING"]


async def test_whoever_is_probed_or_not_there_is_told_so(autojump_clock: MockClock, rig: Rig) -> None:
    async with rig.running(agent()) as inbox:
        answers = [await beat(inbox), await beat(inbox, B)]
    assert [answer.code for answer in answers if isinstance(answer, Refusal)] == ["agent_is_probed", "agent_not_found"]


async def test_an_agent_may_change_from_probes_to_heartbeats_and_back(autojump_clock: MockClock, rig: Rig) -> None:
    rig.network.set("a", health())
    async with rig.running() as inbox:
        await put(inbox, agent())
        await trio.sleep(15)
        assert await put(inbox, AgentRecord(A, "http://a", "default", health="heartbeat")) == AgentsChanged(changed=[A])
        await trio.sleep(100)
        assert len(rig.network.times("a")) == 2
        assert rig.row().state == "stale"
        assert isinstance(await beat(inbox), Heard)
        await put(inbox, agent())
        await trio.sleep(5)
        assert len(rig.network.times("a")) == 3
        assert isinstance(await beat(inbox), Refusal)


@pytest.mark.parametrize("trouble", ["away", "answer lost"])
async def test_a_heartbeat_the_store_may_not_have_is_refused_and_sent_again(
    autojump_clock: MockClock, rig: Rig, trouble: str
) -> None:
    async with rig.running(SILENT) as inbox:
        rig.runner.trouble = lambda unit: trouble if isinstance(unit, RecordProbe) else None
        assert await beat(inbox) in (WRITER_AWAY, OUTCOME_UNKNOWN)
        rig.runner.trouble = lambda unit: None
        assert await beat(inbox) == Heard("healthy", until_us(30))
    assert rig.row().state == "healthy"


async def test_silence_that_the_store_did_not_take_is_noted_later(
    autojump_clock: MockClock, rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    def away(unit: AnyUnit) -> str | None:
        return "away" if isinstance(unit, ChangeAgentState) else None

    async with rig.running(SILENT) as inbox:
        await beat(inbox, ttl_s=10)
        rig.runner.trouble = away
        await trio.sleep(12)
        assert rig.row().state == "healthy"
        rig.runner.trouble = lambda unit: None
        await trio.sleep(1)
        assert rig.row().state == "stale"
    assert caplog.text.count("silence was not noted") == 1


# --- paused


async def test_a_paused_agent_is_not_asked_and_its_time_is_unknown(autojump_clock: MockClock, rig: Rig) -> None:
    rig.network.set("a", health(ttl_seconds=10))
    async with rig.running(agent()) as inbox:
        await trio.sleep(25)
        assert await set_paused(inbox, paused=True, reason="new disk") == AgentsChanged(changed=[A])
        assert await set_paused(inbox, paused=True) == AgentsChanged()
        rig.network.set("a", REFUSED)
        await trio.sleep(1000)
        assert rig.network.times("a") == [0, 10, 20]
        assert rig.row().state == "paused"
        rig.network.set("a", health())
        assert await set_paused(inbox, paused=False) == AgentsChanged(changed=[A])
        assert await set_paused(inbox, paused=False) == AgentsChanged()
        assert rig.row().state == "unknown"
        await trio.sleep(5)
        assert rig.row().state == "healthy"
    assert life(rig)[1:] == [
        ("state", "healthy", None),
        ("paused", "paused", "new disk"),
        ("resumed", "unknown", "resumed"),
        ("state", "healthy", None),
    ]
    assert next((part.start_us, part.end_us) for part in rig.segments()) == (until_us(0), until_us(30))
    assert all(part.up for part in rig.segments())


async def test_a_pause_outlives_a_restart_and_a_change_of_the_agent(autojump_clock: MockClock, rig: Rig) -> None:
    async with rig.running() as inbox:
        await put(inbox, agent())
        await set_paused(inbox, paused=True)
    rig.network.asked.clear()
    async with rig.running() as inbox:
        await put(inbox, agent(url="http://b"))
        await trio.sleep(100)
    assert rig.network.asked == []
    assert rig.row().state == "paused"


async def test_a_heartbeat_of_a_paused_agent_changes_nothing(autojump_clock: MockClock, rig: Rig) -> None:
    async with rig.running(SILENT) as inbox:
        await set_paused(inbox, paused=True)
        assert await beat(inbox) == Heard("paused", None)
    assert rig.probes() == []


async def test_an_agent_that_is_not_there_cannot_be_paused(autojump_clock: MockClock, rig: Rig) -> None:
    async with rig.running() as inbox:
        answer = await set_paused(inbox, paused=True, name=B)
    assert isinstance(answer, Refusal)
    assert answer.code == "agent_not_found"


async def test_a_probe_under_way_when_an_agent_is_paused_counts_no_more(autojump_clock: MockClock, rig: Rig) -> None:
    async def slow() -> Any:
        await trio.sleep(3)
        return REFUSED

    rig.network.set("a", slow)
    async with rig.running(agent()) as inbox:
        await trio.sleep(1)
        await set_paused(inbox, paused=True)
        await trio.sleep(100)
    assert rig.probes() == []


# --- flapping


async def test_an_agent_that_flaps_changes_state_a_bounded_number_of_times_and_uptime_counts_all_the_same(
    autojump_clock: MockClock, rig: Rig
) -> None:
    rig.settings.prober = settings(unhealthy_after=1)
    asked = 0

    async def flap() -> Any:
        nonlocal asked
        asked += 1
        return health() if asked % 2 else REFUSED

    rig.network.set("a", flap)
    async with rig.running(agent()):
        await trio.sleep(2000)
        assert rig.row().flaps.since_us == until_us(60)
        assert rig.row().state == "degraded"
        assert len(rig.transitions()) == 7
        rig.network.set("a", health())
        await trio.sleep(200)
    assert rig.row().flaps.since_us is None
    assert rig.row().state == "healthy"
    assert [entry for entry in life(rig) if entry[0] in ("flapping", "settled")] == [
        ("flapping", None, None),
        ("settled", None, None),
    ]
    assert rig.transitions()[-2:] == [
        (60, "unhealthy", "degraded", "flapping"),
        (2120, "degraded", "healthy", "settled"),
    ]
    up_us = sum(part.end_us - part.start_us for part in rig.segments() if part.up and part.end_us <= until_us(2000))
    assert up_us == 1000 * SECOND_US


async def test_a_restart_does_not_forget_that_an_agent_flaps(autojump_clock: MockClock, rig: Rig) -> None:
    rig.settings.prober = settings(unhealthy_after=1)
    asked = 0

    async def flap() -> Any:
        nonlocal asked
        asked += 1
        return health() if asked % 2 else REFUSED

    rig.network.set("a", flap)
    for _ in range(5):
        async with rig.running(agent()):
            await trio.sleep(15)
    before = len(rig.transitions())
    for _ in range(5):
        async with rig.running(agent()):
            await trio.sleep(15)
    assert rig.row().state == "degraded"
    assert len(rig.transitions()) == before == 7


async def test_a_pause_that_ends_flapping_is_in_the_history(autojump_clock: MockClock, rig: Rig) -> None:
    rig.settings.prober = settings(unhealthy_after=1)
    asked = 0

    async def flap() -> Any:
        nonlocal asked
        asked += 1
        return health() if asked % 2 else REFUSED

    rig.network.set("a", flap)
    async with rig.running(agent()) as inbox:
        await trio.sleep(100)
        assert rig.row().flaps.since_us is not None
        await set_paused(inbox, paused=True, reason="new disk")
    assert rig.row().flaps.since_us is None
    assert [entry[0] for entry in life(rig) if entry[0] in ("flapping", "settled", "paused")] == [
        *("flapping", "settled", "paused"),
    ]


# --- history


async def test_the_history_outlives_the_agent(autojump_clock: MockClock, rig: Rig) -> None:
    async with rig.running() as inbox:
        await put(inbox, agent())
        await put(inbox, agent(tier="gold"))
        await remove(inbox, A)
    found = agent_history.events(rig.connection, EVERYTHING, A, 10, None)
    assert [(event.event, event.reason) for event in reversed(found)] == [
        ("added", "added by hand"),
        ("changed", "tier changed"),
        ("removed", "removed by hand"),
    ]
    assert found[1].details == {"tier": [None, "gold"]}
    with pytest.raises(Exception, match="append-only"):
        rig.connection.execute("DELETE FROM agent_event")
