"""A second opinion: whether a probe that failed in silence says something of the agent, or of this host.

Nothing came back, or no resolver answered. When that is so of every other machine that can be compared as well, at the
same time, it is this host's resolver or network that is away, and nobody knows how the agents are. Where too few can be
compared, what the kernel says of this host's own way to the agent decides.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from urllib.parse import urlsplit

import trio

from asapd.runtime.fetch import Doubt, Fetched, FetchFailed
from asapd.runtime.lookup import is_address, is_answered, is_own
from asapd.runtime.own_network import why_away

ASKED = 3
"""Others that are asked at once, those that answered last first."""
LEAST_OTHERS = 2
"""Fewer silent machines besides the agent's may as well be down themselves."""
WAY_HOLDS_S = 60.0
"""To look at this host's own way takes longer than a probe holds where intervals are short: what is down would be
unknown for most of the time. So a way that is good after so long a silence, in which the kernel has given up what is
away, is taken for good for as long again."""
REMEMBERED = 10_000
"""Machines, some hundred bytes each: more than one host's agents are on."""

Ask = Callable[[str], Awaitable[Fetched | FetchFailed]]


class SecondOpinion:
    """What is known of the machines of agents, by the hosts in their addresses. `ask` makes a probe of an address."""

    def __init__(
        self,
        ask: Ask,
        *,
        resolves: Callable[[str, float], Awaitable[bool]] = is_answered,
        is_near: Callable[[str], bool] = is_own,
        own_way: Callable[[str], Awaitable[str | None]] = why_away,
    ) -> None:
        self._ask = ask
        self._resolves = resolves
        self._own_way = own_way
        self._find_near = is_near
        self._near: dict[str, bool] = {}
        self._reached_s: dict[str, float] = {}
        """When something last came back from a machine, the latest last."""
        self._down: set[str] = set()
        self._way_look_s: dict[str, tuple[float, float]] = {}
        """Of a machine that is silent, since when, and from when on this host's own way to it is looked at again."""
        self._asking = trio.Lock()
        self._silent_s: dict[Doubt, float] = {}
        """When the last comparison began that found that nobody answers."""

    def heard(self, url: str, answer: Fetched | FetchFailed) -> None:
        """Note that something came back from an agent, if it did."""
        host = _host(url)
        came = isinstance(answer, Fetched) or (answer.doubt is None and answer.reason not in ("dns", "not_allowed"))
        if not came or self._is_near(host):
            return
        self._reached_s.pop(host, None)
        self._reached_s[host] = trio.current_time()
        self._down.discard(host)
        self._way_look_s.pop(host, None)
        if len(self._reached_s) > REMEMBERED:
            del self._reached_s[next(iter(self._reached_s))]

    async def blames_host(
        self, url: str, failed: FetchFailed, started_s: float, others: Iterable[str], deadline_s: float
    ) -> str | None:
        """Why a failed probe says nothing of the agent; None when it does.

        `others` are the addresses of all agents that are probed, and `started_s` is when this probe began.
        """
        host = _host(url)
        match failed.doubt:
            case "network" if not self._is_near(host):
                blamed = await self._compare_reach(host, started_s, others)
                if blamed is None:
                    self._down.add(host)
                return blamed
            case "resolver":
                return await self._compare_names(host, started_s, others, deadline_s)
            case _:
                return None

    async def _compare_reach(self, mine: str, started_s: float, others: Iterable[str]) -> str | None:
        """What of this host is away; None when somebody else is not silent, or nothing tells."""
        if self._is_any_reached(mine, started_s):
            return None
        known = {_host(other): other for other in others}
        wanted = [host for host in known if host != mine and host not in self._down and not self._is_near(host)]
        if len(wanted) < LEAST_OTHERS:
            return await self._why_away(mine)
        asked = self._latest_first(wanted)[:ASKED]
        async with self._asking:
            if not self._was_silent("network", started_s) and not self._is_any_reached(mine, started_s):
                begun_s = trio.current_time()
                async with trio.open_nursery() as nursery:
                    for host in asked:
                        nursery.start_soon(self._reach, known[host])
                if not self._is_any_reached(mine, started_s):
                    self._silent_s["network"] = begun_s
        if self._is_any_reached(mine, started_s):
            return None
        return f"this host reaches no other machine either, {', '.join(asked)} among them"

    async def _why_away(self, mine: str) -> str | None:
        if mine not in self._way_look_s and len(self._way_look_s) >= REMEMBERED:
            self._way_look_s.clear()
        since_s, next_s = self._way_look_s.setdefault(mine, (trio.current_time(), 0.0))
        if trio.current_time() < next_s:
            return None
        begun_s, blamed = trio.current_time(), await self._own_way(mine)
        if blamed is None and begun_s - since_s >= WAY_HOLDS_S:
            self._way_look_s[mine] = since_s, trio.current_time() + WAY_HOLDS_S
        return blamed

    async def _reach(self, url: str) -> None:
        # What this host itself cannot do is no answer either.
        with suppress(OSError):
            self.heard(url, await self._ask(url))

    async def _compare_names(self, mine: str, started_s: float, others: Iterable[str], deadline_s: float) -> str | None:
        # Names without a dot are often answered by something else than names with one.
        alike = {host for host in map(_host, others) if host != mine and ("." in host) == ("." in mine)}
        names = self._latest_first(host for host in alike if not is_address(host) and not self._is_near(host))
        if not names:
            return "no resolver answers this host"
        async with self._asking:
            if not self._was_silent("resolver", started_s):
                begun_s = trio.current_time()
                answers: list[bool] = []

                async def look_up(name: str) -> None:
                    answers.append(await self._resolves(name, deadline_s))

                async with trio.open_nursery() as nursery:
                    for name in names[:ASKED]:
                        nursery.start_soon(look_up, name)
                if any(answers):
                    return None
                self._silent_s["resolver"] = begun_s
        return "the resolver of this host answers for no other name either"

    def _is_near(self, host: str) -> bool:
        """Whether no network is needed for it, as it was when first asked."""
        near = self._near.get(host)
        if near is None:
            if len(self._near) >= REMEMBERED:
                self._near.clear()
            near = self._near[host] = self._find_near(host)
        return near

    def _is_any_reached(self, mine: str, since_s: float) -> bool:
        latest = next((host for host in reversed(self._reached_s) if host != mine), None)
        return latest is not None and self._reached_s[latest] >= since_s

    def _latest_first(self, hosts: Iterable[str]) -> list[str]:
        return sorted(hosts, key=lambda host: (-self._reached_s.get(host, 0.0), host))

    def _was_silent(self, doubt: Doubt, since_s: float) -> bool:
        return self._silent_s.get(doubt, -1.0) >= since_s


def _host(url: str) -> str:
    return (urlsplit(url).hostname or "").lower()
