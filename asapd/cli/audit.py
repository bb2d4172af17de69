"""`asapctl audit`: the log of everything that was recorded."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from asapd.cli.door import segment
from asapd.cli.options import Session, asks_daemon, moment
from asapd.cli.outcome import Exit, Failure
from asapd.cli.show import encode, show_json, show_table
from asapd.cli.written import written
from asapd.core.audit import Fault

_OUT = click.Path(path_type=Path, dir_okay=False, allow_dash=True)


@click.group()
def audit() -> None:
    """The audit log: read, export, verify."""


def _erased(count: int) -> str:
    return f" ({count} of them with their content erased)" if count else ""


def _entry_or_moment(text: str) -> str:
    return text if text.isascii() and text.isdecimal() else moment(text)


@audit.command()
@click.option(
    "--since", type=_entry_or_moment, metavar="SEQ|TIME", help="Only what is behind this entry, or from this time on."
)
@click.option(
    "--against",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    metavar="FILE",
    help="Hold the log to every checkpoint in this file as well: what `audit checkpoint` wrote, or a checkpoints.log.",
)
@asks_daemon
def verify(session: Session, since: str | None, against: Path | None) -> int:
    """Check the whole log.

    The daemon walks all entries, holds them to every checkpoint it has signed, and compares them with what they record;
    the exit code is 1 when anything is wrong, and the first bad place is named.

    \b
    Examples:
      asapctl audit verify
      asapctl audit verify --against checkpoint.txt
      asapctl audit verify --since 24h
    """
    first, *rest = [None] if against is None else _checkpoints_in(against)
    verdict = _walked(session, first, since=since)
    for part in rest:
        if verdict["valid"]:
            # The log was walked once: the nodes that hold it now hold these checkpoints as well.
            more = _walked(session, part, since=verdict["last_seq"], reconcile="false")
            counts = {name: count + more["checkpoints"][name] for name, count in verdict["checkpoints"].items()}
            verdict = {**(verdict if more["valid"] else more), "checkpoints": counts}
    if session.as_json:
        show_json(verdict)
        return Exit.DONE if verdict["valid"] else Exit.NO
    bad, reconciled = verdict["first_bad"], verdict["reconciled"] or {}
    findings = [named for table in reconciled.values() for named in table["named"]]
    if bad is not None:
        click.echo(f"bad: {Fault(bad['seq'], bad['id'], bad['reason'])}")
    elif findings:
        click.echo(f"bad: {sum(table['findings'] for table in reconciled.values())} records and entries do not agree")
    else:
        held = verdict["checkpoints"]
        click.echo(
            f"ok: {verdict['verified']} entries{_erased(verdict['erased'])}, "
            f"the last is {verdict['last_seq']} with hash {verdict['last_hash']}; "
            f"{held['held']} checkpoints agree{', those of the file too' if held['remembered'] else ''}"
        )
    for finding in findings:
        click.echo(f"  {finding}")
    retired = reconciled.get("erasure", {}).get("retired")
    if retired:
        click.echo(
            f"the content of {retired} entries was retired: it is in the archives that retention wrote", err=True
        )
    click.echo(verdict["note"], err=True)
    return Exit.DONE if verdict["valid"] else Exit.NO


_PART_BYTES = 1 << 20
"""Of a file of checkpoints in one request: some five thousand."""


def _checkpoints_in(file: Path) -> list[bytes]:
    """What is in a file of checkpoints, in parts of one request each; whether it is any, the daemon says."""
    import msgspec

    from asapd.wire.checkpoint import split_checkpoints

    content = file.read_bytes()
    if not content.strip():
        raise Failure(Exit.USAGE, f"{file} is empty: it holds no checkpoint")
    try:
        if content.lstrip().startswith(b"{"):  # one as `audit checkpoint --json` writes it
            content = str(msgspec.json.decode(content)["note"]).encode()
        notes = list(split_checkpoints(content.decode().splitlines(keepends=True)))
    except (UnicodeDecodeError, msgspec.DecodeError, KeyError):
        return [content]
    parts = [b""]
    for note in notes:
        if parts[-1] and len(parts[-1]) + len(note) > _PART_BYTES:
            parts.append(b"")
        parts[-1] += note.encode()
    return parts


def _walked(session: Session, kept: bytes | None, **parameters: Any) -> dict[str, Any]:
    """The verdict of one walk, whose progress a terminal is shown."""
    verdict: dict[str, Any] = {}
    for step in session.door.lines("/audit/verify", kept, format="ndjson", **parameters):
        verdict = step
        if "entries" in step and sys.stderr.isatty():
            click.echo(f"\r{step['verified']:,} of {step['entries']:,} entries", err=True, nl=False)
    if "valid" not in verdict:
        raise Failure(Exit.UNREACHABLE, str(verdict.get("detail", "the walk ended before it was done: ask again")))
    return verdict


_FILTERS = (
    click.option("--actor", help="Only what this one caused."),
    click.option("--subject", help="Only what is about this."),
    click.option("--event-type", metavar="TYPE", help="Only this type, such as usage.recorded."),
    click.option("--task", metavar="ID", help="Only what is about this task."),
    click.option("--agent", metavar="URN", help="Only what is about this agent."),
    click.option("--since", "start", type=moment, metavar="TIME", help="From then on: 2026-11-20T09:00:00Z, or 24h."),
    click.option("--until", "end", type=moment, metavar="TIME", help="Before then."),
)


def _filtered(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the filters of the log."""
    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(_FILTERS), command)


