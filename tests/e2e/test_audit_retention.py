"""Retention of the log of a daemon that runs, and dies in the middle of it."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from tests.e2e.daemon import QUICK, Daemon, running, until
from tests.e2e.test_sealing import asapd, report, verify
from tests.e2e.test_tampering import asapctl

pytestmark = pytest.mark.load


def retired(daemon: Daemon) -> int:
    reconciled: dict[str, Any] = verify(daemon)["reconciled"]
    return int(reconciled["erasure"]["retired"])


async def test_retention_that_is_killed_goes_on_and_the_log_and_its_archives_verify() -> None:
    with running(QUICK + '[retention]\naudit = "1s"\n') as daemon:
        for _ in range(4):
            report(daemon, 5_000)
        await trio.sleep(1.1)  # what is a second old is due
        would = daemon.admin_request("POST", "/retention?dry_run=true").json()["audit"]
        assert would["count"] >= 20_000

        async def is_archived() -> bool:
            return "entries 1 to" in daemon.stderr.read_text()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, asapctl, daemon, "retention")
            await until(is_archived, within_s=120.0)  # twenty thousand entries, on a busy machine
            daemon.kill()
        await trio.to_thread.run_sync(daemon.start)
        found = verify(daemon)
        assert found["valid"], found
        done = await trio.to_thread.run_sync(asapctl, daemon, "retention")
        assert done.returncode == 0, done
        assert verify(daemon)["valid"]
        assert retired(daemon) >= would["count"]
        archives = sorted((daemon.state_dir / "audit").glob("*.gz"))
        assert archives
        for path in archives:
            ran = await trio.to_thread.run_sync(asapd, "verify", str(path))
            assert ran.returncode == 0, ran
        damaged = daemon.home / "damaged.gz"
        damaged.write_bytes(archives[0].read_bytes()[:-100])
        ran = await trio.to_thread.run_sync(asapd, "verify", str(damaged))
        assert (ran.returncode, "the archive is damaged" in ran.stdout) == (1, True)
