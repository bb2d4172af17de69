"""The sealer: checkpoints of what is committed, kept in two places, and a log that is not the one it sealed."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import closing
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import apsw
import pytest
import trio
from msgspec.structs import replace
from nacl.signing import SigningKey
from trio.testing import MockClock

from asapd import config
from asapd.actors import sealer as sealer_module
from asapd.actors.sealer import Sealer, run_sealer
from asapd.core import merkle
from asapd.core.errors import Refusal
from asapd.core.merkle import Tree
from asapd.runtime.clock import TrioClock
from asapd.store import checkpoint_log, seals
from asapd.store.database import Database, InlineReaders, InlineRunner
from asapd.store.seals import SealedAt
from asapd.store.units.house import Note
from asapd.store.writer import Writer
from asapd.wire.checkpoint import is_signed_by, read_checkpoint
from asapd.wire.keys import public_base64
from tests.core.test_merkle import mth

Inline = tuple[Database, apsw.Connection]
KEY = SigningKey(bytes(range(32)))
LOG = logging.getLogger("test.sealer")


async def inline(function: Callable[..., Any], *arguments: Any) -> Any:
    """Without a thread, beside which virtual time would leap."""
    await trio.lowlevel.checkpoint()
    return function(*arguments)


def make(database: Database, tmp_path: Path) -> Sealer:
    clock = TrioClock(1_800_000_000_000_000)
    return Sealer(database, clock, KEY, tmp_path / "checkpoints.log", config.Audit(), LOG, inline)


async def told(_: SealedAt) -> None:
    """No witnesses."""


async def enter(database: Database, count: int) -> None:
    for number in range(count):
        await database.submit(Note("test", "asapd", f"s{number}", {}, 1_800_000_000_000_000))


async def sealed(sealer: Sealer) -> SealedAt:
    found = await sealer.seal()
    assert isinstance(found, SealedAt)
    return found


async def test_a_checkpoint_covers_all_that_is_committed_and_stands_in_the_database_and_the_file(
    inline_database: Inline, tmp_path: Path, autojump_clock: MockClock
) -> None:
    database, connection = inline_database
    sealer = make(database, tmp_path)
    assert (await sealed(sealer)).root == merkle.EMPTY_ROOT
    await enter(database, 5)
    first = await sealed(sealer)
    entries = [digest for (digest,) in connection.execute("SELECT hash FROM audit ORDER BY seq")]
    assert (first.size, first.root) == (5, mth(entries))
    assert await sealed(sealer) == first  # nothing was entered since
    checkpoint = read_checkpoint(first.note)
    assert is_signed_by(checkpoint, sealer.public_key)
    assert [found.size for found in checkpoint_log.read(sealer.path)] == [0, 5]
    assert sealer.path.stat().st_mode & 0o777 == 0o600
    assert await sealer.newest() == first


async def test_a_sealer_that_starts_afresh_goes_on_where_the_nodes_end(
    inline_database: Inline, tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, connection = inline_database
    monkeypatch.setattr(sealer_module, "STEP", 100)
    monkeypatch.setattr(sealer_module, "KEEP", 2)
    await enter(database, 1_100)
    await sealed(make(database, tmp_path))
    await enter(database, 40)
    found = await sealed(make(database, tmp_path))
    entries = [digest for (digest,) in connection.execute("SELECT hash FROM audit ORDER BY seq")]
    assert (found.size, found.root) == (1_140, mth(entries))
    assert seals.differs(connection, found.size, found.root) is None


async def test_the_tree_keeps_up_with_many_entries_between_two_checkpoints(
    inline_database: Inline, tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, connection = inline_database
    monkeypatch.setattr(sealer_module, "AHEAD", 600)
    sealer = make(database, tmp_path)
    least: list[int] = []

    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        await run_sealer(sealer, tell=told, remind=told, beat=lambda: None, log=LOG, task_status=task_status)

    async with trio.open_nursery() as nursery:
        await nursery.start(run)
        await trio.sleep(0.5)  # until there is a checkpoint of nothing
        await enter(database, 599)
        await trio.sleep(3)
        kept = connection.execute("SELECT count(*) FROM audit_node")
        assert kept.get == 0
        await enter(database, 1)
        await trio.sleep(3)
        kept = connection.execute("SELECT count(*) FROM audit_node")
        assert kept.get == 3, "two over 256 entries, one over both"
        assert connection.execute("SELECT max(size) FROM audit_checkpoint").get == 0
        monkeypatch.setattr(seals, "grow_step", partial(grown_from, seals.grow_step, least))
        await enter(database, 5)
        await trio.sleep(60)
        nursery.cancel_scope.cancel()
    assert least == [600]
    found = await sealer.newest()
    assert found is not None
    entries = [digest for (digest,) in connection.execute("SELECT hash FROM audit ORDER BY seq")]
    assert (found.size, found.root) == (605, mth(entries))


def grown_from(real: Callable[..., Any], least: list[int], connection: apsw.Connection, tree: Tree, limit: int) -> Any:
    least.append(tree.size)
    return real(connection, tree, limit)


@pytest.mark.parametrize("lost", ["an entry", "the writer"])
async def test_a_tree_that_cannot_keep_up_is_left_to_the_next_checkpoint(
    inline_database: Inline, tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    database, connection = inline_database
    monkeypatch.setattr(sealer_module, "AHEAD", 600)
    sealer = make(database, tmp_path)
    await enter(database, 600)
    if lost == "an entry":
        connection.execute("UPDATE retention_gate SET open = 1; DELETE FROM audit WHERE seq = 300")
        await sealer.keep_up()
        refused = await sealer.seal()
        assert isinstance(refused, Refusal)
        assert refused.code == "log_broken"
        return
    monkeypatch.setattr(sealer_module, "KEEP", 1)
    with monkeypatch.context() as away:
        away.setattr(database, "submit", refusing)
        await sealer.keep_up()
    assert connection.execute("SELECT count(*) FROM audit_node").get == 0
    assert (await sealed(sealer)).size == 600
    assert connection.execute("SELECT count(*) FROM audit_node").get == 3


async def test_a_sealer_whose_writer_is_slow_is_seen_to_live(
    inline_database: Inline, tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, _ = inline_database
    monkeypatch.setattr(sealer_module, "AHEAD", 600)
    sealer = make(database, tmp_path)
    beats: list[float] = []
    real = database.submit

    async def slow(*arguments: Any, **named: Any) -> Any:
        await trio.sleep(90)
        return await real(*arguments, **named)

    with trio.move_on_after(300):
        async with trio.open_nursery() as nursery:
            run = partial(run_sealer, sealer, tell=told, remind=told, log=LOG)
            await nursery.start(partial(run, beat=lambda: beats.append(trio.current_time())))
            await trio.sleep(0.5)
            await enter(database, 600)
            monkeypatch.setattr(database, "submit", slow)
    assert max(later - beat for beat, later in pairwise(beats)) <= 10


async def refusing(*_: Any, **__: Any) -> Refusal:
    await trio.lowlevel.checkpoint()
    return Refusal("writer_unavailable", "")


async def test_it_seals_at_intervals_and_a_changed_interval_counts(
    inline_database: Inline, tmp_path: Path, autojump_clock: MockClock
) -> None:
    database, _ = inline_database
    sealer = make(database, tmp_path)
    beats: list[float] = []

    def beat() -> None:
        beats.append(trio.current_time())

    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        await run_sealer(sealer, tell=told, remind=told, beat=beat, log=LOG, task_status=task_status)

    async def sizes() -> list[int]:
        return await database.read(
            lambda connection: [
                size for (size,) in connection.execute("SELECT size FROM audit_checkpoint ORDER BY size")
            ]
        )

    async with trio.open_nursery() as nursery:
        await nursery.start(run)
        await trio.sleep(130)
        await enter(database, 1)
        await trio.sleep(130)
        assert await sizes() == [0, 1]
        assert 200 < len(beats) < 600
        sealer.settings = config.Audit(checkpoint_every="2s")
        for _ in range(3):
            await trio.sleep(5)
            await enter(database, 1)
        await trio.sleep(5)
        assert await sizes() == [0, 1, 2, 3, 4]
        nursery.cancel_scope.cancel()


async def test_what_a_former_key_sealed_gets_a_checkpoint_of_the_new_key_once_anything_is_entered(
    inline_database: Inline, tmp_path: Path, autojump_clock: MockClock
) -> None:
    database, _ = inline_database
    await enter(database, 2)
    await sealed(make(database, tmp_path))
    settings = config.Audit(checkpoint_every="1h")
    sealer = Sealer(
        database,
        TrioClock(1_800_000_000_000_000),
        SigningKey(bytes([9]) * 32),
        tmp_path / "checkpoints.log",
        settings,
        LOG,
    )

    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        await run_sealer(sealer, tell=told, remind=told, beat=lambda: None, log=LOG, task_status=task_status)

    async with trio.open_nursery() as nursery:
        await nursery.start(run)
        await trio.sleep(10)
        newest = await sealer.newest()
        assert newest is not None
        assert newest.size == 2  # one of that size there is
        await enter(database, 1)
        await trio.sleep(3)
        newest = await sealer.newest()
        assert newest is not None
        assert (newest.size, newest.note.partition("\n")[0]) == (3, sealer.origin)
        await enter(database, 1)
        await trio.sleep(1_000)
        assert await sealer.newest() == newest
        nursery.cancel_scope.cancel()


async def test_a_hole_is_refused_and_the_loop_goes_on(
    inline_database: Inline, tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    database, connection = inline_database
    await enter(database, 3)
    connection.execute("UPDATE retention_gate SET open = 1; DELETE FROM audit WHERE seq = 2")
    sealer = make(database, tmp_path)
    refused = await sealer.seal()
    assert isinstance(refused, Refusal)
    assert refused.code == "log_broken"
    with trio.move_on_after(100):
        await run_sealer(sealer, tell=told, remind=told, beat=lambda: None, log=LOG)
    assert caplog.text.count("entry 2 is missing") == 2


# --- what was there before


async def alarms(database: Database, tmp_path: Path) -> list[str]:
    sealer = make(database, tmp_path)
    await sealer.check()
    return sealer.alarms


async def test_an_untouched_log_raises_no_alarm(
    inline_database: Inline, tmp_path: Path, autojump_clock: MockClock
) -> None:
    database, _ = inline_database
    assert await alarms(database, tmp_path) == []
    await enter(database, 300)
    await sealed(make(database, tmp_path))
    await enter(database, 3)
    assert await alarms(database, tmp_path) == []


async def test_an_older_copy_of_the_database_is_found_by_the_file_of_checkpoints_and_entered(
    inline_database: Inline, tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    database, connection = inline_database
    await enter(database, 3)
    await sealed(make(database, tmp_path))
    with closing(apsw.Connection(":memory:")) as old:
        with old.backup("main", connection, "main") as backup:
            backup.step(-1)
        await enter(database, 2)
        await sealed(make(database, tmp_path))
        restored = Database(InlineRunner(Writer(old)), InlineReaders(old))
        (found,) = await alarms(restored, tmp_path)
        assert "held to the newest checkpoint in checkpoints.log: the log ends at entry 3" in found
        assert "2 were cut off, or an older copy of the database was put in its place" in found
        row = old.execute("SELECT event_type, details FROM audit WHERE seq = 4").fetchone()
        assert row is not None
        assert row[0] == "log.alarm"
        assert found in row[1]
        assert "is not the one that was sealed" in caplog.text
        # It goes on, and is found again, also when it has become as long as it was.
        await enter(restored, 5)
        (found,) = await alarms(restored, tmp_path)
        assert "the log was rewritten" in found or "entries that a checkpoint was signed over" in found
        # And when it has been sealed past what the file says of the other one.
        await sealed(make(restored, tmp_path))
        (found,) = await alarms(restored, tmp_path)
        assert "held to a checkpoint in checkpoints.log: the first 5 entries are not those" in found


async def test_a_checkpoint_that_the_database_lost_is_put_back_where_it_fits(
    inline_database: Inline, tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A power cut may take the last commits where the store does not wait for the disk."""
    database, connection = inline_database
    for _ in range(3):
        await enter(database, 2)
        await sealed(make(database, tmp_path))
    notes = connection.execute("SELECT size, root, note FROM audit_checkpoint").fetchall()
    connection.execute("DROP TRIGGER audit_checkpoint_no_delete")
    connection.execute("DELETE FROM audit_checkpoint WHERE size > 2")
    assert await alarms(database, tmp_path) == []
    assert connection.execute("SELECT size, root, note FROM audit_checkpoint").fetchall() == notes
    assert "the database lacked the checkpoint of 6 entries: it is put back" in caplog.text


