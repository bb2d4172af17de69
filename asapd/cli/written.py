"""Files that commands write: there as a whole or not at all."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
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
