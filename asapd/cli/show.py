"""Results on stdout: JSON as the daemon sent it, tables that are pretty on a terminal and plain in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

import click

_STYLES = {
    **dict.fromkeys(("healthy", "running", "ok", "active", "resolved", "met", "yes"), "green"),
    **dict.fromkeys(("degraded", "stale", "warning", "expired"), "yellow"),
    **dict.fromkeys(("unhealthy", "error", "critical", "open", "revoked", "broken", "failed"), "red"),
}


def encode(value: Any) -> bytes:
    """A value as compact JSON, amounts of money (Decimal) as exact numbers."""
    import msgspec

    return msgspec.json.Encoder(decimal_format="number").encode(value)


def show_json(value: Any) -> None:
    """A value as indented JSON."""
    import msgspec

    click.echo(msgspec.json.format(encode(value), indent=2))


def show_json_line(value: Any) -> None:
    """A value as one line of JSON, at once: whoever follows a stream waits for it."""
    click.echo(encode(value))


def cell(value: Any) -> str:
    """A value as it stands in a table; what a terminal would take for a command is escaped."""
    match value:
        case None | "":
            return "-"
        case True:
            return "yes"
        case False:
            return "no"
        case float() | Decimal():
            return f"{value:.6f}".rstrip("0").rstrip(".")
        case list() | tuple():
            return ", ".join(cell(item) for item in value) or "-"
        case dict():
            return ", ".join(f"{key} {cell(item)}" for key, item in value.items()) or "-"
    text = str(value)
    return text if text.isprintable() else ascii(text)[1:-1]


def show_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Rows under headings. In a pipe columns are aligned by spaces, nothing is cut or coloured."""
    texts = [[cell(value) for value in row] for row in rows]
    numeric = [_is_number(column) for column in zip(*texts, strict=True)] if texts else [False] * len(columns)
    if sys.stdout.isatty():
        _show_rich(columns, texts, numeric)
        return
    widths = [max(map(len, column)) for column in zip(columns, *texts, strict=True)]
    for row in ([name.upper() for name in columns], *texts):
        aligned = [
            text.rjust(width) if is_number else text.ljust(width)
            for text, width, is_number in zip(row, widths, numeric, strict=True)
        ]
        click.echo("  ".join(aligned).rstrip())


def show_pairs(pairs: Sequence[tuple[str, Any]]) -> None:
    """Names and values, one a line."""
    width = max(len(name) for name, _ in pairs) + 2
    for name, value in pairs:
        text = cell(value)
        shown = click.style(text, fg=_STYLES.get(text)) if sys.stdout.isatty() else text
        click.echo(f"{name + ':':{width}}{shown}")


def _is_number(texts: Sequence[str]) -> bool:
    given = [text for text in texts if text != "-"]
    return bool(given) and all(text.removeprefix("-").replace(".", "", 1).isdecimal() for text in given)


def _show_rich(columns: Sequence[str], texts: Sequence[Sequence[str]], numeric: Sequence[bool]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name, is_number in zip(columns, numeric, strict=True):
        table.add_column(name, justify="right" if is_number else "left", overflow="fold")
    for row in texts:
        # Text and not str: brackets in a name are no markup.
        table.add_row(*(Text(text, _STYLES.get(text, "")) for text in row))
    Console().print(table)
