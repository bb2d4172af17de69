"""`asapctl doctor`: looks at the host, the files and the daemon, and says what to mend."""

from __future__ import annotations

import ctypes
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from asapd import __version__
from asapd.cli import checkup
from asapd.cli.checkup import Finding, State
from asapd.cli.door import Door, RefusedError
from asapd.cli.options import Session, asks_daemon
from asapd.cli.outcome import Exit, Failure
from asapd.cli.show import cell, show_json

_SYNCS = 5
_TIMEX_BYTES = 256  # the kernel's structure has 208
_TIME_ERROR = 5
_STYLES = {State.OK: "green", State.SKIPPED: "bright_black", State.WARNING: "yellow", State.ERROR: "red"}


@click.command()
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Check this file too, for a daemon that does not run.",
)
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where to look while no daemon runs, else the default; a daemon that runs says where its own is.",
)
@asks_daemon
def doctor(session: Session, config_file: Path | None, state_dir: Path | None) -> int:
    """Check daemon, host and files, and say what to mend.

    Run it as root or the daemon's user: others cannot look into the state directory. It writes nothing but a file of a
    page there, which it removes.

    \b
    Exit codes: 0 nothing has to be mended (there may be warnings); 1 something has;
    3 the daemon cannot be reached, all else was checked; 4 this user may not ask it.

    \b
    Examples:
      asapctl doctor
      asapctl doctor --config /etc/asapd/asapd.toml
    """
    from asapd.cli.config_check import check
    from asapd.config import default_state_dir, read_duration
    from asapd.core.types import SECOND_US

    config, problems = (None, []) if config_file is None else check(config_file)
    found, code = _reach(session.door)
    home = state_dir or (config and config.state_dir) or default_state_dir(os.environ, os.geteuid() == 0)
    keys = None if config is None else config.delegation.keys_dir
    if code is Exit.DONE:
        try:
            status = session.door.get("/status")
            home = Path(status["store"]["path"]).parent
            shown = session.door.get("/config")
            keys = shown["config"]["delegation"].get("keys_dir")
            found += _of_daemon(session.door, status, shown)
            every_s = read_duration(shown["config"]["audit"]["checkpoint_every"]) / SECOND_US
            found += checkup.audit(status, every_s)
        except RefusedError as refused:
            why, do = "not all of it could be checked", "see its log; of an older asapd, use the asapctl beside it"
            found.append(Finding("daemon", State.ERROR, f"asapd refused to tell: {refused}", why, do))
    found += _of_files(home)
    found += _of_keys(home / "keys" if keys is None else Path(keys))
    found.append(checkup.clock(_is_synchronised()))
    if config_file is not None:
        found += _of_config(config_file, problems)
    if code is Exit.DONE and any(finding.state is State.ERROR for finding in found):
        code = Exit.NO
    _show(session, found, code)
    return code


def _reach(door: Door) -> tuple[list[Finding], Exit]:
    try:
        health = door.get("/healthz")
    except Failure as failure:
        if failure.code is Exit.FORBIDDEN:
            why, do = "of the daemon nothing could be checked", "run this as root, or join the socket's group"
        else:
            why, do = "nothing is recorded, nothing is allowed", "its log says why it ended; start it"
        return [Finding("daemon", State.ERROR, str(failure), why, do)], failure.code
    found = [Finding("daemon", State.OK, f"answers at {door.path}"), checkup.version(__version__, health["version"])]
    return [*found, checkup.socket_mode(door.path, door.path.stat().st_mode)], Exit.DONE


def _of_daemon(door: Door, status: dict[str, Any], shown: dict[str, Any]) -> Iterator[Finding]:
    yield from checkup.readiness(status)
    yield from checkup.configuration(shown)
    if shown["path"] is not None and not shown["errors"]:
        yield from _unread(door, shown)
    models: list[str] = []
    unpriced = status["usage"]["unpriced_events"]
    if unpriced:
        rows = door.rows("/usage/aggregate", group_by="model")
        models = [row["model"] or "no model" for row in rows if row["unpriced_events"]]
    yield checkup.prices(models, unpriced)
    yield from checkup.alerts(status["alerts"]["targets"])
    yield from checkup.agents(status)


