"""What waits to be sent: the records, and the order they keep."""

from __future__ import annotations

import os
import socket
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from asapd.client.event import encode
from asapd.client.late import is_held


class Kind(StrEnum):
    """What a record is."""

    USAGE = "u"
    """A usage event, with `source` and `seq`."""
    SETTLE = "s"
    """`{"reservation": id}`: to be settled once the events before it are recorded."""
    DAMAGED = "?"
    """A line whose checksum is wrong."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record as it waits. `end` is the place after it, for `Waiting.acknowledge`."""

    kind: Kind
    body: bytes
    end: tuple[int, int]


class Waiting(Protocol):
    """A bounded queue of records. One thread reads and acknowledges, any may append."""

    @property
    def is_durable(self) -> bool:
        """Whether what waits outlives the process."""
        ...

    @property
    def count(self) -> int:
        """Records that wait."""
        ...

    @property
    def size_bytes(self) -> int:
        """What they take."""
        ...

    @property
    def is_entered(self) -> bool:
        """Whether this thread is in one of these methods already: no other may be called then."""
        ...

    def append(self, kind: Kind, values: Mapping[str, Any]) -> bool:
        """Add a record; False when there is no room: the event is lost, and its `seq` is the gap it leaves.

        Raises:
            OSError: the disk refuses; nothing changed.
        """
        ...

    def read(self, max_records: int, max_bytes: int, after: Record | None = None) -> list[Record]:
        """The oldest records, or those behind one that was read, at least one if there is any."""
        ...

    def acknowledge(self, record: Record, count: int) -> None:
        """Forget the oldest `count` records, of which `record` is the last."""
        ...

    def sync(self) -> None:
        """Make what was appended survive a power cut, where that can be."""
        ...

    def close(self) -> int:
        """Leave what waits to whoever opens it next, and take nothing more; gives how many records that loses."""
        ...


def source_name(name: str | None) -> str:
    """What a source is called before its chance: the name that was given, or the host's."""
    return (name or socket.gethostname())[:200]


def new_source(name: str | None) -> str:
    """A source that no other process uses: the name, or the host's, and some chance."""
    return f"{source_name(name)}-{os.urandom(6).hex()}"


def numbered(kind: Kind, values: Mapping[str, Any], source: str, seq: int) -> bytes:
    """The body of a record; usage gets its source and its number in it."""
    return encode({**values, "source": source, "seq": seq} if kind is Kind.USAGE else values)


class Memory:
    """Records in memory, for programs without a spool and for when the disk refuses; gone with the process."""

    is_durable = False

    def __init__(self, max_bytes: int, name: str | None) -> None:
        self._max_bytes = max_bytes
        self._source = new_source(name)
        self._seq = 0
        self._records: deque[Record] = deque()
        self._lock = threading.RLock()
        self._size_bytes = 0

    @property
    def count(self) -> int:
        """See `Waiting`."""
        return len(self._records)

    @property
    def size_bytes(self) -> int:
        """See `Waiting`."""
        return self._size_bytes

    @property
    def is_entered(self) -> bool:
        """See `Waiting`."""
        return is_held(self._lock)

    def append(self, kind: Kind, values: Mapping[str, Any]) -> bool:
        """See `Waiting`."""
        with self._lock:
            record = Record(kind, numbered(kind, values, self._source, self._seq + 1), (0, 0))
            size_bytes = len(record.body)
            has_room = self._size_bytes + size_bytes <= self._max_bytes
            # From here on without a call, so that no interrupt comes between.
            if kind is Kind.USAGE:
                self._seq += 1
            if has_room:
                self._records += (record,)
                self._size_bytes += size_bytes
            return has_room

    def read(self, max_records: int, max_bytes: int, after: Record | None = None) -> list[Record]:
        """See `Waiting`."""
        found: list[Record] = []
        size_bytes = 0
        with self._lock:
            records = iter(self._records)
            if after is not None:
                next((record for record in records if record is after), None)
            for record in records:
                size_bytes += len(record.body)
                if found and (len(found) >= max_records or size_bytes > max_bytes):
                    break
                found.append(record)
        return found

    def acknowledge(self, record: Record, count: int) -> None:
        """See `Waiting`."""
        del record
        with self._lock:
            for _ in range(count):
                self._size_bytes -= len(self._records.popleft().body)

    def sync(self) -> None:
        """Memory does not survive anything."""

    def close(self) -> int:
        """Forget everything, and take nothing more: it would be nowhere."""
        with self._lock:
            lost = len(self._records)
            self._records.clear()
            self._size_bytes = self._max_bytes = 0
            return lost
