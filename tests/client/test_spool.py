"""The spool: nothing that was appended is lost, and nothing comes back in another order."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asapd.client import refused
from asapd.client import spool as spools
from asapd.client.refused import RefusedFile
from asapd.client.spool import Spool, SpoolLockedError, abandoned, is_left, take
from asapd.client.waiting import Kind, Memory, Record

ROOM = 10**6


def bodies(records: list[Record]) -> list[dict[str, Any]]:
    return [json.loads(record.body) for record in records]


def append(spool: Spool | Memory, *names: str) -> list[bool]:
    return [spool.append(Kind.USAGE, {"id": name}) for name in names]


def fail(directory: Path, error: OSError) -> None:
    raise AssertionError(directory) from error


def names(spool: Spool, number: int = 1000) -> list[str]:
    return [body["id"] for body in bodies(spool.read(number, ROOM))]


def acknowledge(spool: Spool, number: int) -> None:
    records = spool.read(number, ROOM)
    spool.acknowledge(records[-1], len(records))


def test_records_come_back_in_order_with_one_source_and_rising_numbers(tmp_path: Path) -> None:
    spool = Spool(tmp_path, ROOM, "billing")
    append(spool, "a", "b")
    spool.append(Kind.SETTLE, {"reservation": "res_1"})
    records = spool.read(10, ROOM)
    assert [record.kind for record in records] == [Kind.USAGE, Kind.USAGE, Kind.SETTLE]
    assert bodies(records)[0] == {"id": "a", "source": spool.source, "seq": 1}
    assert bodies(records)[1]["seq"] == 2
    assert bodies(records)[2] == {"reservation": "res_1"}
    assert spool.source.startswith("billing-")
    spool.close()


def test_what_was_not_acknowledged_is_there_after_reopening_and_numbers_go_on(tmp_path: Path) -> None:
    spool = Spool(tmp_path, ROOM, None)
    append(spool, "a", "b", "c")
    acknowledge(spool, 1)
    source, size_bytes = spool.source, spool.size_bytes
    spool.close()
    spool = Spool(tmp_path, ROOM, None)
    assert (spool.source, spool.count, spool.size_bytes) == (source, 2, size_bytes)
    append(spool, "d")
    assert [(body["id"], body["seq"]) for body in bodies(spool.read(9, ROOM))] == [("b", 2), ("c", 3), ("d", 4)]
    acknowledge(spool, 9)
    assert (spool.count, spool.size_bytes, spool.read(9, ROOM)) == (0, 0, [])
    spool.close()
    spool = Spool(tmp_path, ROOM, None)
    append(spool, "e")
    assert bodies(spool.read(9, ROOM))[0]["seq"] == 5
    spool.close()


def test_after_a_reboot_there_is_a_new_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "boot").write_text("one\n")
    monkeypatch.setattr(spools, "_BOOT_ID", tmp_path / "boot")
    spool = Spool(tmp_path / "s", ROOM, "x")
    source = spool.source
    append(spool, "a")
    spool.close()
    (tmp_path / "boot").write_text("two\n")
    spool = Spool(tmp_path / "s", ROOM, "x")
    append(spool, "b")
    first, second = bodies(spool.read(9, ROOM))
    assert first == {"id": "a", "source": source, "seq": 1}
    assert second["seq"] == 1
    assert second["source"] != source
    spool.close()


def test_a_program_of_another_name_is_another_source(tmp_path: Path) -> None:
    """Though it goes on where a program of the same boot was; what that one left is sent as that one's."""
    sources = []
    for name in ("billing", "billing", "billing-eu", None, None, "x" * 300, "x" * 300):
        spool = take(tmp_path, ROOM, name)
        append(spool, "a")
        sources.append(spool.source)
        spool.close()
    billing, eu, host, long = sources[0], sources[2], sources[3], sources[5]
    assert sources == [billing, billing, eu, host, host, long, long]
    assert [source[:-12] for source in (billing, eu, host, long)] == [
        "billing-",
        "billing-eu-",
        f"{socket.gethostname()}-",
        "x" * 200 + "-",
    ]
    (adopted,) = abandoned(tmp_path, ROOM, fail)
    assert adopted.source == long
    assert [(body["source"], body["seq"]) for body in bodies(adopted.read(9, ROOM))] == [
        (billing, 1),
        (billing, 2),
        (eu, 1),
        (host, 1),
        (host, 2),
        (long, 1),
        (long, 2),
    ]
    adopted.close()


