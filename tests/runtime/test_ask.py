from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from asapd.runtime.ask import (
    AlreadyAnswered,
    AnswererGone,
    HandlerFailed,
    MailboxFull,
    NoAnswerInTime,
    Reply,
    Unavailable,
    ask,
    post,
)


@dataclass(frozen=True)
class Double:
    number: int
    reply: Reply[int] = field(default_factory=Reply)


def double(number: int):
    return lambda reply: Double(number, reply)


async def test_the_answer_reaches_the_caller(nursery: trio.Nursery) -> None:
    send, receive = trio.open_memory_channel[Double](1)

    @nursery.start_soon
    async def answerer() -> None:
        message = await receive.receive()
        with message.reply as reply:
            reply.send(message.number * 2)

    assert await ask(send, double(21), deadline_s=1) == 42


async def test_none_is_an_answer(nursery: trio.Nursery) -> None:
    send, receive = trio.open_memory_channel[Reply[None]](1)

    @nursery.start_soon
    async def answerer() -> None:
        (await receive.receive()).send(None)

    assert await ask(send, lambda reply: reply, deadline_s=1) is None


async def test_a_full_mailbox_is_refused_at_once() -> None:
    send, receive = trio.open_memory_channel[Double](1)
    send.send_nowait(Double(1))
    with pytest.raises(MailboxFull, match="nothing was done") as caught, trio.testing.assert_no_checkpoints():
        await ask(send, double(2), deadline_s=1)
    assert isinstance(caught.value, Unavailable)
    assert caught.value.retry_after_s == 1
    assert receive.statistics().current_buffer_used == 1


