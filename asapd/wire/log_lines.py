"""Log records as text: JSON objects for machines, readable lines for a terminal."""

from __future__ import annotations

import logging
import time

import msgspec

_COLOURS = {"debug": 2, "info": 32, "warning": 33, "error": 31, "critical": 31}
_LEVELS = {logging.DEBUG: "debug", logging.INFO: "info", logging.WARNING: "warning", logging.ERROR: "error"}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time`, `level`, `logger`, `message`, and `error` with the traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        line = {
            "time": _timestamp(record),
            "level": _LEVELS.get(record.levelno, record.levelname.lower()),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


class TerminalFormatter(logging.Formatter):
    """Time, level and message, with the level coloured."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        level = _LEVELS.get(record.levelno, record.levelname.lower())
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        text = f"{clock} \x1b[{_COLOURS.get(level, 0)}m{level:<7}\x1b[0m {record.getMessage()}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def _timestamp(record: logging.LogRecord) -> str:
    seconds, fraction = divmod(round(record.created * 1_000_000), 1_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{fraction:06d}Z"
