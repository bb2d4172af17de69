"""What commands have in common: how values are written, and the options of everything that asks the daemon."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from asapd.cli.door import Door, default_socket

Command = Callable[..., Any]
SOCKET_PATH = click.Path(path_type=Path, readable=False)
"""Whether it may be opened is for the socket to say: it takes the right to write."""
SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def now_us() -> int:
    """Microseconds since the epoch, by this host's clock."""
    return time.time_ns() // 1_000


def duration(text: str) -> int:
    """A duration with its unit, in microseconds."""
    from asapd.config.values import read_duration

    try:
        return read_duration(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def moment(text: str) -> str:
    """A time, or a duration before now, as RFC 3339; a day without a time is one of UTC."""
    return moment_in("UTC", text)


def moment_in(zone: str, text: str) -> str:
    """A time, or a duration before now, as RFC 3339; a day without a time begins when it does by the zone's clocks."""
    from asapd.config.values import read_duration
    from asapd.core.types import format_us
    from asapd.wire.usage import parse_timestamp

    try:
        return format_us(now_us() - read_duration(text))
    except (ValueError, OverflowError):
        pass
    try:
        return format_us(_day_us(zone, text) if len(text) == len("2026-11-20") else parse_timestamp(text))
    except ValueError as error:
        raise click.BadParameter(f"{error}, or a duration before now such as 24h or 7d") from None


def _day_us(zone: str, text: str) -> int:
    """When a day begins.

    Raises:
        ValueError: there is no such day.
        click.BadParameter: there is no such time zone.
    """
    from datetime import UTC, datetime
    from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

    from asapd.core.periods import period_bounds
    from asapd.core.types import datetime_us
    from asapd.wire.usage import parse_timestamp

    noon = datetime.fromtimestamp(parse_timestamp(f"{text}T12:00Z") // 1_000_000, UTC)
    try:
        its = ZoneInfo(zone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        reason = "must be the name of a time zone, such as Europe/Berlin"
        raise click.BadParameter(reason, param_hint="'--timezone'") from None
    try:
        return period_bounds("day", its, datetime_us(noon.replace(tzinfo=its)))[0]
    except OverflowError:
        raise ValueError("must be a day within the years 1 to 9999") from None


def usd(text: str) -> int:
    """An amount of USD, in micro-USD."""
    from asapd.core.money import MoneyError, parse_usd

    try:
        return parse_usd(text)
    except MoneyError as error:
        raise click.BadParameter(str(error)) from None


def text_or_file(text: str) -> str:
    """Text as given, of a file with @FILE, or of stdin with -."""
    try:
        if text == "-":
            return sys.stdin.read().strip()
        return Path(text[1:]).read_text("utf-8").strip() if text.startswith("@") else text.strip()
    except OSError as error:
        raise click.BadParameter(f"{text}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise click.BadParameter(f"{text}: is not text") from None


class Session:
    """One command's run: whether it prints JSON, and the daemon it may ask."""

    def __init__(self, *, as_json: bool, door: Door) -> None:
        self.as_json = as_json
        self.door = door


def json_option(function: Command) -> Command:
    """Give a command that needs no daemon the option `--json`."""

    @click.option("--json", "as_json", is_flag=True, help="Print JSON.")
    @functools.wraps(function)
    def command(*, as_json: bool, **values: Any) -> Any:
        return function(as_json=as_json or root_option("as_json"), **values)

    return command


def needs_no_daemon(function: Command) -> Command:
    """Give a command `--json`, and `--socket`, which it takes no notice of: scripts give that to every command."""
    return click.option("--socket", type=SOCKET_PATH, hidden=True, expose_value=False)(json_option(function))


def asks_daemon(function: Command) -> Command:
    """Give a command `--json` and `--socket`, and hand it a `Session` first."""

    @click.option("--socket", type=SOCKET_PATH, help="The daemon's admin socket.")
    @functools.wraps(function)
    def command(*, socket: Path | None, as_json: bool, **values: Any) -> Any:
        return function(Session(as_json=as_json, door=open_door(socket)), **values)

    return json_option(command)


def open_door(socket: Path | None) -> Door:
    """The daemon at the socket that a command names, else the program's options, else the default."""
    return Door(socket or root_option("socket") or default_socket())


def root_option(name: str) -> Any:
    """What was given before the command's name, as in `asapctl --json status`."""
    return click.get_current_context().find_root().params.get(name)
