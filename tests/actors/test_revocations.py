"""Revocations in memory and on their way out: a mirror that learns, a list made when it has to be, news in order."""

from __future__ import annotations

import json

import apsw
import pytest
import trio
from nacl.signing import SigningKey

from asapd.actors.notifier import Gap
from asapd.actors.revocations import Follower, Revocations, RevokedTokens, public_news
from asapd.core.delegation import Claims
from asapd.core.denial import ANCESTOR_REVOKED
from asapd.core.types import DAY_US, HOUR_US, SECOND_US
from asapd.runtime.fanout import FeedClosed, Wakeup
from asapd.store import delegation_news
from asapd.store.database import Database, InlineReaders, InlineRunner
from asapd.store.delegation_news import News, Party
from asapd.store.units.delegations import ImportRevocations, Revocation
from asapd.store.units.house import Sweep
from asapd.store.writer import Writer
from asapd.wire.revocations import decode_list, verify_list

NOW_US = 1_795_169_203_000_000
A = "urn:asap:agent:a"


class SetClock:
    """Wall time that moves when told."""

    def __init__(self) -> None:
        self.us = NOW_US

    def now_us(self) -> int:
        return self.us

    def monotonic_s(self) -> float:
        return trio.current_time()


class Host:
    """A store, and what is told when it changes."""

    def __init__(self, connection: apsw.Connection) -> None:
        self.clock = SetClock()
        self.changed = Wakeup()
        self.stopping = trio.Event()
        runner = InlineRunner(Writer(connection), lambda _: self.changed.notify())
        self.database = Database(runner, InlineReaders(connection))
        self.connection = connection

    async def revoke(self, *jtis: str, expires_us: int = NOW_US + HOUR_US) -> None:
        entries = [Revocation(A, jti, NOW_US, expires_us) for jti in jtis]
        await self.database.submit(ImportRevocations(entries, "x", "x", 1, b"", 0, "test", self.clock.us))

    def revocations(self) -> Revocations:
        return Revocations(
            self.database,
            self.clock,
            SigningKey(b"k" * 32),
            skew_us=lambda: SECOND_US,
            changed=self.changed,
            stopping=self.stopping,
        )

    def follower(self, cursor: int = 0) -> Follower:
        return Follower(self.database, self.changed, self.stopping, cursor)


@pytest.fixture
def host(inline_database: tuple[Database, apsw.Connection]) -> Host:
    return Host(inline_database[1])


def claims(jti: str) -> Claims:
    return Claims(jti, A, "urn:asap:agent:b", ("*",), None, None, NOW_US, NOW_US + HOUR_US)


async def test_the_mirror_learns_what_is_committed_while_it_is_followed(
    host: Host, autojump_clock: trio.testing.MockClock
) -> None:
    await host.revoke("before")
    mirror = RevokedTokens(host.database, host.clock)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mirror.follow, host.changed)
        await trio.testing.wait_all_tasks_blocked()
        assert len(mirror) == 0
        await host.revoke("after")
        await trio.testing.wait_all_tasks_blocked()
        assert (claims("before") in mirror, claims("after") in mirror, claims("other") in mirror) == (True, True, False)
        # Committed by a writer that was not heard of again.
        host.connection.execute(
            "INSERT INTO revocation (issuer, jti, revoked_us, expires_us, recorded_us) VALUES (?, 'silent', 0, ?, 0)",
            (A, NOW_US + HOUR_US),
        )
        await trio.sleep(1.5)
        assert claims("silent") in mirror
        nursery.cancel_scope.cancel()


async def test_the_mirror_drops_what_has_long_expired(host: Host) -> None:
    mirror = RevokedTokens(host.database, host.clock)
    await host.revoke("short")
    await host.revoke("long", expires_us=NOW_US + 10 * DAY_US)
    await mirror.refresh()
    assert len(mirror) == 2
    host.clock.us += 2 * DAY_US
    await mirror.refresh()
    assert (claims("short") in mirror, claims("long") in mirror) == (False, True)


