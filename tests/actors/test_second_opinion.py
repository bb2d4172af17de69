"""What failed in silence is the agent's only while somebody else answers."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import trio
from trio.testing import MockClock

from asapd.actors import second_opinion
from asapd.actors.second_opinion import ASKED, SecondOpinion
from asapd.runtime.fetch import Doubt, Fetched, FetchFailed

A, B, C, D = (f"http://10.0.0.{number}:9000" for number in range(1, 5))
NEAR = "http://127.0.0.1:9000"
ALL = (A, B, C, D, NEAR)
OK = Fetched(200, b"{}", 1, {})
REFUSED = FetchFailed("refused", "nobody listens")


def silent(doubt: Doubt = "network") -> FetchFailed:
    return FetchFailed("timeout", "no answer", doubt)


@dataclass
class World:
    """Who answers; `names` are those that a resolver answers for."""

    up: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    away: str | None = None
    looked_at: list[str] = field(default_factory=list)

    async def ask(self, url: str) -> Fetched | FetchFailed:
        self.asked.append(url)
        await trio.sleep(5)
        return OK if url in self.up else silent()

    async def resolves(self, name: str, deadline_s: float) -> bool:
        self.asked.append(name)
        await trio.sleep(deadline_s)
        return name in self.names

    def opinion(self) -> SecondOpinion:
        return SecondOpinion(
            self.ask,
            resolves=self.resolves,
            is_near=lambda host: host in ("127.0.0.1", "near.test"),
            own_way=self.own_way,
        )

    async def own_way(self, host: str) -> str | None:
        self.looked_at.append(host)
        await trio.sleep(9)
        return self.away


async def failing(opinion: SecondOpinion, url: str, others: tuple[str, ...] = ALL) -> str | None:
    started_s = trio.current_time()
    await trio.sleep(5)
    return await opinion.blames_host(url, silent(), started_s, others, 5)


async def test_an_agent_that_alone_is_silent_is_down(autojump_clock: MockClock) -> None:
    world = World(up={B})
    opinion = world.opinion()
    assert await failing(opinion, A) is None
    assert sorted(world.asked) == [B, C, D]


async def test_nobody_is_asked_while_another_was_heard(autojump_clock: MockClock) -> None:
    world = World()
    opinion = world.opinion()
    started_s = trio.current_time()
    opinion.heard(B, REFUSED)
    assert await opinion.blames_host(A, silent(), started_s, ALL, 5) is None
    assert world.asked == []


async def test_when_nobody_answers_it_is_this_host_and_the_others_are_asked_once(autojump_clock: MockClock) -> None:
    world, said = World(), list[str | None]()
    opinion = world.opinion()
    for url in ALL:
        opinion.heard(url, OK)
    await trio.sleep(30)

    async def fail(url: str) -> None:
        said.append(await failing(opinion, url))

    async with trio.open_nursery() as nursery:
        for url in (A, B, C, D):
            nursery.start_soon(fail, url)
    assert all(one is not None and "reaches no other machine" in one for one in said)
    assert len(said) == 4
    assert len(world.asked) == ASKED
    # It comes back, and then one that is silent is so by itself.
    world.up = {A, B, C, D}
    assert await failing(opinion, A) is None


async def test_a_host_that_cannot_even_ask_is_away_itself(autojump_clock: MockClock) -> None:
    async def no_way(url: str) -> Fetched:
        raise OSError("no route")

    opinion = SecondOpinion(no_way, is_near=lambda host: False)
    assert await opinion.blames_host(A, silent(), 0.0, ALL, 5) is not None


async def test_too_few_others_tell_nothing_and_what_is_down_is_no_other(autojump_clock: MockClock) -> None:
    world = World()
    assert await failing(world.opinion(), A, (A, B, NEAR)) is None
    opinion = world.opinion()
    world.up = {C}
    assert await failing(opinion, A, (A, B, C)) is None
    world.up = set()
    assert await failing(opinion, B, (A, B, C)) is None
    opinion.heard(A, OK)
    opinion.heard(B, OK)
    await trio.sleep(30)
    assert await failing(opinion, B, (A, B, C)) is not None


async def test_with_too_few_others_this_hosts_own_way_to_the_agent_decides(autojump_clock: MockClock) -> None:
    world = World(away="the gateway does not answer")
    opinion = world.opinion()
    for others in ((A,), (A, B, NEAR)):
        assert await failing(opinion, A, others) == "the gateway does not answer"
    assert await failing(opinion, NEAR, (NEAR,)) is None
    assert world.looked_at == ["10.0.0.1", "10.0.0.1"]
    # A single other that answers is enough to know better.
    opinion.heard(B, OK)
    assert await opinion.blames_host(A, silent(), 0.0, (A, B), 5) is None
    await trio.sleep(1)
    assert await failing(opinion, A, ALL) is not None
    assert len(world.looked_at) == 2


async def test_a_way_that_was_good_is_not_looked_at_at_every_probe_of_what_is_down(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World()
    opinion = world.opinion()
    # Within the first minute the kernel may still hold for present what is away: five looks of 9 s, each after 5 s.
    for _ in range(30):
        assert await failing(opinion, A, (A,)) is None
    looks = len(world.looked_at)
    assert 6 <= looks <= 8
    # What answers again and falls silent anew is a new case.
    opinion.heard(A, OK)
    world.away = "the gateway does not answer"
    for _ in range(3):
        assert await failing(opinion, A, (A,)) == world.away
    assert len(world.looked_at) == looks + 3
    world.away = None
    monkeypatch.setattr(second_opinion, "REMEMBERED", 1)
    for url in (A, B, A):
        assert await failing(opinion, url, (url,)) is None
    assert len(world.looked_at) == looks + 6


async def test_what_comes_in_time_from_the_agent_itself_tells_nothing(autojump_clock: MockClock) -> None:
    """Two ports of one machine are one machine."""
    world = World()
    opinion = world.opinion()
    started_s = trio.current_time()
    opinion.heard(A, OK)
    assert await opinion.blames_host("http://10.0.0.1:1", silent(), started_s, ALL, 5) is not None


async def test_loopback_and_failures_that_leave_no_doubt_are_the_agents(autojump_clock: MockClock) -> None:
    opinion = World().opinion()
    assert await failing(opinion, NEAR) is None
    assert await opinion.blames_host(A, REFUSED, 0.0, ALL, 5) is None
    opinion.heard(A, FetchFailed("dns", "no such name"))
    opinion.heard(A, silent())
    assert not opinion._reached_s


async def test_a_resolver_that_answers_for_nobody_is_this_hosts(autojump_clock: MockClock) -> None:
    world = World(names={"near.test", "short"})
    opinion = world.opinion()
    names = tuple(f"http://{name}:1" for name in ("a.test", "b.test", "c.test", "near.test", "short", "10.0.0.1"))

    async def failing_name(url: str) -> str | None:
        started_s = trio.current_time()
        return await opinion.blames_host(url, silent("resolver"), started_s, names, 5)

    assert "answers for no other name" in str(await failing_name(names[0]))
    assert sorted(world.asked) == ["b.test", "c.test"]
    started_s = trio.current_time() - 6
    assert await opinion.blames_host(names[1], silent("resolver"), started_s, names, 5) is not None
    assert len(world.asked) == 2
    await trio.sleep(30)
    world.names.add("c.test")
    assert await failing_name(names[0]) is None
    assert await failing_name("http://alone:1") is None
    world.names.clear()
    assert "no resolver answers" in str(
        await opinion.blames_host("http://alone:1", silent("resolver"), trio.current_time(), (), 5)
    )


async def test_what_is_remembered_is_bounded(autojump_clock: MockClock) -> None:
    opinion = World().opinion()
    for number in range(second_opinion.REMEMBERED + 5):
        opinion.heard(f"http://h{number}:1", OK)
    assert len(opinion._reached_s) == second_opinion.REMEMBERED
    assert len(opinion._near) == 5
