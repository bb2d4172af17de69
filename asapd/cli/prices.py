"""`asapctl prices`: the table in force, checking one, pricing again what was recorded, and where to begin."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import click

from asapd.cli.options import Session, asks_daemon, moment, needs_no_daemon
from asapd.cli.outcome import Exit, Failure
from asapd.cli.show import show_json, show_pairs, show_table
from asapd.cli.written import written

_RATES = ("input", "output", "cached_input", "cache_write", "cache_write_1h", "reasoning")


@click.group()
def prices() -> None:
    """What models cost."""


@prices.command()
@click.option("--model", metavar="NAME", help="Only the row that would price this model.")
@click.option("--provider", metavar="NAME", help="As this provider sells it; with --model.")
@click.option("--at", type=moment, metavar="TIME", help="At that time; now unless given. With --model.")
@asks_daemon
def show(session: Session, model: str | None, provider: str | None, at: str | None) -> int:
    """Show the price table in force.

    Rates are in USD per million tokens; one that is not there (-) is that of input, or of output for reasoning. The
    most specific row goes first. With --model, the exit code is 1 when no row prices it.

    \b
    Examples:
      asapctl prices show
      asapctl prices show --model gpt-4o --provider openai
    """
    if model is None and (provider is not None or at is not None):
        raise click.UsageError("--provider and --at go with --model")
    table = session.door.whole("/prices", model=model, provider=provider, at=at)
    rows = table["data"]
    if session.as_json:
        show_json(table)
    else:
        pairs = ("version", "sha256", "file", "prefer")
        show_pairs([(name, table[name]) for name in pairs])
        click.echo()
        if rows:
            _show_rows(rows)
        elif model is None:
            click.echo(
                "there is no price table: only reported costs count; name one in metering.pricing.file", err=True
            )
        else:
            click.echo(f"no row prices {model}: what it costs is not known unless it is reported", err=True)
    return Exit.NO if model is not None and not rows else Exit.DONE


def _show_rows(rows: list[dict[str, Any]]) -> None:
    names = ("model", "provider", *(f"{rate}_per_mtok" for rate in _RATES), "per_call", "valid_from", "valid_until")
    heads = ("model", "provider", *(rate.replace("_", " ") for rate in _RATES), "a call", "from", "until")
    show_table(heads, [[_day(row[name]) for name in names] for row in rows])


def _day(value: Any) -> Any:
    return value.removesuffix("T00:00:00.000000Z") if isinstance(value, str) else value


@prices.command()
@click.argument("file", type=click.Path(path_type=Path))
@needs_no_daemon
def check(file: Path, as_json: bool) -> int:
    """Check a price table.

    Asks no daemon. Each problem is printed as file:line: field: reason, and the exit code is 2. Rows that can never be
    used are named too, and are no problem.

    \b
    Example:
      asapctl prices check prices.toml
    """
    from asapd.cli.config_check import price_problems, price_remarks
    from asapd.core.price_table import parse_price_table

    problems = list(price_problems(file))
    remarks = [] if problems else list(price_remarks(file))
    version, rows = None, 0
    if not problems:
        table = parse_price_table(file.read_bytes().decode())
        version, rows = table.version, len(table.prices)
    if as_json:
        found = {"file": str(file), "valid": not problems, "version": version, "rows": rows}
        show_json({**found, "problems": problems, "remarks": remarks})
    for line in (*problems, *remarks):
        click.echo(line, err=True)
    if not problems and not as_json:
        click.echo(f"{file}: version {version}, {rows} rows")
    return Exit.USAGE if problems else Exit.DONE


@prices.command()
@click.option("--dry-run", is_flag=True, help="Only say what would change.")
@click.option("--since", type=moment, metavar="TIME", help="From then on: 2026-11-20T09:00:00Z, or 7d for a week ago.")
@click.option("--until", type=moment, metavar="TIME", help="Before then.")
@click.option("--model", metavar="NAME", help="Only this model, or with * at the end all whose name begins so.")
@asks_daemon
def reprice(session: Session, dry_run: bool, since: str | None, until: str | None, model: str | None) -> None:
    """Price again what was recorded, by the table in force.

    Each event that costs something else by that table gets a compensating record with the difference: sums, delegations
    and budgets follow, and the audit log names each. What the table does not price stays as it is. A second run finds
    nothing to do, and one that was interrupted is finished by another.

    \b
    Examples:
      asapctl prices reprice --dry-run
      asapctl prices reprice --since 2026-11-01 --model 'gpt-4o*'
    """
    rows: dict[str | None, dict[str, Any]] = {}
    kept = 0
    cursor: str | None = None
    while True:
        part = session.door.post(
            "/prices/reprice", dry_run="true" if dry_run else None, start=since, end=until, model=model, cursor=cursor
        )
        for row in part["data"]:
            known = rows.get(row["model"])
            rows[row["model"]] = row if known is None else _added(known, row)
        kept += part["estimates_kept"]
        cursor = part["next_cursor"]
        if cursor is None:
            break
    data = [rows[name] for name in sorted(rows, key=lambda name: name or "")]
    changed = sum(row["changed"] for row in data)
    if session.as_json:
        shown = {"dry_run": dry_run, "price_version": part["price_version"], "changed": changed, "estimates_kept": kept}
        show_json({**shown, "data": data, "count": len(data), "next_cursor": None})
        return
    columns = (
        *("model", "events", "changed", "first_priced", "not_in_table", "unpriced_events"),
        *("old_cost_usd", "new_cost_usd", "difference_usd"),
    )
    show_table([name.replace("_", " ") for name in columns], [[row[name] for name in columns] for row in data])
    total = sum((row["difference_usd"] for row in data), Decimal(0))
    if not changed:
        click.echo(f"nothing to do: what {part['price_version']} prices costs what it says", err=True)
    else:
        what = "would be corrected" if dry_run else "were corrected"
        click.echo(f"{changed} events {what} by {total} USD, to {part['price_version']}", err=True)
    if kept:
        click.echo(f"{kept} reservations stay settled at their estimate, whose share is not known", err=True)


def _added(known: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Two parts of one model's row; a sum that neither has stays unknown."""
    both: dict[str, Any] = {"model": known["model"]}
    for name in known.keys() - {"model"}:
        given = [row[name] for row in (known, more) if row[name] is not None]
        both[name] = sum(given) if given else None
    return both


