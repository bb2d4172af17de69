"""Two daemons over real stores: one shows its checkpoints, the other signs those of a log that only grew."""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import apsw
import pytest
import trio
from nacl.signing import SigningKey

from asapd import config
from asapd.actors.sealer import Sealer
from asapd.actors.witnesses import Witnesses
from asapd.core.errors import Refusal
from asapd.runtime.clock import TrioClock
from asapd.runtime.posting import Posted, PostFailed
from asapd.store import checkpoint_log, witnessing
from asapd.store.database import Database, InlineReaders, InlineRunner
from asapd.store.seals import SealedAt
from asapd.store.units.audit import Witnessed
from asapd.store.units.house import Note
from asapd.store.writer import Writer, open_for_writing
from asapd.wire.checkpoint import origin_of, read_checkpoint, sign_checkpoint
from asapd.wire.keys import public_base64
from asapd.wire.problem import status_of
from asapd.wire.signed_note import NoteMalformedError, cosigned_us, read_note
from asapd.wire.witness import MAX_BYTES, read_request, write_request

Inline = tuple[Database, apsw.Connection]
NOW_US = 1_800_000_000_000_000
OURS, THEIRS = SigningKey(bytes(range(32))), SigningKey(bytes([7]) * 32)
OUR_KEY, THEIR_KEY = bytes(OURS.verify_key), bytes(THEIRS.verify_key)
LOG = logging.getLogger("test.witnesses")


class Pair:
    """Ours shows, theirs signs; between them stands what a network does to requests."""

    def __init__(self, ours: Inline, theirs: Inline, tmp_path: Path) -> None:
        self.database, self.connection = ours
        clock = TrioClock(NOW_US)
        self.answers: list[Posted | PostFailed] = []
        their_settings = config.Audit(witness_for=({"public_key": public_base64(OUR_KEY)},))
        self.theirs = Witnesses(theirs[0], clock, THEIRS, their_settings, LOG, self.post)
        one = {"url": "http://127.0.0.1:1/witness/", "public_key": public_base64(THEIR_KEY)}
        self.ours = Witnesses(self.database, clock, OURS, config.Audit(witness=(one,)), LOG, self.post)
        self.sealer = Sealer(self.database, clock, OURS, tmp_path / "checkpoints.log", config.Audit(), LOG)
        self.broken: Posted | PostFailed | None = None
        self.sent: list[bytes] = []

    async def post(self, url: str, body: bytes, *, deadline_s: float, max_bytes: int) -> Posted | PostFailed:
        assert url == "http://127.0.0.1:1/witness/add-checkpoint"
        self.sent.append(body)
        if self.broken is not None:
            return self.broken
        answer = await self.theirs.add(read_request(body))
        if isinstance(answer, Refusal):
            return Posted(status_of(answer.code), answer.detail.encode())
        return Posted(200, answer.encode()) if isinstance(answer, str) else Posted(409, b"%d\n" % answer.size)

    async def enter(self, count: int) -> SealedAt:
        for number in range(count):
            await self.database.submit(Note("test", "asapd", f"s{number}", {}, NOW_US))
        sealed = await self.sealer.seal()
        assert isinstance(sealed, SealedAt)
        return sealed


@pytest.fixture
async def pair(inline_database: Inline, tmp_path: Path) -> AsyncIterator[Pair]:
    with closing(open_for_writing(tmp_path / "theirs.db", synchronous="off")) as connection:
        theirs = Database(InlineRunner(Writer(connection)), InlineReaders(connection))
        yield Pair(inline_database, (theirs, connection), tmp_path)


async def test_every_checkpoint_of_a_log_that_grows_is_signed(pair: Pair) -> None:
    for count in (3, 1, 300):  # and behind each an entry of what was signed
        sealed = await pair.enter(count)
        await pair.ours.tell(sealed)
        note = read_note(await pair.sealer.noted(sealed))
        assert len(note.signatures) == 2
        assert cosigned_us(note.text, note.signatures[1], origin_of(THEIR_KEY), THEIR_KEY) == NOW_US
    assert [body.split(b"\n")[0] for body in pair.sent] == [b"old 0", b"old 3", b"old 5"]
    assert pair.ours.alarms == {}


