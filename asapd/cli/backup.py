"""`asapctl backup`: a copy of everything that the daemon has recorded, while it goes on."""

from __future__ import annotations

from pathlib import Path

import click

from asapd.cli.options import Session, asks_daemon
from asapd.cli.outcome import Exit, Failure
from asapd.cli.show import show_json
from asapd.cli.written import written

COPYING_S = 3_600.0
"""How long the daemon may copy before the first byte comes: a hundred gigabytes on a slow disk."""


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@asks_daemon
def backup(session: Session, file: Path) -> None:
    """Write a copy of the database into FILE, or to stdout with -.

    What FILE held before is replaced once the copy is complete, as by every command that writes a file.
    It is of one moment, readable by you alone, and holds everything that was recorded, tokens included; no private key
    is in it: keep identity.pem and keys/ apart. `asapd restore FILE --state-dir DIR` puts it back.

    \b
    Examples:
      asapctl backup /var/backups/asapd.backup
      asapctl backup --json asapd-$(date +%F).backup
    """
    with written(file) as out:
        headers, parts = session.door.made("/backup", COPYING_S)
        size = 0
        for part in parts:
            size += len(part)
            out.write(part)
        if str(size) != headers["asapd-bytes"]:
            raise Failure(Exit.UNREACHABLE, f"{file}: the copy was cut off: nothing was written, ask again")
    entries, root = headers["asapd-checkpoint"].split()
    if str(file) == "-":
        click.echo(f"{size} bytes, the audit log up to entry {entries}", err=True)
    elif session.as_json:
        show_json({"file": str(file), "bytes": size, "entries": int(entries), "root_hash": root})
    else:
        click.echo(f"{file}: {size} bytes, the audit log up to entry {entries}")
