"""The store's ledger with short names for its units, as its tests use it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from random import Random
from typing import Any

import apsw
import msgspec

from asapd.core.delegation import Claims, Denied, Reason
from asapd.core.errors import Refusal
from asapd.core.ledger import Estimate
from asapd.core.usage import FLAG_NAMES, Cost, UsageEvent
from asapd.store.units.delegations import (
    AuthorizationDenied,
    ExtendReservation,
    NewDelegation,
    Recovered,
    RecoverReservations,
    RefundReservation,
    RegisterDelegation,
    ReleaseReservation,
    Reserve,
    Reserved,
    Revoke,
    SettleReservation,
)
from asapd.store.units.exchange import AnyUnit, Envelope
from asapd.store.units.house import Sweep
from asapd.store.units.unit import NotWritten
from asapd.store.units.usage import RecordUsage, VoidUsage
from asapd.store.visibility import EVERYTHING, Visibility
from asapd.store.writer import Writer, open_for_writing

NOW_US = 1_795_169_203_000_000
HOUR_US = 3_600_000_000
USD = 1_000_000
A, B, C, D = (f"urn:asap:agent:{name}" for name in "abcd")

OpenStore = Callable[[], AbstractContextManager[apsw.Connection]]


def link(jti: str, delegator: str = A, delegate: str = B, **fields: Any) -> NewDelegation:
    claims = Claims(
        **(
            {
                "id": jti,
                "delegator": delegator,
                "delegate": delegate,
                "scopes": ("task.*",),
                "max_tasks": None,
                "max_cost_microusd": None,
                "issued_at_us": NOW_US,
                "expires_at_us": NOW_US + HOUR_US,
            }
            | fields
        )
    )
    return NewDelegation(claims, f"token of {jti}", msgspec.json.encode(claims))


ROOT = link("root", max_cost_microusd=10 * USD, max_tasks=100)
CHILD = link("child", B, C, max_cost_microusd=8 * USD)
GRANDCHILD = link("grandchild", C, D)


class Chance:
    """Bytes that are random, and the same again for a unit of the same number."""

    def __init__(self) -> None:
        self._random = Random(0)

    def begin(self, number: int) -> None:
        self._random.seed(number)

    def __call__(self, size: int) -> bytes:
        return self._random.randbytes(size)


class Ledger:
    """The store's ledger with short names for its units."""

    def __init__(self, connection: apsw.Connection) -> None:
        self.connection = connection
        self.chance = Chance()
        self.writer = Writer(connection, self.chance)
        self.now_us = NOW_US
        self.log: list[AnyUnit] = []

    def submit(self, unit: AnyUnit) -> Any:
        self.log.append(unit)
        self.chance.begin(len(self.log))
        return self.writer.run([Envelope(1, unit, True)])[0].result

    def state(self) -> dict[str, list[tuple[Any, ...]]]:
        """Everything that the ledger remembers."""
        tables = {
            "delegation": "account",
            "account_task": "account, task_id",
            "reservation": "id",
            "refund_withheld": "reservation, account",
        }
        return {
            table: self.connection.execute(f"SELECT * FROM {table} ORDER BY {key}").fetchall()
            for table, key in tables.items()
        }

    def register(self, *chain: NewDelegation, tenant: str = "default") -> Any:
        return self.submit(RegisterDelegation(list(chain), "key:x", tenant, self.now_us))

    def reserve(self, *chain: NewDelegation, **fields: Any) -> Any:
        return self.submit(self.wish(*chain, **fields))

    def wish(
        self,
        *chain: NewDelegation,
        delegation: str = "",
        task: str = "t",
        cost: int | None = USD,
        tasks: int = 1,
        ttl_us: int = HOUR_US,
        tenant: str = "default",
        action: str = "task.execute",
    ) -> Reserve:
        """An authorisation to submit."""
        return Reserve(
            task_id=task,
            action=action,
            estimate=Estimate(cost, tasks),
            ttl_us=ttl_us,
            actor="key:x",
            tenant=tenant,
            now_us=self.now_us,
            chain=list(chain),
            delegation=delegation,
        )

    def reserved(self, *chain: NewDelegation, **fields: Any) -> str:
        result = self.reserve(*chain, **fields)
        assert isinstance(result, Reserved)
        return result.reservation

    def settle(self, reservation: str, cost: int | None = None) -> Any:
        return self.submit(SettleReservation(reservation, cost, "key:x", self.now_us))

    def release(self, reservation: str) -> Any:
        return self.submit(ReleaseReservation(reservation, "key:x", self.now_us))

    def extend(self, reservation: str, ttl_us: int) -> Any:
        return self.submit(ExtendReservation(reservation, ttl_us, "key:x", self.now_us))

    def refund(self, reservation: str, cost: int, by: Visibility = EVERYTHING) -> Any:
        return self.submit(RefundReservation(reservation, cost, "faulty", "key:x", self.now_us, by))

    def revoke(self, delegation: str) -> Any:
        return self.submit(Revoke(delegation, "key:x", "why", self.now_us))

    def sweep(self, limit: int = 500) -> Any:
        return self.submit(Sweep(self.now_us, 0, 0, limit))

    def use(
        self, cost: int | None, *, tenant: str = "default", is_bound: bool | None = None, **fields: Any
    ) -> set[str]:
        """Record one event, of a caller that is bound to any tenant but the default one, and say how it was flagged."""
        is_bound = tenant != "default" if is_bound is None else is_bound
        event = UsageEvent(**({"task_id": "t", "agent": B, "consumer": A, "timestamp_us": self.now_us} | fields))
        result = self.submit(RecordUsage(tenant, "key:x", self.now_us, [event], [Cost(cost)], is_bound=is_bound))
        assert result.recorded == 1
        flags = self.connection.execute("SELECT flags FROM usage ORDER BY seq DESC LIMIT 1").get
        return {name for bit, name in FLAG_NAMES.items() if flags & bit}

    def void(self, seq: int) -> Any:
        return self.submit(VoidUsage(seq, "wrong", "key:x", self.now_us))

    def newest(self) -> int:
        """The row of the newest event."""
        return int(self.connection.execute("SELECT max(seq) FROM usage").get or 0)

    def reason_of(self, reservation: str) -> tuple[str, str | None]:
        """State and reason as stored."""
        row = self.connection.execute("SELECT state, reason FROM reservation WHERE id = ?", (reservation,)).fetchone()
        assert row is not None
        return row[0], row[1]

    def restart(self) -> int:
        """Open the file anew, as a daemon that starts does; how many reservations that found past their time."""
        path = Path(self.connection.filename)
        self.connection.close()
        self.connection = open_for_writing(path, synchronous="off")
        self.writer = Writer(self.connection, self.chance)
        recovered = Recovered(0, more=True)
        found = 0
        while recovered.more:
            recovered = self.submit(RecoverReservations(self.now_us, limit=2))
            found += recovered.reservations
        return found

    def lose(self, *units: AnyUnit) -> None:
        """Run units in a commit that does not come about."""
        self.chance.begin(-1 - len(self.log))
        self.connection.set_commit_hook(lambda: True)
        answers = self.writer.run([Envelope(number, unit, True) for number, unit in enumerate(units)])
        self.connection.set_commit_hook(None)
        assert all(isinstance(answer.result, NotWritten) for answer in answers)

    def counters(self, delegation: str) -> tuple[int, int, int, int]:
        """Spent, reserved, tasks used, tasks reserved."""
        row = self.connection.execute(
            "SELECT spent_microusd, reserved_microusd, tasks_used, tasks_reserved FROM delegation WHERE id = ?",
            (delegation,),
        ).fetchone()
        assert row is not None
        return tuple(row)


def code(result: Any) -> str:
    assert isinstance(result, Refusal)
    return result.code


def reason(result: Any) -> Reason:
    denied = result.denied if isinstance(result, AuthorizationDenied) else result
    assert isinstance(denied, Denied)
    return denied.reason
