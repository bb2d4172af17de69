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
SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def now_us() -> int:
    """Microseconds since the epoch, by this host's clock."""
    return time.time_ns() // 1_000


class _Duration(click.ParamType[int]):
    """A duration with its unit, in microseconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from asapd.config.values import read_duration

        if isinstance(value, int):
            return value
        try:
            return read_duration(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Moment(click.ParamType[str]):
    """A time, or a duration before now, as RFC 3339."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from asapd.config.values import read_duration
        from asapd.core.types import format_us
        from asapd.wire.usage import parse_timestamp

        try:
            return format_us(now_us() - read_duration(value))
        except (ValueError, OverflowError):
            pass
        try:
            return format_us(parse_timestamp(value))
        except ValueError as error:
            self.fail(f"{error}; or a duration before now, such as 24h or 7d", param, ctx)


class _Usd(click.ParamType[int]):
    """An amount of USD, in micro-USD."""

    name = "usd"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from asapd.core.money import MoneyError, parse_usd

        if isinstance(value, int):
            return value
        try:
            return parse_usd(value)
        except MoneyError as error:
            self.fail(str(error), param, ctx)


class _Text(click.ParamType[str]):
    """Text as given, of a file with @FILE, or of stdin with -."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            if value == "-":
                return sys.stdin.read().strip()
            return Path(value[1:]).read_text("utf-8").strip() if value.startswith("@") else str(value).strip()
        except OSError as error:
            self.fail(f"{value}: cannot be read: {error.strerror}", param, ctx)
        except UnicodeDecodeError:
            self.fail(f"{value}: is not text", param, ctx)


DURATION = _Duration()
MOMENT = _Moment()
USD = _Usd()
TEXT = _Text()


class Session:
    """One command's run: whether it prints JSON, and the daemon it may ask."""

    def __init__(self, *, as_json: bool, door: Door) -> None:
        self.as_json = as_json
        self.door = door


def json_option(function: Command) -> Command:
    """Give a command that needs no daemon the option `--json`."""

    @click.option("--json", "as_json", is_flag=True, help="Print JSON.")
    @click.pass_context
    @functools.wraps(function)
    def command(context: click.Context, *, as_json: bool, **values: Any) -> Any:
        return function(as_json=as_json or _root(context, "as_json"), **values)

    return command


def asks_daemon(function: Command) -> Command:
    """Give a command `--json` and `--socket`, and hand it a `Session` first."""

    @click.option("--socket", type=click.Path(path_type=Path), help="The daemon's admin socket.")
    @click.pass_context
    @functools.wraps(function)
    def command(context: click.Context, *, socket: Path | None, as_json: bool, **values: Any) -> Any:
        with Door(socket or _root(context, "socket") or default_socket()) as door:
            return function(Session(as_json=as_json, door=door), **values)

    return json_option(command)


def _root(context: click.Context, name: str) -> Any:
    return context.find_root().params.get(name)