async def test_a_checkpoint_of_a_key_from_before_holds_the_log_as_well(
    inline_database: Inline, tmp_path: Path, autojump_clock: MockClock
) -> None:
    database, connection = inline_database
    await enter(database, 5)
    await sealed(make(database, tmp_path))
    connection.execute("DROP TRIGGER audit_checkpoint_no_delete")
    connection.execute("UPDATE retention_gate SET open = 1")
    connection.execute("DELETE FROM audit_checkpoint; DELETE FROM audit WHERE seq > 3")
    changed = Sealer(
        database,
        TrioClock(1_800_000_000_000_000),
        SigningKey(bytes(32)),
        tmp_path / "checkpoints.log",
        config.Audit(former_keys=(public_base64(bytes(KEY.verify_key)),)),
        LOG,
        inline,
    )
    await changed.check()
    (found,) = changed.alarms
    assert "held to the newest checkpoint in checkpoints.log: the log ends at entry 3" in found


async def test_a_log_cut_off_below_its_checkpoint_is_found_by_the_database_itself(
    inline_database: Inline, tmp_path: Path, autojump_clock: MockClock
) -> None:
    database, connection = inline_database
    await enter(database, 5)
    sealer = make(database, tmp_path)
    await sealed(sealer)
    sealer.path.unlink()
    connection.execute("UPDATE retention_gate SET open = 1; DELETE FROM audit WHERE seq > 3")
    (found,) = await alarms(database, tmp_path)
    assert "held to the newest checkpoint in the database: the log ends at entry 3" in found


