"""`checkpoints.log`: every checkpoint as text beside the database, where a copy is taken with any tool."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from asapd.wire.checkpoint import Checkpoint, read_checkpoint, read_size, split_checkpoints
from asapd.wire.signed_note import SIGNATURE_BYTES, NoteMalformedError


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


def length(path: Path) -> int:
    """How many bytes a file of checkpoints has by now; 0 without a file.

    Raises:
        OSError: nobody can say.
    """
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def read(path: Path, *, behind: int = -1, most_bytes: int | None = None) -> Iterator[Checkpoint]:
    """The checkpoints of a file of more entries than `behind`, in its order, unverified. None without a file.

    What is no checkpoint is passed over, what a power cut left of one, and what is behind the first `most_bytes`.

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
        file = os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise
    with file:
        for text in split_checkpoints(_lines(file, most_bytes)):
            size = _size_of(text)
            if size is not None and size <= behind:
                continue
            try:
                checkpoint = read_checkpoint(text)
            except NoteMalformedError:
                continue
            if not _is_cut_off(checkpoint):
                yield checkpoint


def _lines(file: BinaryIO, most_bytes: int | None) -> Iterator[str]:
    left = most_bytes
    for line in file:
        if left is not None and (left := left - len(line)) < 0:
            return
        yield line.decode(errors="replace")


def _is_cut_off(checkpoint: Checkpoint) -> bool:
    """Whether a signature of the log's own is shorter than any: what a power cut leaves may end like a whole line."""
    own = [one for one in checkpoint.note.signatures if one.name == checkpoint.origin]
    return any(len(one.signature) < SIGNATURE_BYTES for one in own)


def _size_of(text: str) -> int | None:
    """The size that a checkpoint says, without reading all of it; None where it says none."""
    _, _, rest = text.partition("\n")
    return read_size(rest.partition("\n")[0])


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
