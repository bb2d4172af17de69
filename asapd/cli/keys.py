"""`asapctl keys`: API keys."""

from __future__ import annotations

import click

from asapd.cli.door import segment
from asapd.cli.options import Session, asks_daemon
from asapd.cli.show import show_json, show_table


@click.group()
def keys() -> None:
    """API keys."""


@keys.command()
@click.option("--name", required=True, help="A name for it, which the audit log shows.")
@click.option("--role", required=True, type=click.Choice(("ingest", "reader", "operator", "admin")))
@click.option(
    "--agent",
    "patterns",
    multiple=True,
    metavar="PATTERN",
    help="An agent it may act for, or a beginning of names with * at the end; several times. Without it: all.",
)
@click.option("--tenant", help="Whose records it is for. Without it: all tenants.")
@click.option("--sign", is_flag=True, help="It may have the daemon sign delegations for its agents.")
@asks_daemon
def create(session: Session, name: str, role: str, patterns: tuple[str, ...], tenant: str | None, sign: bool) -> None:
    """Make a key and print it.

    This is the only time that it is shown.

    \b
    Examples:
      asapctl keys create --name writer --role ingest --agent urn:asap:agent:writer
      asapctl keys create --name dashboard --role reader > dashboard.key
    """
    body = {"name": name, "role": role, "agents": list(patterns) or None, "tenant": tenant, "sign": sign or None}
    made = session.door.post("/keys", body)
    if session.as_json:
        show_json(made)
    else:
        click.echo(made["key"])
    for note in made["notes"]:
        click.echo(f"note: {note}", err=True)
    click.echo(f"{made['id']}: keep the key now, it is not shown again", err=True)


@keys.command("list")
@asks_daemon
def list_keys(session: Session) -> None:
    """List all keys.

    The secrets are not among it: the daemon does not keep them.

    \b
    Example:
      asapctl keys list
    """
    rows = list(session.door.rows("/keys"))
    if session.as_json:
        show_json({"data": rows, "count": len(rows), "next_cursor": None})
        return
    fields = ("id", "name", "role", "agents", "tenant", "sign", "created_at", "revoked_at")
    names = ("id", "name", "role", "agents", "tenant", "sign", "created", "revoked")
    show_table(names, [[row[field] for field in fields] for row in rows])


@keys.command()
@click.argument("key_id", metavar="ID")
@asks_daemon
def revoke(session: Session, key_id: str) -> None:
    """Revoke a key, by its id or name.

    \b
    Example:
      asapctl keys revoke dashboard
    """
    outcome = session.door.delete(f"/keys/{segment(key_id)}")
    if session.as_json:
        show_json(outcome)
    else:
        click.echo(f"revoked: {outcome['id']} ({outcome['name']})")
