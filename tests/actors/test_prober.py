"""The prober with a real store: against real HTTP agents in real time, a scripted network in virtual time."""

from __future__ import annotations

import base64
import errno
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import rfc8785
import trio
from hypothesis import given
from hypothesis import strategies as st
from nacl.signing import SigningKey
from trio.testing import MockClock, wait_all_tasks_blocked

from asapd import config
from asapd.actors import rounds
from asapd.actors.messages import (
    ImportKeyRequest,
    ProberMessage,
    PutAgentRequest,
    ReconfigureProber,
    RemoveAgentRequest,
    RetireKeyRequest,
)
from asapd.actors.probe_answers import judge, read_manifest
from asapd.actors.prober import DirectoryNotSyncedError, ProberSettings, run_prober
from asapd.actors.second_opinion import SecondOpinion
from asapd.core.errors import Refusal
from asapd.core.types import SECOND_US
from asapd.core.uptime import Segment, Uptime, UptimeTimeline
from asapd.runtime.ask import Reply, ask
from asapd.runtime.clock import Clock, SystemClock, TrioClock
from asapd.runtime.fanout import Wakeup
from asapd.runtime.fetch import LOOPBACK, Fetched, Fetcher, FetchFailed
from asapd.store import agent_history
from asapd.store import agents as stored
from asapd.store.database import OUTCOME_UNKNOWN, WRITER_AWAY, Database, InlineReaders, InlineRunner, ReadTooLongError
from asapd.store.manifests import versions
from asapd.store.sla_queries import segments_between
from asapd.store.units.agents import (
    AgentRecord,
    AgentsChanged,
    PutAgent,
    RecordManifest,
    RecordProbe,
    RemoveAgent,
    SyncAgents,
)
from asapd.store.units.exchange import Answer, AnyUnit, Idempotency
from asapd.store.visibility import EVERYTHING, Visibility
from asapd.store.writer import Writer, open_for_writing
from asapd.wire.keys import jwk_thumbprint

A, B = "urn:asap:agent:a", "urn:asap:agent:b"
EPOCH_US = 1_800_000_000 * SECOND_US
KEY, OTHER = SigningKey(bytes(range(32))), SigningKey(bytes(range(1, 33)))
Reaction = Fetched | FetchFailed | Callable[[], Awaitable[Fetched | FetchFailed]]

REFUSED = FetchFailed("refused", "nobody listens")
NOT_FOUND = Fetched(404, b"", 1, {})


def public(key: SigningKey) -> str:
    return base64.b64encode(bytes(key.verify_key)).decode()


def health(status: str = "healthy", *, code: int = 200, **fields: Any) -> Fetched:
    return Fetched(code, json.dumps({"status": status, **fields}).encode(), 1, {})


def manifest(agent: str = A, **fields: Any) -> dict[str, Any]:
    return {"id": agent, "name": "n", "version": "1", **fields}


def plain(document: dict[str, Any]) -> Fetched:
    return Fetched(200, json.dumps(document).encode(), 1, {})


def signed(document: dict[str, Any], key: SigningKey, named: SigningKey | None = None) -> Fetched:
    seal = base64.b64encode(key.sign(rfc8785.dumps(document)).signature).decode()
    envelope = {"manifest": document, "signature": {"alg": "ed25519", "signature": seal, "trust_level": "x"}}
    return plain({**envelope, "public_key": public(named or key)})


def settings(**fields: Any) -> config.Prober:
    """Ten seconds, no jitter, and hardly ever a manifest: round numbers."""
    defaults = {"interval": "10s", "timeout": "5s", "jitter": "0%", "manifest_interval": "1h"}
    return config.Prober.model_validate({**defaults, **fields})


def agent(name: str = A, url: str = "http://a", **fields: Any) -> AgentRecord:
    return AgentRecord(name, url, "default", **fields)


class Network:
    """A scripted network: what each URL answers, and who asked for it when."""

    def __init__(self) -> None:
        self.answers: dict[str, Reaction] = {}
        self.asked: list[tuple[float, str]] = []
        self.under_way = self.most_under_way = 0

    async def get(self, url: str, *, deadline_s: float, max_bytes: int) -> Fetched | FetchFailed:
        self.asked.append((trio.current_time(), url))
        self.under_way += 1
        self.most_under_way = max(self.under_way, self.most_under_way)
        try:
            await trio.lowlevel.checkpoint()
            answer = self.answers.get(url, NOT_FOUND)
            if isinstance(answer, Fetched | FetchFailed):
                return answer
            with trio.move_on_after(deadline_s):
                return await answer()
            return FetchFailed("timeout", "no answer")
        finally:
            self.under_way -= 1

    def set(self, host: str, answer: Reaction) -> None:
        self.answers[f"http://{host}/.well-known/asap/health"] = answer

    def set_manifest(self, host: str, answer: Reaction) -> None:
        self.answers[f"http://{host}/.well-known/asap/manifest.json"] = answer

    def times(self, host: str, path: str = "health") -> list[float]:
        return [at for at, url in self.asked if url == f"http://{host}/.well-known/asap/{path}"]


class Troubled:
    """A runner in front of the real one that loses units or their answers, as a dying writer does."""

    def __init__(self, inner: InlineRunner) -> None:
        self._inner = inner
        self.trouble: Callable[[AnyUnit], str | None] = lambda unit: None
        self.seen: list[AnyUnit] = []

    async def execute(self, unit: AnyUnit, *, urgent: bool, idempotency: Idempotency | None) -> Answer | Refusal:
        self.seen.append(unit)
        match self.trouble(unit):
            case "away":
                return WRITER_AWAY
            case "lost":
                return OUTCOME_UNKNOWN
            case "answer lost":
                await self._inner.execute(unit, urgent=urgent, idempotency=idempotency)
                return OUTCOME_UNKNOWN
            case "bug":
                raise RuntimeError("a bug of the store")
            case _:
                return await self._inner.execute(unit, urgent=urgent, idempotency=idempotency)


class Slow(InlineReaders):
    """Readers that can be made to run out of time."""

    failures = 0

    async def run(self, query: Callable[..., Any], *arguments: Any) -> Any:
        if self.failures:
            self.failures -= 1
            raise ReadTooLongError("too long")
        return await super().run(query, *arguments)


class Rig:
    """Everything around the actor."""

    def __init__(self, path: Path) -> None:
        self.connection = open_for_writing(path)
        self.committed = Wakeup()
        self.runner = Troubled(InlineRunner(Writer(self.connection), lambda _: self.committed.notify()))
        self.readers = Slow(self.connection)
        self.database = Database(self.runner, self.readers)
        self.network = Network()
        self.fetcher: rounds.HealthFetcher = self.network
        self.changed = Wakeup()
        self.settings = ProberSettings(settings(), [])
        self.random: Callable[[], float] = lambda: 0.0
        self.clock: Clock = SystemClock()
        self.beats: list[float] = []
        self.log = logging.getLogger("asapd.test.prober")

    @asynccontextmanager
    async def running(self, *records: AgentRecord) -> AsyncIterator[trio.MemorySendChannel[ProberMessage]]:
        """The actor, until the end of the block."""
        if records:
            self.settings.agents = list(records)
        send, receive = trio.open_memory_channel[ProberMessage](10)
        async with trio.open_nursery() as nursery:
            await nursery.start(
                partial(
                    run_prober,
                    receive,
                    database=self.database,
                    fetcher=self.fetcher,
                    clock=self.clock,
                    random=self.random,
                    settings=self.settings,
                    directory_changed=self.changed,
                    beat=lambda: self.beats.append(trio.current_time()),
                    log=self.log,
                )
            )
            yield send
            send.close()

    def row(self, name: str = A) -> stored.DirectoryAgent:
        (row,) = stored.directory(self.connection, EVERYTHING, name)
        return row

    def probes(self, name: str = A) -> list[stored.StoredProbe]:
        return [probe for _, probe in reversed(stored.probes(self.connection, name, None, None, 1000, None))]

    def segments(self, name: str = A) -> list[Segment]:
        return segments_between(self.connection, name, 0, 2**62)

    def transitions(self, name: str = A) -> list[tuple[float, str, str, str | None]]:
        rows = agent_history.transitions(self.connection, EVERYTHING, name, 100)
        return [(at(ts_us), old, new, reason) for ts_us, old, new, reason in reversed(rows)]

    def manifests(self, name: str = A) -> list[tuple[str, bool]]:
        rows = self.connection.execute(
            "SELECT verification, sla IS NOT NULL FROM manifest WHERE agent = ? ORDER BY seq", (name,)
        )
        return [(verification, bool(used)) for verification, used in rows]