async def test_a_false_signature_in_the_file_is_found(
    inline_database: Inline, tmp_path: Path, autojump_clock: MockClock
) -> None:
    database, _ = inline_database
    await enter(database, 2)
    sealer = make(database, tmp_path)
    checkpoint = read_checkpoint((await sealed(sealer)).note)
    signature = replace(checkpoint.note.signatures[0], signature=bytes(64))
    forged = replace(checkpoint.note, text=checkpoint.note.text.replace("\n2\n", "\n9\n"), signatures=(signature,))
    checkpoint_log.append(sealer.path, forged.encode())
    (found,) = await alarms(database, tmp_path)
    assert found == "checkpoints.log holds a checkpoint of 9 entries with a false signature"


@pytest.mark.parametrize("kind", ["directory", "fifo", "garbage"])
async def test_a_file_that_is_none_of_checkpoints_is_an_alarm_and_the_start_goes_on(
    inline_database: Inline, tmp_path: Path, kind: str, autojump_clock: MockClock
) -> None:
    database, _ = inline_database
    await enter(database, 2)
    sealer = make(database, tmp_path)
    match kind:
        case "directory":
            sealer.path.mkdir()
        case "fifo":
            os.mkfifo(sealer.path)
        case _:
            sealer.path.write_bytes(b"\xffjunk\x00\n")
    assert (await sealed(sealer)).size == 2
    if kind == "garbage":
        sealer.path.write_bytes(b"\xffjunk\x00\n")
    (found,) = await alarms(database, tmp_path)
    assert ("is no regular file" if kind != "garbage" else "it was overwritten") in found


