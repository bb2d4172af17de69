"""Files that hold entries of the audit log: written beside the one they become, verified, then put in its place."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import apsw

from asapd.core import audit
from asapd.core.audit import Fault, Walk
from asapd.store.audit import AuditFilter, list_entries
from asapd.store.audit_retention import Prefix
from asapd.wire.audit_archive import compressor, read_archive
from asapd.wire.export import BadEntryError
from asapd.wire.row_formats import Ndjson

PAGE = 500
"""Entries that are written or verified in one go: some ten milliseconds of a thread."""


def name_of(prefix: Prefix) -> str:
    """The name of the file of some entries, which no other log has a file of, such as one that a restore gave up."""
    return f"audit-{prefix.first_seq:012d}-{prefix.last_hash[:4].hex()}.ndjson.gz"


def page(connection: apsw.Connection, after: int, through: int) -> tuple[bytes, int]:
    """Some entries behind `after` as lines, and the number of the last of them."""
    rows = list_entries(connection, AuditFilter(), min(PAGE, through - after), after, descending=False)
    return Ndjson().rows(rows), rows[-1]["seq"] if rows else through


class Draft:
    """An archive that is being made, under a name that no reader looks for.

    Raises:
        OSError: it cannot be written; what was there under the final name stays.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, exist_ok=True)
        self._directory = directory
        self._path = directory / "audit.new"
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = os.fdopen(os.open(self._path, flags, 0o600), "w+b")
        self._lines = compressor(self._file)

    def add(self, lines: bytes) -> None:
        """Write some lines."""
        self._lines.write(lines)

    def finish(self) -> None:
        """End the file; it is on the disk then."""
        self._lines.close()
        self._file.flush()
        os.fsync(self._file.fileno())

    def verified(self, prefix: Prefix) -> Iterator[Fault | None]:
        """Read the file again from its beginning, a page a time, and hold it to the entries that it has to hold.

        The last that comes is what is wrong with it; None when it holds these entries and nothing else, each whole.
        """
        self._file.seek(0)
        entries = read_archive(self._file)
        walk = Walk(prefix.first_seq - 1, prefix.previous_hash)
        while True:
            try:
                read = list(islice(entries, PAGE))
            except BadEntryError as error:
                yield Fault(error.seq or walk.seq + 1, error.id, error.reason)
                return
            if not read:
                break
            walk = audit.verify(read, walk)
            if walk.fault is not None:
                break
            yield None
        if walk.fault is None and (walk.seq, walk.hash) != (prefix.last_seq, prefix.last_hash):
            yield Fault(walk.seq, None, f"the archive ends at entry {walk.seq}, not at {prefix.last_seq}")
        else:
            yield walk.fault

    def publish(self, name: str) -> str:
        """Put the file in its place for good; its SHA-256 in hex."""
        self._file.seek(0)
        digest = hashlib.file_digest(self._file, "sha256").hexdigest()
        self._path.rename(self._directory / name)
        descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return digest

    def close(self) -> None:
        """Let go of the file; of one that was not published nothing is left."""
        for end in (self._lines.close, self._file.close, self._path.unlink):
            with contextlib.suppress(OSError):
                end()


def is_whole(path: Path, sha256: str) -> bool:
    """Whether a file is there and has a digest; one that cannot be read is not there."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except OSError:
        return False
