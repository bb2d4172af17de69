"""`asapctl maintenance`: time that does not count in the figures."""

from __future__ import annotations

import click

from asapd.cli.door import segment
from asapd.cli.options import Session, asks_daemon
from asapd.cli.show import show_json, show_pairs, show_table

_COLUMNS = ("id", "state", "agent", "start", "end", "reason", "declared by")
_FIELDS = ("start", "end", "reason", "declared_by")


@click.group()
def maintenance() -> None:
    """Time taken out of figures."""


@maintenance.command()
@click.argument("urn", required=False)
@click.option("--all", "everybody", is_flag=True, help="For every agent, instead of one.")
@click.option("--start", metavar="TIME", help="From then on: 2026-11-20T09:00:00Z. Without it: now.")
@click.option("--end", metavar="TIME", help="Until then.")
@click.option("--for", "duration", metavar="DURATION", help="For so long, such as 30m or 2h, instead of --end.")
@click.option("--reason", required=True, help="Why; it is in the audit log and in the evidence.")
@asks_daemon
def add(
    session: Session,
    urn: str | None,
    everybody: bool,
    start: str | None,
    end: str | None,
    duration: str | None,
    reason: str,
) -> None:
    """Declare maintenance.

    What happens in that time counts in no figure, and is shown as excluded.

    \b
    Examples:
      asapctl maintenance add urn:asap:agent:writer --for 30m --reason "new model"
      asapctl maintenance add --all --start 2026-11-22T01:00:00Z --end 2026-11-22T03:00:00Z --reason "kernel"
    """
    if (urn is None) != everybody:
        raise click.UsageError("name an agent, or say --all")
    if urn == "":
        raise click.UsageError("the agent's name is empty: name one, or say --all")
    if (end is None) == (duration is None):
        raise click.UsageError("give either --end or --for")
    body = {"agent_id": urn, "start": start, "end": end, "duration": duration, "reason": reason}
    made = session.door.post("/maintenance", body)
    if session.as_json:
        show_json(made)
        return
    show_pairs([(name.replace("_", " "), made[name]) for name in ("id", "agent_id", "start", "end", "state", "reason")])


@maintenance.command("list")
@click.argument("urn", required=False)
@click.option("--state", type=click.Choice(("planned", "running", "over")))
@asks_daemon
def list_(session: Session, urn: str | None, state: str | None) -> None:
    """List maintenance, the newest first.

    \b
    Examples:
      asapctl maintenance list
      asapctl maintenance list urn:asap:agent:writer --state running
    """
    rows = list(session.door.rows("/maintenance", agent_id=urn, state=state))
    if session.as_json:
        show_json({"data": rows, "count": len(rows), "next_cursor": None})
        return
    show_table(
        _COLUMNS,
        [(row["id"], row["state"], row["agent_id"] or "all", *(row[name] for name in _FIELDS)) for row in rows],
    )


@maintenance.command()
@click.argument("id")
@asks_daemon
def end(session: Session, id: str) -> None:  # noqa: A002 -- the argument's name in the usage text
    """End maintenance now.

    What it took out of the figures until now stays out. One that has not begun is called off.

    \b
    Example:
      asapctl maintenance end mnt_01JD0000000000000000000000
    """
    ended = session.door.delete(f"/maintenance/{segment(id)}")
    if session.as_json:
        show_json(ended)
    else:
        click.echo(f"ended: {ended['id']}")
