"""A verification in a process of its own, so that a long log is walked beside the daemon and not in its loop."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import apsw
import msgspec
import trio

from asapd.store.giving_way import GivingWay, be_batch_work
from asapd.store.verifying import CannotVerifyError, Progress, Report, Request, reading, verification

_NICE = 10
_END_S = 5.0
_TOLD_EVERY = 10


class _NoVerdict(msgspec.Struct, frozen=True, tag=True):
    """In the place of a report: why there is none."""

    reason: str


_said = msgspec.json.Decoder(Progress | Report | _NoVerdict)


class VerifierDiedError(Exception):
    """The process that verified ended by itself; its traceback is on stderr. Ask again."""


async def verify_apart(path: Path, request: Request) -> AsyncGenerator[Progress | Report, None]:
    """Verify a database in another process, which ends with this; the last that comes is the report.

    Raises:
        CannotVerifyError: there is no verdict, for want of what it takes to read the database.
        VerifierDiedError: it ended without a word.
    """
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "asapd.store.verifying_process", str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    is_whole = False
    try:
        async with process.stdin:
            await process.stdin.send_all(msgspec.json.encode(request))
        rest = b""
        async for part in process.stdout:
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                said = _said.decode(line)
                if isinstance(said, _NoVerdict):
                    raise CannotVerifyError(said.reason)
                is_whole = isinstance(said, Report)
                yield said
    except trio.BrokenResourceError:
        pass
    finally:
        if not is_whole:
            process.kill()
        with trio.move_on_after(_END_S, shield=True):  # it was killed, or has said all it had to say
            await process.wait()
        await process.stdout.aclose()
    if not is_whole:
        raise VerifierDiedError(f"the verifying process ended with code {process.returncode}")


def open_alone(path: Path) -> apsw.Connection:
    """Open a database to read it in one thread only: without the locks of SQLite a walk takes a tenth less."""
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_NOMUTEX)
    connection.set_busy_timeout(5_000)
    return connection


def main(arguments: Sequence[str]) -> int:
    """`python -m asapd.store.verifying_process DATABASE`, the request on stdin; for the daemon only."""
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
    with contextlib.suppress(OSError):  # a sandbox may not let it: it is none the worse
        os.nice(_NICE)
    # Not idle work: where all processors are busy that gets a hundredth of one, and a snapshot of it keeps the WAL from
    # being begun anew.
    be_batch_work()
    # Only the daemon listens: with it gone there is nobody to tell, and nothing to say about that.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        with reading(), contextlib.closing(open_alone(Path(arguments[0]))) as connection:
            if request.gives_way:
                connection.exec_trace = GivingWay(connection)
            for number, said in enumerate(verification(connection, request)):
                if isinstance(said, Report) or not number % _TOLD_EVERY:
                    _say(said)
    except CannotVerifyError as error:
        _say(_NoVerdict(str(error)))
    return 0


def _say(said: Progress | Report | _NoVerdict) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(said) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
