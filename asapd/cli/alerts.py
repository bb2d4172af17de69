"""`asapctl alerts`, `breaches` and `silences`: how alerts are pushed, and what is not to be pushed."""

from __future__ import annotations

import click

from asapd.cli.door import segment
from asapd.cli.options import Session, asks_daemon
from asapd.cli.show import show_json, show_table


@click.group()
def alerts() -> None:
    """Webhooks and commands, and what they did not take."""


@alerts.command()
@asks_daemon
def targets(session: Session) -> None:
    """Show how each webhook and command does.

    \b
    Example:
      asapctl alerts targets
    """
    found = session.door.whole("/alerts/targets")
    if session.as_json:
        show_json(found)
        return
    fields = ("name", "kind", "state", "cursor", "backlog", "dead_letters", "delivered_at", "last_error")
    show_table(
        [field.replace("_", " ") for field in fields], [[row[field] for field in fields] for row in found["data"]]
    )


@alerts.command()
@click.option("--target", metavar="NAME", help="Only those of one webhook or command.")
@asks_daemon
def dead(session: Session, target: str | None) -> None:
    """List alerts that a target did not take in time.

    \b
    Example:
      asapctl alerts dead --target pager
    """
    rows = list(session.door.rows("/alerts/dead-letters", target=target))
    if session.as_json:
        show_json({"data": rows, "count": len(rows), "next_cursor": None})
        return
    shown = [
        (row["id"], row["target"], row["seq"], row["alert"]["event"], row["died_at"], row["error"]) for row in rows
    ]
    show_table(("id", "target", "seq", "event", "died", "error"), shown)


@alerts.command()
@click.argument("letter", metavar="ID", type=click.IntRange(1))
@asks_daemon
def redeliver(session: Session, letter: int) -> None:
    """Have a dead letter delivered again.

    \b
    Example:
      asapctl alerts redeliver 7
    """
    outcome = session.door.post(f"/alerts/dead-letters/{letter}/redeliver")
    if session.as_json:
        show_json(outcome)
    else:
        click.echo(f"redelivering: {outcome['id']}")


@click.group()
def breaches() -> None:
    """Breaches that somebody sees to."""


@breaches.command()
@click.argument("breach", metavar="[ID]", required=False)
@click.option("--agent", metavar="PATTERN", help="All of an agent, or of names that begin so with * at the end.")
@click.option("--type", "breach_type", metavar="TYPE", help="All of a type, such as latency.")
@click.option("--severity", type=click.Choice(("warning", "critical")), help="All of a severity.")
@click.option("--comment", default="", help="What is being done.")
@asks_daemon
def ack(
    session: Session,
    breach: str | None,
    agent: str | None,
    breach_type: str | None,
    severity: str | None,
    comment: str,
) -> None:
    """Acknowledge an open breach, or all that fit what is given.

    They are pushed to webhooks and commands no more until they end.

    \b
    Examples:
      asapctl breaches ack brc_01JD0Q6Y8T5W3N9V2X4Z7B1C6D --comment 'restarting it'
      asapctl breaches ack --agent 'urn:asap:agent:batch-*' --type latency
    """
    wanted = {"agent": agent, "type": breach_type, "severity": severity}
    if (breach is None) == (wanted == dict.fromkeys(wanted)):
        raise click.UsageError("name a breach, or say which with --agent, --type or --severity")
    if breach is None:
        outcome = session.door.post("/breaches/ack", {**wanted, "comment": comment})
    else:
        outcome = session.door.post(f"/breaches/{segment(breach)}/ack", {"comment": comment})
    if session.as_json:
        show_json(outcome)
    elif breach is None:
        for one in outcome["acknowledged"]:
            click.echo(f"acknowledged: {one}")
        click.echo(f"{outcome['count']} acknowledged")
    else:
        known = outcome["acknowledged"]
        click.echo(f"acknowledged: {breach} by {known['by']} at {known['at']}")


@breaches.command()
@click.option("--by", default="agent", show_default=True, help="Any of agent, type and severity, joined by commas.")
@click.option("--state", type=click.Choice(("open", "resolved")), help="Only those; without it all.")
@asks_daemon
def groups(session: Session, by: str, state: str | None) -> None:
    """Put breaches together, those with most open first.

    \b
    Example:
      asapctl breaches groups --by type,severity --state open
    """
    rows = list(session.door.rows("/breaches/groups", group_by=by, state=state))
    if session.as_json:
        show_json({"data": rows, "count": len(rows), "next_cursor": None})
        return
    keys = [name for name in ("agent_id", "breach_type", "severity") if rows and name in rows[0]]
    fields = (*keys, "open", "critical", "unacknowledged", "count", "first_detected_at", "last_detected_at")
    show_table([field.replace("_", " ") for field in fields], [[row[field] for field in fields] for row in rows])


@click.group()
def silences() -> None:
    """Alerts that are not to be pushed for a while."""


@silences.command()
@click.option("--agent", metavar="PATTERN", help="An agent, or a beginning of names with * at the end.")
@click.option("--type", "breach_type", metavar="TYPE", help="Such as latency or budget.")
@click.option("--severity", type=click.Choice(("warning", "critical")))
@click.option("--for", "duration", metavar="DURATION", help="How long from now, such as 2h.")
@click.option("--until", metavar="TIME", help="Or until when, as RFC 3339.")
@click.option("--author", help="Who asked for it; without it the user of this command.")
@click.option("--comment", default="", help="Why.")
@asks_daemon
def add(
    session: Session,
    agent: str | None,
    breach_type: str | None,
    severity: str | None,
    duration: str | None,
    until: str | None,
    author: str | None,
    comment: str,
) -> None:
    """Silence what fits all that is given.

    \b
    Examples:
      asapctl silences add --agent 'urn:asap:agent:batch-*' --for 2h --comment migration
      asapctl silences add --type budget --severity warning --until 2026-11-22T08:00:00Z
    """
    body = {
        "agent": agent,
        "type": breach_type,
        "severity": severity,
        "duration": duration,
        "expires_at": until,
        "author": author,
        "comment": comment,
    }
    made = session.door.post("/silences", body)
    if session.as_json:
        show_json(made)
    else:
        click.echo(f"silenced: {made['id']} until {made['expires_at']}")


@silences.command("list")
@click.option("--expired", is_flag=True, help="Also those of the last month that are over.")
@asks_daemon
def list_silences(session: Session, expired: bool) -> None:
    """List silences.

    \b
    Example:
      asapctl silences list
    """
    rows = list(session.door.rows("/silences", expired="true" if expired else None))
    if session.as_json:
        show_json({"data": rows, "count": len(rows), "next_cursor": None})
        return
    fields = ("id", "state", "agent", "type", "severity", "expires_at", "author", "comment")
    show_table([field.replace("_", " ") for field in fields], [[row[field] for field in fields] for row in rows])


@silences.command()
@click.argument("silence", metavar="ID")
@asks_daemon
def remove(session: Session, silence: str) -> None:
    """End a silence now.

    \b
    Example:
      asapctl silences remove sil_01JD0Q6Y8T5W3N9V2X4Z7B1C6D
    """
    outcome = session.door.delete(f"/silences/{segment(silence)}")
    if session.as_json:
        show_json(outcome)
    else:
        click.echo(f"ended: {outcome['id']}")
