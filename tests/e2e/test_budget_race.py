"""A thousand at once for three budgets and a chain of three: what there is is handed out to the last bit, once."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import httpx2
import pytest
import trio

from tests.e2e.daemon import QUICK, Daemon, check_problem, every_page, running, until
from tests.e2e.tokens import Party, jti_of

pytestmark = pytest.mark.load

ASKERS = 1_000
# What one asks for, and for how many there is enough.
USD, TOKENS = Decimal("0.01"), 10
LIMIT = 400
# More than a hundred and fifty of them need to ask.
LAPSE_S = 5
ROOT, MID, LEAF = (Party(name) for name in ("root", "mid", "leaf"))
DESK = "urn:asap:agent:desk"
_numbers = itertools.count(1)


def noon() -> str:
    """A time zone in which no day ends while a test runs."""
    return f"Etc/GMT{datetime.now(UTC).hour - 12:+d}"


def config(tightest: str) -> str:
    """Three budgets, of dollars, tokens and tasks, each with room for more than `LIMIT` but the one that is named."""
    room = {name: LIMIT + (0 if name == tightest else 200) for name in ("agent", "consumer", "project")}
    rows = (
        ("agent", f'agent = "{LEAF.urn}"', "day", f"hard_usd = {room['agent'] * USD}"),
        ("consumer", f'consumer = "{DESK}"', "week", f"hard_tokens = {room['consumer'] * TOKENS}"),
        ("project", 'project = "apollo"', "month", f"hard_tasks = {room['project']}"),
    )
    budgets = "".join(
        f'[[budget]]\nname = "{name}"\nmatch = {{ {match} }}\nperiod = "{period}"\ntimezone = "{noon()}"\n{limit}\n'
        for name, match, period, limit in rows
    )
    pinned = "".join(
        f'[[agents]]\nid = "{party.urn}"\nurl = "http://127.0.0.1:9"\npublic_key = "{party.public_key}"\n'
        for party in (ROOT, MID, LEAF)
    )
    return QUICK + f'[delegation]\nroots = ["{ROOT.urn}"]\n' + budgets + pinned


class Race:
    """One chain of delegations, and the doors by which it is asked."""

    def __init__(self, daemon: Daemon, doors: list[httpx2.AsyncClient], tightest: str) -> None:
        self.daemon = daemon
        self.tcp, self.socket = doors
        least = LIMIT * USD if tightest == "chain" else (LIMIT + 20) * USD
        root = ROOT.grant(MID, usd=100, tasks=10 * ASKERS)
        middle = MID.grant(LEAF, usd=float(least), parent=root)
        # The third link goes from the agent to itself.
        self.token = LEAF.grant(LEAF, usd=float(least), parent=middle)
        self.chain = {jti_of(token): usd for token, usd in ((root, 100), (middle, least), (self.token, least))}
        self.outcomes: Counter[str] = Counter()
        self.held: list[str] = []
        self.expires: list[datetime] = []

    async def ask(self, ttl_s: int = 60) -> str | None:
        """One authorisation by either door; the reservation, if it is allowed."""
        number = next(_numbers)
        body = {
            "token": self.token,
            "task_id": f"task-{number}",
            "consumer": DESK,
            "project": "apollo",
            "estimate": {"cost_usd": str(USD), "tokens": TOKENS},
            "ttl_seconds": ttl_s,
        }
        answer = await (self.tcp, self.socket)[number % 2].post("/delegations/authorize", json=body)
        if answer.status_code != 200:
            denied = check_problem(answer, 403, answer.json()["code"])
            assert denied["decision"] == "deny"
            self.outcomes[denied["code"]] += 1
            return None
        allowed = answer.json()
        assert allowed["decision"] == "allow"
        self.outcomes["allow"] += 1
        self.expires.append(datetime.fromisoformat(allowed["reservation"]["expires_at"]))
        found: str = allowed["reservation"]["id"]
        self.held.append(found)
        return found

    async def all_ask(self, count: int = ASKERS, *, ttl_s: int = 60) -> Counter[str]:
        """So many at once, watched all the while for a limit that is passed."""
        self.outcomes.clear()
        async with trio.open_nursery() as watching:
            watching.start_soon(self._watch)
            async with trio.open_nursery() as asking:
                for _ in range(count):
                    asking.start_soon(self.ask, ttl_s)
            watching.cancel_scope.cancel()
        return Counter(self.outcomes)

    async def _watch(self) -> None:
        while True:
            await self.check_limits()
            await trio.sleep(0.2)

    async def check_limits(self) -> None:
        """No budget and no delegation has given out more than it has."""
        for row in await every_page(self.tcp, "/budgets"):
            for unit, limit in row["hard"].items():
                assert limit is None or row["spent"][unit] + row["reserved"][unit] <= limit, row
        for row in await every_page(self.tcp, "/delegations"):
            assert row["spent_usd"] + row["reserved_usd"] <= self.chain[row["id"]], row

    async def check_given(self, *, spent: Decimal, reserved: Decimal) -> None:
        """Delegations and budgets all have given the same, since everything matched them all."""
        for row in await every_page(self.tcp, "/delegations"):
            assert (row["spent_usd"], row["reserved_usd"]) == (spent, reserved), row
        (row,) = [row for row in await every_page(self.tcp, "/budgets") if row["name"] == "agent"]
        assert (row["spent"]["usd"], row["reserved"]["usd"]) == (spent, reserved), row

    async def close(self, reservation: str, settle: dict[str, Any] | None) -> None:
        """Settles, or releases."""
        path = f"/reservations/{reservation}"
        answer = await (self.tcp.delete(path) if settle is None else self.socket.post(f"{path}/settle", json=settle))
        assert answer.status_code == 200, answer.text
        self.held.remove(reservation)


@contextlib.asynccontextmanager
async def race_for(tightest: str) -> AsyncIterator[Race]:
    limits = httpx2.Limits(max_connections=ASKERS // 2, max_keepalive_connections=100)
    with running(config(tightest)) as daemon:
        transport = httpx2.AsyncHTTPTransport(uds=str(daemon.runtime_dir / "ingest.sock"), verify=False, limits=limits)
        async with (
            daemon.client(limits=limits) as tcp,
            httpx2.AsyncClient(transport=transport, base_url="http://asapd", timeout=60) as local,
        ):
            yield Race(daemon, [tcp, local], tightest)


@pytest.mark.parametrize(
    ("tightest", "code"),
    [
        ("agent", "budget_exhausted"),
        ("consumer", "budget_exhausted"),
        ("project", "task_limit"),
        ("chain", "budget_exhausted"),
    ],
)
async def test_a_thousand_at_once_get_exactly_what_the_tightest_of_all_has(tightest: str, code: str) -> None:
    async with race_for(tightest) as race:
        assert await race.all_ask() == {"allow": LIMIT, code: ASKERS - LIMIT}
        await race.check_given(spent=Decimal(0), reserved=LIMIT * USD)


async def test_nobody_is_refused_for_what_was_given_back_or_has_lapsed() -> None:
    async with race_for("agent") as race:
        await race.all_ask(LIMIT + 10)
        # A hundred each: spent as it was held, spent by half, given back; a hundred are kept.
        async with trio.open_nursery() as nursery:
            for number, reservation in enumerate(race.held[:300]):
                how = (
                    {"cost_usd": str(USD), "tokens": TOKENS},
                    {"cost_usd": str(USD / 2), "tokens": TOKENS // 2},
                    None,
                )[number % 3]
                nursery.start_soon(race.close, reservation, how)
        spent, kept = 150 * USD, 100
        await race.check_given(spent=spent, reserved=kept * USD)
        left = LIMIT - 150 - kept
        # What is left is given out again, for a few seconds. Those over, not one is refused any longer.
        race.expires.clear()
        began_s = trio.current_time()
        outcomes = await race.all_ask(left + 10, ttl_s=LAPSE_S)
        # On a machine so busy that the first lapse while the last still ask, more of them get something.
        assert outcomes == {"allow": left, "budget_exhausted": 10} or trio.current_time() - began_s >= LAPSE_S
        await trio.sleep(max(0.0, (max(race.expires) - datetime.now(UTC)).total_seconds()) + 0.01)
        assert await race.all_ask(400) == {"allow": left, "budget_exhausted": 400 - left}
        await race.check_given(spent=spent, reserved=(kept + left) * USD)


async def test_while_some_let_go_others_get_just_that_and_a_kill_gives_nothing_twice() -> None:
    async with race_for("agent") as race:
        await race.all_ask(LIMIT + 10)
        assert len(race.held) == LIMIT
        async with trio.open_nursery() as nursery:
            for number, reservation in enumerate(race.held[:200]):
                nursery.start_soon(
                    race.close, reservation, {"cost_usd": str(USD), "tokens": TOKENS} if number < 50 else None
                )
            nursery.start_soon(race.all_ask, 400)

        async def is_refused() -> bool:
            return await race.ask() is None

        # Some asked before anything was let go. Now it is there, to the last.
        await until(is_refused)
        assert len(race.held) == LIMIT - 50
        await race.check_given(spent=50 * USD, reserved=(LIMIT - 50) * USD)
        for reservation in race.held[:30]:
            await race.close(reservation, None)
        await trio.to_thread.run_sync(race.daemon.kill)
        await trio.to_thread.run_sync(race.daemon.start)
        race.tcp.base_url = race.daemon.url
        assert await race.all_ask(300) == {"allow": 30, "budget_exhausted": 270}
        await race.check_given(spent=50 * USD, reserved=(LIMIT - 50) * USD)
        assert (await race.tcp.get("/audit/verify")).json()["valid"] is True
