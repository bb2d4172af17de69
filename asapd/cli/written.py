"""Files that commands write: there as a whole or not at all."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from asapd.cli.outcome import Exit, Failure


@contextmanager
def written(file: Path) -> Iterator[BinaryIO]:
    """A file that is there as a whole or not at all, readable by its owner; devices and pipes are written directly."""
    if str(file) == "-":
        yield sys.stdout.buffer
        return
    try:
        if file.exists() and not file.is_file():
            with file.open("wb") as out:
                yield out
            return
        with whole(file) as out:
            yield out
    except BrokenPipeError:
        raise
    except OSError as error:
        raise Failure(Exit.USAGE, f"{file}: cannot be written: {error.strerror}") from None


@contextmanager
def whole(file: Path, *, like: os.stat_result | None = None) -> Iterator[BinaryIO]:
    """The same of a file alone, which gets the owner and the mode of `like`.

    Raises:
        OSError: it cannot be written.
    """
    with _ended_in_order(), _replaced(file, like) as out:
        yield out


class _EndedError(BaseException):
    """A signal that ends the program came, and first of all what is half written has to go."""


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """What would end the program at once does so when the block has been left."""
    came: list[int] = []

    def end(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        if len(came) == 1:  # a second must not cut off what the first has begun
            raise _EndedError

    # Who ignores one, as nohup does, or heeds it, goes on doing so.
    ours = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
        if came:
            os.kill(os.getpid(), came[0])


@contextmanager
def _replaced(file: Path, like: os.stat_result | None) -> Iterator[BinaryIO]:
    descriptor, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(descriptor, "wb") as out:
            if like is not None:
                if (like.st_uid, like.st_gid) != (os.geteuid(), os.getegid()):
                    os.fchown(descriptor, like.st_uid, like.st_gid)
                os.fchmod(descriptor, like.st_mode & 0o777)
            yield out
            out.flush()
            os.fsync(descriptor)
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
