"""Putting a backup in the place of a database: what does not verify replaces nothing, and no end leaves half of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

import apsw
import pytest
from nacl.signing import SigningKey

from asapd.core.budgets import Budget, Limits, Match
from asapd.core.merkle import Tree
from asapd.core.usage import Cost, UsageEvent, identity_key
from asapd.daemon import restoring
from asapd.daemon.restoring import BadBackupError, CannotRestoreError, Restored
from asapd.store import audit, checkpoint_log, lock, migrations, seals, verifying
from asapd.store.backup import CopyFailedError, copy_database
from asapd.store.schema import COUNTED_SINCE, MIGRATIONS
from asapd.store.tx import Tx
from asapd.store.units.audit import Seal
from asapd.store.units.delegations import SyncBudgets
from asapd.store.units.exchange import Envelope
from asapd.store.units.usage import RecordUsage
from asapd.store.writer import Writer, open_for_writing
from asapd.wire.checkpoint import sign_checkpoint
from asapd.wire.keys import private_pem

NOW_US = 1_795_169_203_000_000
KEY, OTHER = SigningKey(bytes(range(32))), SigningKey(bytes(range(1, 33)))


class Host:
    """A state directory, and the daemon's hand in it."""

    def __init__(self, directory: Path, key: SigningKey | None = KEY) -> None:
        self.directory = directory
        directory.mkdir()
        if key is not None:
            (directory / "identity.pem").write_bytes(private_pem(key))
        self.key = key

    @property
    def database(self) -> Path:
        return self.directory / "asapd.db"

    def record(self, *ids: str, folded: bool = True) -> None:
        """Record events, and seal; unless folded, the WAL stays as a daemon that was killed leaves it."""
        connection = open_for_writing(self.database, synchronous="off")
        events = [UsageEvent("t", "urn:asap:agent:a", "c", NOW_US, 5, id=name) for name in ids]
        Writer(connection).run([Envelope(1, RecordUsage("t", "key:x", NOW_US, events, [Cost(7)] * len(ids)), False)])
        tree, made = seals.grow_step(connection, Tree(), 10_000)
        checkpoint = sign_checkpoint(tree.size, tree.root(), self.key or KEY)
        note = checkpoint.note.encode()
        Writer(connection).run([Envelope(1, Seal(tree.size, tree.root(), made, note, NOW_US), False)])
        checkpoint_log.append(self.directory / "checkpoints.log", note)
        if folded:
            connection.close()
        else:
            wal = self.directory / "asapd.db-wal"
            content, database = wal.read_bytes(), self.database.read_bytes()
            connection.close()
            self.database.write_bytes(database)
            wal.write_bytes(content)

    def restore(self, file: Path, *, now_us: int = NOW_US + 5, **options: Any) -> Restored:
        return restoring.restore(file, self.directory, actor="uid:1", now_us=now_us, **options)

    def ids(self, database: Path | None = None) -> set[str]:
        with closing(apsw.Connection(str(database or self.database))) as connection:
            return {name for (name,) in connection.execute("SELECT id FROM usage").fetchall()}

    def assert_verifies(self) -> None:
        with closing(apsw.Connection(str(self.database))) as connection:
            request = verifying.Request(
                checkpoints=str(self.directory / "checkpoints.log"), public_key=bytes((self.key or KEY).verify_key)
            )
            found = verifying.report(connection, request)
            assert found.is_valid, found


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path / "state")


@pytest.fixture
def backup(host: Host, tmp_path: Path) -> Path:
    """Of two events; a third came later."""
    host.record("a", "b")
    file = tmp_path / "asapd.backup"
    copy_database(host.database, file)
    host.record("c", folded=False)
    return file


