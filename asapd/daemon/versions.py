"""The configurations that were accepted, as files in the state directory, so that one can be gone back to."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from asapd.daemon.boot import write_private

# Fifty changes of a file of some kilobytes: who goes back further has it under version control.
KEPT = 50


class Version(msgspec.Struct, frozen=True):
    """One accepted text of the file. Numbers count from 1."""

    number: int
    accepted_us: int
    sha256: str


class Versions:
    """Versions in a directory of their own, mode 0700; whoever calls may block."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def keep(self, text: str, now_us: int) -> Version:
        """The version of a text that is accepted: the newest, if that has the same, else another.

        Raises:
            OSError: it cannot be kept.
        """
        self._directory.mkdir(mode=0o700, exist_ok=True)
        newest = next(self._newest_first(), None)
        if newest is not None and self.text(newest.number) == text:
            return newest
        # One that cannot be read still has its number.
        number = max(self._numbers(), default=0) + 1
        path = self._path(number)
        write_private(path, text.encode())
        os.utime(path, ns=(now_us * 1000, now_us * 1000))
        for old in [version.number for version in self._newest_first()][KEPT:]:
            self._path(old).unlink(missing_ok=True)
        return Version(number, now_us, _digest(text))

    def all(self) -> list[Version]:
        """Those that are kept, the newest first.

        Raises:
            OSError: they cannot be read.
        """
        return list(self._newest_first())

    def text(self, number: int) -> str | None:
        """The text of a version; None when it is not kept, or is no text any more.

        Raises:
            OSError: it cannot be read.
        """
        try:
            return self._path(number).read_bytes().decode()
        except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError):
            return None

    def holding(self, name: str) -> list[int]:
        """The numbers of those versions that have a name anywhere in their text, the newest first.

        Raises:
            OSError: they cannot be read.
        """
        return [number for number in self._numbers() if name in (self.text(number) or "")]

    def _numbers(self) -> list[int]:
        names = self._directory.glob("*.toml") if self._directory.is_dir() else ()
        return sorted((int(path.stem) for path in names if path.stem.isdecimal()), reverse=True)

    def _newest_first(self) -> Iterator[Version]:
        for number in self._numbers():
            text = self.text(number)
            if text is not None:
                with suppress(FileNotFoundError):  # the oldest may go meanwhile
                    yield Version(number, self._path(number).stat().st_mtime_ns // 1000, _digest(text))

    def _path(self, number: int) -> Path:
        return self._directory / f"{number}.toml"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