async def test_a_damaged_note_in_the_database_is_an_alarm_and_the_start_goes_on(
    inline_database: Inline, tmp_path: Path, autojump_clock: MockClock
) -> None:
    database, connection = inline_database
    await enter(database, 2)
    await sealed(make(database, tmp_path))
    connection.execute("DROP TRIGGER audit_checkpoint_no_update")
    connection.execute("UPDATE audit_checkpoint SET note = CAST(x'ff41' AS TEXT)")
    (found,) = await alarms(database, tmp_path)
    assert "held to the newest checkpoint in the database: the stored checkpoint of 2 entries" in found


async def test_what_the_file_lacks_is_added_and_half_a_note_at_its_end_does_no_harm(
    inline_database: Inline, tmp_path: Path, autojump_clock: MockClock
) -> None:
    database, _ = inline_database
    await enter(database, 2)
    sealer = make(database, tmp_path)
    await sealed(sealer)
    content = sealer.path.read_bytes()
    for left in (b"", content[:30], content[:-10]):
        sealer.path.write_bytes(left)
        assert await alarms(database, tmp_path) == []
        assert [found.size for found in checkpoint_log.read(sealer.path)][-1:] == [2]


async def test_a_file_that_cannot_be_written_leaves_the_checkpoint_in_the_database(
    inline_database: Inline, tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    database, _ = inline_database
    sealer = make(database, tmp_path)
    sealer.path = tmp_path / "none" / "checkpoints.log"
    await enter(database, 1)
    assert (await sealed(sealer)).size == 1
    assert "checkpoints are in the database only" in caplog.text