def _unread(door: Door, shown: dict[str, Any]) -> Iterator[Finding]:
    try:
        different = door.get("/config/diff")
    except RefusedError as refused:
        for problem in refused.problem.get("problems") or [str(refused)]:
            why = "it was changed since it was read: a reload or a restart would fail"
            yield Finding("config", State.ERROR, problem, why, "mend it, or `asapctl config rollback`")
        return
    waiting = set(shown["waiting_for_restart"])
    changed = [row["setting"] for row in different["changes"] if row["setting"] not in waiting]
    finding = checkup.unread_changes(shown["path"], changed)
    if finding is not None:
        yield finding


def _of_files(home: Path) -> Iterator[Finding]:
    try:
        names = {entry.name for entry in os.scandir(home)}
    except OSError as error:
        what = f"{home} cannot be looked into: {error.strerror}: disk, files and fsync were not checked"
        yield Finding("files", State.SKIPPED, what, do="run this as root or as the daemon's user, or name --state-dir")
        return
    room = os.statvfs(home)
    yield checkup.disk(home, room.f_bavail * room.f_frsize, room.f_blocks * room.f_frsize)
    yield checkup.private("files", home, home.stat().st_mode, 0o022, "chmod go-w")
    for name in ("identity.pem", "admin.key", "asapd.db"):
        if name in names:
            yield _of_private("files", home / name)
    if "asapd.db-wal" in names:
        with suppress(FileNotFoundError):  # a daemon that stops takes it away
            yield checkup.wal((home / "asapd.db-wal").stat().st_size)
    yield _fsync(home)


def _of_keys(directory: Path) -> Iterator[Finding]:
    try:
        mode, keys = directory.stat().st_mode, sorted(directory.glob("*.pem"))
    except FileNotFoundError:
        return  # asapd makes it when it first needs it
    except OSError as error:
        yield Finding("keys", State.SKIPPED, f"{directory} cannot be looked into: {error.strerror}")
        return
    yield checkup.private("keys", directory, mode, 0o022, "chmod go-w")
    for key in keys:
        yield _of_private("keys", key)


def _of_private(check: str, file: Path) -> Finding:
    try:
        return checkup.private(check, file, file.stat().st_mode, 0o077, "chmod 600")
    except OSError as error:
        what = f"{file} is there and cannot be looked at: {error.strerror}"
        why = "a link that leads nowhere, for example, is nothing to asapd"
        return Finding(check, State.ERROR, what, why, f"put back what it was, or remove it: `ls -l {file}`")


def _fsync(home: Path) -> Finding:
    taken_s = []
    try:
        with tempfile.TemporaryFile(dir=home) as file:
            for _ in range(_SYNCS):
                file.write(bytes(4096))
                file.flush()
                began_s = time.perf_counter()
                os.fsync(file.fileno())
                taken_s.append(time.perf_counter() - began_s)
    except OSError as error:
        what = f"nothing can be written in {home}: {error.strerror}"
        return Finding(
            "fsync", State.WARNING, what, "asapd may not be able to either", "make room, or run this as root"
        )
    return checkup.fsync(statistics.median(taken_s))


def _of_config(file: Path, problems: list[str]) -> Iterator[Finding]:
    for problem in problems:
        yield Finding("config", State.ERROR, problem, "asapd would not start with it", "mend it: `asapd check-config`")
    if not problems:
        yield Finding("config", State.OK, f"{file} is valid")


def _is_synchronised() -> bool | None:
    """What the kernel says; None where it cannot be asked."""
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state != _TIME_ERROR


def _show(session: Session, found: list[Finding], code: Exit) -> None:
    if session.as_json:
        show_json({"ok": code is Exit.DONE, "findings": found})
        return
    for finding in found:
        state = click.style(f"{finding.state:8}", fg=_STYLES[finding.state])
        click.echo(f"{state} {finding.check:10} {cell(finding.what)}")
        for name, text in (("why", finding.why), ("do", finding.do)):
            if text:
                click.echo(f"{'':20}{name + ':':5}{cell(text)}")
    counts = {state: sum(finding.state is state for finding in found) for state in State}
    click.echo(f"{counts[State.ERROR]} to mend, {counts[State.WARNING]} warnings, {counts[State.OK]} good", err=True)