@prices.command()
@click.option(
    "--provider",
    "wanted",
    multiple=True,
    metavar="NAME",
    help="Whose prices; may be given several times. Without it: the large makers of models.",
)
@click.option(
    "--out",
    "file",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    help="Where to write the table; stdout unless given.",
)
@needs_no_daemon
def seed(wanted: tuple[str, ...], file: Path | None, as_json: bool) -> None:
    """Write a price table to begin with.

    From the figures of the package genai-prices (pip install 'asapd[prices]'), without asking any network. What the
    table cannot say exactly is in it as a comment, with the reason, and not in force: prices by the length of a
    request, by the time of day, or by the kind of token.

    \b
    Examples:
      asapctl prices seed --out prices.toml
      asapctl prices seed --provider openai --provider azure
    """
    from importlib.metadata import version

    from asapd.cli import price_seed

    try:
        from genai_prices.data import providers
    except ImportError:
        raise Failure(Exit.USAGE, "this needs genai-prices: pip install 'asapd[prices]'") from None
    known = price_seed.provider_ids(providers)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise Failure(Exit.USAGE, f"genai-prices knows no provider {unknown[0]}; it knows {', '.join(known)}")
    try:
        chosen = list(dict.fromkeys(wanted)) or list(price_seed.MAKERS)
        found = price_seed.seed(providers, chosen, version("genai-prices"))
    except price_seed.NotUnderstoodError as error:
        raise Failure(Exit.USAGE, f"{error}: install the version that asapd[prices] asks for") from None
    left = [{"provider": one.provider, "model": one.model, "reason": one.reason} for one in found.left]
    if file is not None:
        with written(file) as out:
            out.write(found.text.encode())
    if as_json:
        shown = {"file": None if file is None else str(file), "providers": chosen, "rows": found.rows, "left_out": left}
        show_json(shown if file is not None else {**shown, "table": found.text})
    elif file is None:
        click.echo(found.text, nl=False)
    where = "" if file is None or str(file) == "-" else f"{file}: "
    click.echo(f"{where}{found.rows} rows; {len(left)} not in force, see the comments", err=True)
