"""A thousand authorisations at once over a forest of delegations: exact, replayable, nothing overspent, kill or not."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import apsw
import pytest
import trio

from asapd.core.ledger import Estimate
from asapd.core.types import SECOND_US
from asapd.store import audit, verifying
from asapd.store.units.delegations import NewDelegation, ReleaseReservation, Reserve, Reserved, SettleReservation
from asapd.store.units.exchange import AnyUnit, Envelope
from asapd.store.writer import Writer, open_for_writing
from asapd.wire.token import decode, lineage
from tests.e2e.daemon import PATIENCE_S, QUICK, Daemon, running, until
from tests.e2e.tokens import Party, jti_of

pytestmark = pytest.mark.load

ASKED = 1_000
CENT = 10_000
ROOT = Party("root")
PARTIES = [Party(f"party-{number}") for number in range(6)]

CONFIG = (
    QUICK
    + f'[delegation]\nroots = ["{ROOT.urn}"]\nreservation_ttl = "10m"\n'
    + "".join(
        f'[[agents]]\nid = "{party.urn}"\nurl = "http://127.0.0.1:9"\npublic_key = "{party.public_key}"\n'
        for party in (ROOT, *PARTIES)
    )
)


@dataclass
class Node:
    """A delegation of the forest: its limits in cents and tasks, None being none."""

    token: str
    delegate: Party
    parent: Node | None
    cents: int | None
    tasks: int | None
    reserved: int = 0
    spent: int = 0
    known: set[str] = field(default_factory=set)

    @property
    def path(self) -> list[Node]:
        return [self, *(self.parent.path if self.parent is not None else [])]

    @property
    def depth(self) -> int:
        return len(self.path)

    @property
    def id(self) -> str:
        return jti_of(self.token)


def plant(chance: random.Random) -> list[Node]:
    """Forty delegations under three roots, up to five deep; each limit at most that of whoever gave it."""
    nodes: list[Node] = []
    while len(nodes) < 40:
        above = [node for node in nodes if node.depth < 5]
        parent = None if len(nodes) < 3 else chance.choice(above)
        cents, tasks = chance.choice((None, 400, 900, 2_000)), chance.choice((None, None, 10, 40))
        if parent is None:
            cents, tasks = 3_000, 150
        for given in [] if parent is None else parent.path:
            cents = given.cents if cents is not None and given.cents is not None and given.cents < cents else cents
            tasks = given.tasks if tasks is not None and given.tasks is not None and given.tasks < tasks else tasks
        holders = [] if parent is None else [node.delegate for node in parent.path]
        delegate = chance.choice([party for party in PARTIES if party not in holders])
        issuer = ROOT if parent is None else parent.delegate
        usd = None if cents is None else cents / 100
        token = issuer.grant(delegate, usd=usd, tasks=tasks, parent=None if parent is None else parent.token)
        nodes.append(Node(token, delegate, parent, cents, tasks))
    return nodes


@dataclass
class Wish:
    """One authorisation that is asked for, and what came of it."""

    number: int
    node: Node
    task: str
    cents: int
    tasks: int
    status: int = 0
    answer: Any = None
    end: str = ""
    settled_cents: int = 0

    @property
    def reservation(self) -> str:
        found: str = self.answer["reservation"]["id"]
        return found


class Killer:
    """Does something when so many answers came."""

    def __init__(self, daemon: Daemon, what: str | None, after: int) -> None:
        self.daemon, self.what, self.left = daemon, what, after

    def count(self) -> None:
        self.left -= 1
        if self.left == 0 and self.what == "daemon":
            self.daemon.kill()
            self.daemon.start()
        elif self.left == 0 and self.what == "writer":
            self.daemon.kill_writer()


async def send(daemon: Daemon, method: str, path: str, body: Any, key: str) -> tuple[int, Any]:
    """One request on a connection of its own over the ingest socket, again until it is answered."""
    raw = json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: asapd\r\nIdempotency-Key: {key}\r\nContent-Length: {len(raw)}\r\n"
    head += "Connection: close\r\nContent-Type: application/json\r\n\r\n"
    with trio.fail_after(PATIENCE_S):
        while True:
            received = b""
            try:
                async with await trio.open_unix_socket(daemon.runtime_dir / "ingest.sock") as stream:
                    await stream.send_all(head.encode() + raw)
                    async for chunk in stream:
                        received += chunk
            except (OSError, trio.BrokenResourceError):
                received = b""
            before, found, document = received.partition(b"\r\n\r\n")
            if found and not before.startswith(b"HTTP/1.1 503"):
                length = next(line for line in before.split(b"\r\n") if line.lower().startswith(b"content-length:"))
                if len(document) == int(length.partition(b":")[2]):
                    return int(before.split(b" ", 2)[1]), json.loads(document, parse_float=Decimal)
            await trio.sleep(0.05)


async def ask_all(daemon: Daemon, wishes: list[Wish], killer: Killer) -> None:
    async def ask(wish: Wish) -> None:
        estimate = {"cost_usd": wish.cents / 100, "tasks": wish.tasks}
        body = {"token": wish.node.token, "task_id": wish.task, "estimate": estimate}
        key = f"ask-{wish.number}"
        wish.status, wish.answer = await send(daemon, "POST", "/delegations/authorize", body, key)
        killer.count()

    async with trio.open_nursery() as nursery:
        for wish in wishes:
            nursery.start_soon(ask, wish)


async def end_all(daemon: Daemon, wishes: list[Wish], killer: Killer) -> None:
    """Settle, also above the estimate, or release, all at once."""

    async def end(wish: Wish) -> None:
        path = f"/reservations/{wish.reservation}"
        if wish.end == "settled":
            body = {"cost_usd": wish.settled_cents / 100}
            status, answer = await send(daemon, "POST", f"{path}/settle", body, f"end-{wish.number}")
        else:
            status, answer = await send(daemon, "DELETE", path, None, "none")
        assert (status, answer["state"], answer["reason"]) == (200, wish.end, wish.end), answer
        killer.count()

    async with trio.open_nursery() as nursery:
        for wish in wishes:
            if wish.end:
                nursery.start_soon(end, wish)


# --- what has to be there


@contextmanager
def read_only(daemon: Daemon) -> Iterator[apsw.Connection]:
    connection = apsw.Connection(str(daemon.state_dir / "asapd.db"), flags=apsw.SQLITE_OPEN_READONLY)
    connection.set_busy_timeout(5_000)
    try:
        yield connection
    finally:
        connection.close()


def counters(connection: apsw.Connection) -> dict[str, tuple[int, ...]]:
    """Spent, reserved, tasks used, tasks reserved."""
    rows = connection.execute(
        "SELECT id, spent_microusd, reserved_microusd, tasks_used, tasks_reserved FROM delegation"
    ).fetchall()
    return {name: tuple(rest) for name, *rest in rows}


def expected(nodes: list[Node], wishes: list[Wish]) -> dict[str, tuple[int, ...]]:
    """The same, summed up from what the clients were told."""
    found = {}
    for node in nodes:
        under = [wish for wish in wishes if wish.status == 200 and node in wish.node.path]
        held = [wish for wish in under if not wish.end]
        tasks = {wish.task for wish in under if wish.end in {"", "settled"}}
        found[node.id] = (
            sum(wish.settled_cents for wish in under if wish.end == "settled") * CENT,
            sum(wish.cents for wish in held) * CENT,
            len(tasks),
            sum(wish.tasks - 1 for wish in held),
        )
    return found


def check_limits(nodes: list[Node], found: dict[str, tuple[int, ...]]) -> None:
    for node in nodes:
        _, reserved, tasks_used, tasks_reserved = found[node.id]
        assert node.cents is None or reserved <= node.cents * CENT
        assert node.tasks is None or tasks_used + tasks_reserved <= node.tasks


def check_denials(wishes: list[Wish], found: dict[str, tuple[int, ...]]) -> None:
    """Nothing was given back meanwhile, so what was too much once is too much still: nobody was refused in vain."""
    taken = {wish.task: {node.id for node in wish.node.path} for wish in wishes if wish.status == 200}
    for wish in wishes:
        if wish.status != 200:
            assert wish.status == 403, wish.answer
            assert wish.answer["code"] in {"task_limit", "budget_exhausted", "insufficient_budget"}
            assert any(
                (node.cents is not None and found[node.id][1] + wish.cents * CENT > node.cents * CENT)
                or (node.cents is not None and found[node.id][1] >= node.cents * CENT)
                or (
                    node.tasks is not None
                    and sum(found[node.id][2:]) + wish.tasks - (node.id in taken.get(wish.task, ())) > node.tasks
                )
                for node in wish.node.path
            ), wish.answer


def replay(daemon: Daemon, path: Path) -> dict[str, tuple[int, ...]]:
    """Run the units that the audit log tells of on an empty store, one by one in their order; its counters."""
    with read_only(daemon) as source:
        assert verifying.report(source, verifying.Request()).is_valid
        tokens = dict(source.execute("SELECT id, token FROM delegation").fetchall())
        entries = audit.list_entries(source, audit.AuditFilter(), 100_000, 0, descending=False)
    connection = open_for_writing(path, synchronous="off")
    writer = Writer(connection)
    now_us = max(decode(token).claims.issued_at_us for token in tokens.values()) + SECOND_US
    ids: dict[str, str] = {}
    for number, entry in enumerate(entries):
        details = entry["details"]
        match entry["event_type"]:
            case "reservation.created":
                chain = [
                    NewDelegation(one.claims, one.text, one.digest)
                    for one in lineage(decode(tokens[details["delegation"]]))
                ]
                estimate = Estimate(details["cost_microusd"], details["tasks"], details["tokens"])
                unit: AnyUnit = Reserve(
                    details["task_id"], details["action"], estimate, 600 * SECOND_US, "x", "default", now_us, chain
                )
                result = writer.run([Envelope(number, unit, True)])[0].result
                assert isinstance(result, Reserved), "whatever was allowed is allowed again in that order"
                ids[details["id"]] = result.reservation
            case "reservation.settled":
                unit = SettleReservation(ids[details["id"]], details["used_microusd"], "x", now_us)
                assert writer.run([Envelope(number, unit, True)])[0].result.state == "settled"  # type: ignore[union-attr]
            case "reservation.released":
                unit = ReleaseReservation(ids[details["id"]], "x", now_us)
                assert writer.run([Envelope(number, unit, True)])[0].result.state == "released"  # type: ignore[union-attr]
    found = counters(connection)
    connection.close()
    return found


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with running(CONFIG) as started:
        yield started


@pytest.mark.parametrize(("killed", "seed"), [(None, 1), ("writer", 2), ("daemon", 3)])
async def test_a_thousand_at_once_get_exactly_what_the_forest_has(
    daemon: Daemon, tmp_path: Path, killed: str | None, seed: int
) -> None:
    chance = random.Random(seed)
    nodes = plant(chance)
    wishes = [
        Wish(
            number,
            chance.choice(nodes),
            f"task-{chance.randrange(300)}",
            chance.randrange(1, 60),
            1 + (chance.random() < 0.1),
        )
        for number in range(ASKED)
    ]
    await ask_all(daemon, wishes, Killer(daemon, killed, ASKED // 3))
    allowed = [wish for wish in wishes if wish.status == 200]
    assert len(allowed) > 50
    assert len(allowed) < ASKED - 50
    with read_only(daemon) as connection:
        found = counters(connection)
        stored = {row[0] for row in connection.execute("SELECT id FROM reservation")}
    assert stored == {wish.reservation for wish in allowed}, "each is there once, and none that nobody was told of"
    told = expected(nodes, wishes)
    assert found == {name: told[name] for name in found}
    check_limits([node for node in nodes if node.id in found], found)
    check_denials(wishes, {**told, **found})

    for wish in allowed:
        wish.end = chance.choice(("", "settled", "released"))
        wish.settled_cents = chance.randrange(0, 2 * wish.cents)
    ended = sum(bool(wish.end) for wish in allowed)
    await end_all(daemon, wishes, Killer(daemon, killed, ended // 2))
    daemon.stop()
    told = expected(nodes, wishes)
    with read_only(daemon) as connection:
        found = counters(connection)
        ends = dict(connection.execute("SELECT id, coalesce(reason, '') FROM reservation").fetchall())
    assert found == {name: told[name] for name in found}
    assert ends == {wish.reservation: wish.end for wish in allowed}
    again = replay(daemon, tmp_path / "again.db")
    assert again == {name: found[name] for name in again}


async def test_what_lapsed_while_nobody_served_is_found_at_the_start(daemon: Daemon) -> None:
    token = ROOT.grant(PARTIES[0], usd=10)
    wanted = {"token": token, "task_id": "t", "estimate": {"cost_usd": 4}}
    (_, short), (_, long) = [
        await send(daemon, "POST", "/delegations/authorize", {**wanted, "ttl_seconds": ttl_s}, f"k{ttl_s}")
        for ttl_s in (1, 600)
    ]
    daemon.kill()
    ends = datetime.fromisoformat(short["reservation"]["expires_at"]).timestamp()

    async def is_over() -> bool:
        await trio.lowlevel.checkpoint()
        return time.time() > ends

    await until(is_over)
    daemon.start()
    async with daemon.client() as client:
        ended = (await client.get(f"/reservations/{short['reservation']['id']}")).json()
        assert (ended["state"], ended["reason"], ended["held_usd"]) == ("expired", "recovered", 0)
        stands = (await client.get(f"/reservations/{long['reservation']['id']}")).json()
        assert (stands["state"], stands["reason"], stands["held_usd"]) == ("open", None, 4)
        noted = (await client.get("/audit/logs", params={"event_type": "reservation.expired"})).json()["data"]
        assert [entry["details"]["reason"] for entry in noted] == ["recovered"]
        shown = (await client.get(f"/delegations/{jti_of(token)}")).json()
        assert (shown["reserved_usd"], shown["remaining"]["cost_usd"]) == (4, 6)