async def test_without_a_deadline_room_is_waited_for(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    send, receive = trio.open_memory_channel[Double](1)
    send.send_nowait(Double(1))

    @nursery.start_soon
    async def answerer() -> None:
        await trio.sleep(2)
        async for message in receive:
            with message.reply as reply:
                reply.send(message.number * 2)

    assert await ask(send, double(5), deadline_s=None) == 10
    await send.aclose()


@pytest.mark.parametrize("deadline_s", [1, None])
async def test_a_mailbox_nobody_will_read_is_an_answerer_gone(deadline_s: float | None) -> None:
    send, receive = trio.open_memory_channel[Double](1)
    await receive.aclose()
    with pytest.raises(AnswererGone, match="nothing was done"):
        await ask(send, double(1), deadline_s=deadline_s)
    await send.aclose()
    with pytest.raises(AnswererGone, match="nothing was done"):
        await ask(send, double(1), deadline_s=deadline_s)


async def test_a_crash_with_the_request_in_hand_ends_the_wait_at_once(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    send, receive = trio.open_memory_channel[Double](1)

    @nursery.start_soon
    async def answerer() -> None:
        message = await receive.receive()
        with pytest.raises(OSError, match="disk on fire"), message.reply:
            raise OSError("disk on fire")

    with pytest.raises(AnswererGone, match="unknown"):
        await ask(send, double(1), deadline_s=60)
    assert trio.current_time() == 0


async def test_no_answer_in_time_leaves_the_request_sent(autojump_clock: MockClock) -> None:
    send, receive = trio.open_memory_channel[Double](1)
    with pytest.raises(NoAnswerInTime, match="within 4 s"):
        await ask(send, double(1), deadline_s=4)
    assert trio.current_time() == pytest.approx(4)
    message = receive.receive_nowait()
    message.reply.send(2)
    assert message.reply.ended


async def test_who_asks_hears_when_the_answerer_is_done_though_the_deadline_passed(autojump_clock: MockClock) -> None:
    send, receive = trio.open_memory_channel[Double](1)
    ended: list[Reply[int]] = []
    with pytest.raises(NoAnswerInTime):
        await ask(send, double(1), deadline_s=1, then=ended.append)
    assert ended == []
    reply = receive.receive_nowait().reply
    reply.send(2)
    assert ended == [reply]


@pytest.mark.parametrize("why", ["full", "gone", "cancelled"])
async def test_who_asks_hears_at_once_of_what_was_not_sent(why: str) -> None:
    send, receive = trio.open_memory_channel[Double](1)
    send.send_nowait(Double(1))
    if why == "gone":
        receive.close()
    ended: list[Reply[int]] = []
    with trio.CancelScope() as scope:
        if why == "cancelled":
            scope.cancel()
            await ask(send, double(2), deadline_s=None, then=ended.append)
        else:
            with pytest.raises(MailboxFull if why == "full" else AnswererGone):
                await ask(send, double(2), deadline_s=1, then=ended.append)
    (reply,) = ended
    with pytest.raises(AnswererGone):
        reply.result_nowait()


async def test_an_answer_that_comes_with_the_deadline_counts(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    send, receive = trio.open_memory_channel[Double](0)

    @nursery.start_soon
    async def answerer() -> None:
        message = await receive.receive()
        autojump_clock.jump(10)
        message.reply.send(2)

    await wait_all_tasks_blocked()
    assert await ask(send, double(1), deadline_s=4) == 2


async def test_a_handlers_bug_is_not_unavailability(nursery: trio.Nursery) -> None:
    send, receive = trio.open_memory_channel[Double](1)

    @nursery.start_soon
    async def answerer() -> None:
        with (await receive.receive()).reply as reply:
            reply.fail()

    with pytest.raises(HandlerFailed) as caught:
        await ask(send, double(1), deadline_s=1)
    assert not isinstance(caught.value, Unavailable)


async def test_the_callers_own_cancellation_passes_through() -> None:
    send, _receive = trio.open_memory_channel[Double](1)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: ask(send, double(1), deadline_s=60))
            await wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught


def test_the_first_outcome_of_a_reply_stands() -> None:
    answered: Reply[int] = Reply()
    answered.send(1)
    answered.fail()
    answered.close()
    assert answered.result_nowait() == 1
    with pytest.raises(AlreadyAnswered, match="answered already"):
        answered.send(2)

    closed: Reply[int] = Reply()
    closed.close()
    closed.fail()
    with pytest.raises(AnswererGone):
        closed.result_nowait()
    with pytest.raises(AlreadyAnswered, match="closed already"):
        closed.send(2)


def test_a_pending_reply_has_no_result() -> None:
    with pytest.raises(trio.WouldBlock):
        Reply().result_nowait()


# --- posting


@dataclass(frozen=True)
class Note:
    reply: Reply[int]


async def test_a_posted_message_goes_on_at_once_and_hears_of_its_end() -> None:
    send, receive = trio.open_memory_channel[Note](2)
    heard: list[int] = []
    await post(send, Note, lambda reply: heard.append(reply.result_nowait()))
    note = receive.receive_nowait()
    assert heard == []
    note.reply.send(7)
    assert heard == [7]
    await note.reply.wait_ended()


async def test_a_post_waits_for_room_and_only_for_that(autojump_clock: MockClock) -> None:
    send, receive = trio.open_memory_channel[Note](1)
    await post(send, Note, lambda reply: None)
    with trio.move_on_after(1) as waiting:
        await post(send, Note, lambda reply: None)
    assert waiting.cancelled_caught
    async with trio.open_nursery() as nursery:
        nursery.start_soon(post, send, Note, lambda reply: None)
        await wait_all_tasks_blocked()
        receive.receive_nowait()
    assert receive.statistics().current_buffer_used == 1


async def test_a_post_hears_of_a_crash_and_of_a_closed_mailbox() -> None:
    send, receive = trio.open_memory_channel[Note](1)
    ends: list[Reply[int]] = []
    await post(send, Note, ends.append)
    with receive.receive_nowait().reply:
        pass
    with pytest.raises(AnswererGone):
        ends[0].result_nowait()
    receive.close()
    with pytest.raises(AnswererGone, match="nothing was done"):
        await post(send, Note, ends.append)
    assert len(ends) == 1


async def test_several_may_wait_for_one_end(nursery: trio.Nursery) -> None:
    reply: Reply[int] = Reply()
    nursery.start_soon(reply.wait_ended)
    nursery.start_soon(reply.wait_ended)
    await wait_all_tasks_blocked()
    reply.send(1)
