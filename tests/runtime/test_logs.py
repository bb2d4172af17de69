"""Log lines for machines and for a terminal."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator

import pytest

from asapd.runtime.logs import configure
from asapd.wire.log_lines import JsonFormatter, TerminalFormatter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def root_logger_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def record(level: int = logging.INFO, *, error: bool = False) -> logging.LogRecord:
    made = logging.LogRecord("asapd.x", level, "", 0, "saw %d", (5,), None)
    made.created = 1_800_000_000.123456
    if error:
        try:
            raise ValueError("boom")
        except ValueError:
            made.exc_info = sys.exc_info()
    return made


def test_a_json_line_holds_time_level_logger_and_message() -> None:
    assert json.loads(JsonFormatter().format(record())) == {
        "time": "2027-01-15T08:00:00.123456Z",
        "level": "info",
        "logger": "asapd.x",
        "message": "saw 5",
    }


def test_an_error_is_one_line_with_its_traceback() -> None:
    line = JsonFormatter().format(record(logging.ERROR, error=True))
    assert "\n" not in line
    assert "ValueError: boom" in json.loads(line)["error"]


@pytest.mark.parametrize(
    ("level", "name"), [(logging.DEBUG, "debug"), (logging.CRITICAL, "critical"), (25, "level 25")]
)
def test_every_level_has_a_name(level: int, name: str) -> None:
    assert json.loads(JsonFormatter().format(record(level)))["level"] == name


def test_a_terminal_line_is_for_people() -> None:
    line = TerminalFormatter().format(record(logging.WARNING))
    assert "\x1b[33mwarning\x1b[0m saw 5" in line
    assert "ValueError: boom" in TerminalFormatter().format(record(error=True))
    assert "saw 5" in TerminalFormatter().format(record(25))


@pytest.mark.parametrize(("stream", "begin"), [(io.StringIO(), "{"), (Terminal(), "")])
def test_the_form_suits_the_stream(stream: io.StringIO, begin: str) -> None:
    configure(stream)
    logging.getLogger("asapd.test").info("hello")
    logging.getLogger("asapd.test").debug("hidden")
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("{") is bool(begin)
    assert "hello" in line
