"""`asapctl usage`: what was used, and what it cost."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from asapd.cli.options import Session, asks_daemon, moment_in
from asapd.cli.show import show_json, show_table
from asapd.cli.usage_download import download
from asapd.cli.written import written
from asapd.wire.row_formats import csv_cell

_COLUMNS = {
    "agent": "agent_id",
    "consumer": "consumer_id",
    "model": "model",
    "project": "project",
    "outcome": "outcome",
}
_TOTALS = (
    "total_tasks",
    "total_events",
    "total_tokens",
    "total_tokens_in",
    "total_tokens_out",
    "total_cached_tokens_in",
    "total_cache_write_tokens",
    "total_cache_write_1h_tokens",
    "total_reasoning_tokens",
    "total_duration_ms",
    "total_api_calls",
    "total_cost_usd",
    "unpriced_events",
    "unique_agents",
    "unique_consumers",
)
_TABLE = (
    "total_tasks",
    "total_tokens_in",
    "total_tokens_out",
    "total_duration_ms",
    "total_api_calls",
    "unpriced_events",
    "total_cost_usd",
)


def _there(context: click.Context, _option: click.Parameter, text: str | None) -> str | None:
    """A time as it was given, a day by the clocks of the zone that periods are told by."""
    return None if text is None else moment_in(context.params.get("timezone") or "UTC", text)


@click.group()
def usage() -> None:
    """What was used, and what it cost."""


@usage.command()
@click.option(
    "--by",
    multiple=True,
    type=click.Choice(tuple(_COLUMNS)),
    help="Sum by this; may be given several times. Without it, and without --period: agent.",
)
@click.option("--period", type=click.Choice(("hour", "day", "week", "month")), help="Sum by this length of time.")
@click.option(
    "--timezone",
    metavar="ZONE",
    is_eager=True,  # it tells when days begin, wherever it stands
    help="Whose clocks tell periods, and days that --since and --until name, such as Europe/Berlin; UTC unless given.",
)
@click.option(
    "--since",
    callback=_there,
    metavar="TIME",
    help="From then on: 2026-11-20T09:00:00Z, 2026-11-20 for its first moment, or 7d for a week ago.",
)
@click.option("--until", callback=_there, metavar="TIME", help="Before then.")
@click.option("--agent", metavar="URN", help="Only work of this agent.")
@click.option("--consumer", metavar="URN", help="Only work for this consumer.")
@click.option("--format", "form", type=click.Choice(("table", "json", "csv")), default="table", show_default=True)
@asks_daemon
def report(
    session: Session,
    by: tuple[str, ...],
    period: str | None,
    since: str | None,
    until: str | None,
    form: str,
    **filters: Any,
) -> None:
    """Sum up usage and cost.

    Sums of whole hours UTC are kept for ever. What asks for less (a time that is not on the hour; of a zone that
    stands off UTC by a part of one its hours, and the hour inside which a longer period begins) is summed up from
    events, which retention takes: it says so where some of them are gone.

    \b
    Examples:
      asapctl usage report
      asapctl usage report --period day --timezone Europe/Berlin --since 2026-10-24 --until 2026-10-27
      asapctl usage report --by model --period day --since 7d
      asapctl usage report --by agent --by consumer --format csv > usage.csv
    """
    groups = [*([period] if period else []), *dict.fromkeys(by)] or ["agent"]
    group_by = ",".join(groups)
    pages = list(session.door.pages("/usage/aggregate", group_by=group_by, start=since, end=until, **filters))
    rows = [row for page in pages for row in page["data"]]
    last = pages[-1]  # each page is of its moment, and what went before it is missing in some of them
    _warn_of_gone(last)
    if session.as_json or form == "json":
        show_json({**last, "data": rows, "count": len(rows), "next_cursor": None})
        return
    own = [_COLUMNS.get(group, "period") for group in groups]
    if form == "csv":
        _write_csv((*own, *_TOTALS), rows)
        return
    names = [name.removeprefix("total_").removesuffix("_id").replace("_", " ") for name in (*own, *_TABLE)]
    show_table(names, [[row[name] for name in (*own, *_TABLE)] for row in rows])
    if unpriced := sum(row["unpriced_events"] for row in rows):
        click.echo(f"{unpriced} events have no known cost, which is not in these sums", err=True)


_NAMED = 3
"""So many stretches are named each: of days that begin inside an hour there is one a day."""


def _warn_of_gone(page: dict[str, Any]) -> None:
    """Say which part of the time that was asked for is not, or not all, in the sums."""
    parts = page["incomplete"]
    which = "events"
    if len(parts) > _NAMED:
        which = f"events of {len(parts)} stretches"
        parts = [{"start": parts[0]["start"], "end": parts[-1]["end"]}]
    for part in parts:
        since = "from the beginning" if part["start"] is None else f"from {part['start']}"
        click.echo(
            f"{which} {since} to {part['end']} are missing in these sums, as far as retention took them: for ever it "
            "keeps only sums of whole hours UTC. Ask for times on the hour, and periods of a zone that stands off UTC "
            f"by whole hours, or for what is later than {page['raw_since']}; retention.usage says how long events stay",
            err=True,
        )


def _write_csv(columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow(csv_cell(row[name]) for name in columns)


@usage.command()
@click.option(
    "--out",
    "file",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    default="-",
    help="Where to write it; stdout unless given.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(("ndjson", "json", "csv", "parquet")),
    help="ndjson unless --json is given.",
)
@click.option("--bom", is_flag=True, help="Of csv: put the mark before it by which Excel knows UTF-8.")
@click.option(
    "--timezone",
    metavar="ZONE",
    is_eager=True,  # as that of a report
    help="Whose clocks tell when days begin that --since and --until name, such as Europe/Berlin; UTC unless given.",
)
@click.option(
    "--since",
    "start",
    callback=_there,
    metavar="TIME",
    help="From then on: 2026-11-20T09:00:00Z, 2026-11-20 for its first moment, or 7d for a week ago.",
)
@click.option("--until", "end", callback=_there, metavar="TIME", help="Before then.")
@click.option("--agent", metavar="URN", help="Only work of this agent.")
@click.option("--consumer", metavar="URN", help="Only work for this consumer.")
@asks_daemon
def export(
    session: Session,
    file: Path,
    form: str | None,
    bom: bool,
    timezone: str | None,  # noqa: ARG001 -- by it days were read already
    **filters: str | None,
) -> None:
    """Write out every usage event.

    All that is recorded when it begins, in the order of time; a file is there as a whole or not at all. Where the
    connection is lost, or asapd started again, ndjson and csv go on from there; json and parquet have to be asked for
    again. Events that retention took are in none, and where that concerns the time asked for, it says so.

    \b
    Examples:
      asapctl usage export --out usage.ndjson
      asapctl usage export --timezone Europe/Berlin --since 2026-11-01 --until 2026-12-01 --out november.ndjson
      asapctl usage export --format parquet --since 30d --out usage.parquet
    """
    chosen = form or ("json" if session.as_json else "ndjson")
    headers, parts = download(session.door, chosen, {**filters, "bom": "true" if bom else None})
    size = 0
    raw_since = headers.get("asapd-raw-since")
    start = filters["start"]
    is_short = raw_since is not None and (start is None or start < raw_since)
    counted = {**filters, "start": raw_since} if is_short else filters
    with _progress(session, chosen, counted) as show, written(file) as out:
        for part in parts:
            out.write(part)
            size += len(part)
            show(part)
    if is_short:
        click.echo(
            f"events from before {raw_since} are not in it, as far as retention took them (retention.usage): "
            "`asapctl usage report` has their sums by whole hours",
            err=True,
        )
    if str(file) != "-":
        click.echo(f"{file}: {size} bytes, all up to row {headers['asapd-snapshot']}", err=True)


@contextmanager
def _progress(session: Session, form: str, filters: dict[str, str | None]) -> Iterator[Callable[[bytes], None]]:
    """On a terminal a bar, by lines; of Parquet, which has none, how many bytes came.

    There are about as many lines as the sums have events: voids, corrections and line ends in cells of CSV come on top.
    """
    if not sys.stderr.isatty():
        yield lambda _part: None
    elif form == "parquet":
        sizes = [0]

        def show(part: bytes) -> None:
            sizes[0] += len(part)
            click.echo(f"\r{sizes[0] / 1_000_000:.1f} MB", nl=False, err=True)

        yield show
        click.echo(err=True)
    else:
        total = session.door.get("/usage/summary", **filters)["total_events"]
        with click.progressbar(length=total, label="about", show_pos=True, show_percent=True, file=sys.stderr) as bar:
            yield lambda part: bar.update(part.count(b"\n"))
            bar.update(max(0, total - bar.pos))
