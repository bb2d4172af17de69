"""Two daemons that witness each other come to rest: what one enters of the other is no reason to show it more."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import apsw
import pytest
import trio
from nacl.signing import SigningKey
from trio.testing import MockClock

from asapd import config
from asapd.actors.sealer import Sealer, run_sealer
from asapd.actors.witnesses import Witnesses
from asapd.core.errors import Refusal
from asapd.runtime.clock import TrioClock
from asapd.runtime.posting import Posted
from asapd.store import seals, verifying, witnessing
from asapd.store.database import Database, InlineReaders, InlineRunner
from asapd.store.seals import SealedAt
from asapd.store.units.house import Note
from asapd.store.writer import Writer, open_for_writing
from asapd.wire.checkpoint import origin_of
from asapd.wire.keys import public_base64
from asapd.wire.witness import read_request

NOW_US = 1_800_000_000_000_000
HOUR_S = 3_600
KEYS = {name: SigningKey(bytes([number]) * 32) for number, name in enumerate(("left", "right"), 1)}
LOG = logging.getLogger("test.mutual_witnesses")


async def inline(function: Callable[..., Any], *arguments: Any) -> Any:
    """Without a thread, beside which virtual time would leap."""
    await trio.lowlevel.checkpoint()
    return function(*arguments)


class Host:
    """One of two: it seals, shows the other what it sealed, and signs what it is shown."""

    def __init__(self, name: str, connection: apsw.Connection, directory: Path, hosts: dict[str, Host]) -> None:
        (other,) = {*KEYS} - {name}
        self.connection = connection
        self.database = Database(InlineRunner(Writer(connection)), InlineReaders(connection))
        self.other_key = bytes(KEYS[other].verify_key)
        public = public_base64(self.other_key)
        settings = config.Audit(
            witness=({"url": f"http://{other}", "public_key": public},), witness_for=({"public_key": public},)
        )
        clock = TrioClock(NOW_US)
        self.witnesses = Witnesses(self.database, clock, KEYS[name], settings, LOG, self.post)
        path = directory / f"{name}.log"
        self.sealer = Sealer(self.database, clock, KEYS[name], path, settings, LOG, inline)
        self.public_key, self.other, self.hosts = bytes(KEYS[name].verify_key), other, hosts

    async def post(self, url: str, body: bytes, *, deadline_s: float, max_bytes: int) -> Posted:
        answer = await self.hosts[self.other].witnesses.add(read_request(body))
        if isinstance(answer, Refusal):
            return Posted(422, answer.detail.encode())
        return Posted(200, answer.encode()) if isinstance(answer, str) else Posted(409, b"%d\n" % answer.size)

    async def enter(self) -> None:
        await self.database.submit(Note("test", "asapd", "s", {}, NOW_US))

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        tell, remind = self.witnesses.tell, self.witnesses.remind
        await run_sealer(self.sealer, tell=tell, remind=remind, beat=lambda: None, log=LOG, task_status=task_status)

    def entries(self) -> int:
        return int(self.connection.execute("SELECT count(*) FROM audit").get)

    def checkpoints(self) -> list[int]:
        return [size for (size,) in self.connection.execute("SELECT size FROM audit_checkpoint ORDER BY size")]

    def report(self) -> verifying.Report:
        return verifying.report(
            self.connection, verifying.Request(public_key=self.public_key, witness_keys=(self.other_key,))
        )


@pytest.fixture
async def hosts(tmp_path: Path) -> AsyncIterator[dict[str, Host]]:
    made: dict[str, Host] = {}
    left, right = (open_for_writing(tmp_path / f"{name}.db", synchronous="off") for name in KEYS)
    with closing(left), closing(right):
        for name, connection in zip(KEYS, (left, right), strict=True):
            made[name] = Host(name, connection, tmp_path, made)
        async with trio.open_nursery() as nursery:
            for host in made.values():
                await host.enter()
                await nursery.start(host.run)
            yield made
            nursery.cancel_scope.cancel()


async def test_idle_they_enter_nothing_and_seal_nothing(hosts: dict[str, Host], autojump_clock: MockClock) -> None:
    left, right = hosts["left"], hosts["right"]
    await trio.sleep(HOUR_S)
    before = [(host.entries(), host.checkpoints()) for host in (left, right)]
    assert before[0][0] <= 5
    await trio.sleep(3 * HOUR_S)
    assert [(host.entries(), host.checkpoints()) for host in (left, right)] == before
    await left.enter()
    await trio.sleep(HOUR_S)
    # One checkpoint with its two entries: what was signed here, and what was seen there.
    assert left.entries() == before[0][0] + 2
    assert right.entries() == before[1][0] + 1
    assert left.checkpoints() == [*before[0][1], before[0][0] + 1]
    assert right.checkpoints() == before[1][1]
    for host in (left, right):
        assert host.report().is_valid
        current = await host.sealer.current()
        assert isinstance(current, SealedAt)
        assert len(witnessing.cosignatures(host.connection, current.size)) == 1
        last = await host.sealer.seal()  # as at a stop
        assert isinstance(last, SealedAt)
        assert last.size == host.entries() > current.size
        assert host.report().is_valid


async def test_beside_a_busy_one_the_idle_one_seals_what_it_saw_at_times(
    hosts: dict[str, Host], autojump_clock: MockClock
) -> None:
    left, right = hosts["left"], hosts["right"]
    for _ in range(300):
        await left.enter()
        await trio.sleep(61)
    assert len(left.checkpoints()) >= 300
    assert len(right.checkpoints()) <= 4
    assert right.entries() - right.checkpoints()[-1] < seals.ECHOES
    assert origin_of(left.public_key) in {log[0] for log in witnessing.logs(right.connection)}
    assert right.report().is_valid