def at(ts_us: int) -> float:
    return (ts_us - EPOCH_US) / SECOND_US


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path / "asapd.db")
    yield made
    made.connection.close()


@pytest.fixture
async def virtual(rig: Rig) -> Rig:
    """A rig in the virtual time of the test's clock, which starts at 0 and at EPOCH_US."""
    rig.clock = TrioClock(EPOCH_US)
    return rig


async def put(inbox: trio.MemorySendChannel[ProberMessage], record: AgentRecord) -> AgentsChanged | Refusal:
    def build(reply: Reply[AgentsChanged | Refusal]) -> ProberMessage:
        return PutAgentRequest(record, "test", None, reply)

    return await ask(inbox, build, deadline_s=60)


async def remove(inbox: trio.MemorySendChannel[ProberMessage], name: str) -> AgentsChanged | Refusal:
    def build(reply: Reply[AgentsChanged | Refusal]) -> ProberMessage:
        return RemoveAgentRequest(name, "test", reply)

    return await ask(inbox, build, deadline_s=60)


async def reconfigure(
    inbox: trio.MemorySendChannel[ProberMessage], by: config.Prober, *records: AgentRecord
) -> AgentsChanged | Refusal:
    def build(reply: Reply[AgentsChanged | Refusal]) -> ProberMessage:
        return ReconfigureProber(by, list(records), "test", reply)

    return await ask(inbox, build, deadline_s=60)


# --- state and uptime


async def test_configured_agents_are_in_the_directory_when_the_prober_is_ready_and_known_soon_after(
    autojump_clock: MockClock,
    virtual: Rig,
) -> None:
    virtual.network.set("a", health("degraded"))
    async with virtual.running(agent()):
        assert virtual.row().state == "unknown"
        assert virtual.changed.count == 1
        await trio.sleep(1)
        assert (virtual.row().state, virtual.row().since_us) == ("degraded", EPOCH_US)
        (probe,) = virtual.probes()
        assert (probe.ts_us, probe.up, probe.status, probe.reason) == (EPOCH_US, True, "degraded", None)


async def test_a_killed_agent_turns_unhealthy_after_the_set_number_of_probes_and_its_uptime_falls_exactly(
    autojump_clock: MockClock,
    virtual: Rig,
) -> None:
    virtual.settings.prober = settings(unhealthy_after=3)
    virtual.network.set("a", health())
    async with virtual.running(agent()):
        await trio.sleep(25)
        virtual.network.set("a", REFUSED)
        await trio.sleep(20)
        assert virtual.row().state == "healthy"
        await trio.sleep(10)
        assert virtual.row().state == "unhealthy"
        await trio.sleep(10)
    assert virtual.transitions() == [(0, "unknown", "healthy", None), (50, "healthy", "unhealthy", "refused")]
    timeline = UptimeTimeline()
    for segment in virtual.segments():
        timeline.extend(segment.start_us, segment.end_us, segment.up)
    expected = Uptime(up_us=30 * SECOND_US, down_us=35 * SECOND_US, unknown_us=0)
    assert timeline.uptime(EPOCH_US, EPOCH_US + 65 * SECOND_US) == expected


async def test_a_single_failure_moves_uptime_but_not_the_state(autojump_clock: MockClock, virtual: Rig) -> None:
    virtual.network.set("a", health())
    async with virtual.running(agent()):
        await trio.sleep(5)
        virtual.network.set("a", REFUSED)
        await trio.sleep(10)
        virtual.network.set("a", health())
        await trio.sleep(10)
    assert virtual.transitions() == [(0, "unknown", "healthy", None)]
    assert [(at(s.start_us), at(s.end_us), s.up) for s in virtual.segments()] == [
        (0, 10, True),
        (10, 20, False),
        (20, 50, True),
    ]


async def test_an_agent_that_flaps_is_healthy_again_only_after_the_set_number_of_good_probes(
    autojump_clock: MockClock, virtual: Rig
) -> None:
    virtual.settings.prober = settings(healthy_after=2, unhealthy_after=1)
    virtual.network.set("a", REFUSED)
    async with virtual.running(agent()):
        for answer in (health(), REFUSED, health(), health()):
            await trio.sleep(5)
            virtual.network.set("a", answer)
            await trio.sleep(5)
        await trio.sleep(1)
    assert virtual.transitions() == [(0, "unknown", "unhealthy", "refused"), (40, "unhealthy", "healthy", None)]


async def test_a_probe_holds_as_long_as_the_agent_says_at_most_three_intervals(
    autojump_clock: MockClock, virtual: Rig
) -> None:
    virtual.network.set("a", health(ttl_seconds=12))
    virtual.network.set_manifest("a", plain(manifest(ttl_seconds=20)))
    async with virtual.running(agent()):
        for answer in (REFUSED, health("unhealthy", ttl_seconds=14), health(), health(ttl_seconds=600)):
            await trio.sleep(5)
            virtual.network.set("a", answer)
            await trio.sleep(5)
        await trio.sleep(1)
    assert [probe.hold_us // SECOND_US for probe in virtual.probes()] == [12, 12, 14, 20, 30]


async def test_without_a_ttl_a_probe_holds_for_three_intervals(autojump_clock: MockClock, virtual: Rig) -> None:
    virtual.network.set("a", health())
    async with virtual.running(agent()):
        await trio.sleep(1)
    assert [probe.hold_us for probe in virtual.probes()] == [30 * SECOND_US]


async def answers_late() -> Fetched:
    await trio.sleep(1.25)
    return health()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (health(), (True, "healthy", None)),
        (health("degraded", agent_id=A), (True, "degraded", None)),
        (health("unhealthy"), (False, "unhealthy", "reports_unhealthy")),
        (health("unhealthy", code=503), (False, "unhealthy", "reports_unhealthy")),
        (health("healthy", code=503), (False, None, "http_status")),
        (Fetched(503, b"no", 1, {}), (False, None, "http_status")),
        (health("unhealthy", code=500), (False, None, "http_status")),
        (NOT_FOUND, (False, None, "http_status")),
        (health(agent_id=B), (False, None, "wrong_agent")),
        (health("fine"), (False, None, "protocol")),
        (Fetched(200, b"{", 1, {}), (False, None, "bad_json")),
        (FetchFailed("too_large", "x" * 5000), (False, None, "too_large")),
        (trio.sleep_forever, (False, None, "timeout")),
    ],
)
async def test_what_an_answer_says(
    autojump_clock: MockClock, virtual: Rig, answer: Reaction, expected: tuple[bool, str | None, str]
) -> None:
    virtual.network.set("a", answer)
    async with virtual.running(agent()):
        await trio.sleep(6)
    (probe,) = virtual.probes()
    assert (probe.up, probe.status, probe.reason) == expected
    assert (probe.detail is None) == probe.up
    assert len(probe.detail or "") <= 300
    assert probe.ts_us == EPOCH_US


