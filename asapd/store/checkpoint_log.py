"""`checkpoints.log`: every checkpoint as text beside the database, where a copy is taken with any tool."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from asapd.wire.checkpoint import Checkpoint, read_checkpoint, split_checkpoints
from asapd.wire.signed_note import NoteMalformedError


def append(path: Path, note: str) -> None:
    """Add a checkpoint, and return when it is on the disk.

    Raises:
        OSError: it is not.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o600)
    try:
        _refuse_other_kinds(descriptor, path)
        size = os.fstat(descriptor).st_size
        # A power cut may have left half a line: a blank line ends whatever is there.
        is_cut = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        blank = "\n" * ((size > 0) + is_cut)
        os.write(descriptor, f"{blank}{note}".encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path) -> Iterator[Checkpoint]:
    """The checkpoints of a file, in its order, unverified; what is no checkpoint is passed over. None without a file.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        # A FIFO would keep whoever opens it waiting.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return
    try:
        _refuse_other_kinds(descriptor, path)
        file = os.fdopen(descriptor, encoding="utf-8", errors="replace", newline="\n")
    except BaseException:
        os.close(descriptor)
        raise
    with file:
        for text in split_checkpoints(file):
            try:
                yield read_checkpoint(text)
            except NoteMalformedError:
                continue


def _refuse_other_kinds(descriptor: int, path: Path) -> None:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise OSError(errno.EINVAL, "is no regular file", str(path))


def is_strange(path: Path, origin: str) -> bool:
    """Whether a file in which there is no checkpoint holds something else than the beginning of one of this log.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(len(origin)).lstrip()
    return not origin.encode().startswith(start)
