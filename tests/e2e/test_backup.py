"""A backup of a daemon at work, and what it takes to put one back."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.e2e.daemon import QUICK, Daemon, running
from tests.e2e.test_sealing import asapd, report, verify
from tests.e2e.test_tampering import asapctl

pytestmark = pytest.mark.load


async def run(function: Any, *arguments: Any) -> Any:
    return await trio.to_thread.run_sync(function, *arguments)


async def backed_up(daemon: Daemon, file: Path) -> dict[str, Any]:
    ran = await run(asapctl, daemon, "backup", str(file), "--json")
    assert ran.returncode == 0, ran
    told: dict[str, Any] = json.loads(ran.stdout)
    assert (told["bytes"], oct(mode_of(file))) == (len(file.read_bytes()), "0o600")  # noqa: ASYNC240 -- a small file
    return told


def mode_of(file: Path) -> int:
    return file.stat().st_mode & 0o777


async def restored(daemon: Daemon, file: Path, *options: str, code: int = 0) -> Any:
    ran = await run(asapd, "restore", str(file), "--state-dir", str(daemon.state_dir), *options)
    assert ran.returncode == code, ran
    return ran


def events(daemon: Daemon) -> int:
    return int(daemon.admin_get("/usage/summary").json()["total_events"])


def entries(daemon: Daemon, kind: str) -> list[dict[str, Any]]:
    return [row["details"] for row in daemon.admin_get(f"/audit/logs?event_type={kind}").json()["data"]]


async def test_a_backup_made_under_load_is_whole_and_restored_says_what_was_given_up(tmp_path: Path) -> None:
    file = tmp_path / "asapd.backup"
    with running(QUICK) as daemon:
        report(daemon, 20)
        stop = trio.Event()
        async with trio.open_nursery() as nursery:

            async def load() -> None:
                while not stop.is_set():
                    await run(report, daemon, 50)

            nursery.start_soon(load)
            told = await backed_up(daemon, file)
            stop.set()
        assert not (daemon.state_dir / "asapd.db.backup").exists()
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as copy:
            assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            (kept,) = copy.execute("SELECT count(*) FROM usage").fetchone()
        report(daemon, 7)
        assert len(entries(daemon, "backup.made")) == 1
        refused = await restored(daemon, file, code=2)
        assert "is in use by pid" in refused.stderr
        before = daemon.admin_get("/audit/checkpoint?format=json").json()
        assert before["size"] > told["entries"]
        daemon.kill()  # what was committed last is in the WAL
        ran = await restored(daemon, file)
        assert f"given up: a log of {before['size']} entries with root {before['root_hash']}" in ran.stdout
        await run(daemon.start)
        assert events(daemon) == kept
        (marked,) = entries(daemon, "log.restored")
        assert (marked["abandoned_size"], marked["abandoned_root"]) == (before["size"], before["root_hash"])
        assert marked["size"] >= told["entries"]
        assert verify(daemon)["valid"]
        assert daemon.status()["audit"]["alarms"] == []
        report(daemon, 3)
        (old,) = daemon.state_dir.glob("asapd.db.before-restore-*")
        assert (daemon.state_dir / "checkpoints.abandoned.log").exists()
        # The abandoned log is there whole, and can be put back in turn.
        await run(daemon.stop)
        await restored(daemon, old, "--give-up-checkpoints")
        await run(daemon.start)
        assert events(daemon) > kept
        assert verify(daemon)["valid"]
        assert daemon.status()["audit"]["alarms"] == []
