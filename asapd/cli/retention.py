"""`asapctl retention`: what is past its time, and taking it away."""

from __future__ import annotations

from typing import Any

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
    replies = [session.door.post(path, patience_s=PATIENCE_S)]
    try:
        while replies[-1]["more"]:
            replies.append(session.door.post(path, patience_s=PATIENCE_S))
    finally:
        # What went is said as well where a later request is refused.
        _show(session, _added_up(replies))


def _added_up(replies: list[dict[str, Any]]) -> dict[str, Any]:
    """What several requests took; up to which times, what stays, and whether there is more, by the last of them."""
    last = replies[-1]
    # Of probes each says what is still there, which goes without it.
    done = {**last, "probes": replies[0]["probes"]}
    for name in ("usage", "alerts", "audit"):
        parts = [reply[name] for reply in replies]
        done[name] = {**last[name], "count": sum(part["count"] for part in parts)}
        for choose, keys in ((min, ("first_row", "first_seq", "oldest")), (max, ("last_row", "last_seq", "newest"))):
            for key in done[name].keys() & keys:
                values: list[Any] = [part[key] for part in parts if part[key] is not None]
                done[name][key] = choose(values, default=None)
    return done


def _show(session: Session, done: dict[str, Any]) -> None:
    if session.as_json:
        show_json(done)
        return
    rows = [(name, done[name]["before"], done[name]["count"]) for name in ("usage", "probes", "alerts", "audit")]
    rows = [(name, before or "never", count) for name, before, count in rows]
    show_table(("records", "from before", "would go" if done.get("dry_run") else "went"), rows)
    if kept := done["usage"].get("kept"):  # which a daemon of before does not say
        click.echo(f"{kept} events stay, for the sums of their hours are not theirs: asapctl audit verify", err=True)
