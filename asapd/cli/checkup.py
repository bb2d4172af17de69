"""What `asapctl doctor` makes of what it sees: findings, each with what is so, why that matters, and what to do."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec


class State(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    SKIPPED = "skipped"
    WARNING = "warning"
    ERROR = "error"


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at. `why` and `do` are empty where there is nothing to mend."""

    check: str
    state: State
    what: str
    why: str = ""
    do: str = ""


SLOW_FSYNC_S = 0.05
"""Every commit waits for one: beyond it decisions take longer than users wait gladly."""
LARGE_WAL_BYTES = 256 << 20
"""It is folded all the time, and at 64 MiB by a commit: at four times that, something holds it."""
LOW_DISK_BYTES, NO_DISK_BYTES = 1 << 30, 128 << 20
LOW_DISK_SHARE = 0.05
_MIB = 1 << 20


def _ok(check: str, what: str) -> Finding:
    return Finding(check, State.OK, what)


def version(own: str, daemon: str) -> Finding:
    """Whether the programs are of one version."""
    if own == daemon:
        return _ok("version", f"asapctl and asapd are {own}")
    return Finding(
        "version",
        State.WARNING,
        f"asapd is {daemon}, asapctl is {own}",
        "commands may ask for what the other does not know",
        "restart asapd after an upgrade, or use the asapctl beside it",
    )