def test_what_an_upgrade_enters_is_not_held_to_the_checkpoints_of_what_came_behind_the_backup(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "older.backup"
    with monkeypatch.context() as older:
        older.setattr(migrations, "MIGRATIONS", MIGRATIONS[: COUNTED_SINCE - 1])
        older.setattr(Tx, "count_budget", lambda *_: None)
        older.setattr("asapd.store.budget_counts.say_definitions", lambda _: None)
        older.setattr("asapd.store.usage_behind.mark", lambda _: 0)
        older.setattr("asapd.store.prepared.identity_key", lambda *its: (key := identity_key(*its))[-10:] + key[:-10])
        with closing(open_for_writing(host.database, synchronous="off")) as connection:
            budgets = [Budget("b", Match(), "day", "UTC", soft=Limits(microusd=1_000))]
            Writer(connection).run([Envelope(1, SyncBudgets(budgets, "asapd", NOW_US), False)])
        host.record("a", "b")
        copy_database(host.database, file)
        host.record("c")
    done = host.restore(file)
    assert done.head.entries == 3
    assert done.abandoned is not None
    assert done.abandoned.entries == 4
    assert host.ids() == {"a", "b"}
    with closing(apsw.Connection(str(host.database))) as connection:
        kinds = connection.execute("SELECT event_type FROM audit WHERE seq > 3 ORDER BY seq").fetchall()
    assert kinds == [("upgrade.counted",), ("log.restored",)]
    host.assert_verifies()


def test_of_two_restores_in_a_second_both_keep_what_was_there(host: Host, backup: Path) -> None:
    first, second = host.restore(backup), host.restore(backup, now_us=NOW_US + 500_000)
    assert first.kept is not None
    assert second.kept is not None
    assert (host.ids(first.kept), host.ids(second.kept)) == ({"a", "b", "c"}, {"a", "b"})


def test_the_backup_takes_the_place_and_the_log_says_what_was_given_up(host: Host, backup: Path) -> None:
    steps: list[tuple[int, int]] = []
    with closing(apsw.Connection(str(host.database))) as connection:
        size, root = connection.execute("SELECT size, root FROM audit_checkpoint ORDER BY size DESC").fetchone() or ()
    done = host.restore(backup, progress=lambda *step: steps.append(step))
    assert (done.head.entries, done.abandoned, done.remarks) == (2, restoring.Head(size, root), ())
    assert steps == [(2, 2)]
    assert host.ids() == {"a", "b"}
    assert done.kept is not None
    assert host.ids(done.kept) == {"a", "b", "c"}
    with closing(apsw.Connection(str(host.database))) as connection:
        entry = audit.get_entry(connection, "3")
    assert entry is not None
    assert (entry["event_type"], entry["actor"]) == ("log.restored", "uid:1")
    assert entry["details"] == {
        "abandoned_root": root.hex(),
        "abandoned_size": 3,
        "root": done.head.root.hex(),
        "size": 2,
    }
    host.assert_verifies()
    sizes = [[found.size for found in checkpoint_log.read(host.directory / name)] for name in LOGS]
    assert sizes == [[2], [3]]
    assert host.database.stat().st_mode & 0o777 == 0o600


LOGS = ("checkpoints.log", "checkpoints.abandoned.log")


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("DROP TRIGGER audit_no_update; UPDATE audit SET actor = 'x' WHERE seq = 2", "entry 2 (aud_"),
        ("DROP TRIGGER audit_no_delete; DELETE FROM audit WHERE seq = 2", "2 entries was signed: 1 were cut off"),
        ("DROP TRIGGER audit_no_delete; DELETE FROM audit", "it has no audit log"),
        ("DROP TRIGGER usage_no_update; UPDATE usage SET tokens_in = 9", "records and entries do not agree: usage row"),
        ("UPDATE usage_hour SET tokens_in = 9", "tokens_in is 9, and the events come to 10"),
        ("DROP TRIGGER audit_checkpoint_no_update; UPDATE audit_checkpoint SET root = x'00'", "says another size or"),
    ],
)
def test_what_does_not_verify_replaces_nothing(host: Host, backup: Path, sql: str, said: str) -> None:
    with closing(apsw.Connection(str(backup))) as connection:
        connection.execute(sql)
    before = contents(host)
    with pytest.raises(BadBackupError, match=said.replace("(", r"\(")):
        host.restore(backup)
    # What was in the WAL may have been folded; nothing else of the directory was touched.
    assert contents(host) == before


