"""`asapctl agents`: the directory."""

from __future__ import annotations

from typing import Any

import click

from asapd.cli.agent_keys import agent_keys
from asapd.cli.agent_life import LIFE
from asapd.cli.door import segment
from asapd.cli.options import Session, asks_daemon, text_or_file
from asapd.cli.show import cell, show_json, show_pairs, show_table

_STATES = ("healthy", "degraded", "unhealthy", "stale", "unknown", "paused")
_STATUSES = ("READY", "BUSY", "PAUSE", "DRAINING")


@click.group()
def agents() -> None:
    """The directory of agents."""


agents.add_command(agent_keys)
for command in LIFE:
    agents.add_command(command)


@agents.command("list")
@click.option("--state", type=click.Choice(_STATES), help="Only agents in this state.")
@click.option("--status", type=click.Choice(_STATUSES, case_sensitive=False), help="Only agents that say so.")
@click.option("--flapping", is_flag=True, help="Only agents that flap.")
@click.option("--min-availability", metavar="PERCENT", help="Only agents that were up so much, such as 99.5%.")
@click.option("--max-latency-p95-ms", type=click.IntRange(min=1), metavar="MS", help="Only agents as fast as that.")
@click.option("--window", metavar="WINDOW", help="The window of the figures, such as 1h or 7d.")
@click.option("--sort", type=click.Choice(("id", "sla_score")), default="id", show_default=True)
@asks_daemon
def list_agents(session: Session, flapping: bool, **filters: Any) -> None:
    """List all agents, or those that keep what you need.

    \b
    Examples:
      asapctl agents list --state unhealthy
      asapctl agents list --min-availability 99.5% --max-latency-p95-ms 500 --status READY --sort sla_score
    """
    rows = list(session.door.rows("/agents", flapping="true" if flapping else None, **filters))
    if session.as_json:
        show_json({"data": rows, "count": len(rows), "next_cursor": None})
        return
    show_table(
        ("id", "state", "since", "status", "uptime %", "p95 ms", "errors %", "score", "sla", "url"),
        [
            (
                *(row["id"], _state(row), row["since"], row["agent_status"], row["uptime_percent"]),
                *(row["latency_p95_ms"], row["error_rate_percent"], row["sla_score"], _promise(row), row["url"]),
            )
            for row in rows
        ],
    )


def _state(row: dict[str, Any]) -> str:
    return f"{row['state']}, flapping" if row["flapping"] else str(row["state"])


def _promise(row: dict[str, Any]) -> str | None:
    """Where the promise is from; an error of one that does not count must catch the eye."""
    source: str | None = row["sla_source"]
    return source if row["sla_error"] is None else f"{source or 'none'}, ERROR"


@agents.command()
@click.argument("urn")
@click.argument("url", required=False)
@click.option("--heartbeat", is_flag=True, help="It cannot be probed and reports by itself; it needs no URL.")
@click.option("--public-key", type=text_or_file, metavar="KEY", help="Its Ed25519 key: base64, or @FILE with a PEM.")
@click.option("--tier", help="A tier of the configuration that it is held to.")
@click.option("--availability", metavar="PERCENT", help="Its promise, such as 99.9%.")
@click.option("--max-latency-p95-ms", type=click.IntRange(min=1), metavar="MS", help="Its promise.")
@click.option("--max-error-rate", metavar="PERCENT", help="Its promise, such as 1%.")
@click.option("--tenant", help="Whose agent it is.")
@asks_daemon
def add(
    session: Session,
    urn: str,
    url: str | None,
    heartbeat: bool,
    public_key: str | None,
    tier: str | None,
    tenant: str | None,
    **terms: str | int | None,
) -> None:
    """Add an agent, or change one.

    \b
    Examples:
      asapctl agents add urn:asap:agent:writer http://127.0.0.1:9000
      asapctl agents add urn:asap:agent:writer http://127.0.0.1:9000 \\
          --availability 99.9% --max-latency-p95-ms 500 --max-error-rate 1%
      asapctl agents add urn:asap:agent:roamer --heartbeat
    """
    promise = {name: value for name, value in terms.items() if value is not None}
    body = {"id": urn, "url": url, "public_key": public_key, "tier": tier, "sla": promise or None, "tenant": tenant}
    body["health"] = "heartbeat" if heartbeat else "probe"
    row = session.door.post("/agents", body)
    if session.as_json:
        show_json(row)
    else:
        click.echo(f"{row['id']} {row['url'] or 'reports by itself'}")


@agents.command()
@click.argument("urn")
@click.option("--window", metavar="WINDOW", help="The window of the figures, such as 1h or 7d.")
@asks_daemon
def show(session: Session, urn: str, window: str | None) -> None:
    """Show one agent.

    \b
    Example:
      asapctl agents show urn:asap:agent:writer
    """
    row = session.door.get(f"/agents/{segment(urn)}", window=window)
    if session.as_json:
        show_json(row)
    else:
        show_pairs([(name.replace("_", " "), value) for name, value in row.items()])


@agents.command()
@click.argument("urn")
@asks_daemon
def remove(session: Session, urn: str) -> None:
    """Remove an agent.

    One that the configuration names can only be removed there.

    \b
    Example:
      asapctl agents remove urn:asap:agent:writer
    """
    outcome = session.door.delete(f"/agents/{segment(urn)}")
    if session.as_json:
        show_json(outcome)
    else:
        click.echo(f"removed: {cell(outcome['removed'])}")


@agents.command()
@click.argument("urn")
@click.option("--window", metavar="WINDOW", help="The window of the uptime, such as 1h or 7d.")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="How many probes.")
@asks_daemon
def health(session: Session, urn: str, window: str | None, limit: int) -> None:
    """Show an agent's health.

    Its state, its latest probes, the newest first, and its changes of state.

    \b
    Example:
      asapctl agents health urn:asap:agent:writer
    """
    found = session.door.get(f"/agents/{segment(urn)}/health", window=window, limit=limit)
    if session.as_json:
        show_json(found)
        return
    facts = ("state", "since", "flapping_since", "agent_status", "uptime_percent")
    pairs = [("agent", found["agent_id"]), *((name.replace("_", " "), found[name]) for name in facts)]
    uptime = found["uptime"]
    if uptime is not None:
        pairs += [(f"{name} s", uptime[f"{name}_seconds"]) for name in ("up", "down", "unknown")]
    unprobed = found["not_probed"]
    if unprobed is not None:
        pairs.append(("not probed", f"{unprobed['reason']}: {unprobed['detail']} (since {unprobed['since']})"))
    show_pairs(pairs)
    if found["transitions"]:
        click.echo()
        fields = ("at", "from", "to", "reason")
        show_table(
            ("changed", "from", "to", "reason"), [[row[field] for field in fields] for row in found["transitions"]]
        )
    if found["data"]:
        click.echo()
        names = ("at", "up", "status", "latency_ms", "reason", "detail")
        shown = ("probed", "up", "status", "latency ms", "reason", "detail")
        show_table(shown, [[row[name] for name in names] for row in found["data"]])
