"""Two daemons: what one sealed holds it to its word, whatever becomes of its files; the other signs what it saw."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.e2e.daemon import QUICK, Daemon, running, until
from tests.e2e.test_tampering import asapctl

pytestmark = pytest.mark.load


def report(daemon: Daemon, count: int) -> None:
    """Events that no other request has."""
    event = {"task_id": "t", "agent": "urn:asap:agent:a", "consumer": "desk", "timestamp": time.time()}
    assert daemon.admin_request("POST", "/usage", json=[event] * count).status_code == 201


def asapd(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = "import sys; from asapd.cli.asapd import main; sys.exit(main())"
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def verify(daemon: Daemon) -> dict[str, Any]:
    found: dict[str, Any] = daemon.admin_get("/audit/verify").json()
    return found


async def test_an_older_copy_of_the_database_is_found_at_the_start_and_by_what_was_kept(tmp_path: Path) -> None:
    with running() as daemon:
        database = daemon.state_dir / "asapd.db"
        report(daemon, 5)
        await trio.to_thread.run_sync(daemon.stop)
        shutil.copy(database, tmp_path / "old.db")
        await trio.to_thread.run_sync(daemon.start)
        for _ in range(10):  # more than the older copy is given at its next start: a gap in the watch, the alarm
            report(daemon, 1)
        kept = tmp_path / "checkpoint"
        kept.write_text(daemon.admin_get("/audit/checkpoint").text)
        key = daemon.admin_get("/audit/checkpoint?format=json").json()["public_key"]
        good = await trio.to_thread.run_sync(asapctl, daemon, "audit", "verify", "--against", str(kept))
        assert good.returncode == 0, good.stdout
        assert "those of the file too" in good.stdout
        own_log = daemon.state_dir / "checkpoints.log"
        wrapped, empty, other = tmp_path / "wrapped", tmp_path / "empty", tmp_path / "other"
        wrapped.write_text(daemon.admin_get("/audit/checkpoint?format=json").text)
        empty.touch()
        other.write_text(kept.read_text().replace("\n— asapd/", "\n— asapd/0").replace("asapd/", "asapd/0", 1))
        for file, code in ((own_log, 0), (wrapped, 0), (empty, 2), (daemon.config, 2), (other, 1)):
            held = await trio.to_thread.run_sync(asapctl, daemon, "audit", "verify", "--against", str(file))
            assert held.returncode == code, (file, held)
        await trio.to_thread.run_sync(daemon.stop)
        assert (await trio.to_thread.run_sync(asapd, "verify", str(kept), "--public-key", key)).returncode == 0
        log = daemon.state_dir / "checkpoints.log"
        whole = await trio.to_thread.run_sync(asapd, "verify", str(log), "--public-key", key)
        assert whole.returncode == 0, whole
        shutil.copy(tmp_path / "old.db", database)
        await trio.to_thread.run_sync(daemon.start)
        (alarm,) = daemon.status()["audit"]["alarms"]
        assert "an older copy of the database was put in its place" in alarm
        found = verify(daemon)
        assert found["valid"] is False
        # On a slow host more is entered by then than was before, and sealed meanwhile.
        assert any(said in found["first_bad"]["reason"] for said in ("were cut off", "are not those that were sealed"))
        await trio.to_thread.run_sync(daemon.stop)
        log.unlink()  # who rolls back the one can take away the other
        await trio.to_thread.run_sync(daemon.start)
        assert daemon.status()["audit"]["alarms"] == []
        assert verify(daemon)["valid"] is True
        bad = await trio.to_thread.run_sync(asapctl, daemon, "audit", "verify", "--against", str(kept))
        assert bad.returncode == 1
        assert bad.stdout.startswith("bad: at entry ")


@pytest.mark.parametrize("rounds", [3])
async def test_a_kill_at_any_point_leaves_a_log_that_verifies_and_seals_on(rounds: int) -> None:
    with running(QUICK + '[audit]\ncheckpoint_every = "1s"\n') as daemon:
        for _ in range(rounds):
            report(daemon, 50)
            daemon.admin_get("/audit/checkpoint")
            report(daemon, 50)
            daemon.kill()
            await trio.to_thread.run_sync(daemon.start)
            assert daemon.status()["audit"]["alarms"] == []
            found = verify(daemon)
            assert found["valid"] is True, found
        assert verify(daemon)["reconciled"]["usage"]["rows"] == 100 * rounds


async def test_one_daemon_witnesses_the_other() -> None:
    with running() as witness:
        their_key = witness.admin_get("/audit/checkpoint?format=json").json()["public_key"]
        port = witness.port
        shown = f'[[audit.witness]]\nurl = "http://127.0.0.1:{port}/witness"\npublic_key = "{their_key}"\n'
        with running(f'{QUICK}[audit]\ncheckpoint_every = "1s"\n{shown}') as daemon:
            our_key = daemon.admin_get("/audit/checkpoint?format=json").json()["public_key"]
            config = witness.config
            config.write_text(f'{config.read_text()}\n[[audit.witness_for]]\npublic_key = "{our_key}"\n')
            assert witness.admin_request("POST", "/reload").status_code == 200

            async def signatures() -> bool:
                report(daemon, 1)
                size = daemon.status()["audit"]["checkpoint"]
                text: str = daemon.admin_get(f"/audit/checkpoint?size={size}").text
                return text.count("\n— asapd/") == 2

            await until(signatures)


async def test_a_pack_verifies_on_a_machine_that_has_the_key_and_nothing_else(tmp_path: Path) -> None:
    agent, pack = "urn:asap:agent:a", tmp_path / "pack.json"
    with running() as daemon:
        added = daemon.admin_request("POST", "/agents", json={"id": agent, "url": "http://127.0.0.1:1"})
        assert added.status_code == 201
        report(daemon, 5)
        key = daemon.admin_get("/audit/checkpoint?format=json").json()["public_key"]
        asked = ("audit", "pack", "--agent", agent, "--since", "1h", "--out", str(pack))
        written = await trio.to_thread.run_sync(asapctl, daemon, *asked)
        assert written.returncode == 0, written.stderr
    verified = await trio.to_thread.run_sync(asapd, "verify", str(pack), "--public-key", key)
    assert verified.returncode == 0, verified
    assert verified.stdout.startswith(f"ok: {agent} from ")
    pack.write_text(pack.read_text().replace('"consumer":"desk"', '"consumer":"disk"', 1))
    changed = await trio.to_thread.run_sync(asapd, "verify", str(pack), "--public-key", key)
    assert (changed.returncode, changed.stdout) == (1, "bad: entries: was changed since it was signed\n")
