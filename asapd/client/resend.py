"""`python -m asapd.client.resend`: sends again what was set aside, once its cause is mended."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from asapd.client import address as addresses
from asapd.client.event import TOKEN_FIELD, encode
from asapd.client.link import Answer, Away, Refused, Requests, Taken, report, settle

ALL_TAKEN, SOME_REFUSED, DAEMON_AWAY = 0, 1, 3


def main(arguments: list[str] | None = None) -> int:
    """Send each line of a file; those that are refused again go to the standard output, with the reason of today."""
    parser = argparse.ArgumentParser(
        "python -m asapd.client.resend",
        description="Send what was set aside. What is refused again is written to the standard output, as a file of "
        "the same kind. The file stays as it is, and sending it twice counts nothing twice.",
        epilog="The API key, where one is needed, is taken from $ASAPD_KEY.",
    )
    parser.add_argument("file", type=Path, help="the refused.ndjson of a spool")
    parser.add_argument("--address", help="of the daemon, as for a meter (/run/asapd/ingest.sock)")
    options = parser.parse_args(arguments)
    try:
        requests = Requests(addresses.parse(options.address), os.environ.get("ASAPD_KEY", "").strip() or None, None)
        with contextlib.closing(requests), options.file.open(encoding="utf-8", errors="surrogateescape") as lines:
            return send(lines, requests, sys.stdout)
    except (OSError, ValueError) as error:
        parser.error(str(error))


def send(lines: Iterable[str], requests: Requests, rest: TextIO) -> int:
    """Send them one by one, so that none keeps another from being taken; gives the exit status."""
    taken = refused = 0
    for number, text in enumerate(lines, 1):
        line = _line(text)
        answer = _send(requests, line.get("event"))
        match answer:
            case Taken():
                taken += 1
            case Away(is_bug=False):
                sys.stderr.write(
                    f"asapd takes nothing at present: {answer.reason}; {taken} of the {number - 1} lines before this "
                    "one were taken. Run it again on the same file later\n"
                )
                return DAEMON_AWAY
            case Refused() | Away():
                refused += 1
                code, reason = _why(answer)
                rest.write(json.dumps({**line, "code": code, "reason": reason}) + "\n")
    sys.stderr.write(f"taken: {taken}, refused again: {refused}\n")
    return SOME_REFUSED if refused else ALL_TAKEN


def _line(text: str) -> dict[str, Any]:
    """A line, or its text as the event of one: what was damaged is shown, never sent."""
    data = text.rstrip("\n").encode("utf-8", "surrogateescape")
    try:
        line = json.loads(data.decode("utf-8"))
        encode(line)  # which 1e999 cannot be, nor what is nested too deeply
    except (ValueError, RecursionError):
        line = None
    return line if isinstance(line, dict) else {"event": data.decode("utf-8", "replace")}


def _send(requests: Requests, event: Any) -> Answer:
    if not isinstance(event, dict):
        return Refused("damaged", "this is no event: it was damaged on the disk, and what is left of it is shown")
    if "id" not in event and "reservation" in event:
        return settle(requests, str(event["reservation"]))
    token = event.get(TOKEN_FIELD)
    if not isinstance(token, str):
        return report(requests, [encode(event)])
    return report(requests, [encode({name: value for name, value in event.items() if name != TOKEN_FIELD})], token)


def _why(answer: Refused | Away) -> tuple[str, str]:
    if isinstance(answer, Away):
        return "internal", answer.reason
    return answer.code, next(iter(answer.places.values()), answer.detail)


if __name__ == "__main__":
    sys.exit(main())