@audit.command()
@_filtered
@click.option(
    "--limit", type=click.IntRange(min=1), default=100, show_default=True, help="At most so many, the newest."
)
@asks_daemon
def log(session: Session, limit: int, **filters: str | None) -> None:
    """Show entries, the newest last.

    \b
    Examples:
      asapctl audit log --limit 20
      asapctl audit log --event-type key.created --since 30d
    """
    rows = list(session.door.rows("/audit/logs", limit=limit, order="desc", **filters))[::-1]
    if session.as_json:
        show_json({"data": rows, "count": len(rows), "next_cursor": None})
        return
    show_table(
        ("seq", "timestamp", "event", "actor", "subject", "details"),
        [
            (
                row["seq"],
                row["timestamp"],
                row["event_type"],
                row["actor"],
                row["subject"],
                encode(row["details"]).decode(),
            )
            for row in rows
        ],
    )


@audit.command()
@click.argument("file", type=_OUT, default="-")
@click.option(
    "--format", "form", type=click.Choice(("ndjson", "json", "csv", "syslog")), help="ndjson unless --json is given."
)
@_filtered
@asks_daemon
def export(session: Session, file: Path, form: str | None, **filters: str | None) -> None:
    """Write out the log, all of it unless filtered.

    To FILE or to stdout; a whole export as json or ndjson is checked by `asapd verify FILE` anywhere, without a daemon.
    csv is safe to open in a spreadsheet, and so cannot be verified; syslog has lines of RFC 5424.

    \b
    Examples:
      asapctl audit export audit.ndjson
      asapctl audit export --format csv --since 30d > audit.csv
    """
    chosen = form or ("json" if session.as_json else "ndjson")
    with written(file) as out:
        headers, parts = session.door.download("/audit/export", format=chosen, **filters)
        for part in parts:
            out.write(part)
    if str(file) != "-":
        click.echo(f"{file}: entries up to {headers['asapd-snapshot']}", err=True)


def _write(file: Path, content: bytes) -> None:
    with written(file) as out:
        out.write(content)


@audit.command()
@click.argument("file", type=_OUT, default="-")
@asks_daemon
def checkpoint(session: Session, file: Path) -> None:
    """Write out a signed checkpoint of the log as it is now.

    To FILE or to stdout. Keep it where this host cannot change it: `audit verify --against FILE` later holds the log to
    it, and `asapd verify FILE --public-key KEY` checks the signature.

    \b
    Examples:
      asapctl audit checkpoint checkpoint.txt
      asapctl audit checkpoint --json
    """
    sealed = session.door.get("/audit/checkpoint", format="json")
    _write(file, encode(sealed) + b"\n" if session.as_json else sealed["note"].encode())


@audit.command()
@click.argument("entry", required=False)
@click.argument("file", type=_OUT, default="-")
@click.option(
    "--from", "first", type=click.IntRange(min=0), metavar="SIZE", help="Prove that the log went on from there."
)
@click.option(
    "--to", "second", type=click.IntRange(min=0), metavar="SIZE", help="With --from: up to there, not to now."
)
@asks_daemon
def proof(session: Session, entry: str | None, file: Path, first: int | None, second: int | None) -> None:
    """Write out what proves that an entry is in the log.

    ENTRY is an id or a number. To FILE or to stdout, as a tlog-proof, or as JSON with --json. With --from instead of
    ENTRY: what proves that the log of so many entries is the beginning of the log as it is now. Both are checked with
    `asapd verify`.

    \b
    Examples:
      asapctl audit proof aud_01JD8Z4M7Q0000000000000000 entry.tlog-proof
      asapctl audit proof --from 1000
    """
    if (entry is None) == (first is None):
        raise click.UsageError("give an ENTRY or --from, one of them")
    if first is not None:
        _write(file, encode(session.door.get("/audit/proof/consistency", **{"from": first, "to": second})) + b"\n")
        return
    if session.as_json:
        _write(file, encode(session.door.get("/audit/proof/inclusion", id=entry)) + b"\n")
        return
    _, parts = session.door.download("/audit/proof/inclusion", id=entry, format="tlog-proof")
    _write(file, b"".join(parts))


