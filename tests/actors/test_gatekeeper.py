"""API keys: what is made is found, what is revoked is gone, and looking one up tells nothing."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import apsw
import pytest
import trio
from trio.testing import MockClock

from asapd.actors import gatekeeper
from asapd.actors.gatekeeper import KEY_PREFIX, KeyRing, digest_of, run_gatekeeper
from asapd.actors.messages import CreateKeyRequest, GatekeeperMessage, Idempotency, NewKey, RevokeKeyRequest
from asapd.core.access import Caller
from asapd.core.errors import Refusal
from asapd.core.types import SECOND_US, Role
from asapd.runtime.ask import HandlerFailed, ask
from asapd.runtime.clock import TrioClock
from asapd.store.database import Database, InlineReaders
from asapd.store.units.house import ApiKey
from tests.slow_reads import giving_up

T0 = 1_800_000_000 * SECOND_US
ADMIN = Caller("admin", Role.ADMIN)
Inline = tuple[Database, apsw.Connection]


class Gate:
    def __init__(self, database: Database, ring: KeyRing, send: trio.MemorySendChannel[GatekeeperMessage]) -> None:
        self.database, self.ring, self.send = database, ring, send

    async def create(self, name: str = "n", role: str = "reader", **fields: Any) -> NewKey | Refusal:
        agents, tenant, sign = fields.get("agents", ("*",)), fields.get("tenant"), fields.get("sign", False)
        once = fields.get("idempotency")
        outcome: NewKey | Refusal = await ask(
            self.send, lambda to: CreateKeyRequest(ADMIN, name, role, agents, tenant, sign, to, once), deadline_s=5
        )
        return outcome

    async def revoke(self, key: str) -> ApiKey | Refusal:
        outcome: ApiKey | Refusal = await ask(self.send, lambda to: RevokeKeyRequest(ADMIN, key, to), deadline_s=5)
        return outcome


@asynccontextmanager
async def running(inline: Inline, seed: bytes = b"s" * 32) -> AsyncIterator[Gate]:
    database, _ = inline
    ring = KeyRing()
    numbers = count(1)
    send, receive = trio.open_memory_channel[GatekeeperMessage](10)

    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        await run_gatekeeper(
            receive,
            database=database,
            ring=ring,
            clock=TrioClock(T0),
            entropy=lambda size: next(numbers).to_bytes(size, "big"),
            seed=seed,
            beat=lambda: None,
            log=logging.getLogger("test.gatekeeper"),
            task_status=task_status,
        )

    async with trio.open_nursery() as nursery:
        await nursery.start(run)
        yield Gate(database, ring, send)
        send.close()


def made(outcome: NewKey | Refusal) -> NewKey:
    assert isinstance(outcome, NewKey)
    return outcome


async def test_a_new_key_opens_the_door_at_once_with_its_rights(
    inline_database: Inline, autojump_clock: MockClock
) -> None:
    async with running(inline_database) as gate:
        new = made(await gate.create(role="operator", agents=("a*", "b"), tenant="x", sign=True))
        assert gate.ring.find(new.secret) == Caller(f"key:{new.key.id}", Role.OPERATOR, ("a*", "b"), "x", True)
        assert new.secret not in repr(new)
        assert new.secret.rpartition("_")[2].encode() not in bytes(new.key.digest)


async def test_a_revoked_key_is_gone_from_the_reply_on(inline_database: Inline, autojump_clock: MockClock) -> None:
    async with running(inline_database) as gate:
        new, other = made(await gate.create("one")), made(await gate.create("two"))
        revoked = await gate.revoke("one")
        assert isinstance(revoked, ApiKey)
        assert revoked.revoked_us == T0
        assert gate.ring.find(new.secret) is None
        assert gate.ring.find(other.secret) is not None
        assert await gate.revoke(new.key.id) == revoked
        unknown = await gate.revoke("nobody")
        assert isinstance(unknown, Refusal)
        assert unknown.code == "key_not_found"


async def test_a_key_is_revoked_and_none_is_denied_however_slow_the_disk_is(
    inline_database: Inline, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = Idempotency(b"k" * 16, b"r" * 16, T0)
    async with running(inline_database) as gate:
        new, other = made(await gate.create("one")), made(await gate.create("two"))
        with monkeypatch.context() as patched:
            patched.setattr(InlineReaders, "run", giving_up("list_keys"))
            assert isinstance(await gate.revoke("one"), ApiKey)
            assert gate.ring.find(new.secret) is None
            assert gate.ring.find(other.secret) is not None
            for outcome in (await gate.create("three", idempotency=once), await gate.revoke("nobody")):
                assert isinstance(outcome, Refusal)
                assert outcome.code == "outcome_unknown"
        assert gate.ring.find(made(await gate.create("three", idempotency=once)).secret) is not None


async def test_the_ring_is_filled_from_the_store_at_the_start(
    inline_database: Inline, autojump_clock: MockClock
) -> None:
    async with running(inline_database) as gate:
        kept, gone = made(await gate.create("kept")), made(await gate.create("gone"))
        await gate.revoke("gone")
    async with running(inline_database) as gate:
        assert gate.ring.find(kept.secret) is not None
        assert gate.ring.find(gone.secret) is None


async def test_a_name_in_use_and_a_role_nobody_has_are_refused(
    inline_database: Inline, autojump_clock: MockClock
) -> None:
    async with running(inline_database) as gate:
        first = made(await gate.create("n"))
        taken = await gate.create("n")
        assert isinstance(taken, Refusal)
        assert taken.code == "key_name_taken"
        wrong = await gate.create("m", role="king")
        assert isinstance(wrong, Refusal)
        assert wrong.errors[0].field == "role"
        await gate.revoke(first.key.id)
        assert isinstance(await gate.create("n"), NewKey)


async def test_a_key_that_is_asked_for_again_is_made_once_and_its_secret_is_nowhere_kept(
    inline_database: Inline, autojump_clock: MockClock
) -> None:
    once, other = Idempotency(b"k" * 16, b"r" * 16, T0), Idempotency(b"K" * 16, b"r" * 16, T0)
    async with running(inline_database) as gate:
        first = made(await gate.create("n", idempotency=once))
        assert made(await gate.create("n", idempotency=once)) == first
        found = gate.ring.find(first.secret)
        assert found is not None
        assert found.actor == f"key:{first.key.id}"
        reused = await gate.create("m", idempotency=Idempotency(b"k" * 16, b"R" * 16, T0))
        assert isinstance(reused, Refusal)
        assert reused.code == "idempotency_key_reused"
        second = made(await gate.create("m", idempotency=other))
        assert second.secret.rpartition("_")[2] != first.secret.rpartition("_")[2]
        _, connection = inline_database
        kept = repr([list(connection.execute(f"SELECT * FROM {table}")) for table in ("api_key", "idempotency")])
        assert first.secret.rpartition("_")[2] not in kept
    async with running(inline_database) as gate:
        assert made(await gate.create("n", idempotency=once)) == first, "after a restart too"
    async with running(inline_database, seed=b"new" * 10) as gate:
        gone = await gate.create("n", idempotency=once)
        assert isinstance(gone, Refusal)
        assert gone.code == "key_name_taken"
        assert "former key" in gone.detail


async def test_a_handler_that_fails_is_answered_and_logged(
    inline_database: Inline, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(inline_database) as gate:
        with pytest.raises(HandlerFailed):
            await gate.create(agents=(object(),))
        assert "a CreateKeyRequest could not be handled" in caplog.text
        assert isinstance(await gate.create(), NewKey)


KEY = ApiKey("k1", "n", "admin", ["*"], None, False, digest_of("secret"), 0)


@pytest.mark.parametrize(
    "presented",
    [
        "",
        "asapd",
        "asapd_k1",
        "asapd_k1_",
        "asapd_k1_wrong",
        "asapd_k2_secret",
        "asapd__secret",
        "other_k1_secret",
        "k1_secret",
        "asapd_k1_secret_",
        "asapd_k1_secr\udcffet",
    ],
)
def test_anything_but_the_whole_key_finds_nobody(presented: str) -> None:
    ring = KeyRing()
    ring.replace([KEY])
    assert ring.find(f"{KEY_PREFIX}_k1_secret") is not None
    assert ring.find(presented) is None


@pytest.mark.parametrize("presented", ["asapd_k1_wrong", "asapd_unknown_wrong", "nonsense"])
def test_a_digest_is_compared_in_constant_time_whether_the_key_is_known_or_not(
    presented: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = KeyRing()
    ring.replace([KEY])
    compared: list[tuple[int, int]] = []
    real = gatekeeper.hmac.compare_digest

    def watched(left: bytes, right: bytes) -> bool:
        compared.append((len(left), len(right)))
        return real(left, right)

    monkeypatch.setattr(gatekeeper.hmac, "compare_digest", watched)
    assert ring.find(presented) is None
    assert compared == [(32, 32)]
