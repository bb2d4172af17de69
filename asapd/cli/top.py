"""`asapctl top`: what the agents do now, again and again."""

from __future__ import annotations

import sys
import time
from decimal import Decimal
from typing import Any

import click

from asapd.cli.options import Session, asks_daemon, duration, now_us
from asapd.cli.show import cell, show_json, show_table

_COLUMNS = ("agent", "state", "tasks/m", "tok/m", "USD/h", "errors", "p95", "up", "score", "open")
_PREFIX = "urn:asap:agent:"
_LEAST_US = 100_000


@click.command()
@click.option("--window", type=duration, default="5m", show_default=True, help="Rates are of so long before now.")
@click.option("--interval", type=duration, default="2s", show_default=True, help="From one look to the next.")
@click.option("--sort", type=click.Choice(("spend", "tasks", "agent")), default="spend", show_default=True)
@click.option("--once", is_flag=True, help="Print once and end.")
@asks_daemon
def top(session: Session, window: int, interval: int, sort: str, once: bool) -> None:
    """Watch the agents: rate, spend, health.

    Errors, p95 and uptime are of the last hour, `open` are breaches; `+?` stands where events have no known cost. On a
    terminal it goes on until Ctrl-C; in a pipe, or with --json, it prints once.

    \b
    Examples:
      asapctl top
      asapctl top --window 1h --sort tasks
      asapctl top --json
    """
    goes_on = not (once or session.as_json) and sys.stdout.isatty()
    try:
        while True:
            look = _look(session, window, sort)
            if session.as_json:
                show_json(look)
            else:
                if goes_on:
                    click.clear()
                _print(look)
            if not goes_on:
                return
            time.sleep(max(interval, _LEAST_US) / 1_000_000)
    except KeyboardInterrupt:
        return


def _look(session: Session, window_us: int, sort: str) -> dict[str, Any]:
    """What the daemon knows now, by agent; one that is in no directory has no health."""
    from asapd.core.types import format_us

    door = session.door
    now = now_us()
    window_us = max(window_us, 1_000_000)
    known = {row["id"]: row for row in door.rows("/agents", window="1h")}
    used = {
        row["agent_id"]: row
        for row in door.rows("/usage/aggregate", group_by="agent", start=format_us(now - window_us))
    }
    breaches: dict[str, int] = {}
    for breach in door.rows("/sla/breaches", state="open"):
        if breach["agent_id"] is not None:
            breaches[breach["agent_id"]] = breaches.get(breach["agent_id"], 0) + 1
    rows = [_row(name, known.get(name), used.get(name), breaches.get(name, 0), window_us) for name in {**known, **used}]
    # Who spends or does most comes first; a cost that nobody knows is before none at all.
    order: dict[str, Any] = {
        "spend": lambda row: (-(row["usd_per_hour"] or 0), -row["tasks_per_minute"], row["agent"]),
        "tasks": lambda row: (-row["tasks_per_minute"], row["agent"]),
        "agent": lambda row: row["agent"],
    }
    rows.sort(key=order[sort])
    return {"at": format_us(now), "window_seconds": window_us / 1_000_000, "agents": rows}


def _row(
    name: str, known: dict[str, Any] | None, used: dict[str, Any] | None, breaches: int, window_us: int
) -> dict[str, Any]:
    minutes = Decimal(window_us) / 60_000_000
    spent = Decimal(0) if used is None else used["total_cost_usd"]
    health = known or {}
    return {
        "agent": name,
        "state": health.get("state"),
        "tasks_per_minute": _rate(0 if used is None else used["total_tasks"], minutes),
        "tokens_per_minute": _rate(0 if used is None else used["total_tokens"], minutes),
        "usd_per_hour": None if spent is None else _rate(Decimal(spent) * 60, minutes),
        "unpriced_events": 0 if used is None else used["unpriced_events"],
        "error_rate_percent": health.get("error_rate_percent"),
        "latency_p95_ms": health.get("latency_p95_ms"),
        "uptime_percent": health.get("uptime_percent"),
        "sla_score": health.get("sla_score"),
        "open_breaches": breaches,
    }


def _rate(amount: Decimal | int, minutes: Decimal) -> Decimal:
    return round(Decimal(amount) / minutes, 6)


def _print(look: dict[str, Any]) -> None:
    rows = look["agents"]
    costs = [row["usd_per_hour"] for row in rows if row["usd_per_hour"] is not None]
    unpriced = any(row["unpriced_events"] for row in rows)
    spend = None if unpriced and not any(costs) else sum(costs, Decimal(0))
    tasks = sum((row["tasks_per_minute"] for row in rows), Decimal(0))
    watched = [row["state"] for row in rows if row["state"] is not None]
    up = sum(state in {"healthy", "degraded"} for state in watched)
    others = f" and {len(rows) - len(watched)} that only report" if len(watched) < len(rows) else ""
    click.echo(
        f"{look['at'][:19]}Z: {up} of {len(watched)} agents up{others}, {tasks:.1f} tasks a minute, "
        f"USD {_usd(spend, unpriced)} an hour, {sum(row['open_breaches'] for row in rows)} open breaches"
    )
    click.echo()
    show_table(_COLUMNS, [_cells(row) for row in rows])


def _usd(amount: Decimal | None, unpriced: bool) -> str:
    """An amount, marked where there are events besides whose cost nobody knows."""
    return "-" if amount is None else f"{amount:.2f}{'+?' if unpriced else ''}"


def _cells(row: dict[str, Any]) -> tuple[Any, ...]:
    return (
        row["agent"].removeprefix(_PREFIX),
        row["state"],
        f"{row['tasks_per_minute']:.1f}",
        f"{row['tokens_per_minute']:.0f}",
        _usd(row["usd_per_hour"], bool(row["unpriced_events"])),
        _unit(row["error_rate_percent"], "%"),
        _unit(row["latency_p95_ms"], " ms"),
        _unit(row["uptime_percent"], "%"),
        row["sla_score"],
        row["open_breaches"] or None,
    )


def _unit(value: Any, unit: str) -> str | None:
    return None if value is None else f"{cell(value)}{unit}"
