"""What happens before anything runs: configuration, state directory, lock, identity; each failure in one line."""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nacl.signing import SigningKey

from asapd import config
from asapd.config import Config, ConfigError, Problem
from asapd.core.price_table import PriceTableError, parse_price_table
from asapd.core.pricing import PriceTable
from asapd.daemon.targets import read_secrets
from asapd.store import lock
from asapd.store.database import prepare
from asapd.store.migrations import DatabaseTooNewError, NotOurDatabaseError
from asapd.store.units.agents import AgentRecord
from asapd.wire.keys import KeyFormatError, load_private_pem, load_public, private_pem

# 40: a start may take 60 s under systemd (TimeoutStartSec=), which gives up after ten within five minutes: with such
# starts it never does.
LOCK_PATIENCE_S = 40.0
WAIT_FOR_WRITER = (
    "it is finishing its last commit. Start again when it has ended; if it hangs, end it with kill -9, which loses "
    "nothing that was acknowledged"
)
_FULL = frozenset((errno.ENOSPC, errno.EDQUOT))
_log = logging.getLogger("asapd")


class BootError(Exception):
    """The daemon cannot start; the message says what happened and what to do about it."""


class LeftBehindError(BootError):
    """The writer of a daemon that died is still there: its end is all that is needed, so another start may go well."""


@dataclass(frozen=True)
class Loaded:
    """A configuration together with what the files it names hold. `text` is of the file, None without one."""

    config: Config
    prices: PriceTable
    pinned: dict[str, bytes]
    agents: list[AgentRecord]
    secrets: dict[Path, bytes] = field(default_factory=dict)
    text: str | None = None


def load(path: Path | None) -> Loaded:
    """Read the configuration and the price table it names; without a path, the defaults.

    Raises:
        ConfigError: with every problem of either file.
    """
    text = None if path is None else config.read(path)
    loaded = config.parse("") if path is None or text is None else config.parse_at(path, text)
    name = "<defaults>" if path is None else str(path)
    prices = _prices(loaded.metering.pricing.file)
    pinned: dict[str, bytes] = {}
    problems: list[Problem] = []
    for index, agent in enumerate(loaded.agents):
        if agent.public_key is not None:
            try:
                pinned[agent.id] = load_public(agent.public_key)
            except KeyFormatError as error:
                problems.append(Problem(None, f"agents[{index}].public_key", str(error)))
    others = [
        *(
            (f"delegation.revocation_source[{n}]", one.public_key)
            for n, one in enumerate(loaded.delegation.revocation_sources)
        ),
        *((f"audit.witness[{n}]", one.public_key) for n, one in enumerate(loaded.audit.witnesses)),
        *((f"audit.witness_for[{n}]", one.public_key) for n, one in enumerate(loaded.audit.witness_for)),
    ]
    for place, key in others:
        try:
            load_public(key)
        except KeyFormatError as error:
            problems.append(Problem(None, f"{place}.public_key", str(error)))
    if problems:
        raise ConfigError(problems, name)
    for remark in config.remarks(loaded):
        _log.warning("%s: %s", name, remark)
    secrets = read_secrets(loaded.alerts, name)
    return Loaded(loaded, prices, pinned, [_record(agent) for agent in loaded.agents], secrets, text)


