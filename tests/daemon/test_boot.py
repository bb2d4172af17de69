"""Before anything runs: the directory, its lock, the identity; each failure in one line that says what to do."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest
from nacl.signing import SigningKey

from asapd import config
from asapd.config import ConfigError
from asapd.daemon import boot
from asapd.daemon.boot import BootError, LeftBehindError, Premises, load, occupy, write_private
from asapd.daemon.run import run
from asapd.store.units.agents import AgentRecord
from asapd.wire.keys import load_private_pem, private_pem, public_base64

PUBLIC = SigningKey(b"k" * 32).verify_key
AGENT = (
    f'[[agents]]\nid = "urn:asap:agent:a"\nurl = "http://127.0.0.1:1"\npublic_key = "{public_base64(bytes(PUBLIC))}"\n'
)
needs_other_user = pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")


@pytest.fixture(name="descriptors")
def closed_afterwards() -> Iterator[list[int]]:
    descriptors: list[int] = []
    yield descriptors
    for descriptor in descriptors:
        os.close(descriptor)


def taken(state_dir: Path, descriptors: list[int], **environ: str) -> Premises:
    premises = occupy(config.Config(), state_dir, environ)
    descriptors += premises.locks
    return premises


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- loading


def test_without_a_file_the_defaults_hold() -> None:
    loaded = load(None)
    assert loaded.config == config.Config()
    assert (loaded.agents, loaded.pinned, loaded.prices.version) == ([], {}, "none")


def test_agents_keys_and_prices_are_loaded_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "prices.toml").write_text('version = "v1"\n[[price]]\nmodel = "m"\ninput_per_mtok = 1\n')
    text = '[metering.pricing]\nfile = "prices.toml"\n' + AGENT
    text += '[agents.sla]\navailability = "99.5%"\nmax_latency_p95_ms = 500\n'
    (tmp_path / "asapd.toml").write_text(text)
    loaded = load(tmp_path / "asapd.toml")
    assert loaded.prices.version.startswith("v1+")
    assert loaded.pinned == {"urn:asap:agent:a": bytes(PUBLIC)}
    (agent,) = loaded.agents
    assert isinstance(agent, AgentRecord)
    assert agent.sla == {
        "availability": "99.5%",
        "max_latency_p95_ms": 500,
        "max_error_rate": None,
        "support_hours": None,
    }


@pytest.mark.parametrize(
    ("prices", "word"),
    [
        (None, "cannot be read"),
        (b"\xff", "UTF-8"),
        (b"[[price]]\nmodel = 5\n", "price[0].model"),
        (b"= nonsense", "toml"),
    ],
)
def test_a_price_table_that_cannot_be_used_is_a_problem_of_the_configuration(
    tmp_path: Path, prices: bytes | None, word: str
) -> None:
    if prices is not None:
        (tmp_path / "prices.toml").write_bytes(prices)
    (tmp_path / "asapd.toml").write_text('[metering.pricing]\nfile = "prices.toml"\n')
    with pytest.raises(ConfigError) as refused:
        load(tmp_path / "asapd.toml")
    assert word in str(refused.value)
    assert "prices.toml" in str(refused.value)


def test_a_public_key_that_is_no_point_of_the_curve_is_named(tmp_path: Path) -> None:
    path = tmp_path / "asapd.toml"
    path.write_text(AGENT.replace(public_base64(bytes(PUBLIC)), public_base64(bytes(32))))
    with pytest.raises(ConfigError) as refused:
        load(path)
    assert "agents[0].public_key" in str(refused.value)
    source = f'[[delegation.revocation_source]]\npublic_key = "{public_base64(bytes(32))}"\nissuers = ["*"]\n'
    path.write_text(source)
    with pytest.raises(ConfigError) as refused:
        load(path)
    assert "delegation.revocation_source[0].public_key" in str(refused.value)
    bad = f'public_key = "{public_base64(bytes(32))}"\n'
    path.write_text(f'[[audit.witness]]\nurl = "http://127.0.0.1:1"\n{bad}[[audit.witness_for]]\n{bad}')
    with pytest.raises(ConfigError) as refused:
        load(path)
    for place in ("audit.witness[0].public_key", "audit.witness_for[0].public_key"):
        assert place in str(refused.value)


# --- occupying


def test_the_first_start_makes_the_directory_and_an_identity_for_its_owner_only(
    tmp_path: Path, descriptors: list[int]
) -> None:
    premises = taken(tmp_path / "deep" / "state", descriptors)
    assert mode(premises.state_dir) == 0o700
    identity = premises.state_dir / "identity.pem"
    assert mode(identity) == 0o600
    assert load_private_pem(identity.read_bytes()) == premises.identity
    assert premises.database.exists()
    assert premises.admin_key == premises.state_dir / "admin.key"
    assert not list(premises.state_dir.glob("*.new"))


def test_later_starts_keep_the_identity(
    tmp_path: Path, descriptors: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    first = taken(tmp_path / "s", descriptors)
    first.release()
    descriptors.clear()
    (tmp_path / "s" / "identity.pem").chmod(0o644)
    second = taken(tmp_path / "s", descriptors)
    assert second.identity == first.identity
    assert "identity.pem can be read by others: chmod 600 it" in caplog.text


def test_the_command_line_goes_before_the_file_and_the_file_before_the_environment(
    tmp_path: Path, descriptors: list[int]
) -> None:
    named = config.Config(state_dir=str(tmp_path / "file"))
    environ = {"STATE_DIRECTORY": str(tmp_path / "environment")}
    for loaded, state_dir, expected in (
        (named, tmp_path / "line", "line"),
        (named, None, "file"),
        (config.Config(), None, "environment"),
    ):
        premises = occupy(loaded, state_dir, environ)
        descriptors += premises.locks
        assert premises.state_dir == tmp_path / expected


def test_the_sockets_directory_is_the_service_managers(tmp_path: Path, descriptors: list[int]) -> None:
    premises = taken(tmp_path / "s", descriptors, RUNTIME_DIRECTORY=str(tmp_path / "run"))
    assert premises.runtime_dir == tmp_path / "run"


def test_a_directory_in_use_is_refused_with_its_pid(tmp_path: Path, descriptors: list[int]) -> None:
    taken(tmp_path, descriptors)
    with pytest.raises(BootError, match=rf"is in use by pid {os.getpid()}: stop it first, or .*--state-dir"):
        occupy(config.Config(), tmp_path, {})


def test_what_a_dead_daemons_writer_still_holds_is_to_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """systemd tries again after every code but 2, which is for what another start does not mend."""
    died = subprocess.Popen([sys.executable, "-c", ""])
    died.wait()
    monkeypatch.setattr(boot, "LOCK_PATIENCE_S", 0.0)
    with (tmp_path / "asapd.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(f"{died.pid}\n")
        file.flush()
        expected = rf"still held by pid {os.getpid()}, the writer of a daemon that died \(pid {died.pid}\): .*kill -9"
        with pytest.raises(LeftBehindError, match=expected):
            occupy(config.Config(), tmp_path, {})
        assert run(None, tmp_path) == 70
        assert f"asapd: {tmp_path} is still held by pid {os.getpid()}" in capsys.readouterr().err
        file.truncate(0)
        assert run(None, tmp_path) == 2, "nobody is known to have died"


def test_a_start_that_waits_is_within_what_the_service_manager_waits() -> None:
    """And so long that it does not give up for good: ten starts within five minutes are too many for it."""
    unit = (Path(__file__).parents[2] / "systemd" / "asapd.service").read_text()
    settings = dict(line.split("=", 1) for line in unit.splitlines() if "=" in line and not line.startswith("#"))
    assert settings["RestartPreventExitStatus"] == "2"
    assert int(settings["TimeoutStartSec"]) > boot.LOCK_PATIENCE_S + 15
    assert settings["StartLimitIntervalSec"] == "5min"
    assert boot.LOCK_PATIENCE_S * int(settings["StartLimitBurst"]) > 5 * 60


def test_a_state_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("")
    with pytest.raises(BootError, match=r"the state directory cannot be used: .*/s: .*--state-dir"):
        occupy(config.Config(), tmp_path / "s", {})


def test_a_disk_without_any_room_is_no_bug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, _: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device (disk I/O error)", str(path))

    monkeypatch.setattr(boot, "prepare", fail)
    with pytest.raises(BootError, match=r"cannot be used: .*/asapd.db: No space .*; free some of the disk$"):
        occupy(config.Config(), tmp_path, {})
    assert occupied_by_nobody(tmp_path)


@needs_other_user
def test_a_directory_that_may_not_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(BootError, match="the state directory cannot be used"):
        occupy(config.Config(), tmp_path, {})


def occupied_by_nobody(state_dir: Path) -> bool:
    with (state_dir / "asapd.lock").open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_an_identity_that_is_no_key_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "identity.pem").write_text("nonsense")
    with pytest.raises(BootError, match=r"identity.pem is not an Ed25519 key .*restore it, or move it away"):
        occupy(config.Config(), tmp_path, {})
    assert (tmp_path / "identity.pem").read_text() == "nonsense"
    assert occupied_by_nobody(tmp_path)


def test_a_database_that_is_not_ours_or_newer_is_refused_and_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    connection = apsw.Connection(str(other / "asapd.db"))
    connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    with pytest.raises(BootError, match=r"asapd\.db"):
        occupy(config.Config(), other, {})
    newer = tmp_path / "newer"
    premises = occupy(config.Config(), newer, {})
    premises.release()
    connection = apsw.Connection(str(newer / "asapd.db"))
    connection.execute("PRAGMA user_version = 9999")
    connection.close()
    with pytest.raises(BootError, match="newer"):
        occupy(config.Config(), newer, {})
    assert occupied_by_nobody(newer)


def test_a_private_file_is_written_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("old")
    path.chmod(0o644)
    write_private(path, private_pem(SigningKey(b"k" * 32)))
    assert mode(path) == 0o600
    assert path.read_bytes() == private_pem(SigningKey(b"k" * 32))
    (tmp_path / "other.new").symlink_to(path)
    with pytest.raises(OSError, match="symbolic link"):
        write_private(tmp_path / "other", b"")


def test_there_is_patience_for_a_dead_owners_writer() -> None:
    assert boot.LOCK_PATIENCE_S >= 5


def test_nobody_gets_in_beside_a_daemon_whose_lock_file_was_deleted(tmp_path: Path, descriptors: list[int]) -> None:
    taken(tmp_path, descriptors)
    (tmp_path / "asapd.lock").unlink()
    with pytest.raises(BootError, match=r"asapd\.db is in use by another process"):
        occupy(config.Config(), tmp_path, {})