def contents(host: Host) -> tuple[set[str], set[str], bytes]:
    names = {path.name for path in host.directory.iterdir()} - {"asapd.lock", "asapd.db-wal", "asapd.db-shm"}
    return names, host.ids(), (host.directory / "checkpoints.log").read_bytes()


def test_a_backup_that_cannot_be_read_to_its_end_is_not_said_to_be_bad(
    host: Host, backup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks = [lambda connection: connection.execute("PRAGMA temp.max_page_count = 1")]
    with monkeypatch.context() as full:
        full.setattr(apsw, "connection_hooks", hooks)
        with pytest.raises(CannotRestoreError, match=r"no room for temporary files.*nothing was replaced"):
            host.restore(backup)
    assert host.ids() == {"a", "b", "c"}


def test_files_of_another_kind_are_refused(host: Host, backup: Path, tmp_path: Path) -> None:
    before = contents(host)
    file = tmp_path / "file"
    whole = backup.read_bytes()
    for content, kind, said in (
        (b"not a database" * 99, CannotRestoreError, "is not a backup of asapd"),
        (b"", BadBackupError, "it has no audit log"),
        (whole[:4000], BadBackupError, "it is damaged"),
        (whole[:9000], BadBackupError, "it is damaged"),
        (whole[:-4096], BadBackupError, "it is damaged"),
        (whole[:4000] + bytes(9000), BadBackupError, "it is damaged"),
    ):
        file.write_bytes(content)
        with pytest.raises(kind, match=said):
            host.restore(file)
    for sql, said in (
        ("CREATE TABLE x (y)", "is not a backup of asapd"),
        ("PRAGMA application_id = 1634951536; PRAGMA user_version = 99; CREATE TABLE x (y)", "schema version 99"),
    ):
        file.unlink()
        with closing(apsw.Connection(str(file))) as connection:
            connection.execute(sql)
        with pytest.raises(CannotRestoreError, match=said):
            host.restore(file)
    with pytest.raises(CannotRestoreError, match="there is no such file"):
        host.restore(tmp_path / "none")
    assert contents(host) == before


def test_a_directory_that_is_held_is_left_alone(host: Host, backup: Path) -> None:
    held = lock.acquire(host.directory / "asapd.lock", patience_s=0, monotonic_s=lambda: 0.0, sleep=lambda _: None)
    with pytest.raises(CannotRestoreError, match=f"in use by pid {os.getpid()}: stop the daemon first"):
        host.restore(backup)
    os.close(held)
    assert host.ids() == {"a", "b", "c"}


def test_a_directory_that_cannot_be_made_is_said(tmp_path: Path, host: Host, backup: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotRestoreError, match="nothing was replaced"):
        restoring.restore(backup, tmp_path / "file" / "state", actor="x", now_us=NOW_US)


def test_checkpoints_of_another_log_are_set_aside_only_when_asked_to(host: Host, backup: Path) -> None:
    host.database.unlink()
    (host.directory / "asapd.db-wal").unlink(missing_ok=True)
    (host.directory / "checkpoints.log").unlink()
    host.record("x")
    with pytest.raises(BadBackupError, match="--give-up-checkpoints"):
        host.restore(backup)
    assert host.ids() == {"x"}
    host.restore(backup, give_up_checkpoints=True)
    assert host.ids() == {"a", "b"}
    assert list(checkpoint_log.read(host.directory / "checkpoints.log")) == []
    host.assert_verifies()


def test_an_empty_directory_has_nothing_to_give_up(backup: Path, tmp_path: Path) -> None:
    other = Host(tmp_path / "other", None)
    done = other.restore(backup)
    assert (done.abandoned, done.kept) == (None, None)
    assert "identity.pem is not there" in done.remarks[0]
    other.assert_verifies()


def test_a_key_of_another_log_is_said_and_one_that_is_none_refused(backup: Path, tmp_path: Path) -> None:
    other = Host(tmp_path / "other", OTHER)
    assert "or list it in audit.former_keys and give --config" in other.restore(backup).remarks[0]
    (other.directory / "identity.pem").write_text("no key")
    with pytest.raises(CannotRestoreError, match="is not an Ed25519 key"):
        other.restore(backup)


def test_checkpoints_of_a_former_key_are_held_to_it(host: Host, tmp_path: Path) -> None:
    host.record("a")
    host.key = OTHER
    (host.directory / "identity.pem").write_bytes(private_pem(OTHER))
    host.record("b")
    file = tmp_path / "asapd.backup"
    copy_database(host.database, file)
    with pytest.raises(BadBackupError, match=r"list it in audit\.former_keys, and give --config"):
        host.restore(file)
    done = host.restore(file, former_keys=[bytes(KEY.verify_key)])
    assert (done.remarks, done.abandoned) == ((), done.head)
    assert host.ids() == {"a", "b"}
    assert not (host.directory / "checkpoints.abandoned.log").exists()


def test_a_database_that_is_damaged_is_replaced_and_kept_with_its_wal(host: Host, backup: Path) -> None:
    host.database.write_bytes(b"\0" * 5_000)
    wal = (host.directory / "asapd.db-wal").read_bytes()
    done = host.restore(backup)
    assert done.abandoned is not None
    assert done.abandoned.entries == 3  # by the checkpoint in the file
    assert done.kept is not None
    assert done.kept.read_bytes() == b"\0" * 5_000
    assert done.kept.with_name(f"{done.kept.name}-wal").read_bytes() == wal
    assert host.ids() == {"a", "b"}
    host.assert_verifies()


class KilledError(Exception):
    """The end, wherever it was."""


def test_an_end_at_any_step_leaves_one_database_whole_and_the_next_run_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for lives in count():
        host = Host(tmp_path / f"state{lives}")
        host.record("a", "b")
        backup = tmp_path / f"backup{lives}"
        copy_database(host.database, backup)
        host.record("c", folded=False)
        left = [lives]

        def mortal(function: Callable[..., Any], left: list[int] = left) -> Callable[..., Any]:
            def step(*arguments: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    raise KilledError
                return function(*arguments)

            return step

        with monkeypatch.context() as patch:
            for name in ("rename", "hardlink_to"):
                patch.setattr(Path, name, mortal(getattr(Path, name)))
            patch.setattr(checkpoint_log, "append", mortal(checkpoint_log.append))
            patch.setattr(restoring, "_sync", mortal(restoring._sync))
            try:
                host.restore(backup)
            except KilledError:
                is_whole = False
            else:
                is_whole = True
        assert host.ids() in ({"a", "b", "c"}, {"a", "b"})
        if is_whole:
            break
        host.restore(backup)
        assert host.ids() == {"a", "b"}
        host.assert_verifies()
    assert lives >= 4


def test_a_journal_that_was_left_is_not_played_back(host: Host, backup: Path) -> None:
    """It is of a database that stood there before, or of a copy that was cut short."""
    journal = b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7" + (1).to_bytes(4, "big") * 5 + bytes(9_000)
    for name in ("asapd.db.restoring-journal", "asapd.db-journal"):
        (host.directory / name).write_bytes(journal)
    host.database.write_bytes(b"damaged")
    host.restore(backup)
    assert not list(host.directory.glob("asapd.db-*"))
    assert host.ids() == {"a", "b"}
    host.assert_verifies()


def test_a_copy_that_finds_no_room_leaves_nothing(host: Host, backup: Path, tmp_path: Path) -> None:
    with pytest.raises(CopyFailedError, match="No such file or directory"):
        copy_database(backup, tmp_path / "none" / "copy")
    backup.write_bytes(b"")
    with pytest.raises(CopyFailedError):
        copy_database(tmp_path / "none", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