def test_a_line_that_was_not_wholly_written_is_cut_off(tmp_path: Path) -> None:
    spool = Spool(tmp_path, ROOM, None)
    append(spool, "a")
    spool.close()
    with next(tmp_path.glob("*.segment")).open("ab") as file:
        file.write(b'u 00000000 {"id":"torn')
    spool = Spool(tmp_path, ROOM, None)
    append(spool, "b")
    assert names(spool) == ["a", "b"]
    spool.close()


def test_a_damaged_line_is_given_as_such_and_the_others_as_they_were(tmp_path: Path) -> None:
    spool = Spool(tmp_path, ROOM, None)
    append(spool, "a", "b", "c")
    spool.close()
    segment = next(tmp_path.glob("*.segment"))
    segment.write_bytes(segment.read_bytes().replace(b'"b"', b'"\r"'))
    spool = Spool(tmp_path, ROOM, None)
    assert [record.kind for record in spool.read(9, ROOM)] == [Kind.USAGE, Kind.DAMAGED, Kind.USAGE]
    assert spool.count == 3
    spool.close()


TORN_MARKS = [b"", b"garbage", b"1 2", b"000000000001 000000000099 0000000000000007 00000000\n"]


@pytest.mark.parametrize("mark", TORN_MARKS)
def test_a_mark_that_is_lost_or_torn_gives_everything_again(tmp_path: Path, mark: bytes) -> None:
    spool = Spool(tmp_path, ROOM, None)
    append(spool, "a", "b")
    acknowledge(spool, 1)
    spool.close()
    (tmp_path / "acknowledged").write_bytes(mark)
    spool = Spool(tmp_path, ROOM, None)
    append(spool, "c")
    assert [(body["id"], body["seq"]) for body in bodies(spool.read(9, ROOM))] == [("a", 1), ("b", 2), ("c", 3)]
    spool.close()


@pytest.mark.parametrize("mark", TORN_MARKS)
def test_a_mark_that_is_torn_or_not_yet_written_hides_nothing_and_stops_nobody(tmp_path: Path, mark: bytes) -> None:
    """A process that opens a directory makes the file first; killed there, it must not keep the others from theirs."""
    left = Spool(tmp_path / "1", ROOM, None)
    append(left, "a")
    left.close()
    (tmp_path / "1" / "acknowledged").write_bytes(mark)
    assert is_left(tmp_path)
    (adopted,) = abandoned(tmp_path, ROOM, fail)
    assert names(adopted) == ["a"]
    adopted.close()
    (tmp_path / "1" / "acknowledged").write_bytes(mark)
    own = take(tmp_path, ROOM, None)
    assert names(own) == ["a"]
    own.close()


