"""`asapctl audit`: the log of everything that was recorded."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import click

from asapd.cli.options import Session, asks_daemon, moment
from asapd.cli.outcome import Exit
from asapd.cli.show import encode, show_json, show_table
from asapd.cli.written import written


@click.group()
def audit() -> None:
    """The audit log: read, export, verify."""


def _erased(count: int) -> str:
    return f" ({count} of them with their content erased)" if count else ""


@audit.command()
@asks_daemon
def verify(session: Session) -> int:
    """Check the whole log.

    The daemon walks all entries; the exit code is 1 when one is bad.

    \b
    Example:
      asapctl audit verify
    """
    verdict = session.door.get("/audit/verify")
    bad = verdict["first_bad"]
    if session.as_json:
        show_json(verdict)
    elif bad is None:
        click.echo(
            f"ok: {verdict['verified']} entries{_erased(verdict['erased'])}, "
            f"the last is {verdict['last_seq']} with hash {verdict['last_hash']}"
        )
    else:
        click.echo(f"bad: entry {bad['seq']} ({bad['id'] or 'no id'}): {bad['reason']}")
    if not session.as_json:
        click.echo(verdict["note"], err=True)
    return Exit.DONE if verdict["valid"] else Exit.NO


@audit.command()
@click.option("--actor", help="Only what this one caused.")
@click.option("--subject", help="Only what is about this.")
@click.option("--event-type", metavar="TYPE", help="Only this type, such as usage.recorded.")
@click.option("--task", metavar="ID", help="Only what is about this task.")
@click.option("--agent", metavar="URN", help="Only what is about this agent.")
@click.option("--since", "start", type=moment, metavar="TIME", help="From then on: 2026-11-20T09:00:00Z, or 24h.")
@click.option("--until", "end", type=moment, metavar="TIME", help="Before then.")
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
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True), default="-")
@click.option("--format", "form", type=click.Choice(("ndjson", "json")), help="ndjson unless --json is given.")
@asks_daemon
def export(session: Session, file: Path, form: str | None) -> None:
    """Write out the whole log.

    To FILE or to stdout; `asapd verify FILE` checks it anywhere, without a daemon.

    \b
    Examples:
      asapctl audit export audit.ndjson
      asapctl audit export --format json > audit.json
    """
    entries = session.door.rows("/audit/logs")
    # The first page is asked for before the file is touched, so that a daemon that is away costs nobody a file.
    first = list(islice(entries, 1))
    count = 0
    is_json = (form or ("json" if session.as_json else "ndjson")) == "json"
    with written(file) as out:
        if is_json:
            out.write(b'{"data":[')
        for part in (first, entries):
            for entry in part:
                out.write((b",\n" if count else b"\n") * is_json + encode(entry) + b"\n" * (not is_json))
                count += 1
        if is_json:
            out.write(b'\n],"count":%d,"next_cursor":null}\n' % count)
    if str(file) != "-":
        click.echo(f"{file}: {count} entries", err=True)
