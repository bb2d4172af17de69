"""Directories whose entries survive a power cut, which is another matter than what is in their files."""

from __future__ import annotations

import contextlib
import os
from itertools import takewhile
from pathlib import Path


def make(path: Path) -> None:
    """Make a directory, and those above it that are missing; others may do so at the same time.

    Raises:
        OSError: when it cannot be made.
    """
    missing = list(takewhile(lambda one: not one.exists(), [path, *path.parents]))
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    for made in missing:
        sync(made.parent)


def sync(path: Path) -> None:
    """Have what was made in it last, where its filesystem can do that, and it may be opened."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
