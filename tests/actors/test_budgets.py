"""Budgets through the registry: what a thousand ask for at once, and what a new configuration does."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import apsw
import pytest
import trio
from nacl.signing import SigningKey

from asapd import config
from asapd.actors.budgets import BudgetsNotSyncedError
from asapd.actors.messages import Authorize, ChangeReservation, ReconfigureRegistry, RegistryMessage
from asapd.actors.registry import RegistrySettings, run_registry
from asapd.core.access import Caller
from asapd.core.delegation import Claims, Denied
from asapd.core.errors import Refusal
from asapd.core.ledger import Estimate
from asapd.core.types import DAY_US, HOUR_US, SECOND_US, Role
from asapd.runtime.ask import ask
from asapd.runtime.fanout import Wakeup
from asapd.store.budget_queries import get_budget
from asapd.store.budgets import read_rules
from asapd.store.database import WRITER_AWAY, Database, InlineReaders, InlineRunner
from asapd.store.units.delegations import AuthorizationDenied, Reserved, SettleReservation
from asapd.store.units.exchange import Answer, AnyUnit, Idempotency
from asapd.store.visibility import EVERYTHING
from asapd.store.writer import Writer
from asapd.wire.token import sign

A, B, C, D = (f"urn:asap:agent:{letter}" for letter in "abcd")
KEYS = {agent: SigningKey(bytes([number]) * 32) for number, agent in enumerate((A, B, C, D), 1)}
T0 = 1_800_000_000 * SECOND_US
ADMIN = Caller("admin", Role.ADMIN, may_sign=True)
USD = 1_000_000
log = logging.getLogger("test.budgets")


class SetClock:
    us = T0

    def now_us(self) -> int:
        return self.us

    def monotonic_s(self) -> float:
        return trio.current_time()


def chain() -> str:
    """Three delegations deep, without limits of their own."""
    text = None
    for jti, delegator, delegate in (("root", A, B), ("child", B, C), ("leaf", C, D)):
        claims = Claims(jti, delegator, delegate, ("task.*",), None, None, T0, T0 + 30 * DAY_US)
        text = sign(claims, KEYS[delegator], parent=text)
    assert text is not None
    return text


def budget(name: str, **said: Any) -> config.Budget:
    return config.Budget.model_validate({"name": name, "period": "day", **said})


class Desk:
    """A registry that goes by budgets, and short ways to ask it."""

    def __init__(self, connection: apsw.Connection, keys_dir: Path, *budgets: config.Budget) -> None:
        self.connection = connection
        self.clock = SetClock()
        self.database = Database(InlineRunner(Writer(connection)), InlineReaders(connection))
        pinned = {agent: bytes(key.verify_key) for agent, key in KEYS.items()}
        self.settings = RegistrySettings(config.Delegation(roots=(A,)), keys_dir, pinned, budgets)
        self.send, self.receive = trio.open_memory_channel[RegistryMessage](2_000)
        self.token = chain()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        await run_registry(
            self.receive.clone(),
            database=self.database,
            clock=self.clock,
            settings=self.settings,
            directory_changed=Wakeup(),
            new_id=lambda now_us: f"del_{now_us}",
            beat=lambda: None,
            log=log,
            task_status=task_status,
        )

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Desk]:
        async with trio.open_nursery() as nursery:
            await nursery.start(self.run)
            yield self
            nursery.cancel_scope.cancel()

    async def ask(self, build: Callable[[Any], RegistryMessage]) -> Any:
        return await ask(self.send, build, deadline_s=600)

    async def authorize(self, number: int, ttl_us: int = HOUR_US) -> Any:
        estimate = Estimate(USD // 100, 1, 10)
        return await self.ask(
            lambda to: Authorize(
                ADMIN,
                self.token,
                None,
                "task.execute",
                f"t{number}",
                None,
                "desk",
                "apollo",
                estimate,
                ttl_us,
                None,
                to,
            )
        )

    async def authorize_all(self, numbers: range, **fields: Any) -> list[Any]:
        """Ask for all at once."""
        outcomes: list[Any] = []

        async def one(number: int) -> None:
            outcomes.append(await self.authorize(number, **fields))

        async with trio.open_nursery() as nursery:
            for number in numbers:
                nursery.start_soon(one, number)
        return outcomes

    async def settle(self, reservation: str, cost: int) -> Any:
        return await self.ask(
            lambda to: ChangeReservation(ADMIN, "settle", reservation, cost, None, "", None, to, tokens=7)
        )

    async def reconfigure(self, *budgets: config.Budget) -> Any:
        settings = self.settings
        return await self.ask(
            lambda to: ReconfigureRegistry(settings.delegation, settings.pinned, to, budgets, "key:x")
        )

    def show(self, name: str) -> Any:
        return get_budget(self.connection, EVERYTHING, name, self.clock.us)


def codes(outcomes: list[Any]) -> Counter[str]:
    def code(outcome: Any) -> str:
        match outcome:
            case Reserved():
                return "allowed"
            case AuthorizationDenied(denied=Denied(reason=reason)):
                return str(reason)
            case Refusal(code=said):
                return said
        raise AssertionError(outcome)

    return Counter(map(code, outcomes))


OVERLAPPING = (
    budget("all", hard_usd="7.00", soft_usd="3.00"),
    budget("desk", match={"consumer": "desk", "agent": "urn:asap:agent:*"}, period="week", hard_tokens=6_000),
    budget("root", match={"delegation": "root", "project": "apollo"}, period="month", hard_tasks=500),
)


@pytest.fixture
def connection(inline_database: tuple[Database, apsw.Connection]) -> apsw.Connection:
    return inline_database[1]


async def test_a_thousand_at_once_reach_a_hard_limit_exactly_and_never_pass_it(
    connection: apsw.Connection, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """The tightest of three overlapping budgets, all 500 tasks of it, and nothing is refused for what has lapsed."""
    async with Desk(connection, tmp_path, *OVERLAPPING).open() as desk:
        outcomes = await desk.authorize_all(range(1_000))
        assert codes(outcomes) == {"allowed": 500, "task_limit": 500}
        assert desk.show("root")["remaining"]["tasks"] == 0
        assert str(desk.show("all")["reserved"]["usd"]) == "5.0"
        assert desk.show("desk")["reserved"]["tokens"] == 5_000
        accounts = connection.execute("SELECT id, reserved_microusd FROM delegation ORDER BY account").fetchall()
        assert accounts == [("root", 5 * USD), ("child", 5 * USD), ("leaf", 5 * USD)]

        desk.clock.us += HOUR_US
        again = await desk.authorize_all(range(1_000, 2_000))
        assert codes(again) == {"allowed": 500, "task_limit": 500}

        held = [outcome.reservation for outcome in again if isinstance(outcome, Reserved)]
        for reservation in held[:200]:
            assert not isinstance(await desk.settle(reservation, USD // 100), Refusal)
        assert str(desk.show("all")["spent"]["usd"]) == "2.0"
        assert desk.show("desk")["spent"]["tokens"] == 1_400
        assert connection.execute("SELECT count(*) FROM alert").get == 0
        shown = desk.show("root")
        assert [shown[amount]["tasks"] for amount in ("spent", "reserved", "remaining")] == [200, 300, 0]

        desk.clock.us += HOUR_US
        last = await desk.authorize_all(range(2_000, 3_000))
        assert codes(last) == {"allowed": 300, "task_limit": 700}
        denied = next(outcome for outcome in last if isinstance(outcome, AuthorizationDenied))
        assert denied.shortfall is not None
        assert (denied.shortfall.budget, denied.shortfall.unit, denied.shortfall.left) == ("root", "tasks", 0)
        desk.clock.us = denied.shortfall.renews_at_us
        assert codes([await desk.authorize(3_000)]) == {"allowed": 1}


async def test_a_new_configuration_takes_effect_at_once_and_keeps_what_was_counted(
    connection: apsw.Connection, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with Desk(connection, tmp_path, budget("all", hard_usd="0.02")).open() as desk:
        assert codes(await desk.authorize_all(range(3))) == {"allowed": 2, "budget_exhausted": 1}
        assert await desk.reconfigure(budget("all", hard_usd="0.03")) == ()
        assert codes(await desk.authorize_all(range(3, 6))) == {"allowed": 1, "budget_exhausted": 2}
        assert await desk.reconfigure() == ()
        assert codes(await desk.authorize_all(range(6, 9))) == {"allowed": 3}
        assert read_rules(connection) == ()
        changes = connection.execute(
            "SELECT actor, details ->> 'added', details ->> 'changed', details ->> 'removed' FROM audit "
            "WHERE event_type = 'budgets.changed' ORDER BY seq"
        ).fetchall()
        assert changes == [
            ("asapd", '["all"]', "[]", "[]"),
            ("key:x", "[]", '["all"]', "[]"),
            ("key:x", "[]", "[]", '["all"]'),
        ]


async def test_a_budget_that_may_begin_with_too_little_is_named_in_the_log(
    connection: apsw.Connection,
    tmp_path: Path,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Desk(connection, tmp_path, budget("all", hard_usd="1")).open() as desk:
        settled = await desk.authorize(0)
        assert isinstance(settled, Reserved)
        await desk.database.submit(SettleReservation(settled.reservation, 7, "key:x", T0))
        assert await desk.reconfigure(budget("all", hard_usd="2"), budget("late", hard_usd="1")) == ()
    named = [message.partition(" may begin with less")[0] for message in caplog.messages if "may begin" in message]
    assert named == ["budget late"]


async def test_a_registry_that_starts_again_goes_by_the_newest_budgets_and_writes_nothing(
    connection: apsw.Connection, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    desk = Desk(connection, tmp_path)
    async with desk.open():
        await desk.reconfigure(budget("all", hard_usd="0.01"))
        await desk.authorize(1)
    entries = connection.execute("SELECT max(seq) FROM audit").get
    async with desk.open():
        assert connection.execute("SELECT max(seq) FROM audit").get == entries
        assert codes([await desk.authorize(2)]) == {"budget_exhausted": 1}


class Away:
    """A writer that is being restarted."""

    async def execute(self, unit: AnyUnit, *, urgent: bool, idempotency: Idempotency | None) -> Answer | Refusal:
        await trio.lowlevel.checkpoint()
        return WRITER_AWAY


async def test_without_a_writer_nothing_changes_and_the_registry_does_not_start(
    connection: apsw.Connection, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    desk = Desk(connection, tmp_path)
    async with desk.open():
        writer, desk.database._runner = desk.database._runner, Away()
        assert (await desk.reconfigure(budget("all", hard_usd="0.01"))).code == "writer_unavailable"
        desk.database._runner = writer
        assert codes([await desk.authorize(1)]) == {"allowed": 1}
        assert desk.settings.budgets == ()
    desk.settings.budgets = (budget("all", hard_usd="0.01"),)
    desk.database = Database(Away(), InlineReaders(connection))
    with pytest.raises(BudgetsNotSyncedError):
        await desk.run()
