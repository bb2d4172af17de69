"""`asapctl budgets`: what is left of each, and at which pace it goes."""

from __future__ import annotations

from typing import Any

import click

from asapd.cli.door import segment
from asapd.cli.options import Session, asks_daemon
from asapd.cli.show import show_json, show_pairs, show_table

_UNITS = ("usd", "tokens", "tasks")


@click.group()
def budgets() -> None:
    """Limits of a day, week or month."""


@budgets.command("list")
@asks_daemon
def list_(session: Session) -> None:
    """List budgets.

    A row for each unit that a budget limits.

    \b
    Examples:
      asapctl budgets list
      asapctl budgets list --json
    """
    rows = list(session.door.rows("/budgets"))
    if session.as_json:
        show_json({"data": rows, "count": len(rows), "next_cursor": None})
        return
    show_table(
        ("budget", "unit", "spent", "reserved", "soft", "hard", "remaining", "reached", "renewed"),
        [
            (
                *(row["name"], unit),
                *(row[field][unit] for field in ("spent", "reserved", "soft", "hard", "remaining")),
                *(row["limit_reached"], row["period_end"]),
            )
            for row in rows
            for unit in _limited(row)
        ],
    )


@budgets.command()
@click.argument("name")
@asks_daemon
def show(session: Session, name: str) -> None:
    """Show one budget.

    \b
    Example:
      asapctl budgets show research
    """
    row = session.door.get(f"/budgets/{segment(name)}")
    if session.as_json:
        show_json(row)
        return
    names = ("name", "match", "period", "timezone", "period_start", "period_end", "limit_reached")
    show_pairs([(field.replace("_", " "), row[field]) for field in (*names, "events", "unpriced_events")])
    click.echo()
    fields = ("spent", "reserved", "soft", "hard", "remaining", "burn_rate_per_hour")
    show_table(
        ("unit", "spent", "reserved", "soft", "hard", "remaining", "an hour", "exhausted", "spike"),
        [
            (unit, *(row[field][unit] for field in fields), _exhausted(row["forecast"][unit]), _spike(row, unit))
            for unit in _limited(row)
        ],
    )
    breach = row["open_breach"]
    if breach is not None:
        click.echo()
        show_pairs(
            [
                ("alert", breach["severity"]),
                ("  reached", breach["threshold"]),
                ("  spent then", breach["actual"]),
                ("  since", breach["detected_at"]),
            ]
        )


def _limited(row: dict[str, Any]) -> list[str]:
    return [unit for unit in _UNITS if row["soft"][unit] is not None or row["hard"][unit] is not None]


def _exhausted(forecast: dict[str, Any] | None) -> str | None:
    if forecast is None:
        return None
    return (forecast["exhausted_at"] or "reached") if forecast["within_period"] else "not in this period"


def _spike(row: dict[str, Any], unit: str) -> bool | None:
    found = row["spike"].get(unit)
    return None if found is None else found["is_spike"]