async def test_latency_is_measured_from_the_request_to_the_whole_answer(
    autojump_clock: MockClock, virtual: Rig
) -> None:
    virtual.network.set("a", answers_late)
    async with virtual.running(agent()):
        await trio.sleep(2)
    assert virtual.probes()[0].latency_us == 1_250_000


@given(st.integers(200, 599), st.binary(max_size=50) | st.from_regex(r'\{"status": ?"[a-z]{0,9}"\}').map(str.encode))
def test_any_answer_is_judged_and_up_exactly_when_there_is_no_reason(status: int, body: bytes) -> None:
    result, _ = judge(Fetched(status, body, 1, {}), A, EPOCH_US, 1.0)
    assert result.up == (result.reason is None) == (result.status in ("healthy", "degraded"))


@given(st.binary(max_size=50))
def test_any_body_is_a_manifest_or_a_reason(body: bytes) -> None:
    assert isinstance(read_manifest(Fetched(200, body, 1, {}), A, None, 0), str)


# --- what cannot be known is not recorded


async def test_an_agent_that_asapd_may_not_reach_is_not_down_but_unknown(
    autojump_clock: MockClock, virtual: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    virtual.network.set("a", FetchFailed("not_allowed", "10.0.0.1 is outside the allowed networks"))
    async with virtual.running(agent()):
        await trio.sleep(100)
        assert virtual.row().state == "unknown"
        assert virtual.probes() == []
        assert [record.getMessage() for record in caplog.records if "not probed" in record.message] == [
            f"agent {A}: not probed: 10.0.0.1 is outside the allowed networks"
        ]
        unprobed = virtual.settings.unprobed.get(A)
        assert unprobed is not None
        assert (unprobed.reason, unprobed.detail) == ("not_allowed", "10.0.0.1 is outside the allowed networks")
        assert at(unprobed.since_us) < 2
        virtual.network.set("a", health())
        await trio.sleep(10)
        assert virtual.row().state == "healthy"
        assert virtual.settings.unprobed.get(A) is None


async def test_why_an_agent_is_not_probed_goes_with_its_address_and_with_it(
    autojump_clock: MockClock, virtual: Rig
) -> None:
    unprobed, prober = virtual.settings.unprobed, virtual.settings.prober
    virtual.network.set("a", FetchFailed("not_allowed", "outside"))
    async with virtual.running(agent()) as send:
        await trio.sleep(5)
        assert unprobed.get(A) is not None
        virtual.network.set("b", health())
        await reconfigure(send, prober, agent(url="http://b"))
        assert unprobed.get(A) is None
        await reconfigure(send, prober, agent())
        await trio.sleep(5)
        assert unprobed.get(A) is not None
        await reconfigure(send, prober)
        assert unprobed.get(A) is None


async def test_a_request_that_this_host_could_not_make_is_not_the_agents_downtime(
    autojump_clock: MockClock, virtual: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    async def no_descriptors() -> Fetched:
        raise OSError(errno.EMFILE, "Too many open files")

    virtual.network.set("a", no_descriptors)
    async with virtual.running(agent()):
        await trio.sleep(100)
    assert virtual.probes() == []
    unprobed = virtual.settings.unprobed.get(A)
    assert unprobed is not None
    assert (unprobed.reason, "Too many open files" in unprobed.detail) == ("host_failed", True)
    assert [r.levelname for r in caplog.records if "this host failed" in r.getMessage()] == ["WARNING"]


async def test_a_bug_met_with_one_agent_is_logged_and_stops_neither_it_nor_the_others(
    autojump_clock: MockClock, virtual: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    async def bug() -> Fetched:
        raise RuntimeError("a bug")

    virtual.network.set("a", bug)
    virtual.network.set("b", health())
    async with virtual.running(agent(), agent(B, "http://b")):
        await trio.sleep(35)
        virtual.network.set("a", health())
        await trio.sleep(10)
    assert [at(probe.ts_us) for probe in virtual.probes(B)] == [0, 10, 20, 30, 40]
    assert [at(probe.ts_us) for probe in virtual.probes(A)] == [40]
    (record,) = [r for r in caplog.records if "met a bug" in r.getMessage()]
    assert record.exc_info


async def test_a_timeout_while_asapd_itself_was_held_up_is_asked_again(autojump_clock: MockClock, virtual: Rig) -> None:
    outcomes: list[Callable[[], Awaitable[Fetched | FetchFailed]]] = []

    async def held_up() -> FetchFailed:
        # What a stalled loop looks like from here: the deadline passes, and the answer comes much later.
        with trio.CancelScope(shield=True):
            await trio.sleep(9)
        return FetchFailed("timeout", "held up")

    async def answers() -> Fetched:
        return health()

    async def scripted() -> Fetched | FetchFailed:
        return await outcomes.pop(0)()

    outcomes[:] = [held_up, answers, held_up, held_up, answers]
    virtual.network.set("a", scripted)
    async with virtual.running(agent()):
        await trio.sleep(35)
    assert [(at(probe.ts_us), probe.up) for probe in virtual.probes()] == [(9, True), (28, True)]


async def test_a_failure_across_a_leap_of_the_wall_clock_is_asked_again(
    autojump_clock: MockClock, virtual: Rig
) -> None:
    clock = virtual.clock
    leap_us = 0

    class Leaping:
        def now_us(self) -> int:
            return clock.now_us() + leap_us

        def monotonic_s(self) -> float:
            return clock.monotonic_s()

    async def sleeps() -> FetchFailed:
        nonlocal leap_us
        leap_us = 8 * 3600 * SECOND_US
        virtual.network.set("a", health())
        return FetchFailed("protocol", "reset")

    virtual.clock = Leaping()
    virtual.network.set("a", sleeps)
    async with virtual.running(agent()):
        await trio.sleep(5)
    assert [(at(probe.ts_us), probe.up) for probe in virtual.probes()] == [(8 * 3600, True)]


async def test_an_answer_that_was_asked_for_at_a_time_yet_to_come_does_not_count(
    autojump_clock: MockClock, virtual: Rig
) -> None:
    clock = virtual.clock
    ahead_us = 8 * 3600 * SECOND_US

    class SetBack:
        def now_us(self) -> int:
            return clock.now_us() + ahead_us

        def monotonic_s(self) -> float:
            return clock.monotonic_s()

    async def slow() -> Fetched:
        nonlocal ahead_us
        ahead_us = 0
        return health()

    virtual.clock = SetBack()
    virtual.network.set("a", slow)
    async with virtual.running(agent()):
        await trio.sleep(5)
    assert [(at(probe.ts_us), probe.up) for probe in virtual.probes()] == [(0, True)]


# --- turns


async def test_turns_are_counted_from_start_to_start_and_a_late_one_is_not_doubled(
    autojump_clock: MockClock, virtual: Rig
) -> None:
    virtual.settings.prober = settings(interval="2s", timeout="3s")
    virtual.network.set("a", trio.sleep_forever)
    virtual.network.set("b", answers_late)
    async with virtual.running(agent(), agent(B, "http://b")):
        await trio.sleep(8.5)
    assert virtual.network.times("a") == [0, 3, 6]
    assert virtual.network.times("b") == [0, 2, 4, 6, 8]


async def test_turns_are_spread_by_the_jitter_either_way(autojump_clock: MockClock, virtual: Rig) -> None:
    virtual.settings.prober = settings(jitter="20%")
    chances = iter([0.5, 0.5, 0.0, 0.0, 1.0, 0.5])
    virtual.random = lambda: next(chances, 0.5)
    virtual.network.set("a", health())
    async with virtual.running(agent()):
        await trio.sleep(35)
    first, *rest = virtual.network.times("a")
    assert first == 0.5
    assert all(8 <= later - sooner <= 12 for sooner, later in zip([first, *rest], rest, strict=False))
    assert rest[0] - first == pytest.approx(8)


async def test_a_new_agent_is_asked_within_a_second_and_sooner_when_the_interval_is_shorter(
    autojump_clock: MockClock, virtual: Rig
) -> None:
    virtual.settings.prober = settings(interval="100ms")
    virtual.random = lambda: 0.9
    async with virtual.running(agent()):
        await trio.sleep(0.5)
    assert virtual.network.times("a")[0] == pytest.approx(0.09)


async def test_an_interval_change_takes_effect_without_waiting_for_the_old_interval(
    autojump_clock: MockClock, virtual: Rig
) -> None:
    virtual.settings.prober = settings(interval="1h")
    async with virtual.running(agent()) as inbox:
        await trio.sleep(7)
        assert await reconfigure(inbox, settings(interval="20s"), agent()) == AgentsChanged()
        await trio.sleep(38)
        assert virtual.network.times("a") == [0, 20, 40]
        await reconfigure(inbox, settings(interval="1h"), agent())
        await trio.sleep(100)
        assert virtual.network.times("a") == [0, 20, 40]
        await reconfigure(inbox, settings(interval="1s"), agent())
        await trio.sleep(0.5)
        assert virtual.network.times("a") == [0, 20, 40, 145]


async def test_no_more_than_a_bounded_number_of_probes_are_under_way(autojump_clock: MockClock, virtual: Rig) -> None:
    many = [agent(f"urn:asap:agent:n{n}", f"http://n{n}") for n in range(rounds.PROBES_AT_ONCE * 2)]
    for n in range(len(many)):
        virtual.network.set(f"n{n}", answers_late)
        virtual.network.set_manifest(f"n{n}", answers_late)
    async with virtual.running(*many):
        await trio.sleep(9)
    assert virtual.network.most_under_way == rounds.PROBES_AT_ONCE + rounds.MANIFESTS_AT_ONCE
    assert {len(virtual.network.times(f"n{n}")) for n in range(len(many))} == {1}


async def test_well_known_paths_are_joined_to_an_address_with_a_path_or_a_slash(
    autojump_clock: MockClock, virtual: Rig
) -> None:
    async with virtual.running(agent(url="http://a/x/"), agent(B, "http://b/")):
        await trio.sleep(1)
    assert {url for _, url in virtual.network.asked} == {
        "http://a/x/.well-known/asap/health",
        "http://a/x/.well-known/asap/manifest.json",
        "http://b/.well-known/asap/health",
        "http://b/.well-known/asap/manifest.json",
    }


async def test_the_actor_beats_while_idle_and_while_probes_hang(autojump_clock: MockClock, virtual: Rig) -> None:
    virtual.network.set("a", trio.sleep_forever)
    async with virtual.running(agent()):
        await trio.sleep(10)
    gaps = [later - sooner for sooner, later in zip(virtual.beats, virtual.beats[1:], strict=False)]
    assert len(gaps) >= 8
    assert max(gaps) <= 1


async def test_a_dead_network_of_this_host_is_not_the_downtime_of_its_only_remote_agent(
    autojump_clock: MockClock, virtual: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = ["the interface eth0 of this host has no link"]

    async def own_way(host: str) -> str | None:
        assert host == "10.0.0.1"
        return away[0] if away else None

    monkeypatch.setattr(rounds, "SecondOpinion", partial(SecondOpinion, own_way=own_way))

    async def silence() -> FetchFailed:
        await trio.sleep(4)
        return FetchFailed("timeout", "no answer", "network")

    virtual.network.set("10.0.0.1", health())
    async with virtual.running(agent(A, "http://10.0.0.1")):
        await trio.sleep(95)
        virtual.network.set("10.0.0.1", silence)
        await trio.sleep(100)
        assert {segment.up for segment in virtual.segments(A)} == {True}
        note = virtual.settings.unprobed.get(A)
        assert note is not None
        assert (note.reason, note.detail) == ("host_failed", away[0])
        away.clear()
        await trio.sleep(100)
        assert [segment.up for segment in virtual.segments(A)] == [True, False]


async def test_an_outage_of_this_host_is_unknown_and_an_agents_own_is_down(
    autojump_clock: MockClock, virtual: Rig
) -> None:
    silent = FetchFailed("timeout", "no answer", "network")
    hosts = [f"10.0.0.{number}" for number in range(1, 5)]
    agents = [agent(f"urn:asap:agent:{host}", f"http://{host}") for host in hosts]

    async def silence() -> FetchFailed:
        await trio.sleep(4)
        return silent

    for host in hosts:
        virtual.network.set(host, health())
    async with virtual.running(*agents):
        await trio.sleep(95)
        for host in hosts:
            virtual.network.set(host, silence)
        await trio.sleep(100)
        assert {segment.up for one in agents for segment in virtual.segments(one.id)} == {True}
        note = virtual.settings.unprobed.get(agents[0].id)
        assert note is not None
        assert (note.reason, "reaches no other machine" in note.detail) == ("host_failed", True)
        for host in hosts[1:]:
            virtual.network.set(host, health())
        await trio.sleep(100)
        assert [segment.up for segment in virtual.segments(agents[0].id)] == [True, False]
        assert virtual.settings.unprobed.noted() == {}


# --- manifests

SLA = {"availability": "99.5%", "max_latency_p95_ms": 500, "max_error_rate": 1.5}


async def test_a_manifest_is_stored_once_and_again_when_it_changes(autojump_clock: MockClock, virtual: Rig) -> None:
    virtual.settings.prober = settings(manifest_interval="20s")
    virtual.network.set_manifest("a", plain(manifest(sla=SLA, ttl_seconds=60)))
    async with virtual.running(agent()):
        await trio.sleep(50)
        first = virtual.row().manifest
        assert first is not None
        assert (first.sla, first.sla_error, first.ttl_seconds, first.public_key) == (SLA, None, 60, None)
        assert at(first.fetched_us) == 0
        assert virtual.manifests() == [("unsigned", True)]
        changes = virtual.changed.count
        virtual.network.set_manifest("a", plain(manifest(sla={"availability": "bad"})))
        await trio.sleep(40)
        assert virtual.manifests() == [("unsigned", True), ("unsigned", False)]
        assert virtual.changed.count == changes + 1
        assert virtual.row().manifest.sla_error.startswith("sla.availability:")  # type: ignore[union-attr]
    assert virtual.network.times("a", "manifest.json") == [0, 20, 40, 60, 80]


async def test_a_manifest_that_was_stored_is_told_of_though_what_follows_cannot_be_read(
    autojump_clock: MockClock, virtual: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    async def answers() -> Fetched:
        virtual.readers.failures = 1
        return plain(manifest(sla=SLA))

    virtual.network.set_manifest("a", answers)
    async with virtual.running(agent()):
        changes = virtual.changed.count
        await trio.sleep(5)
        assert virtual.manifests() == [("unsigned", True)]
        assert (virtual.readers.failures, virtual.changed.count) == (0, changes + 1)
    assert f"agent {A}: manifest not followed up: ReadTooLongError: too long" in caplog.text
    assert "bug" not in caplog.text


async def test_a_tenant_that_gets_an_agent_sees_its_manifest_though_it_did_not_change(
    autojump_clock: MockClock, virtual: Rig
) -> None:
    virtual.network.set_manifest("a", signed(manifest(sla=SLA), KEY))

    def seen_by(tenant: str) -> int:
        return len(versions(virtual.connection, Visibility(tenant=tenant), A, 10, None))

    async with virtual.running() as inbox:
        await put(inbox, agent())
        await trio.sleep(5)
        assert (seen_by("default"), seen_by("x")) == (1, 0)
        await put(inbox, AgentRecord(A, "http://a", "x"))
        assert (seen_by("default"), seen_by("x")) == (0, 0)
        await trio.sleep(5)
        assert seen_by("x") == 1
    async with virtual.running():
        await trio.sleep(5)
    assert (seen_by("x"), len(virtual.manifests())) == (1, 2)


async def test_a_restart_does_not_store_the_same_manifest_again(autojump_clock: MockClock, virtual: Rig) -> None:
    virtual.network.set_manifest("a", signed(manifest(sla=SLA), KEY))
    for _ in range(2):
        async with virtual.running(agent()):
            await trio.sleep(1)
    assert virtual.manifests() == [("self_signed", True)]


@pytest.mark.parametrize(
    ("pinned", "answer", "verification", "signer", "error"),
    [
        (KEY, signed(manifest(sla=SLA), KEY), "verified", KEY, None),
        (KEY, signed(manifest(sla=SLA), KEY, OTHER), "verified", KEY, None),
        (KEY, signed(manifest(sla=SLA), OTHER), "wrong_key", OTHER, "not signed with the public key"),
        (KEY, signed(manifest(sla=SLA), OTHER, KEY), "bad_signature", None, "does not verify"),
        (KEY, plain(manifest(sla=SLA)), "unsigned", None, "is not signed"),
        (None, plain(manifest(sla=SLA)), "unsigned", None, None),
        (None, signed(manifest(sla=SLA), OTHER), "self_signed", OTHER, None),
        (None, signed(manifest(sla=SLA), KEY, OTHER), "bad_signature", None, "does not verify"),
    ],
)
async def test_only_a_manifest_to_be_believed_gives_a_promise(
    autojump_clock: MockClock,
    virtual: Rig,
    pinned: SigningKey | None,
    answer: Fetched,
    verification: str,
    signer: SigningKey | None,
    error: str | None,
) -> None:
    virtual.network.set_manifest("a", answer)
    async with virtual.running(agent(public_key=None if pinned is None else public(pinned))):
        await trio.sleep(1)
    kept = virtual.row().manifest
    assert kept is not None
    assert (kept.verification, kept.sla) == (verification, SLA if error is None else None)
    assert kept.public_key == (None if signer is None else public(signer))
    assert (kept.sla_error or "") == "" if error is None else error in (kept.sla_error or "")


async def test_a_manifest_that_is_not_to_be_believed_does_not_say_how_long_a_probe_holds(
    autojump_clock: MockClock, virtual: Rig
) -> None:
    virtual.network.set("a", health())
    virtual.network.set_manifest("a", plain(manifest(ttl_seconds=5)))
    async with virtual.running(agent(public_key=public(KEY))):
        await trio.sleep(15)
    assert {probe.hold_us for probe in virtual.probes()} == {30 * SECOND_US}


def states_of_keys(virtual: Rig) -> dict[str, tuple[str, str]]:
    names = {bytes(KEY.verify_key): "KEY", bytes(OTHER.verify_key): "OTHER"}
    return {f"{names[key.public_key]} {key.source}": (key.state, key.source) for key in virtual.row().keys}


async def test_an_agent_that_signs_with_another_key_is_not_believed_until_an_operator_says_so(
    autojump_clock: MockClock, virtual: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    virtual.settings.prober = settings(manifest_interval="10s")
    virtual.network.set_manifest("a", signed(manifest(sla=SLA), KEY))
    async with virtual.running(agent()) as inbox:
        await trio.sleep(5)
        assert states_of_keys(virtual) == {"KEY manifest": ("active", "manifest")}
        virtual.network.set_manifest("a", signed(manifest(sla=SLA), OTHER))
        await trio.sleep(50)
        assert virtual.manifests() == [("self_signed", True), ("key_changed", False)]
        assert states_of_keys(virtual)["OTHER manifest"] == ("claimed", "manifest")
        warned = [record.getMessage() for record in caplog.records if "is not known as its own" in record.getMessage()]
        assert len(warned) == 1
        assert f"asapctl agents keys import {A} {public(OTHER)}" in warned[0]

        changes = virtual.changed.count
        key = bytes(OTHER.verify_key)
        done = await ask(inbox, lambda to: ImportKeyRequest(A, key, "key:x", None, to), deadline_s=60)
        assert done == AgentsChanged(changed=[A])
        assert virtual.changed.count == changes + 1
        await trio.sleep(5)
        assert virtual.manifests()[-1] == ("verified", True)
        assert {name: state for name, (state, _) in states_of_keys(virtual).items()} == {
            "KEY manifest": "retired",
            "OTHER manifest": "active",
            "OTHER import": "active",
        }


async def test_a_claimed_key_can_be_dismissed_and_the_manifest_stays_unbelieved(
    autojump_clock: MockClock, virtual: Rig
) -> None:
    virtual.settings.prober = settings(manifest_interval="10s")
    virtual.network.set_manifest("a", signed(manifest(sla=SLA), KEY))
    async with virtual.running(agent()) as inbox:
        await trio.sleep(5)
        virtual.network.set_manifest("a", signed(manifest(sla=SLA), OTHER))
        await trio.sleep(10)
        kid = jwk_thumbprint(bytes(OTHER.verify_key))
        await ask(inbox, lambda to: RetireKeyRequest(A, kid, None, "key:x", to), deadline_s=60)
        await trio.sleep(30)
        assert states_of_keys(virtual)["OTHER manifest"] == ("retired", "manifest")
        assert virtual.manifests() == [("self_signed", True), ("key_changed", False)]
        virtual.network.set_manifest("a", signed(manifest(sla=SLA), KEY))
        await trio.sleep(10)
        assert virtual.manifests()[-1] == ("self_signed", True)


async def test_a_manifest_by_a_key_that_was_retired_before_the_agent_was_removed_promises_nothing(
    autojump_clock: MockClock, virtual: Rig
) -> None:
    virtual.network.set_manifest("a", signed(manifest(sla=SLA), KEY))
    async with virtual.running() as inbox:
        await put(inbox, agent())
        await trio.sleep(5)
        kid = jwk_thumbprint(bytes(KEY.verify_key))
        await ask(inbox, lambda to: RetireKeyRequest(A, kid, None, "key:x", to), deadline_s=60)
        await remove(inbox, A)
        await put(inbox, agent())
        await trio.sleep(5)
        assert virtual.manifests()[-1] == ("key_changed", False)


async def test_a_manifest_that_was_signed_and_is_no_more_promises_nothing(
    autojump_clock: MockClock, virtual: Rig
) -> None:
    virtual.settings.prober = settings(manifest_interval="10s")
    virtual.network.set_manifest("a", signed(manifest(sla=SLA), KEY))
    async with virtual.running(agent()):
        await trio.sleep(5)
        virtual.network.set_manifest("a", plain(manifest(sla=SLA)))
        await trio.sleep(10)
    assert virtual.manifests() == [("self_signed", True), ("unsigned", False)]


async def test_a_replaced_pin_covers_the_manifest_until_its_overlap_is_over(
    autojump_clock: MockClock, virtual: Rig
) -> None:
    virtual.settings.prober = settings(manifest_interval="10s")
    virtual.settings.key_overlap_us = 60 * SECOND_US
    virtual.network.set_manifest("a", signed(manifest(sla=SLA), KEY))
    async with virtual.running() as inbox:
        await put(inbox, agent(public_key=public(KEY)))
        await trio.sleep(5)
        await put(inbox, agent(public_key=public(OTHER)))
        await trio.sleep(40)
        assert virtual.manifests() == [("verified", True)]
        await trio.sleep(40)
    assert virtual.manifests() == [("verified", True), ("wrong_key", False)]


async def test_an_agent_that_was_removed_and_added_again_has_its_first_key_again(
    autojump_clock: MockClock, virtual: Rig
) -> None:
    virtual.network.set_manifest("a", signed(manifest(sla=SLA), KEY))
    async with virtual.running() as inbox:
        await put(inbox, agent())
        await trio.sleep(5)
        await remove(inbox, A)
        await put(inbox, agent())
        await trio.sleep(5)
        assert states_of_keys(virtual) == {"KEY manifest": ("active", "manifest")}


async def test_a_key_pinned_later_judges_the_same_manifest_anew(autojump_clock: MockClock, virtual: Rig) -> None:
    virtual.network.set_manifest("a", plain(manifest(sla=SLA)))
    async with virtual.running() as inbox:
        await put(inbox, agent())
        await trio.sleep(5)
        await put(inbox, agent(public_key=public(KEY)))
        await trio.sleep(5)
    assert virtual.manifests() == [("unsigned", True), ("unsigned", False)]


@pytest.mark.parametrize(
    ("answer", "verification"),
    [(signed(manifest(sla=SLA), KEY), "wrong_key"), (plain(manifest(sla=SLA)), "unsigned")],
)
async def test_with_a_pinned_key_that_is_none_nothing_is_believed(
    autojump_clock: MockClock, virtual: Rig, answer: Fetched, verification: str
) -> None:
    virtual.network.set_manifest("a", answer)
    async with virtual.running(agent(public_key=base64.b64encode(bytes(32)).decode())):
        await trio.sleep(1)
    assert virtual.manifests() == [(verification, False)]


@pytest.mark.parametrize(
    "answer", [plain(manifest(B)), Fetched(200, b"[]", 1, {}), NOT_FOUND, REFUSED, trio.sleep_forever]
)
async def test_what_is_no_manifest_of_the_agent_changes_nothing_and_is_logged_once(
    autojump_clock: MockClock, virtual: Rig, caplog: pytest.LogCaptureFixture, answer: Reaction
) -> None:
    caplog.set_level(logging.INFO)
    virtual.settings.prober = settings(manifest_interval="10s")
    virtual.network.set_manifest("a", plain(manifest(sla=SLA)))
    async with virtual.running(agent()):
        await trio.sleep(5)
        virtual.network.set_manifest("a", answer)
        await trio.sleep(50)
    assert virtual.manifests() == [("unsigned", True)]
    assert len([record for record in caplog.records if "no manifest taken" in record.getMessage()]) == 1


async def test_the_manifest_of_an_agent_that_was_away_is_asked_for_at_the_pace_of_the_probes(
    autojump_clock: MockClock, virtual: Rig
) -> None:
    virtual.network.set_manifest("a", REFUSED)
    async with virtual.running(agent()):
        await trio.sleep(15)
        virtual.network.set_manifest("a", plain(manifest(sla=SLA)))
        await trio.sleep(100)
    assert virtual.network.times("a", "manifest.json") == [0, 10, 20]
    assert virtual.manifests() == [("unsigned", True)]


# --- changes of the directory


async def test_an_added_agent_is_probed_and_a_removed_one_no_more(autojump_clock: MockClock, virtual: Rig) -> None:
    virtual.network.set("b", health())
    async with virtual.running(agent()) as inbox:
        assert await put(inbox, agent(B, "http://b")) == AgentsChanged(added=[B])
        await trio.sleep(15)
        assert virtual.row(B).state == "healthy"
        changes = virtual.changed.count
        assert await remove(inbox, B) == AgentsChanged(removed=[B])
        assert virtual.changed.count == changes + 1
        await trio.sleep(50)
    assert virtual.network.times("b") == [0, 10]
    assert len(virtual.network.times("a")) == 7


async def test_a_changed_address_is_probed_at_once_in_place_of_the_old_one(
    autojump_clock: MockClock, virtual: Rig
) -> None:
    virtual.network.set("old", health())
    virtual.network.set("new", health())
    async with virtual.running() as inbox:
        await put(inbox, agent(url="http://old"))
        await trio.sleep(15)
        assert await put(inbox, agent(url="http://new")) == AgentsChanged(changed=[A])
        await trio.sleep(15)
    assert (virtual.network.times("old"), virtual.network.times("new")) == ([0, 10], [15, 25])
    assert virtual.row().ok_streak == 4


async def test_a_change_that_does_not_concern_probing_lets_the_probes_go_on(
    autojump_clock: MockClock, virtual: Rig
) -> None:
    async with virtual.running() as inbox:
        await put(inbox, agent())
        await trio.sleep(5)
        assert await put(inbox, agent(sla={"availability": "99%"})) == AgentsChanged(changed=[A])
        await trio.sleep(10)
    assert virtual.network.times("a") == [0, 10]


@pytest.mark.parametrize("change", ["remove", "put", "reconfigure"])
async def test_the_result_of_a_probe_of_what_is_no_longer_in_the_directory_is_dropped(
    autojump_clock: MockClock, virtual: Rig, change: str
) -> None:
    virtual.network.set("a", answers_late)
    virtual.settings.agents = [agent()] if change == "reconfigure" else []
    async with virtual.running() as inbox:
        if change != "reconfigure":
            await put(inbox, agent())
        await trio.sleep(1)
        match change:
            case "remove":
                await remove(inbox, A)
            case "put":
                await put(inbox, agent(url="http://a/other"))
            case _:
                await reconfigure(inbox, settings())
        await trio.sleep(0.9)
    assert virtual.network.times("a") == [0]
    assert not [probe for probe in virtual.probes() if probe.ts_us == EPOCH_US]


@pytest.mark.parametrize("change", ["remove", "hand_on"])
async def test_a_change_waits_for_a_result_that_is_just_being_written(
    autojump_clock: MockClock, virtual: Rig, change: str
) -> None:
    virtual.network.set("a", health())
    order: list[str] = []
    gate = trio.Event()
    inner = virtual.runner.execute

    async def execute(unit: AnyUnit, *, urgent: bool, idempotency: Idempotency | None) -> Answer | Refusal:
        if isinstance(unit, RecordProbe):
            await gate.wait()
        order.append(type(unit).__name__)
        return await inner(unit, urgent=urgent, idempotency=idempotency)

    virtual.runner.execute = execute  # type: ignore[method-assign]
    configured = [agent()] if change == "hand_on" else []
    async with virtual.running(*configured) as inbox, trio.open_nursery() as nursery:
        if change == "remove":
            await put(inbox, agent())
        await trio.sleep(1)
        if change == "remove":
            nursery.start_soon(remove, inbox, A)
        else:
            nursery.start_soon(reconfigure, inbox, settings(), AgentRecord(A, "http://a", "x"))
        await trio.sleep(1)
        gate.set()
        await trio.sleep(0.5)
    if change == "remove":
        assert order == ["SyncAgents", "PutAgent", "RecordProbe", "RemoveAgent"]
    else:
        assert order[:3] == ["SyncAgents", "RecordProbe", "SyncAgents"]


async def test_a_refused_change_is_answered_and_changes_nothing(autojump_clock: MockClock, virtual: Rig) -> None:
    async with virtual.running(agent()) as inbox:
        await trio.sleep(5)
        refused = await put(inbox, agent(url="http://elsewhere"))
        assert isinstance(refused, Refusal)
        assert refused.code == "agent_configured"
        gone = await remove(inbox, B)
        assert isinstance(gone, Refusal)
        assert gone.code == "agent_not_found"
        await trio.sleep(10)
    assert virtual.network.times("a") == [0, 10]
    assert virtual.changed.count == 1


async def test_a_reconfiguration_adds_changes_and_removes_configured_agents_only(
    autojump_clock: MockClock, virtual: Rig
) -> None:
    virtual.network.set("a", health())
    async with virtual.running(agent(), agent(B, "http://b")) as inbox:
        c = agent("urn:asap:agent:c", "http://c")
        await put(inbox, c)
        await trio.sleep(5)
        d = agent("urn:asap:agent:d", "http://d")
        outcome = await reconfigure(inbox, settings(), agent(url="http://a2"), d)
        assert outcome == AgentsChanged(added=[d.id], changed=[A], removed=[B])
        await trio.sleep(14)
    assert virtual.network.times("a") == [0]
    assert virtual.network.times("b") == [0]
    assert virtual.network.times("a2") == [5, 15]
    assert virtual.network.times("c") == [0, 10]
    assert virtual.network.times("d") == [5, 15]


async def test_an_agent_taken_over_by_the_configuration_is_removed_with_it(
    autojump_clock: MockClock, virtual: Rig
) -> None:
    async with virtual.running() as inbox:
        await put(inbox, agent())
        assert await reconfigure(inbox, settings(), agent()) == AgentsChanged(changed=[A])
        await trio.sleep(5)
        assert await reconfigure(inbox, settings()) == AgentsChanged(removed=[A])
        await trio.sleep(20)
    assert virtual.network.times("a") == [0]


# --- restarts and endings


async def test_a_restart_goes_on_from_the_stored_streaks(autojump_clock: MockClock, virtual: Rig) -> None:
    virtual.settings.prober = settings(unhealthy_after=3)
    virtual.network.set("a", health())
    async with virtual.running(agent()):
        await trio.sleep(5)
        virtual.network.set("a", REFUSED)
        await trio.sleep(20)
        assert (virtual.row().state, virtual.row().fail_streak) == ("healthy", 2)
    async with virtual.running():
        await trio.sleep(1)
    assert (virtual.row().state, virtual.row().fail_streak) == ("unhealthy", 3)
    assert virtual.transitions()[-1] == (25, "healthy", "unhealthy", "refused")


async def test_failures_that_are_not_in_a_row_bring_an_agent_down_where_the_settings_say_so(
    autojump_clock: MockClock, virtual: Rig
) -> None:
    virtual.settings.prober = settings(unhealthy_after=2, unhealthy_within=3)
    async with virtual.running(agent()):
        for answer in (health(), REFUSED, health(), REFUSED):
            virtual.network.set("a", answer)
            await trio.sleep(10)
    assert virtual.transitions() == [(0, "unknown", "healthy", None), (30, "healthy", "unhealthy", "refused")]


async def test_a_restart_goes_on_counting_failures_that_are_not_in_a_row(
    autojump_clock: MockClock, virtual: Rig
) -> None:
    virtual.settings.prober = settings(unhealthy_after=3, unhealthy_within=6, flapping_after=0)
    for answers in ((REFUSED, REFUSED, health(), REFUSED), (health(), REFUSED), (health(), REFUSED)):
        async with virtual.running(agent()):
            for answer in answers:
                virtual.network.set("a", answer)
                await trio.sleep(10)
    # Those from before it came up at 20 do not count.
    assert virtual.transitions() == [(20, "unknown", "healthy", None), (70, "healthy", "unhealthy", "refused")]


async def test_a_restart_uses_the_newest_configuration(autojump_clock: MockClock, virtual: Rig) -> None:
    async with virtual.running(agent()) as inbox:
        await reconfigure(inbox, settings(interval="2s"), agent(B, "http://b"))
    virtual.network.asked.clear()
    async with virtual.running():
        await trio.sleep(5)
    assert virtual.network.times("a") == []
    assert virtual.network.times("b") == [0, 2, 4]


async def test_it_is_cancelled_cleanly_in_the_middle_of_requests_and_writes(
    autojump_clock: MockClock, virtual: Rig
) -> None:
    virtual.network.set("a", trio.sleep_forever)
    virtual.network.set("b", health())
    virtual.runner.trouble = lambda unit: "away" if isinstance(unit, RecordProbe) else None
    with trio.move_on_after(0.5) as scope:
        async with virtual.running(agent(), agent(B, "http://b")):
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert virtual.network.under_way == 0


async def test_it_returns_at_once_when_the_mailbox_is_closed(autojump_clock: MockClock, virtual: Rig) -> None:
    virtual.network.set("a", trio.sleep_forever)
    with trio.fail_after(0.2):
        async with virtual.running(agent()):
            await wait_all_tasks_blocked()


# --- trouble with the store


def first(count: int, kind: type[Any], trouble: str) -> Callable[[AnyUnit], str | None]:
    """This trouble for the first `count` units of a kind."""
    left = [trouble] * count
    return lambda unit: left.pop() if isinstance(unit, kind) and left else None


@pytest.mark.parametrize("trouble", ["away", "lost", "answer lost"])
@pytest.mark.parametrize("kind", [RecordProbe, RecordManifest])
async def test_a_result_is_written_exactly_once_whatever_becomes_of_the_writer(
    autojump_clock: MockClock, virtual: Rig, trouble: str, kind: type[Any]
) -> None:
    virtual.network.set("a", health())
    virtual.network.set_manifest("a", plain(manifest(sla=SLA)))
    virtual.runner.trouble = first(2 if trouble != "answer lost" else 1, kind, trouble)
    async with virtual.running(agent()):
        await trio.sleep(9)
    assert [(at(probe.ts_us), probe.up) for probe in virtual.probes()] == [(0, True)]
    assert virtual.transitions() == [(0, "unknown", "healthy", None)]
    assert virtual.manifests() == [("unsigned", True)]


async def test_a_result_the_store_never_takes_is_dropped_and_logged_and_the_next_counts_afresh(
    autojump_clock: MockClock, virtual: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    virtual.network.set("a", health())
    virtual.runner.trouble = lambda unit: "away" if isinstance(unit, RecordProbe) else None
    async with virtual.running(agent()):
        await trio.sleep(25)
        assert virtual.probes() == []
        virtual.runner.trouble = lambda unit: None
        await trio.sleep(10)
    assert [record.getMessage() for record in caplog.records if "dropped" in record.getMessage()] == [
        f"agent {A}: a result was dropped, the store did not take it: {WRITER_AWAY.detail}"
    ]
    assert virtual.transitions() == [(at(virtual.probes()[0].ts_us), "unknown", "healthy", None)]


async def test_a_manifest_the_store_never_takes_is_tried_again_in_its_next_turn(
    autojump_clock: MockClock, virtual: Rig
) -> None:
    virtual.settings.prober = settings(manifest_interval="20s")
    virtual.network.set_manifest("a", plain(manifest(sla=SLA)))
    virtual.runner.trouble = first(rounds.RECORD_TRIES, RecordManifest, "away")
    async with virtual.running(agent()):
        await trio.sleep(25)
    assert virtual.manifests() == [("unsigned", True)]


async def test_a_start_waits_for_the_writer(autojump_clock: MockClock, virtual: Rig) -> None:
    virtual.runner.trouble = first(3, SyncAgents, "away")
    async with virtual.running(agent()):
        assert virtual.row().origin == "config"


async def test_a_start_without_the_writer_fails(autojump_clock: MockClock, virtual: Rig) -> None:
    virtual.runner.trouble = lambda unit: "away"
    with pytest.RaisesGroup(pytest.RaisesGroup(DirectoryNotSyncedError)):
        async with virtual.running(agent()):
            raise AssertionError("it must not become ready")


async def test_a_reconfiguration_the_store_does_not_take_changes_nothing(
    autojump_clock: MockClock, virtual: Rig
) -> None:
    async with virtual.running(agent()) as inbox:
        virtual.runner.trouble = lambda unit: "away" if isinstance(unit, SyncAgents) else None
        assert await reconfigure(inbox, settings(interval="1s"), agent(B, "http://b")) == WRITER_AWAY
        await trio.sleep(15)
    assert virtual.settings.agents == [agent()]
    assert virtual.settings.prober == settings()
    assert {round(b - a) for a, b in zip(virtual.network.times("a"), virtual.network.times("a")[1:], strict=False)} == {
        10
    }


async def test_a_change_whose_answer_was_lost_is_followed_all_the_same(autojump_clock: MockClock, virtual: Rig) -> None:
    virtual.runner.trouble = first(1, PutAgent, "answer lost")
    async with virtual.running() as inbox:
        assert await put(inbox, agent()) == OUTCOME_UNKNOWN
        await trio.sleep(1)
        assert virtual.network.times("a") == [0]


async def test_a_change_that_a_dying_writer_commits_late_is_found(autojump_clock: MockClock, virtual: Rig) -> None:
    virtual.runner.trouble = first(2, PutAgent, "lost")
    async with virtual.running() as inbox:
        assert await put(inbox, agent()) == OUTCOME_UNKNOWN
        assert await put(inbox, agent()) == OUTCOME_UNKNOWN
        await trio.sleep(1)
        await virtual.database.submit(PutAgent(agent(), "late", EPOCH_US))
        seen = virtual.changed.count
        await trio.sleep(5)
        assert virtual.network.times("a") == [5]
        assert virtual.changed.count > seen
        await trio.sleep(60)
        seen = virtual.changed.count
        await trio.sleep(60)
        assert virtual.changed.count == seen


async def test_a_directory_that_cannot_be_read_in_time_is_read_again(autojump_clock: MockClock, virtual: Rig) -> None:
    async with virtual.running() as inbox:
        virtual.readers.failures = 2
        assert await put(inbox, agent()) == AgentsChanged(added=[A])
        await trio.sleep(11)
        assert virtual.network.times("a") == [10]


async def test_a_bug_in_the_store_fails_the_request_and_not_the_actor(
    autojump_clock: MockClock, virtual: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    virtual.runner.trouble = first(1, RemoveAgent, "bug")
    async with virtual.running() as inbox:
        with pytest.raises(Exception, match="met a bug"):
            await remove(inbox, A)
        assert await put(inbox, agent()) == AgentsChanged(added=[A])
    assert "RemoveAgentRequest failed" in caplog.text


# --- real agents


class RealAgent:
    """An HTTP server on loopback that behaves as told."""

    def __init__(self, behaviour: str) -> None:
        self.behaviour = behaviour

    async def serve(self, stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            async with stream:
                head = b""
                while b"\r\n\r\n" not in head:
                    received = await stream.receive_some()
                    if not received:
                        return
                    head += received
                await self.answer(stream, head)

    async def answer(self, stream: trio.SocketStream, head: bytes) -> None:
        if b"manifest.json" in head:
            await self.reply(stream, "200 OK", signed(manifest(sla=SLA), KEY).body)
            return
        match self.behaviour:
            case "healthy":
                await self.reply(stream, "200 OK", health(agent_id=A).body)
            case "unhealthy":
                await self.reply(stream, "503 Service Unavailable", health("unhealthy").body)
            case "lying":
                await self.reply(stream, "200 OK", health(agent_id=B).body)
            case "slow":
                for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n{}":
                    await stream.send_all(bytes([byte]))
                    await trio.sleep(0.05)
            case "endless":
                await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\n")
                while True:
                    await stream.send_all(b" " * 4096)
            case "elsewhere":
                await self.reply(stream, "302 Found", b"", "Location: http://127.0.0.1/\r\n")
            case "garbage":
                await stream.send_all(b"\0\1\2 what\r\n\r\n")

    async def reply(self, stream: trio.SocketStream, status: str, body: bytes, more: str = "") -> None:
        head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{more}\r\n"
        await stream.send_all(head.encode() + body)


@asynccontextmanager
async def serving(real: RealAgent) -> AsyncIterator[str]:
    async with trio.open_nursery() as nursery:
        listeners: list[trio.SocketListener] = await nursery.start(
            partial(trio.serve_tcp, real.serve, 0, host="127.0.0.1")
        )
        yield f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/"
        nursery.cancel_scope.cancel()


async def reached(rig: Rig, condition: Callable[[], bool]) -> None:
    with trio.fail_after(30):
        seen = rig.committed.count
        while not condition():
            seen = await rig.committed.wait(seen)


@pytest.mark.parametrize(
    ("behaviour", "state", "reason"),
    [
        ("healthy", "healthy", None),
        ("unhealthy", "unhealthy", "reports_unhealthy"),
        ("lying", "unhealthy", "wrong_agent"),
        ("slow", "unhealthy", "timeout"),
        ("endless", "unhealthy", "too_large"),
        ("elsewhere", "unhealthy", "redirect"),
        ("garbage", "unhealthy", "protocol"),
    ],
)
async def test_a_real_agent_is_seen_as_it_is(rig: Rig, behaviour: str, state: str, reason: str | None) -> None:
    rig.settings.prober = settings(interval="20ms", timeout="300ms" if behaviour == "slow" else "30s")
    async with serving(RealAgent(behaviour)) as url, Fetcher(LOOPBACK) as fetcher:
        rig.fetcher = fetcher
        async with rig.running(agent(url=url, public_key=public(KEY))):
            await reached(rig, lambda: rig.row().state == state and rig.row().manifest is not None)
    assert rig.probes()[0].reason == reason
    assert rig.manifests() == [("verified", True)]


async def test_a_real_agent_that_is_killed_and_comes_back_is_followed(rig: Rig) -> None:
    rig.settings.prober = settings(interval="20ms", timeout="30s", unhealthy_after=3)

    async def serve(life: trio.CancelScope, listeners: list[trio.SocketListener]) -> None:
        with life:
            await trio.serve_listeners(RealAgent("healthy").serve, listeners)

    async with Fetcher(LOOPBACK) as fetcher, trio.open_nursery() as nursery:
        rig.fetcher = fetcher
        first_life, second_life = trio.CancelScope(), trio.CancelScope()
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        nursery.start_soon(serve, first_life, listeners)
        async with rig.running(agent(url=f"http://127.0.0.1:{port}")):
            await reached(rig, lambda: rig.row().state == "healthy")
            first_life.cancel()
            await reached(rig, lambda: rig.row().state == "unhealthy")
            nursery.start_soon(serve, second_life, await trio.open_tcp_listeners(port, host="127.0.0.1"))
            await reached(rig, lambda: rig.row().state == "healthy")
        second_life.cancel()
    failed = [probe for probe in rig.probes() if not probe.up]
    assert len(failed) >= 3
    assert {probe.reason for probe in failed} <= {"refused", "protocol"}