@pytest.mark.parametrize("is_sealed", [False, True], ids=["the last segment", "one before it"])
def test_a_mark_beyond_the_end_of_its_segment_hides_nothing_that_comes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_sealed: bool
) -> None:
    """A power cut may keep the mark and take the end of what it stands for."""
    spool = Spool(tmp_path, ROOM, None, segment_bytes=1 if is_sealed else ROOM)
    append(spool, "a", "b", "c")
    acknowledge(spool, 3)
    if is_sealed:
        append(spool, "kept")
    spool.close()
    first = min(tmp_path.glob("*.segment"))
    os.truncate(first, first.stat().st_size // 2)
    stale = (tmp_path / "acknowledged").read_bytes()
    synced: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(
            "asapd.client.spool.os.fsync", lambda fd: synced.append(Path(f"/proc/self/fd/{fd}").readlink().name)
        )
        spool = Spool(tmp_path, ROOM, None)
    assert synced == ["acknowledged"], "else another power cut could bring the former mark back"
    assert (tmp_path / "acknowledged").read_bytes() != stale
    append(spool, "d", "e")
    wanted = ["kept", "d", "e"] if is_sealed else ["d", "e"]
    assert names(spool) == wanted
    spool.close()
    spool = Spool(tmp_path, ROOM, None)
    assert names(spool) == wanted
    acknowledge(spool, 9)
    assert (spool.count, spool.size_bytes) == (0, 0)
    spool.close()


def test_beyond_its_bound_it_takes_nothing_and_the_number_is_missing_for_ever(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 250, None)
    assert append(spool, "a", "b", "c", "d", "e")[-1] is False
    held = spool.count
    spool.close()
    spool = Spool(tmp_path, ROOM, None)
    append(spool, "later")
    assert bodies(spool.read(9, ROOM))[-1]["seq"] == 6
    assert spool.count == held + 1
    spool.close()


def test_segments_go_when_they_are_acknowledged(tmp_path: Path) -> None:
    spool = Spool(tmp_path, ROOM, None, segment_bytes=200)
    wanted = [f"{number:03d}" for number in range(30)]
    append(spool, *wanted)
    assert len(list(tmp_path.glob("*.segment"))) > 5
    spool.sync()
    spool.sync()
    found = []
    while spool.count:
        found += names(spool, 4)
        acknowledge(spool, 4)
    assert found == wanted
    assert len(list(tmp_path.glob("*.segment"))) == 1
    append(spool, "more")
    assert names(spool) == ["more"]
    spool.close()


def test_a_batch_has_at_least_one_record_and_else_keeps_to_its_bounds(tmp_path: Path) -> None:
    spool = Spool(tmp_path, ROOM, None)
    append(spool, "x" * 1000, "y", "z")
    assert len(spool.read(10, 1)) == 1
    assert len(spool.read(2, ROOM)) == 2
    spool.close()


@pytest.mark.parametrize("is_durable", [True, False], ids=["on the disk", "in memory"])
def test_one_can_read_on_behind_what_was_read(tmp_path: Path, is_durable: bool) -> None:
    queue = Spool(tmp_path, ROOM, None, segment_bytes=1) if is_durable else Memory(ROOM, None)
    append(queue, "a", "b", "b", "c")
    read = queue.read(2, ROOM)
    assert [body["id"] for body in bodies(queue.read(9, ROOM, read[-1]))] == ["b", "c"]
    assert [body["id"] for body in bodies(queue.read(1, ROOM, read[-1]))] == ["b"]
    queue.acknowledge(read[0], 1)
    rest = queue.read(9, ROOM, read[-1])
    assert [body["id"] for body in bodies(rest)] == ["b", "c"]
    assert queue.read(9, ROOM, rest[-1]) == []
    queue.close()


def test_a_spool_that_someone_emptied_says_so(tmp_path: Path) -> None:
    spool = Spool(tmp_path, ROOM, None)
    append(spool, "a")
    os.truncate(next(tmp_path.glob("*.segment")), 0)
    with pytest.raises(OSError, match="lacks records"):
        spool.read(1, ROOM)
    spool.close()


def test_what_was_closed_takes_nothing_and_leaves_the_directory_alone(tmp_path: Path) -> None:
    """It may be another process's by then."""
    spool = Spool(tmp_path, ROOM, None, segment_bytes=1)
    append(spool, "a")
    spool.close()
    known = sorted(tmp_path.iterdir())
    with pytest.raises(OSError, match="closed"):
        append(spool, "b")
    assert sorted(tmp_path.iterdir()) == known


def test_one_process_at_a_time(tmp_path: Path) -> None:
    spool = Spool(tmp_path, ROOM, None)
    with pytest.raises(SpoolLockedError):
        Spool(tmp_path, ROOM, None)
    spool.close()
    Spool(tmp_path, ROOM, None).close()


def test_processes_take_spools_of_their_own_and_adopt_what_others_left(tmp_path: Path) -> None:
    first, second = take(tmp_path, ROOM, None), take(tmp_path, ROOM, None)
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}
    assert list(abandoned(tmp_path, ROOM, fail)) == []
    append(first, "own")
    append(second, "left")
    second.close()
    (adopted,) = abandoned(tmp_path, ROOM, fail)
    assert names(adopted) == ["left"]
    acknowledge(adopted, 1)
    adopted.close()
    assert list(abandoned(tmp_path, ROOM, fail)) == []
    first.close()
    third = take(tmp_path, ROOM, None)
    assert names(third) == ["own"]
    third.close()


def test_whether_something_was_left_is_told_without_taking_it(tmp_path: Path) -> None:
    assert not is_left(tmp_path / "missing")
    spool = take(tmp_path, ROOM, None)
    spool.close()
    assert not is_left(tmp_path)
    spool = take(tmp_path, ROOM, None)
    append(spool, "a")
    assert not is_left(tmp_path), "its process is there"
    spool.close()
    assert is_left(tmp_path)
    spool = take(tmp_path, ROOM, None)
    assert names(spool) == ["a"]
    spool.close()


