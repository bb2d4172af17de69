"""Logging to stderr, in the form that suits whoever reads it."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from asapd.wire.log_lines import JsonFormatter, TerminalFormatter


def configure(stream: TextIO = sys.stderr, level: int = logging.INFO) -> None:
    """Send every record of the process to a stream, in the form that suits it."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(TerminalFormatter() if stream.isatty() else JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