async def test_a_list_is_made_anew_only_when_a_token_came_or_lapsed(host: Host) -> None:
    shown = host.revocations()
    empty = await shown.current()
    assert (json.loads(empty.body)["entries"], json.loads(empty.body)["updated_at"]) == ([], None)
    assert await shown.current() is empty
    await host.revoke("one", "two")
    await host.revoke("late", expires_us=NOW_US + 2 * HOUR_US)
    full = await shown.current()
    assert [entry["id"] for entry in json.loads(full.body)["entries"]] == ["late", "one", "two"]
    assert full.etag != empty.etag
    host.clock.us = NOW_US + HOUR_US
    assert await shown.current() is full  # the skew is not over
    host.clock.us += SECOND_US
    fewer = await shown.current()
    assert [entry["id"] for entry in json.loads(fewer.body)["entries"]] == ["late"]
    assert (fewer.number, fewer.etag != full.etag) == (full.number, True)
    assert (await host.revocations().current()).body == fewer.body


async def test_a_list_goes_in_parts_from_one_number_to_the_next(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asapd.actors.revocations.PART", 2)
    await host.revoke("one", "two", "gone", expires_us=NOW_US + HOUR_US)
    await host.revoke("late", expires_us=NOW_US + 2 * HOUR_US)
    shown = host.revocations()
    told, number = [], 0
    while (part := decode_list((await shown.since(number)).body)).entries:
        assert verify_list(part, [bytes(SigningKey(b"k" * 32).verify_key)]) is not None
        told.append([entry.id for entry in part.entries])
        number = part.number
    assert (told, number) == ([["one", "two"], ["gone", "late"]], (await shown.current()).number)
    assert decode_list((await shown.since(3)).body).number == 4
    assert decode_list((await shown.since(100)).body).number == 4, "the daemon is not where the caller was"
    host.clock.us += HOUR_US + SECOND_US
    assert [entry.id for entry in decode_list((await shown.since(0)).body).entries] == ["late"]


async def test_news_come_in_order_and_a_gap_in_the_place_of_what_is_gone(host: Host) -> None:
    for number in range(30):
        await host.revoke(f"t{number}")
    follower = host.follower()
    found = [*await follower.next_news(), *await follower.next_news()]
    assert [one.seq for one in found if isinstance(one, News)] == list(range(1, 31))
    host.clock.us += 1
    await host.revoke("kept")
    await host.database.submit(Sweep(host.clock.us, host.clock.us, 0))
    gap, news = await host.follower(10).next_news()
    assert (gap, isinstance(news, News)) == (Gap(11, 30), True)


async def test_a_follower_waits_for_what_comes_and_ends_with_the_daemon(
    host: Host, autojump_clock: trio.testing.MockClock
) -> None:
    follower, newest = await host.revocations().follow(None)
    assert newest == 0
    heard: list[int] = []

    async def follow() -> None:
        while True:
            heard.extend(one.seq if isinstance(one, News) else 0 for one in await follower.next_news())

    async def until_closed() -> None:
        with pytest.raises(FeedClosed):
            await follow()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(until_closed)
        await trio.sleep(3)
        await host.revoke("x")
        await trio.sleep(0.1)
        assert heard == [1]
        host.stopping.set()
        host.changed.notify()
    assert heard == [1]


async def test_a_cursor_from_another_store_does_not_hide_what_comes(host: Host) -> None:
    await host.revoke("one")
    follower, _ = await host.revocations().follow(1_000)
    with trio.move_on_after(0.01):
        await follower.next_news()
    await host.revoke("two")
    (news,) = await follower.next_news()
    assert isinstance(news, News)
    assert news.seq == 2
    assert delegation_news.newest_news(host.connection) == 2


@pytest.mark.parametrize(("tenants", "is_told"), [(("ta", "tb", "tc"), True), (("tc",), False)])
def test_who_may_not_know_of_the_cause_is_told_neither_it_nor_its_reason(
    tenants: tuple[str, ...], *, is_told: bool
) -> None:
    cause, below = (
        Party("a", "b", "ta", "d-1", "d-1", "2027-01-01T00:00:00Z", "tb"),
        Party("b", "c", "tb", "d-2", "d-2", "2027-01-01T00:00:00Z", "tc"),
    )
    params = {"cause": "d-1", "reason": "secret", "revoked_at": "2026-01-01T00:00:00Z", "source": "asapd/x"}
    found = public_news(
        News(1, params, [cause, below], cause=cause),
        lambda _, concerned: not set(tenants).isdisjoint(concerned),
        lambda agents: "c" in agents,
    )
    ((method, told),) = found
    assert method == "delegation.revoked"
    assert [one["id"] for one in told["delegations"]] == ["d-2"]
    said = {name: told[name] for name in params}
    assert said == (params if is_told else {**params, "cause": None, "reason": ANCESTOR_REVOKED, "source": None})
