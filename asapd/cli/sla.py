"""`asapctl sla`: what was promised, what was measured, what was broken."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

from asapd.cli.door import segment
from asapd.cli.options import Session, asks_daemon, moment
from asapd.cli.outcome import Exit
from asapd.cli.show import cell, show_json, show_json_line, show_pairs, show_table

WATCH_S = 1.0
"""Between two looks of `sla show --watch`; figures change with every tick of the daemon, a second by default."""


@click.group()
def sla() -> None:
    """Promises kept and broken."""


@sla.command()
@click.argument("urn", required=False)
@click.option("--window", metavar="WINDOW", help="The window of the figures, such as 1h or 7d.")
@click.option("--fail", is_flag=True, help="Exit with 1 when a breach is open.")
@click.option("--watch", is_flag=True, help="Go on, and print again whenever something changed.")
@asks_daemon
def show(session: Session, urn: str | None, window: str | None, fail: bool, watch: bool) -> int:
    """Show figures and promises.

    \b
    Examples:
      asapctl sla show
      asapctl sla show urn:asap:agent:writer --window 24h
      asapctl sla show --fail
    """
    try:
        return _look(session, urn, window, fail=fail, watch=watch)
    except KeyboardInterrupt:
        if watch:
            return Exit.DONE
        raise


def _look(session: Session, urn: str | None, window: str | None, *, fail: bool, watch: bool) -> int:
    seen: Any = None
    while True:
        reports = _reports(session, urn, window)
        # Time goes on with every look, which alone is no news.
        news = [{**report, "metrics": _without_time(report["metrics"])} for report in reports]
        if news != seen:
            _show_reports(session, reports, urn, is_stream=watch)
            seen = news
        if fail and any(report["open_breaches"] for report in reports):
            return Exit.NO
        if not watch:
            return Exit.DONE
        time.sleep(WATCH_S)


def _reports(session: Session, urn: str | None, window: str | None) -> list[dict[str, Any]]:
    if urn is not None:
        return [session.door.get(f"/agents/{segment(urn)}/sla", window=window)]
    return list(session.door.rows("/sla", window=window))


def _route(urn: str | None, what: str) -> str:
    return f"/sla/{what}" if urn is None else f"/agents/{segment(urn)}/sla/{what}"


def _without_time(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if not name.startswith("period_") and "seconds" not in name}


def _show_reports(session: Session, reports: list[dict[str, Any]], urn: str | None, *, is_stream: bool) -> None:
    if session.as_json:
        found = reports[0] if urn is not None else {"data": reports, "count": len(reports), "next_cursor": None}
        (show_json_line if is_stream else show_json)(found)
        return
    if is_stream and sys.stdout.isatty():
        click.clear()
    if urn is not None:
        _show_one(reports[0])
        return
    show_table(
        ("agent", "window", "uptime %", "p95 ms", "errors %", "completed", "failed", "score", "compliance %", "open"),
        [
            (
                *(report["agent_id"], report["window"], report["metrics"]["uptime_percent"]),
                *(report["metrics"]["latency_p95_ms"], report["metrics"]["error_rate_percent"]),
                *(report["metrics"]["tasks_completed"], report["metrics"]["tasks_failed"]),
                *(report["sla_score"], report["compliance_percent"]),
                [breach["breach_type"] for breach in report["open_breaches"]],
            )
            for report in reports
        ],
    )


def _show_one(report: dict[str, Any]) -> None:
    metrics = report["metrics"]
    names = ("period_start", "period_end", "uptime_percent", "latency_p95_ms", "error_rate_percent")
    counts = ("tasks_completed", "tasks_failed", "probes")
    figures = ("compliance_percent", "sla_score", "error_budget_left_percent", "burn_rates")
    show_pairs(
        [
            ("agent", report["agent_id"]),
            ("window", report["window"]),
            *((name.replace("_", " "), metrics[name]) for name in (*names, *counts)),
            ("sla from", report["sla_source"]),
            *((("sla error", report["sla_error"]),) if report["sla_error"] else ()),
            *((name.replace("_", " "), report[name]) for name in figures),
            ("reputation", _reputation(report["reputation"])),
            *((f"{name.replace('_', ' ')} budget", _budget(budget)) for name, budget in report["error_budget"].items()),
            *((name.replace("_", " "), metrics[name]) for name in ("unknown_seconds", "excluded_seconds")),
        ]
    )
    if report["compliance"]:
        click.echo()
        show_table(
            ("term", "promised", "measured", "verdict", "samples"),
            [
                (name, term["threshold"], term["actual"], _verdict(term["met"]), term["samples"])
                for name, term in report["compliance"].items()
            ],
        )
    if report["open_breaches"]:
        click.echo()
        _show_breaches(report["open_breaches"])


def _reputation(found: dict[str, Any]) -> str:
    if found["score"] is None:
        return "-"
    return f"{cell(found['score'])}{' (provisional)' if found['provisional'] else ''}"


def _budget(found: dict[str, Any]) -> str:
    gone = "not at this pace" if found["exhausted_at"] is None else found["exhausted_at"]
    return f"{cell(found['left_percent'])} % of {found['window']} left, used up: {gone}"


def _verdict(met: bool | None) -> str | None:
    return None if met is None else "met" if met else "broken"


@sla.command()
@click.argument("urn", required=False)
@click.option(
    "--resolution", type=click.Choice(("minute", "hour", "day")), default="hour", show_default=True, help="The periods."
)
@click.option("--since", type=moment, metavar="TIME", help="From then on: 2026-11-20T09:00:00Z, or 7d.")
@click.option("--until", type=moment, metavar="TIME", help="Until then; now unless given.")
@click.option("--limit", type=click.IntRange(min=1), default=1000, show_default=True, help="At most so many periods.")
@click.option("--watch", is_flag=True, help="Go on, and print again whenever something changed.")
@asks_daemon
def history(
    session: Session, urn: str | None, resolution: str, since: str | None, until: str | None, limit: int, watch: bool
) -> int:
    """Show figures of the past, period by period.

    \b
    Examples:
      asapctl sla history urn:asap:agent:writer
      asapctl sla history urn:asap:agent:writer --resolution day --since 30d
    """
    seen: Any = None
    try:
        while True:
            filters = {"resolution": resolution, "start": since, "end": until}
            rows = list(session.door.rows(_route(urn, "history"), limit=limit, **filters))
            news = [{**_without_time(row), "start": row["period_start"]} for row in rows]
            if news != seen:
                _show_history(session, rows, is_stream=watch)
                seen = news
            if not watch:
                return Exit.DONE
            time.sleep(WATCH_S)
    except KeyboardInterrupt:
        if watch:
            return Exit.DONE
        raise


def _show_history(session: Session, rows: list[dict[str, Any]], *, is_stream: bool) -> None:
    if session.as_json:
        (show_json_line if is_stream else show_json)({"data": rows, "count": len(rows), "next_cursor": None})
        return
    if is_stream and sys.stdout.isatty():
        click.clear()
    fields = ("agent_id", "period_start", "uptime_percent", "latency_p95_ms", "error_rate_percent")
    more = (
        "tasks_completed",
        "tasks_failed",
        "unknown_seconds",
        "excluded_seconds",
        "sla_source",
        "compliance_percent",
    )
    names = (
        "agent",
        "from",
        "uptime %",
        "p95 ms",
        "errors %",
        "completed",
        "failed",
        "unknown s",
        "excluded s",
        "sla from",
        "kept %",
    )
    show_table(names, [tuple(row[name] for name in (*fields, *more)) for row in rows])


@sla.command()
@click.argument("id")
@asks_daemon
def evidence(session: Session, id: str) -> None:  # noqa: A002 -- the argument's name in the usage text
    """Print the signed evidence of a breach.

    `asapd verify` computes the verdict anew from it, without a daemon.

    \b
    Example:
      asapctl sla evidence brc_01JD0000000000000000000000 > breach.json
    """
    show_json(session.door.get(f"/breaches/{segment(id)}/evidence"))


@sla.command()
@click.argument("urn")
@click.option("--period", metavar="MONTH", help="A month such as 2026-11; the one that is running unless given.")
@asks_daemon
def penalty(session: Session, urn: str, period: str | None) -> None:
    """Show what a missed availability costs.

    \b
    Example:
      asapctl sla penalty urn:asap:agent:writer --period 2026-11
    """
    found = session.door.get(f"/agents/{segment(urn)}/sla/penalty", period=period)
    if session.as_json:
        show_json(found)
        return
    names = ("agent_id", "period", "complete", "availability_percent", "unknown_seconds", "excluded_seconds")
    amounts = ("cost_usd", "credit_percent", "credit_usd")
    show_pairs([(name.replace("_", " "), found[name]) for name in (*names, *amounts)])


@sla.command()
@click.argument("urn", required=False)
@click.option("--state", type=click.Choice(("open", "resolved")))
@click.option("--severity", type=click.Choice(("warning", "critical")))
@click.option("--since", type=moment, metavar="TIME", help="Detected from then on: 2026-11-20T09:00:00Z, or 7d.")
@click.option(
    "--limit", type=click.IntRange(min=1), default=100, show_default=True, help="At most so many, the newest."
)
@click.option("--fail", is_flag=True, help="Exit with 1 when one of them is open.")
@click.option("--watch", is_flag=True, help="Print the open ones, then every change as it happens, until Ctrl-C.")
@asks_daemon
def breaches(
    session: Session,
    urn: str | None,
    state: str | None,
    severity: str | None,
    since: str | None,
    limit: int,
    fail: bool,
    watch: bool,
) -> int:
    """List broken promises, the newest first.

    \b
    Examples:
      asapctl sla breaches --state open
      asapctl sla breaches --fail
      asapctl sla breaches --watch --json
    """
    if watch:
        from asapd.cli.watch import follow_breaches

        if state is not None or since is not None:
            raise click.UsageError("--watch shows every change from now on: leave --state and --since out")
        return follow_breaches(session, urn, severity, fail=fail)
    filters: dict[str, Any] = {"state": state, "severity": severity, "start": since}
    route = _route(urn, "breaches")
    rows = list(session.door.rows(route, limit=limit, **filters))
    if session.as_json:
        show_json({"data": rows, "count": len(rows), "next_cursor": None})
    else:
        _show_breaches(rows)
    # One that is open may be older than what was asked to be listed.
    is_open = fail and state != "resolved" and any(session.door.rows(route, **{**filters, "state": "open"}))
    return Exit.NO if is_open else Exit.DONE


def _show_breaches(rows: list[dict[str, Any]]) -> None:
    fields = ("breach_type", "window", "threshold", "actual", "detected_at", "resolved_at")
    names = ("id", "state", "severity", "agent", "type", "window", "promised", "measured", "detected", "resolved")
    show_table(
        names,
        [
            (
                row["id"],
                row["state"],
                row["severity"],
                row["agent_id"] or row["budget"],
                *(row[name] for name in fields),
            )
            for row in rows
        ],
    )