def _prices(path: Path | None) -> PriceTable:
    if path is None:
        return PriceTable()
    try:
        return parse_price_table(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = f"the price table cannot be read: {error.strerror or error}"
        raise ConfigError([Problem(None, "metering.pricing.file", reason)], str(path)) from None
    except UnicodeDecodeError:
        raise ConfigError([Problem(None, "file", "is not UTF-8 text")], str(path)) from None
    except PriceTableError as error:
        found = [Problem(None, problem.field, problem.reason) for problem in error.problems]
        raise ConfigError(found, str(path)) from None


def _record(agent: config.Agent) -> AgentRecord:
    sla: dict[str, object] | None = None
    if agent.sla is not None:
        terms = agent.sla
        sla = {
            "availability": _percent(terms.availability_percent),
            "max_latency_p95_ms": terms.max_latency_p95_ms,
            "max_error_rate": _percent(terms.max_error_rate_percent),
            "support_hours": terms.support_hours,
        }
    url = "" if agent.url is None else agent.url
    return AgentRecord(agent.id, url, agent.tenant, agent.public_key, agent.tier, sla, agent.health)


def _percent(value: object) -> str | None:
    return None if value is None else f"{value}%"


@dataclass(frozen=True)
class Premises:
    """The state directory, locked, with what the first start puts there."""

    state_dir: Path
    runtime_dir: Path
    locks: tuple[int, ...]
    identity: SigningKey

    def release(self) -> None:
        """Let others have it, now that nothing of ours is open in it."""
        for descriptor in self.locks:
            os.close(descriptor)

    @property
    def database(self) -> Path:
        """The one file that holds everything."""
        return self.state_dir / "asapd.db"

    @property
    def backup(self) -> Path:
        """Where a copy of it is while it is made."""
        return self.state_dir / "asapd.db.backup"

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints of the audit log stand as text."""
        return self.state_dir / "checkpoints.log"

    @property
    def archives(self) -> Path:
        """Where what retention takes out of the audit log is written first."""
        return self.state_dir / "audit"

    @property
    def versions(self) -> Path:
        """Where the configurations are that were accepted."""
        return self.state_dir / "config"

    @property
    def admin_key(self) -> Path:
        """Where the first API key is written."""
        return self.state_dir / "admin.key"


def occupy(loaded: Config, state_dir: Path | None, environ: Mapping[str, str]) -> Premises:
    """Make and lock the state directory, and bring the database up to date.

    Raises:
        BootError: with what to do.
        LeftBehindError: when all that was to be done is to wait longer.
    """
    is_root = os.geteuid() == 0
    chosen = (state_dir or loaded.state_dir or config.default_state_dir(environ, is_root)).absolute()
    try:
        chosen.mkdir(mode=0o700, parents=True, exist_ok=True)
        if chosen.stat().st_mode & 0o022:
            raise BootError(f"others may write in the state directory {chosen}: chmod go-w it, or name another")
        locks = [
            lock.acquire(
                chosen / "asapd.lock", patience_s=LOCK_PATIENCE_S, monotonic_s=time.monotonic, sleep=time.sleep
            )
        ]
        try:
            locks.append(lock.hold(chosen / "asapd.db", time.sleep))
            identity = _identity(chosen / "identity.pem")
            prepare(chosen / "asapd.db", identity)
            (chosen / "asapd.db.backup").unlink(missing_ok=True)  # what a daemon that was killed began to copy
        except BaseException:
            for descriptor in locks:
                os.close(descriptor)
            raise
    except lock.LeftLockedError as error:
        raise LeftBehindError(f"{error}: {WAIT_FOR_WRITER}") from None
    except lock.LockedError as error:
        raise BootError(f"{error}: stop it first, or choose another directory with --state-dir") from None
    except (DatabaseTooNewError, NotOurDatabaseError) as error:
        raise BootError(str(error)) from None
    except OSError as error:
        what = f"{error.filename or chosen}: {error.strerror or error}"
        todo = "free some of the disk" if error.errno in _FULL else "name a writable one with --state-dir"
        raise BootError(f"the state directory cannot be used: {what}; {todo}") from None
    return Premises(chosen, config.default_runtime_dir(environ, is_root, chosen), tuple(locks), identity)


def _identity(path: Path) -> SigningKey:
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        key = SigningKey(os.urandom(32))
        write_private(path, private_pem(key))
        _log.info("made the daemon's own key: %s", path)
        return key
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        _log.warning("%s can be read by others: chmod 600 it", path)
    try:
        return load_private_pem(text)
    except KeyFormatError as error:
        raise BootError(
            f"{path} is not an Ed25519 key ({error}): restore it, or move it away to get a new one"
        ) from None


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read, whole or not at all."""
    fresh = path.with_name(f"{path.name}.new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    try:
        os.fchmod(descriptor, 0o600)
        left = memoryview(content)
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    fresh.rename(path)
