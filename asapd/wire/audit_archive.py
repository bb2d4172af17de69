"""Archives of the audit log: an export with one entry a line, compressed with gzip."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from asapd.core.audit import Entry
from asapd.wire.export import BadEntryError, read_entry
from asapd.wire.strict_json import TokenMalformed, parse_strict_json

MAGIC = b"\x1f\x8b"

_MAX_LINE = 64 << 20
"""Of one entry, however well it is compressed: an entry is at most as large as the request it came from."""


def compressor(file: BinaryIO) -> gzip.GzipFile:
    """What writes lines into a file; the same lines always give the same bytes."""
    return gzip.GzipFile(filename="", mode="wb", fileobj=file, compresslevel=6, mtime=0)


def read_archive(file: BinaryIO) -> Iterator[Entry]:
    """The entries of an archive, a line at a time.

    Raises:
        BadEntryError: a line is no entry, or the file was changed or cut off.
    """
    lines = gzip.GzipFile(fileobj=file, mode="rb")
    number = 0
    while True:
        number += 1
        try:
            line = lines.readline(_MAX_LINE)
            if not line:
                return
            row = parse_strict_json(line)
        except (OSError, EOFError, zlib.error) as error:
            raise BadEntryError(None, None, f"line {number} cannot be read, the archive is damaged: {error}") from None
        except TokenMalformed as error:
            raise BadEntryError(None, None, f"line {number} of the archive {error.reason}") from None
        yield read_entry(row)
