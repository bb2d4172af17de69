"""`asapctl retention`: what is past its time, and taking it away."""

from __future__ import annotations

import click

from asapd.cli.options import Session, asks_daemon
from asapd.cli.show import show_json, show_table

PATIENCE_S = 600.0
"""An archive of the audit log that has begun is finished: who hung up before would have it begun anew."""


@click.command()
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@asks_daemon
def retention(session: Session, dry_run: bool) -> None:
    """Take away what is past its time.

    The daemon does so by itself; this is for now. Usage events go by retention.usage and leave their sums behind;
    probes go by retention.probes, alerts by retention.alerts. Entries of the audit log go by retention.audit: they
    are written into files in the state directory, which are verified, and lose their content, but not their hashes.
    The audit log names what went.

    \b
    Examples:
      asapctl retention --dry-run
      asapctl retention
    """
    path = "/retention?dry_run=true" if dry_run else "/retention"
    first = done = session.door.post(path, patience_s=PATIENCE_S)
    while done["more"]:
        done = session.door.post(path, patience_s=PATIENCE_S)
    if session.as_json:
        show_json({**first, "more": False})
        return
    rows = [(name, first[name]["before"], first[name]["count"]) for name in ("usage", "probes", "alerts", "audit")]
    rows = [(name, before or "never", count) for name, before, count in rows]
    show_table(("records", "from before", "would go" if dry_run else "went"), rows)
    if kept := done["usage"].get("kept"):  # which a daemon of before does not say
        click.echo(f"{kept} events stay, for the sums of their hours are not theirs: asapctl audit verify", err=True)
