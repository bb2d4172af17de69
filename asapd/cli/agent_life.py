"""`asapctl agents history`, `manifests`, `pause` and `resume`: the life of an agent in the directory."""

from __future__ import annotations

import click

from asapd.cli.door import segment
from asapd.cli.options import Session, asks_daemon
from asapd.cli.show import show_json, show_table


@click.command()
@click.argument("urn")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="How many events.")
@asks_daemon
def history(session: Session, urn: str, limit: int) -> None:
    """Show what happened to an agent, the newest first.

    When it was added, changed, paused, resumed and removed, by whom and why, and each change of its state.

    \b
    Example:
      asapctl agents history urn:asap:agent:writer
    """
    found = session.door.get(f"/agents/{segment(urn)}/history", limit=limit)
    if session.as_json:
        show_json(found)
        return
    fields = ("at", "event", "from", "to", "actor", "reason")
    show_table(fields, [[row[field] for field in fields] for row in found["data"]])


@click.command()
@click.argument("urn")
@click.argument("digest", required=False)
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="How many versions.")
@asks_daemon
def manifests(session: Session, urn: str, digest: str | None, limit: int) -> None:
    """List every version of an agent's manifest, or show one.

    \b
    Examples:
      asapctl agents manifests urn:asap:agent:writer
      asapctl agents manifests urn:asap:agent:writer DIGEST
    """
    path = f"/agents/{segment(urn)}/manifests"
    if digest is not None:
        show_json(session.door.get(f"{path}/{segment(digest)}"))
        return
    found = session.door.get(path, limit=limit)
    if session.as_json:
        show_json(found)
        return
    fields = ("fetched_at", "digest", "verification", "ttl_seconds", "sla_error")
    names = ("fetched", "digest", "verification", "ttl s", "sla error")
    show_table(names, [[row[field] for field in fields] for row in found["data"]])


@click.command()
@click.argument("urn")
@click.option("--reason", metavar="TEXT", help="Why, for the history and the audit log.")
@asks_daemon
def pause(session: Session, urn: str, reason: str | None) -> None:
    """Stop asking and judging an agent.

    The time until it is resumed is unknown: it counts neither for nor against it.

    \b
    Example:
      asapctl agents pause urn:asap:agent:writer --reason "new disk"
    """
    _set(session, urn, "pause", reason)


@click.command()
@click.argument("urn")
@click.option("--reason", metavar="TEXT", help="Why, for the history and the audit log.")
@asks_daemon
def resume(session: Session, urn: str, reason: str | None) -> None:
    """Ask and judge a paused agent again.

    \b
    Example:
      asapctl agents resume urn:asap:agent:writer
    """
    _set(session, urn, "resume", reason)


def _set(session: Session, urn: str, verb: str, reason: str | None) -> None:
    found = session.door.post(f"/agents/{segment(urn)}/{verb}", {"reason": reason})
    if session.as_json:
        show_json(found)
    else:
        click.echo(f"{found['agent_id']}: {found['state']}{'' if found['changed'] else ', as before'}")


LIFE = (history, manifests, pause, resume)