def test_a_directory_in_which_something_is_wrong_is_passed_over_and_named(tmp_path: Path) -> None:
    for number in ("1", "2", "3"):
        spool = Spool(tmp_path / number, ROOM, None)
        append(spool, f"in {number}")
        spool.close()
    (tmp_path / "1" / "source").unlink()
    (tmp_path / "1" / "source.new").mkdir()
    passed: list[Path] = []
    left = list(abandoned(tmp_path, ROOM, lambda directory, error: passed.append(directory)))
    assert [names(spool) for spool in left] == [["in 2"], ["in 3"]]
    assert passed == [tmp_path / "1"]
    left.pop().close()
    own = take(tmp_path, ROOM, None)
    assert names(own) == ["in 3"]
    fresh = take(tmp_path, ROOM, None)
    assert names(fresh) == []
    for spool in (*left, own, fresh):
        spool.close()


def test_where_no_new_directory_can_be_made_one_try_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Path] = []

    def full(directory: Path, *args: object) -> Spool:
        tried.append(directory)
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "4").mkdir()
    monkeypatch.setattr(spools, "Spool", full)
    with pytest.raises(OSError, match="No space"):
        take(tmp_path, ROOM, None)
    assert tried == [tmp_path / "4", tmp_path / "5"]


def test_where_nothing_may_be_made_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not that everything is in use; what is there and belongs to another user is passed over."""
    make = Path.mkdir

    def forbidden(path: Path, **settings: Any) -> None:
        if path.parent == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        make(path, **settings)

    (tmp_path / "1").mkdir()
    monkeypatch.setattr(Path, "mkdir", forbidden)
    with pytest.raises(PermissionError, match=str(tmp_path / "2")):
        take(tmp_path, ROOM, None)


def test_a_directory_that_cannot_be_used_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        take(tmp_path / "file", ROOM, None)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 400)),
        st.tuples(st.just("acknowledge"), st.integers(1, 7)),
        st.tuples(st.just("reopen"), st.just(0)),
        st.tuples(st.just("sync"), st.just(0)),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_it_is_a_queue_whatever_happens(steps: list[tuple[str, int]]) -> None:
    """Any order of appending, reading, acknowledging and dying gives a first-in, first-out queue."""
    with tempfile.TemporaryDirectory() as directory:
        model: list[str] = []
        number = 0
        spool = Spool(Path(directory), ROOM, None, segment_bytes=500)
        for step, argument in steps:
            if step == "append":
                number += 1
                model.append(f"{number}:" + "x" * argument)
                append(spool, model[-1])
            elif step == "acknowledge" and model:
                assert names(spool, argument) == model[:argument]
                acknowledge(spool, argument)
                del model[:argument]
            elif step == "reopen":
                spool.close()
                spool = Spool(Path(directory), ROOM, None, segment_bytes=500)
            elif step == "sync":
                spool.sync()
            assert names(spool) == model
            assert spool.count == len(model)
        spool.close()


def test_memory_is_a_bounded_queue_too() -> None:
    memory = Memory(150, "m")
    assert append(memory, "a", "b", "c", "d", "e", "f") == [True, True, True, False, False, False]
    first = memory.read(1, ROOM)
    memory.acknowledge(first[0], 1)
    assert append(memory, "g") == [True]
    assert [(body["id"], body["seq"]) for body in bodies(memory.read(9, ROOM))] == [("b", 2), ("c", 3), ("g", 7)]
    assert len(memory.read(9, 1)) == 1
    memory.sync()
    memory.close()
    assert (memory.count, memory.size_bytes) == (0, 0)
    assert append(memory, "h") == [False]


def test_what_could_not_be_marked_is_acknowledged_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path, ROOM, None)
    append(spool, "a", "b", "c")
    records = spool.read(2, ROOM)
    with monkeypatch.context() as broken:
        broken.setattr(Spool, "_write_mark", _fails)
        for _ in range(2):
            with pytest.raises(OSError, match="broken"):
                spool.acknowledge(records[-1], len(records))
    assert (spool.count, names(spool)) == (3, ["a", "b", "c"])
    spool.acknowledge(records[-1], len(records))
    assert (spool.count, names(spool)) == (1, ["c"])
    spool.close()


def _fails(*_: object) -> None:
    raise OSError("the disk is broken")


@pytest.mark.parametrize("call", ["write", "open"])
def test_an_interrupt_while_a_line_is_written_spoils_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """A signal that comes during a call of the system is raised when that returns: it is done, and nobody knows."""
    real = getattr(os, call)

    def do_and_interrupt(*args: object) -> None:
        real(*args)
        raise KeyboardInterrupt

    spool = Spool(tmp_path, ROOM, None, segment_bytes=1)
    append(spool, "a")
    with monkeypatch.context() as patch:
        patch.setattr(f"asapd.client.spool.os.{call}", do_and_interrupt)
        with pytest.raises(KeyboardInterrupt):
            append(spool, "b")
    append(spool, "c", "d")
    kept = [(body["id"], body["seq"]) for body in bodies(spool.read(9, ROOM))]
    assert kept == [("a", 1), ("c", 2), ("d", 3)]
    spool.close()
    spool = Spool(tmp_path, ROOM, None)
    assert [(body["id"], body["seq"]) for body in bodies(spool.read(9, ROOM))] == kept
    spool.close()


def test_a_refused_event_is_given_up_when_another_process_has_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refused, "LOCKED_S", 0.05)
    file = RefusedFile(tmp_path / "refused.ndjson")
    record = Record(Kind.USAGE, b'{"id":"a"}', (0, 0))
    assert file.add(record, "invalid", "is odd")
    with (tmp_path / "refused.ndjson").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            file.add(record, "invalid", "is odd")
    assert file.add(record, "invalid", "is odd")
    assert len((tmp_path / "refused.ndjson").read_bytes().splitlines()) == 2


@pytest.mark.parametrize("body", [b"1e999\n", b'{"a":-Infinity}', b"NaN", b"[" * 200_000, b'u \xff"', b""])
def test_what_is_no_json_that_can_be_written_is_set_aside_as_text(tmp_path: Path, body: bytes) -> None:
    assert RefusedFile(tmp_path / "refused.ndjson").add(Record(Kind.DAMAGED, body, (0, 0)), "damaged", "is odd")
    line = json.loads((tmp_path / "refused.ndjson").read_bytes(), parse_constant=pytest.fail)
    assert line["event"] == body.decode("utf-8", "replace")


def test_a_refused_event_is_a_line_of_its_own_behind_one_that_a_power_cut_tore(tmp_path: Path) -> None:
    file = RefusedFile(tmp_path / "refused.ndjson")
    for name in "abc":
        assert file.add(Record(Kind.USAGE, b'{"id":"%b"}' % name.encode(), (0, 0)), "invalid", "is odd")
        if name == "a":
            whole = (tmp_path / "refused.ndjson").read_bytes()
        elif name == "b":
            os.truncate(tmp_path / "refused.ndjson", len(whole) + 20)
    first, torn, last = (tmp_path / "refused.ndjson").read_bytes().splitlines(keepends=True)
    assert (first, torn) == (whole, whole[:20] + b"\n")
    assert json.loads(last)["event"] == {"id": "c"}


@pytest.mark.parametrize("broken", ["dup", "open", "fsync"])
def test_what_could_not_be_synced_is_synced_later_and_keeps_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """Whichever of the calls it is that fails."""
    spool = Spool(tmp_path / "1", ROOM, None, segment_bytes=50)
    append(spool, *"abc")
    segments = set((tmp_path / "1").glob("*.segment"))
    assert len(segments) > 2
    call, fsync = getattr(os, broken), os.fsync
    left = 0
    synced: set[Path] = set()

    def fail_at_last(*args: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(errno.EIO, "Input/output error")
        return call(*args)

    def note(fd: int) -> None:
        synced.add(Path(f"/proc/self/fd/{fd}").readlink())
        fsync(fd)

    before = sorted(Path("/proc/self/fd").iterdir())
    for place in range(1, 2 if broken == "open" else 1 + len(segments)):
        left = place
        with monkeypatch.context() as patch:
            patch.setattr(os, broken, fail_at_last)
            with pytest.raises(OSError, match="Input/output"):
                spool.sync()
        assert sorted(Path("/proc/self/fd").iterdir()) == before
    monkeypatch.setattr(os, "fsync", note)
    spool.sync()
    assert synced == {*segments, tmp_path / "1"}
    synced.clear()
    spool.sync()
    assert not synced
    spool.close()


def test_what_is_made_is_synced_with_the_directories_that_it_is_made_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    fsync = os.fsync

    def note(fd: int) -> None:
        synced.append(Path(f"/proc/self/fd/{fd}").readlink())
        fsync(fd)

    monkeypatch.setattr(os, "fsync", note)
    root = tmp_path / "above" / "spool"
    take(root, ROOM, None).close()
    assert {tmp_path, tmp_path / "above", root} <= set(synced)
    synced.clear()
    file = RefusedFile(root / "refused.ndjson")
    record = Record(Kind.USAGE, b'{"id":"a"}', (0, 0))
    assert file.add(record, "invalid", "is odd")
    assert synced == [root / "refused.ndjson", root]
    assert file.add(record, "invalid", "is odd")
    assert synced[2:] == [root / "refused.ndjson"]