async def test_who_forgot_what_was_signed_asks_and_goes_on_from_there(pair: Pair) -> None:
    await pair.ours.tell(await pair.enter(3))
    pair.connection.execute("DELETE FROM audit_cosignature")
    sealed = await pair.enter(2)
    await pair.ours.tell(sealed)
    assert [body.split(b"\n")[0] for body in pair.sent[1:]] == [b"old 0", b"old 3"]
    assert len(witnessing.cosignatures(pair.connection, 6)) == 1
    pair.connection.execute("DELETE FROM audit_cosignature")
    await pair.ours.tell(sealed)  # the very same again
    assert len(witnessing.cosignatures(pair.connection, 6)) == 1


async def test_a_log_that_was_rewritten_is_refused_and_an_alarm(pair: Pair, tmp_path: Path) -> None:
    await pair.ours.tell(await pair.enter(4))
    with closing(open_for_writing(tmp_path / "other.db", synchronous="off")) as connection:
        other = Database(InlineRunner(Writer(connection)), InlineReaders(connection))
        fork = Pair((other, connection), (other, connection), tmp_path)
        fork.theirs = pair.theirs
        await fork.ours.tell(await fork.enter(6))
        assert fork.ours.alarms == {
            origin_of(THEIR_KEY): f"{origin_of(THEIR_KEY)} has seen another log of this daemon than this one"
        }
    with closing(open_for_writing(tmp_path / "short.db", synchronous="off")) as connection:
        other = Database(InlineRunner(Writer(connection)), InlineReaders(connection))
        fork = Pair((other, connection), (other, connection), tmp_path)
        fork.theirs = pair.theirs
        await fork.ours.tell(await fork.enter(2))
        (alarm,) = fork.ours.alarms.values()
        assert alarm.endswith("has seen 4 entries of this log, which has 2")
        await fork.ours.tell(await fork.enter(2))  # as many again, and others
        (alarm,) = fork.ours.alarms.values()
        assert alarm.endswith("another log of this daemon than this one")


