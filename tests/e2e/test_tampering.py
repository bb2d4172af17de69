"""Somebody edits the database file with SQLite's own tools."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import trio

from asapd.core import audit
from tests.e2e.daemon import Daemon, running

COLUMNS = (
    "id",
    "timestamp_us",
    "event_type",
    "actor",
    "subject",
    "details",
    "salt",
    "payload_hash",
    "previous_hash",
    "hash",
)


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """One with forty entries in its log."""
    with running() as started:
        events = [
            {
                "id": f"e{number}",
                "task_id": f"t{number}",
                "agent": "urn:asap:agent:a",
                "consumer": "desk",
                "timestamp": time.time(),
            }
            for number in range(40)
        ]
        made = started.admin_request("POST", "/usage", json=events)
        assert made.status_code == 201, made.text
        yield started


def edit(daemon: Daemon, sql: str, *values: Any) -> None:
    """Run one statement with the guards taken away for it."""
    with closing(sqlite3.connect(daemon.state_dir / "asapd.db", timeout=10, isolation_level=None)) as connection:
        guards = connection.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'").fetchall()
        connection.execute("BEGIN IMMEDIATE")
        for name, _ in guards:
            connection.execute(f"DROP TRIGGER {name}")
        connection.execute(sql, values)
        for _, guard in guards:
            connection.execute(guard)
        connection.execute("COMMIT")


def read(daemon: Daemon, seq: int, column: str) -> Any:
    with closing(sqlite3.connect(daemon.state_dir / "asapd.db", timeout=10)) as connection:
        return connection.execute(f"SELECT {column} FROM audit WHERE seq = ?", (seq,)).fetchone()[0]


def flipped(value: Any) -> Any:
    """The same value with the lowest bit of its middle byte turned."""
    if isinstance(value, int):
        return value ^ 1
    raw = bytearray(value.encode() if isinstance(value, str) else value)
    raw[len(raw) // 2] ^= 1
    return raw.decode() if isinstance(value, str) else bytes(raw)


def verify(daemon: Daemon) -> dict[str, Any]:
    found: dict[str, Any] = daemon.admin_get("/audit/verify").json()
    return found


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("seq", [1, 17, -1])
async def test_one_flipped_bit_anywhere_in_a_row_is_found_and_named(daemon: Daemon, column: str, seq: int) -> None:
    walk = verify(daemon)
    assert walk["valid"] is True
    seq = walk["last_seq"] if seq == -1 else seq
    before, name = read(daemon, seq, column), read(daemon, seq, "id")
    edit(daemon, f"UPDATE audit SET {column} = ? WHERE seq = ?", flipped(before), seq)
    try:
        found = verify(daemon)
        assert found["valid"] is False
        assert found["first_bad"]["seq"] == seq
        assert found["first_bad"]["reason"]
        assert found["first_bad"]["id"] == (flipped(name) if column == "id" else name)
    finally:
        edit(daemon, f"UPDATE audit SET {column} = ? WHERE seq = ?", before, seq)
    assert verify(daemon)["valid"] is True


async def test_a_deleted_entry_is_found(daemon: Daemon) -> None:
    edit(daemon, "UPDATE audit SET seq = -20 WHERE seq = 20")
    try:
        found = verify(daemon)
        assert found["valid"] is False
        assert found["first_bad"]["seq"] in {-20, 20, 21}
    finally:
        edit(daemon, "UPDATE audit SET seq = 20 WHERE seq = -20")
    assert verify(daemon)["valid"] is True


async def test_the_guards_refuse_a_plain_edit(daemon: Daemon) -> None:
    with closing(sqlite3.connect(daemon.state_dir / "asapd.db", timeout=10, isolation_level=None)) as connection:
        for statement in ("UPDATE audit SET actor = 'x' WHERE seq = 2", "DELETE FROM audit WHERE seq = 2"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                connection.execute(statement)


def asapctl(daemon: Daemon, *arguments: str) -> subprocess.CompletedProcess[str]:
    socket = str(daemon.runtime_dir / "admin.sock")
    program = "import sys; from asapd.cli.asapctl import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", program, "--socket", socket, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


async def test_an_edit_while_the_daemon_was_down_is_found_after_its_start_and_asapctl_says_so(daemon: Daemon) -> None:
    sound = await trio.to_thread.run_sync(asapctl, daemon, "audit", "verify")
    assert sound.returncode == 0, sound.stderr
    await trio.to_thread.run_sync(daemon.stop)
    before, name = read(daemon, 9, "details"), read(daemon, 9, "id")
    edit(daemon, "UPDATE audit SET details = ? WHERE seq = 9", flipped(before))
    await trio.to_thread.run_sync(daemon.start)
    assert verify(daemon)["first_bad"]["seq"] == 9
    broken = await trio.to_thread.run_sync(asapctl, daemon, "audit", "verify")
    assert broken.returncode == 1
    assert name in broken.stdout + broken.stderr
    edit(daemon, "UPDATE audit SET details = ? WHERE seq = 9", before)
    assert verify(daemon)["valid"] is True


async def test_what_was_taken_while_the_daemon_was_down_is_not_explained_by_a_chained_entry_that_says_so() -> None:
    with running() as daemon:
        event = {"task_id": "t", "agent": "urn:asap:agent:a", "consumer": "desk", "timestamp": time.time()}
        assert daemon.admin_request("POST", "/usage", json=[event] * 5).status_code == 201
        asked = {"consumer": "desk", "reason": "request 17"}
        assert daemon.admin_request("POST", "/audit/erase", json=asked).json()["entries"] == 5
        assert daemon.admin_request("POST", "/usage", json=[event] * 3).status_code == 201
        sound = verify(daemon)
        assert (sound["valid"], sound["erased"]) == (True, 5)
        await trio.to_thread.run_sync(daemon.stop)
        seq, digest = sound["last_seq"], bytes.fromhex(sound["last_hash"])
        said = {"count": 1, "entries": [[seq, seq]], "first_seq": seq, "last_seq": seq, "usage_rows": [[8, 8]]}
        sealed = audit.seal("uid:0", [("ers_x", audit.canonical_details({**said, "reason": "request 18"}))], bytes(16))
        (row,) = audit.chain((seq, digest), "erasure.applied", "uid:0", 1_900_000_000_000_000, ["aud_x"], sealed)
        edit(daemon, f"INSERT INTO audit VALUES ({','.join('?' * 11)})", *row)
        emptied = "actor = NULL, subject = NULL, details = NULL, salt = NULL"
        edit(daemon, f"UPDATE audit SET {emptied} WHERE seq = ?", seq)
        edit(daemon, "DELETE FROM usage WHERE seq = 8")
        await trio.to_thread.run_sync(daemon.start)
        broken = await trio.to_thread.run_sync(asapctl, daemon, "audit", "verify")
        assert broken.returncode == 1
        assert f"entry {seq + 1} (erasure.applied ers_x) was not signed by this daemon's key" in broken.stdout
        assert "1 of the rows 1 to 8 of usage are not there, and nobody says who took them" in broken.stdout
        asked_to_vouch = await trio.to_thread.run_sync(asapctl, daemon, "audit", "vouch", "--reason", "trust me")
        assert asked_to_vouch.stdout == "there is nothing to vouch for\n"