def readiness(status: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether every part of the daemon is up, and stays so."""
    if status["ready"]:
        yield _ok("ready", f"up for {int(status['uptime_seconds'])} s, pid {status['pid']}")
    else:
        yield Finding("ready", State.ERROR, "asapd is not ready", "it starts, stops, or a part is down", "see its log")
    for name, actor in status["actors"].items():
        if actor["state"] != "running" or actor["last_error"]:
            yield Finding(
                "actors",
                State.WARNING if actor["state"] == "running" else State.ERROR,
                f"{name} is {actor['state']}, after {actor['restarts']} restarts: {actor['last_error'] or 'no error'}",
                "a part that crashes makes callers wait and ask again",
                "see the log for the crash, and report it",
            )


def socket_mode(path: Path, mode: int) -> Finding:
    """Whether others than the group may open the admin socket; what it takes to open one is the right to write."""
    if mode & stat.S_IWOTH:
        return Finding(
            "socket",
            State.WARNING,
            f"every user may connect to {path}, mode {stat.S_IMODE(mode):04o}",
            "asapd refuses those who are not of its group, and they can take its connections nevertheless",
            'set admin.mode = "0660" and restart asapd',
        )
    return _ok("socket", f"{path}, mode {stat.S_IMODE(mode):04o}")


def private(what: str, path: Path, mode: int, loose: int, do: str) -> Finding:
    """Whether none of the permission bits `loose` is on a file or directory."""
    if mode & loose:
        reason = "others than its owner may get at it" if loose & 0o044 else "others than its owner may change it"
        return Finding(what, State.ERROR, f"{path} has mode {stat.S_IMODE(mode):04o}", reason, f"{do} {path}")
    return _ok(what, f"{path}, mode {stat.S_IMODE(mode):04o}")


def clock(is_synchronised: bool | None) -> Finding:
    """Whether the kernel says that the clock is held to others; None where it does not tell."""
    if is_synchronised is None:
        return Finding("clock", State.SKIPPED, "the kernel does not tell whether the clock is synchronised")
    if is_synchronised:
        return _ok("clock", "synchronised")
    return Finding(
        "clock",
        State.WARNING,
        "the clock is not synchronised",
        "events of other hosts are refused as too late or in the future, and tokens expire too early or too late",
        "run a time service, such as `systemctl enable --now systemd-timesyncd`",
    )


def disk(path: Path, free_bytes: int, total_bytes: int) -> Finding:
    """Whether there is room."""
    what = f"{free_bytes // _MIB} MiB of {total_bytes // _MIB} MiB are free under {path}"
    if free_bytes >= LOW_DISK_BYTES and free_bytes >= total_bytes * LOW_DISK_SHARE:
        return _ok("disk", what)
    state = State.ERROR if free_bytes < NO_DISK_BYTES else State.WARNING
    return Finding(
        "disk",
        state,
        what,
        "on a full disk nothing is recorded and everything is refused (503)",
        "make room, move state_dir, or shorten retention.usage: `asapctl retention --dry-run` says what would go",
    )


def wal(size_bytes: int) -> Finding:
    """Whether the write-ahead log is folded into the database."""
    what = f"the write-ahead log has {size_bytes // _MIB} MiB"
    if size_bytes <= LARGE_WAL_BYTES:
        return _ok("wal", what)
    return Finding(
        "wal",
        State.WARNING,
        what,
        "it is folded into the database while nobody reads an old state of that: a long query or export keeps it",
        "wait for exports to end, and see whether another program has the database open; a restart folds it",
    )


def fsync(median_s: float) -> Finding:
    """Whether the disk is made durable fast enough."""
    what = f"making a page durable takes {median_s * 1000:.1f} ms"
    if median_s <= SLOW_FSYNC_S:
        return _ok("fsync", what)
    return Finding(
        "fsync",
        State.WARNING,
        what,
        "every acknowledgement waits for one",
        'put state_dir on a faster disk; store.synchronous = "normal" may lose commits in a power cut',
    )


def configuration(shown: Mapping[str, Any]) -> Iterator[Finding]:
    """What `GET /config` says."""
    for problem in shown["errors"]:
        yield Finding(
            "config",
            State.ERROR,
            f"the file was refused: {problem}",
            "what was in force before still is, and a restart would fail",
            "mend the file and run `asapctl reload`, or go back with `asapctl config rollback`",
        )
    for name in shown["waiting_for_restart"]:
        what = f"{name} waits for a restart"
        yield Finding("config", State.WARNING, what, "what is in force differs from the file", "restart asapd")
    for name in shown["without_effect"]:
        what = f"{name} is not acted on by this version"
        yield Finding("config", State.WARNING, what, "nothing comes of it", "take it out")
    if not (shown["errors"] or shown["waiting_for_restart"] or shown["without_effect"]):
        yield _ok("config", "the defaults" if shown["path"] is None else f"{shown['path']}, version {shown['version']}")


def unread_changes(path: str, settings: Sequence[str]) -> Finding | None:
    """What stands in the file and was not read."""
    if not settings:
        return None
    more = f" and {len(settings) - 3} more" if len(settings) > 3 else ""
    what = f"{path} was changed and not read: {', '.join(settings[:3])}{more}"
    why = "a restart would apply it, at a time nobody chose"
    return Finding("config", State.WARNING, what, why, "see `asapctl config diff`, then `asapctl reload`")


def audit(status: Mapping[str, Any], every_s: float) -> Iterator[Finding]:
    """What the status says of the log, of which a checkpoint is made so often."""
    log = status["audit"]
    broken = "the audit log proves nothing until that is explained"
    for alarm in log["alarms"]:
        do = "run `asapctl audit verify`, and keep a copy of the state directory"
        yield Finding("audit", State.ERROR, alarm, broken, do)
    verified = log["verified"]
    if verified is None:
        yield Finding("verify", State.SKIPPED, "the log was not verified since the start")
    elif verified["valid"]:
        yield _ok("verify", f"verified through entry {verified['seq']} at {verified['at']}")
    else:
        yield Finding("verify", State.ERROR, str(verified["reason"]), broken, "run `asapctl audit verify`")
    failed = log.get("without_verdict")  # an earlier asapd does not say
    if failed is not None:
        what = f"the walk that ended at {failed['at']} found nothing out: {failed['reason']}"
        unseen = "what was changed since the one before it would not be seen"
        yield Finding("verify", State.WARNING, what, unseen, "see to that, then run `asapctl audit verify`")
    behind = log["seq"] - (log["checkpoint"] or 0)
    # Between two checkpoints there are entries: only when they wait for several intervals, none is made.
    waiting_s = log.get("unsealed_seconds") or 0.0  # an earlier asapd does not say
    if waiting_s > 3 * every_s + 60:
        yield Finding(
            "checkpoint",
            State.WARNING,
            f"{behind} entries have no checkpoint, the first of them for {int(waiting_s)} s",
            "what is cut off behind the last checkpoint cannot be seen",
            "see the sealer in `asapctl status`, and the log",
        )
    else:
        yield _ok("checkpoint", f"over {log['checkpoint'] or 0} of {log['seq']} entries")


def prices(models: Sequence[str], unpriced_events: int) -> Finding:
    """Whether every event has a cost."""
    if not unpriced_events:
        return _ok("prices", "every event has a cost")
    named = ", ".join(models[:5]) or "of no model"
    return Finding(
        "prices",
        State.WARNING,
        f"{unpriced_events} events have no known cost: {named}{' and others' if len(models) > 5 else ''}",
        "sums and budgets in money lack them",
        "add the models that are not in the price table, `asapctl reload`, then `asapctl prices reprice`; for those "
        "that are, have agents tell `tokens_in` and `tokens_out`, or `cost_usd`, of every call",
    )


def alerts(targets: Iterable[Mapping[str, Any]]) -> Iterator[Finding]:
    """Whether alerts reach whom they should."""
    found = False
    for target in targets:
        if target["state"] == "failing":
            found = True
            since = f"fails since {target['failing_since']}, {target['backlog']} alerts wait"
            yield Finding(
                "alerts",
                State.ERROR,
                f"{target['name']} {since}: {target['last_error']}",
                "nobody hears of breaches there",
                "mend the receiver: what waits then comes, in order",
            )
        if target["dead_letters"]:
            found = True
            yield Finding(
                "alerts",
                State.WARNING,
                f"{target['dead_letters']} alerts for {target['name']} were given up",
                "whoever is behind it has not heard of them",
                "see `asapctl alerts dead`, and have them delivered again",
            )
    if not found:
        yield _ok("alerts", "none is held up or given up")


def agents(status: Mapping[str, Any]) -> Iterator[Finding]:
    """Agents and keys that something is wrong with."""
    standing, keys = status["agents"], status["keys"]
    for one in standing["not_probed"]:
        what = f"{one} is not probed"
        yield Finding("agents", State.WARNING, what, "its uptime is unknown", f"see `asapctl agents show {one}`")
    for one in standing["sla_errors"]:
        why = "it is held to nothing, or to less than it promises"
        yield Finding("agents", State.WARNING, f"{one['agent']}: {one['error']}", why, "mend its manifest")
    for problem in keys["problems"]:
        why = "delegations of that agent cannot be signed"
        yield Finding("keys", State.ERROR, problem, why, "mend it, then `asapctl reload`")
    for claim in keys["unconfirmed"]:
        yield Finding(
            "keys",
            State.WARNING,
            f"{claim['agent']} signs with the key {claim['kid']} since {claim['since']}, which nobody confirmed",
            "its tokens are refused; or somebody else speaks for it",
            "ask its owner, then `asapctl agents keys import` it, or dismiss it",
        )
    if not (standing["not_probed"] or standing["sla_errors"]):
        yield _ok("agents", f"{standing['total']} in the directory")
    if not (keys["problems"] or keys["unconfirmed"]):
        yield _ok("keys", "nothing to mend")