async def test_of_two_requests_from_one_size_one_is_taken(pair: Pair) -> None:
    """Looking and storing are one: else the second would roll the witness back."""
    first, second = await pair.enter(2), await pair.enter(2)
    asked = [read_request(write_request(0, [], sealed.note)) for sealed in (second, first)]
    answers = []

    async def add(number: int) -> None:
        answers.append(await pair.theirs.add(asked[number]))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(add, 0)
        nursery.start_soon(add, 1)
    assert sorted(type(answer).__name__ for answer in answers) == ["Witnessed", "str"]
    (refused,) = [answer for answer in answers if isinstance(answer, Witnessed)]
    assert refused.size in {2, 4}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (PostFailed("no answer within 10 s"), "no answer within 10 s"),
        (Posted(500, b""), "it answered with status 500"),
        (Posted(200, b"nonsense\n"), "no valid signature"),
        (Posted(200, "— w AAAAAAAA\n".encode()), "no valid signature"),
        (Posted(409, b"nonsense"), "has seen another log"),
        (Posted(409, b"9" * 5000), "has seen another log"),
        (Posted(409, "٣\n".encode()), "has seen another log"),
        (Posted(409, b"%d\n" % 2**63), "has seen another log"),
    ],
)
async def test_a_witness_that_does_not_sign_is_told_of_and_stops_nothing(
    pair: Pair, answer: Posted | PostFailed, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    pair.broken = answer
    sealed = await pair.enter(1)
    await pair.ours.tell(sealed)
    assert said in caplog.text
    pair.broken = None
    await pair.ours.tell(sealed)
    assert len(witnessing.cosignatures(pair.connection, 1)) == 1
    assert pair.ours.alarms == {}


async def test_who_has_not_signed_the_newest_is_reminded_and_who_has_is_left_alone(pair: Pair) -> None:
    pair.broken = Posted(500, b"")
    sealed = await pair.enter(1)
    await pair.ours.tell(sealed)
    pair.broken = None
    for _ in range(3):
        await pair.ours.remind(sealed)
    assert len(witnessing.cosignatures(pair.connection, 1)) == 1
    assert len(pair.sent) == 2


async def test_a_witness_that_is_away_is_logged_once_and_again_when_it_is_back(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    sealed = await pair.enter(1)
    await pair.ours.remind(sealed)
    assert not caplog.text
    sealed = await pair.enter(1)
    for answer in (PostFailed("no answer within 10 s"), PostFailed("refused"), Posted(500, b"")):
        pair.broken = answer
        await pair.ours.remind(sealed)
        pair.ours.adopt(pair.ours.settings)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert pair.ours.failures == 3
    pair.broken = Posted(422, b"")
    for _ in range(2):
        await pair.ours.remind(sealed)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "has seen another log" in caplog.text
    pair.broken = None
    await pair.ours.remind(sealed)
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING", "INFO"]
    assert "takes checkpoints again" in caplog.text
    assert pair.ours.failures == 5


async def test_who_is_no_witness_any_more_raises_no_alarm(pair: Pair) -> None:
    pair.broken = Posted(422, b"")
    await pair.ours.tell(await pair.enter(1))
    alarms = dict(pair.ours.alarms)
    pair.ours.adopt(pair.ours.settings)
    assert pair.ours.alarms == alarms != {}
    pair.ours.adopt(config.Audit())
    assert pair.ours.alarms == {}


async def test_a_witness_that_never_agrees_on_a_size_is_left(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    sealed = await pair.enter(5)
    sizes = iter([b"1\n", b"2\n"])

    async def post(url: str, body: bytes, *, deadline_s: float, max_bytes: int) -> Posted:
        return Posted(409, next(sizes))

    pair.ours._post = post
    await pair.ours.tell(sealed)
    assert "yet another size" in caplog.text


async def test_what_is_not_asked_as_it_has_to_be_is_refused(pair: Pair) -> None:
    note = sign_checkpoint(3, bytes(32), OURS).note.encode()

    async def code(old: int, text: str) -> str:
        answer = await pair.theirs.add(read_request(write_request(old, [], text)))
        assert isinstance(answer, Refusal)
        return answer.code

    assert await code(0, sign_checkpoint(3, bytes(32), THEIRS).note.encode()) == "witness_unknown_log"
    assert await code(0, note.replace("\n3\n", "\n4\n")) == "witness_bad_signature"
    assert await code(9, note) == "malformed"
    for body in (b"", b"old 01\n\n", b"old 1\nAAAA\n\n" + note.encode(), b"\xff", b"x" * (MAX_BYTES + 1)):
        with pytest.raises(NoteMalformedError):
            read_request(body)


async def test_a_file_and_a_program_get_every_checkpoint(
    pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = f"import sys, pathlib; pathlib.Path({str(tmp_path / 'got')!r}).write_text(sys.stdin.read())"
    pair.ours.settings = config.Audit(
        witness_file=str(tmp_path / "elsewhere"), witness_command=(sys.executable, "-c", script)
    )
    sealed = await pair.enter(2)
    await pair.ours.tell(sealed)
    assert [found.size for found in checkpoint_log.read(tmp_path / "elsewhere")] == [2]
    assert read_checkpoint((tmp_path / "got").read_text()).size == 2
    assert not caplog.text
    for command, said in ((("/nowhere/x",), "cannot be run"), ((sys.executable, "-c", "exit(3)"), "code 3")):
        pair.ours.settings = config.Audit(witness_file=str(tmp_path), witness_command=command)
        await pair.ours.tell(sealed)
        assert said in caplog.text
    assert "did not take a checkpoint" in caplog.text


async def test_a_program_that_takes_too_long_is_ended(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("asapd.actors.witnesses.ANSWER_S", 0.2)
    command = (sys.executable, "-c", "import time; time.sleep(60)")
    pair.ours.settings = config.Audit(witness_command=command)
    await pair.ours.tell(await pair.enter(1))
    assert "took longer than 0.2 s" in caplog.text


async def test_a_size_that_no_entry_can_hold_is_refused(pair: Pair) -> None:
    note = sign_checkpoint(2**53, bytes(32), OURS).note.encode()
    answer = await pair.theirs.add(read_request(write_request(0, [], note)))
    assert isinstance(answer, Refusal)
    assert (answer.code, "below 2^53" in answer.detail) == ("malformed", True)
