"""Records on disk: append-only segments that survive the process, and a mark of how far they were acknowledged.

A line of a segment is the kind, the CRC-32 of the rest in hex, and the record as JSON: `u 1c291ca3 {...}`. It is
written with one `write` before `append` returns, so a killed process loses nothing. What waits longer, because the
daemon is away, is fsynced by the sender, so that a power cut takes at most the last seconds.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from asapd.client.directory import make
from asapd.client.late import is_held
from asapd.client.locked import close_file, open_file
from asapd.client.waiting import Kind, Record, new_source, numbered, source_name

SEGMENT_BYTES = 4 * 2**20
_READ_BYTES = 2**18
_HEAD_BYTES = len(b"u 00000000 ")
_open_spools: set[Spool] = set()
"""Those of this process, from before they are locked, so that a fork at any time leaves none of them in the child."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class SpoolLockedError(Exception):
    """Another process uses this directory: take another one."""


class Spool:
    """One directory of segments, which one process uses at a time.

    `source` and its numbering go on from one process to the next; with a `name` that is another than the one before,
    there is a new source. After a reboot there is one too, because a power cut may have taken numbers that were already
    sent.

    Raises:
        SpoolLockedError: when another process has it.
        OSError: when the directory cannot be used.
    """

    is_durable = True

    def __init__(
        self, directory: Path, max_bytes: int, name: str | None, *, segment_bytes: int = SEGMENT_BYTES
    ) -> None:
        make(directory)
        self._directory = directory
        self._max_bytes = max_bytes
        self._segment_bytes = segment_bytes
        self._lock = threading.RLock()
        self._sealed: dict[int, int] = {}
        self._is_dirty = False
        self._reading = -1
        self._reading_number = 0
        self.count = 0
        self.size_bytes = 0
        self._fd = self._mark_fd = self._lock_fd = -1
        _open_spools.add(self)
        try:
            self._lock_fd = _lock(directory / "lock")
            self._open(name)
        except BaseException:
            self.close()
            raise

    # --- opening

    def _open(self, name: str | None) -> None:
        segments = self._segments()
        marked, offset, seq = _read_mark(self._directory)
        first, start = (marked, offset) if marked in segments else (segments[0] if segments else 1, 0)
        for number in segments:
            if number < first:
                self._path(number).unlink()
        self.source, is_known = self._identify(name)
        self._number = segments[-1] if segments else 1
        self._fd = os.open(self._path(self._number), os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._end = _cut_torn_line(self._fd)
        # A power cut may keep the mark and take what was acknowledged before it, with the end of the segment.
        self._acknowledged = (first, min(start, self._size(first)))
        self._seq = seq if is_known else 0
        self._count()
        self._mark_fd = os.open(self._directory / "acknowledged", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._write_mark()
        if self._acknowledged < (marked, offset):
            # Before anything is appended, which the former mark would pass over after another power cut.
            os.fsync(self._mark_fd)

    def _count(self) -> None:
        """What a former process left, and the number it had come to."""
        last: Record | None = None
        for record, line_bytes in self._lines(self._acknowledged):
            self.count += 1
            self.size_bytes += line_bytes
            last = record if record.kind is Kind.USAGE else last
        event = {} if last is None else json.loads(last.body)
        if event.get("source") == self.source:
            self._seq = max(self._seq, int(event["seq"]))

    def _segments(self) -> list[int]:
        return sorted(int(path.stem) for path in self._directory.glob("*.segment") if path.stem.isdecimal())

    def _path(self, number: int) -> Path:
        return self._directory / f"{number:012d}.segment"

    def _write_mark(self) -> None:
        text = f"{self._acknowledged[0]:012d} {self._acknowledged[1]:012d} {self._seq:016d}"
        os.pwrite(self._mark_fd, f"{text} {zlib.crc32(text.encode()):08x}\n".encode(), 0)

    def _identify(self, name: str | None) -> tuple[str, bool]:
        boot = ""
        with contextlib.suppress(OSError):
            boot = _BOOT_ID.read_text("ascii").strip()
        path = self._directory / "source"
        with contextlib.suppress(OSError, ValueError):
            source, old_boot = path.read_text("utf-8").split("\n")[:2]
            is_named = name is None or source.rpartition("-")[0] == name
            if old_boot == boot and source and is_named:
                return source, True
        source = new_source(name)
        fresh = path.with_suffix(".new")
        with fresh.open("w", encoding="utf-8") as file:
            file.write(f"{source}\n{boot}\n")
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
        return source, False

    # --- using

    @property
    def is_entered(self) -> bool:
        """See `Waiting`."""
        return is_held(self._lock)

    def append(self, kind: Kind, values: Mapping[str, Any]) -> bool:
        """See `Waiting`."""
        with self._lock:
            if self._lock_fd < 0:  # the directory may be another process's by now
                raise OSError(errno.EBADF, "the spool is closed", str(self._directory))
            body = numbered(kind, values, self.source, self._seq + 1)
            line = b"%b %08x %b\n" % (kind.value.encode(), zlib.crc32(body), body)
            has_room = self.size_bytes + len(line) <= self._max_bytes
            numbers = 1 if kind is Kind.USAGE else 0
            if has_room:
                self._write(line, numbers)
            else:
                self._seq += numbers
                self._write_mark()
            return has_room

    def _write(self, line: bytes, numbers: int) -> None:
        if self._end >= self._segment_bytes:
            number = self._number + 1
            # It may be there, empty, where a signal came between.
            fd = os.open(self._path(number), os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._sealed[self._number] = self._fd
            self._fd, self._number, self._end = fd, number, 0
        try:
            written = os.write(self._fd, line)
            if written < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except BaseException:  # also a signal's, such as Ctrl-C: the line may be there, and nothing would know of it
            os.ftruncate(self._fd, self._end)
            raise
        # Without a call, so that no signal comes between.
        self._end += written
        self.size_bytes += written
        self.count += 1
        self._seq += numbers
        self._is_dirty = True

    def read(self, max_records: int, max_bytes: int, after: Record | None = None) -> list[Record]:
        """See `Waiting`.

        Raises:
            OSError: when segments cannot be read, or someone else changed them.
        """
        found: list[Record] = []
        size_bytes = 0
        for record, line_bytes in self._lines(self._acknowledged if after is None else after.end):
            size_bytes += line_bytes
            if found and (len(found) >= max_records or size_bytes > max_bytes):
                break
            found.append(record)
        if self.count and not found and after is None:
            raise OSError(errno.EIO, "the spool lacks records that were written to it", str(self._directory))
        return found

    def _lines(self, position: tuple[int, int]) -> Iterator[tuple[Record, int]]:
        """The whole lines from a position on, with their sizes."""
        number, offset = position
        while True:
            with self._lock:
                active, end = self._number, self._end
            if number != active:
                end = self._size(number)
            data = self._read_at(number, offset, min(_READ_BYTES, end - offset)) if offset < end else b""
            if data and b"\n" not in data:
                data = self._read_at(number, offset, end - offset)
            if not data:
                if number >= active:
                    return
                number, offset = number + 1, 0
                continue
            # Without any line end the rest of a sealed segment is one damaged line.
            for line in io.BytesIO(data[: data.rfind(b"\n") + 1 or len(data)]):
                offset += len(line)
                yield _record(line, (number, offset)), len(line)

    def _size(self, number: int) -> int:
        try:
            return self._path(number).stat().st_size
        except FileNotFoundError:
            return 0

    def _read_at(self, number: int, offset: int, size: int) -> bytes:
        if self._reading_number != number:
            fd = os.open(self._path(number), os.O_RDONLY | os.O_CLOEXEC)
            # A fork may come between any two steps, and the child closes what is known here.
            before, self._reading, self._reading_number = self._reading, fd, number
            if before >= 0:
                os.close(before)
        return os.pread(self._reading, size, offset)

    def acknowledge(self, record: Record, count: int) -> None:
        """See `Waiting`."""
        with self._lock:
            gone, self._acknowledged = self._acknowledged, record.end
            try:
                self._write_mark()
            except BaseException:
                self._acknowledged = gone  # nothing has changed: they are acknowledged again
                raise
            finished = range(gone[0], record.end[0])
            self.size_bytes -= record.end[1] - gone[1] + sum(map(self._size, finished))
            self.count -= count
            for number in finished:
                with contextlib.suppress(OSError):  # what stays is taken away by whoever opens the directory next
                    self._path(number).unlink(missing_ok=True)
                if number in self._sealed:
                    os.close(self._sealed.pop(number))

    def sync(self) -> None:
        """See `Waiting`."""
        fds: list[int] = []
        try:
            with self._lock:
                if not self._is_dirty and not self._sealed:
                    return
                sealed = list(self._sealed)
                # Of their own, as they may be closed meanwhile by whoever acknowledges.
                fds.extend(os.dup(fd) for fd in [*self._sealed.values(), self._fd])
                self._is_dirty = False
            fds.append(os.open(self._directory, os.O_RDONLY | os.O_CLOEXEC))
            for fd in fds:
                os.fsync(fd)
        except BaseException:
            self._is_dirty = True  # with the sealed ones, which are kept: it is tried again
            raise
        finally:
            for fd in fds:
                with contextlib.suppress(OSError):
                    os.close(fd)
        with self._lock:
            for number in sealed:
                if number in self._sealed:
                    os.close(self._sealed.pop(number))

    def close(self) -> int:
        """See `Waiting`. Nothing is lost."""
        with self._lock:
            if self._lock_fd >= 0:
                # Not left to its last descriptor: a child that is forked just now has one too, for a moment.
                fcntl.flock(self._lock_fd, fcntl.LOCK_UN)
            self._close()
        return 0

    def _close(self) -> None:
        known = [self._fd, self._mark_fd, self._reading, *self._sealed.values()]
        # Before they are closed: a child that is forked meanwhile must not close what has their numbers by then.
        lock_fd = self._lock_fd
        self._sealed = {}
        self._fd = self._mark_fd = self._lock_fd = self._reading = -1
        self._reading_number = 0
        _open_spools.discard(self)
        for fd in known:
            if fd >= 0:
                os.close(fd)
        close_file(lock_fd)

    def forget_in_child(self) -> None:
        """Close what a forked child inherited; the parent goes on with it, and keeps the lock."""
        self._lock = threading.RLock()
        self._close()


def forget_in_child() -> None:
    """In a forked child: close all spools, also those that other threads had adopted or were about to open."""
    for spool in list(_open_spools):
        with contextlib.suppress(OSError):
            spool.forget_in_child()


def _lock(path: Path) -> int:
    fd = open_file(path, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        close_file(fd)
        raise SpoolLockedError(f"{path.parent} is in use by another process") from None
    except OSError:
        close_file(fd)
        raise
    return fd


def _read_mark(directory: Path) -> tuple[int, int, int]:
    """Segment, offset and last number. A mark that is lost, torn or not yet written means that everything is sent."""
    with contextlib.suppress(OSError, ValueError):
        text, _, crc = (directory / "acknowledged").read_text("ascii").strip().rpartition(" ")
        if int(crc, 16) == zlib.crc32(text.encode()):
            number, offset, seq = map(int, text.split())
            return number, offset, seq
    return 0, 0, 0


def _cut_torn_line(fd: int) -> int:
    """Cut off a last line that was not wholly written, whose `append` never returned; gives the size."""
    size = end = os.fstat(fd).st_size
    while end:
        start = max(0, end - _READ_BYTES)
        found = os.pread(fd, end - start, start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    if end < size:
        os.ftruncate(fd, end)
    return end


def _record(line: bytes, end: tuple[int, int]) -> Record:
    body = line[_HEAD_BYTES:-1]
    kind = line[:1]
    if line[:_HEAD_BYTES] == b"%b %08x " % (kind, zlib.crc32(body)) and line[-1:] == b"\n" and kind in _KINDS:
        return Record(_KINDS[kind], body, end)
    return Record(Kind.DAMAGED, line, end)


_KINDS = {b"u": Kind.USAGE, b"s": Kind.SETTLE}


# --- a directory of spools


def take(root: Path, max_bytes: int, name: str | None) -> Spool:
    """A spool below `root` that no other process uses: one in which something waits, else any, else a new one.

    Raises:
        OSError: when the directory cannot be used.
    """
    make(root)
    known = sorted(_numbers(root), key=lambda number: (not _holds_records(root / str(number)), number))
    fresh = max(known, default=0) + 1
    for number in [*known, *range(fresh, fresh + 1000)]:
        try:
            return Spool(root / str(number), max_bytes, source_name(name))
        except SpoolLockedError:
            continue
        except PermissionError:
            # Another user's; what could not even be made is nobody's.
            if not (root / str(number)).exists():
                raise
        except OSError:
            # What is wrong with one directory is passed over, and what is wrong with a new one is so with all.
            if number >= fresh:
                raise
    raise OSError(errno.EBUSY, "all spools are in use", str(root))


def abandoned(root: Path, max_bytes: int, passed_over: Callable[[Path, OSError], None]) -> Iterator[Spool]:
    """The spools below `root` in which something waits and whose process is gone, opened.

    `passed_over` is told of those that cannot be opened, but for what belongs to others.
    """
    for number in sorted(_numbers(root)):
        directory = root / str(number)
        if _holds_records(directory):
            try:
                spool = Spool(directory, max_bytes, None)
            except (SpoolLockedError, PermissionError):
                continue
            except OSError as error:
                passed_over(directory, error)
                continue
            yield spool


def is_left(root: Path) -> bool:
    """Whether something waits below `root` whose process is gone; nothing there is changed."""
    with contextlib.suppress(OSError):
        return any(_holds_records(root / str(number)) and _is_free(root / str(number)) for number in _numbers(root))
    return False


def _is_free(directory: Path) -> bool:
    with contextlib.suppress(SpoolLockedError, OSError):
        close_file(_lock(directory / "lock"))
        return True
    return False


def _numbers(root: Path) -> list[int]:
    return [int(path.name) for path in root.iterdir() if path.name.isdecimal()]


def _holds_records(directory: Path) -> bool:
    """Whether something may wait there: a guess without the lock, which opening then makes sure of."""
    marked, offset, _ = _read_mark(directory)
    with contextlib.suppress(OSError):
        sizes = {int(path.stem): path.stat().st_size for path in directory.glob("*.segment") if path.stem.isdecimal()}
        return any(size > (offset if number == marked else 0) for number, size in sizes.items())
    return False
