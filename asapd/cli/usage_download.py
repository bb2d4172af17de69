"""An export of usage as it comes, gone on with where a connection ended before it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import click
import msgspec

from asapd.cli.door import CutOffError, Door
from asapd.cli.outcome import Exit, Failure

PATIENCE_S = 60.0
"""How long no row may come before it is given up: a daemon that is started again is there within seconds."""

_PAUSE_S = 0.5
_SEQ = re.compile(rb"[0-9]+")


def download(door: Door, form: str, filters: dict[str, str | None]) -> tuple[dict[str, str], Iterator[bytes]]:
    """The headers of the first reply and the parts of the whole export, which fail when it cannot be had.

    Formats of one row after the other go on behind the last whole row that came, the others fail when cut off.
    """
    headers, parts = door.download("/usage/export", format=form, **filters)
    if form in _ROWS:
        parts = _resumed(door, parts, form, {"format": form, "through": headers["asapd-snapshot"], **filters})
    return headers, parts


def _resumed(door: Door, parts: Iterator[bytes], form: str, asked: dict[str, Any]) -> Iterator[bytes]:
    rows = _ROWS[form]()
    given_up_s: float | None = None
    while True:
        try:
            for part in parts:
                if whole := rows.whole(part):
                    given_up_s = None
                    yield whole
            yield rows.rest
            return
        except CutOffError as error:
            cut_off: Failure = error
            # From here, not from the last row: whoever takes the rows may have been slow.
            given_up_s = given_up_s or time.monotonic() + PATIENCE_S
        rows.rest = b""
        click.echo(
            f"cut off {f'behind row {rows.last}' if rows.last else 'at its start'}: going on from there", err=True
        )
        while True:
            if time.monotonic() > given_up_s:
                raise cut_off
            time.sleep(_PAUSE_S)
            try:
                headers, parts = door.download("/usage/export", after=rows.last, **asked)
                break
            except Failure as error:
                if error.code is not Exit.UNREACHABLE:
                    detail = (
                        f"the reply was cut off, and cannot be gone on with: {error}; nothing was written, ask again"
                    )
                    raise Failure(error.code, detail) from None
                cut_off = error
        if headers["asapd-snapshot"] != asked["through"]:
            next(parts, b"")  # begun, they close their connection at their end
            raise Failure(Exit.UNREACHABLE, "the daemon no longer has rows that it had, as after a restore: ask again")


class _Lines:
    """NDJSON: the whole lines of what came, and the number of the last one."""

    def __init__(self) -> None:
        self.rest = b""
        self.last: int | None = None

    def whole(self, part: bytes) -> bytes:
        """What can be written out now; `rest` waits for more."""
        lines, end, self.rest = (self.rest + part).rpartition(b"\n")
        if end:
            self.last = msgspec.json.decode(lines.rpartition(b"\n")[2])["seq"]
        return lines + end


class _Records:
    """The same for CSV, whose cells may have line ends in quotes; a header waits for the first record."""

    def __init__(self) -> None:
        self.rest = b""
        self.last: int | None = None

    def whole(self, part: bytes) -> bytes:
        """What can be written out now; `rest` waits for more."""
        came = self.rest + part
        start = end = 0
        while (stop := came.find(b"\r\n", end) + 2) >= 2:
            end = stop
            if came.count(b'"', start, end) % 2 == 0:
                number = _SEQ.match(came, start)
                self.last = int(number[0]) if number else self.last
                start = end
        if self.last is None:
            start = 0
        self.rest = came[start:]
        return came[:start]


_ROWS: dict[str, type[_Lines | _Records]] = {"ndjson": _Lines, "csv": _Records}