@audit.command()
@click.argument("task")
@click.argument("file", type=_OUT, default="-")
@asks_daemon
def receipt(session: Session, task: str, file: Path) -> None:
    """Write out a signed receipt of what TASK used and cost.

    To FILE or to stdout, as JSON: the sums, every entry behind them with what proves it to be in the log, and the
    delegations it was done under. `asapd verify FILE --public-key KEY` checks all of it.

    \b
    Example:
      asapctl audit receipt task-7f3a receipt.json
    """
    with written(file) as out:
        _, parts = session.door.download(f"/tasks/{segment(task)}/receipt")
        out.writelines(parts)
        out.write(b"\n")


@audit.command()
@click.option("--agent", required=True, metavar="URN", help="Whose.")
@click.option(
    "--since", "start", type=moment, required=True, metavar="TIME", help="From then on: an RFC 3339 time, or 30d."
)
@click.option("--until", "end", type=moment, metavar="TIME", help="Before then; until now unless given.")
@click.option("--out", "file", type=_OUT, default="-", metavar="FILE", help="Where to write it; stdout unless given.")
@asks_daemon
def pack(session: Session, agent: str, start: str, end: str | None, file: Path) -> None:
    """Write out signed evidence of what an agent did in a period.

    One file, as JSON: every entry of the log about it with its proof, checkpoints, reports of its SLA by day, its
    breaches with their evidence, its delegations, and hashes of the configuration. `asapd verify FILE --public-key KEY`
    checks all of it on any machine, and names the first bad part.

    \b
    Example:
      asapctl audit pack --agent urn:asap:agent:translator --since 30d --out pack.json
    """
    with written(file) as out:
        _, parts = session.door.download("/audit/pack", agent=agent, start=start, end=end)
        out.writelines(parts)
        out.write(b"\n")


@audit.command()
@click.argument("consumer")
@click.option("--reason", required=True, help="Why, such as the number of the request; it is entered into the log.")
@click.option("--dry-run", is_flag=True, help="Only say how much there is.")
@asks_daemon
def erase(session: Session, consumer: str, reason: str, dry_run: bool) -> None:
    """Erase what is kept of CONSUMER, which cannot be undone.

    Its rows get a pseudonym instead of its name, and keep counting; its entries in the log lose their content, and keep
    their place: the log and all proofs still verify.

    \b
    Examples:
      asapctl audit erase urn:asap:agent:desk --reason "request 17" --dry-run
    """
    path = "/audit/erase?dry_run=true" if dry_run else "/audit/erase"
    body = {"consumer": consumer, "reason": reason}
    first = done = session.door.post(path, body)
    entries = first["entries"]
    while done["more"]:
        done = session.door.post(path, body)
        entries += done["entries"]
    # What was found is what the first request found, and what went of the log is what all of them erased.
    told = {**first, "entries": entries, "pseudonym": done["pseudonym"], "more": False}
    if session.as_json:
        show_json(told)
        return
    for budget in first["budgets"]:
        click.echo(f"the configuration names {consumer} in budget {budget}: take it out there as well", err=True)
    versions = first.get("versions", [])  # which a daemon of before does not say
    if versions is None:
        click.echo("the kept versions of the configuration cannot be read: the daemon's log says why", err=True)
    for version in versions or ():
        kept = f"config/{version}.toml in the state directory"
        click.echo(
            f"version {version} of the configuration has {consumer}: delete {kept} when it is not in force", err=True
        )
    for key in first["keys"]:
        click.echo(f"API key {key} names {consumer} among its agents, and stays in the log", err=True)
    would = "would be erased" if dry_run else f"erased, now {told['pseudonym']}"
    click.echo(f"{consumer}: {entries} entries, {first['usage']} events, {first['task']} steps of tasks {would}")


@audit.command()
@click.option("--reason", required=True, help="Why, such as the upgrade; it is entered into the log.")
@click.option("--dry-run", is_flag=True, help="Only name them.")
@asks_daemon
def vouch(session: Session, reason: str, dry_run: bool) -> None:
    """Vouch for entries of older builds that explain gaps.

    Those builds did not sign them. Look at each of them first: `audit verify` takes your word for it from then on.
    Only those from before the first signed one can be vouched for; and, once, the ends of tasks that these builds took
    without an entry.

    \b
    Examples:
      asapctl audit vouch --reason "upgrade of 2026-11-21" --dry-run
    """
    done = session.door.post("/audit/vouch?dry_run=true" if dry_run else "/audit/vouch", {"reason": reason})
    if session.as_json:
        show_json(done)
        return
    for line in done["named"]:
        click.echo(line)
    would = "could be vouched for" if dry_run else "vouched for"
    if done["count"]:
        click.echo(f"{done['count']} entries {would}, {done['first_seq']} to {done['last_seq']}")
    elif done["named"]:
        click.echo(would)
    else:
        click.echo("there is nothing to vouch for")
