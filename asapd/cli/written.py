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
        descriptor, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        try:
            with os.fdopen(descriptor, "wb") as out:
                yield out
                out.flush()
                os.fsync(descriptor)
            Path(name).replace(file)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except BrokenPipeError:
        raise
    except OSError as error:
        raise Failure(Exit.USAGE, f"{file}: cannot be written: {error.strerror}") from None
