"""`checkpoints.log`: every checkpoint as text beside the database, where a copy is taken with any tool."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from asapd.wire.checkpoint import Checkpoint, read_checkpoint, split_checkpoints
from asapd.wire.signed_note import NoteMalformedError


def append(path: Path, note: str) -> None:
    """Add a checkpoint, and return when it is on the disk.

    Raises:
        OSError: it is not.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
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
        with path.open(encoding="utf-8", errors="replace", newline="\n") as lines:
            for text in split_checkpoints(lines):
                try:
                    yield read_checkpoint(text)
                except NoteMalformedError:
                    continue
    except FileNotFoundError:
        return


def largest(path: Path, origin: str) -> Checkpoint | None:
    """The checkpoint of this log with the largest size; of two the later one."""
    found: Checkpoint | None = None
    for checkpoint in read(path):
        if checkpoint.origin == origin and (found is None or checkpoint.size >= found.size):
            found = checkpoint
    return found
