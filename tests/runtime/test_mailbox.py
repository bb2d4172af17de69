from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from asapd.runtime.ask import AnswererGone, HandlerFailed, Reply, ask
from asapd.runtime.mailbox import BURST, TooManyFailures, serve


@dataclass(frozen=True)
class Job:
    number: int
    reply: Reply[int] | None = field(default_factory=Reply)


class Failures(list):
    def __call__(self, message, error) -> None:
        self.append((message, error))


def filled(*items):
    send, receive = trio.open_memory_channel(100)
    for item in items:
        send.send_nowait(item)
    send.close()
    return receive


@pytest.mark.parametrize("concurrency", [1, 3])
async def test_all_messages_are_handled_before_it_returns(concurrency: int, autojump_clock: MockClock) -> None:
    done = []

    async def handle(number: int) -> None:
        await trio.sleep(10 - number)
        done.append(number)

    await serve(filled(*range(10)), handle, failed=Failures(), concurrency=concurrency)
    assert sorted(done) == list(range(10))
    if concurrency == 1:
        assert done == list(range(10))


async def test_no_more_than_the_concurrency_are_in_hand_and_the_rest_stays_queued(autojump_clock: MockClock) -> None:
    in_hand = peak = 0
    left = []
    receive = filled(*range(10))

    async def handle(number: int) -> None:
        nonlocal in_hand, peak
        in_hand += 1
        peak = max(peak, in_hand)
        await trio.sleep(1)
        left.append(receive.statistics().current_buffer_used)
        in_hand -= 1

    await serve(receive, handle, failed=Failures(), concurrency=4)
    assert peak == 4
    assert left[0] == 6
    assert trio.current_time() == pytest.approx(3)


@pytest.mark.parametrize("concurrency", [1, 2])
async def test_a_poison_message_is_reported_answered_and_passed_over(concurrency: int, nursery: trio.Nursery) -> None:
    send, receive = trio.open_memory_channel[Job](10)
    failures = Failures()
    poison = ValueError("poison")

    async def handle(job: Job) -> None:
        if job.number == 13:
            raise poison
        job.reply.send(job.number)

    @nursery.start_soon
    async def actor() -> None:
        await serve(receive, handle, failed=failures, concurrency=concurrency)

    with pytest.raises(HandlerFailed):
        await ask(send, lambda reply: Job(13, reply), deadline_s=1)
    assert await ask(send, lambda reply: Job(14, reply), deadline_s=1) == 14
    assert [(job.number, error) for job, error in failures] == [(13, poison)]
    await send.aclose()


async def test_a_bug_after_the_answer_does_not_unsay_it(nursery: trio.Nursery) -> None:
    send, receive = trio.open_memory_channel[Job](10)
    failures = Failures()

    async def handle(job: Job) -> None:
        job.reply.send(1)
        raise ValueError("late")

    nursery.start_soon(lambda: serve(receive, handle, failed=failures))
    assert await ask(send, lambda reply: Job(1, reply), deadline_s=1) == 1
    await send.aclose()
    await wait_all_tasks_blocked()
    assert len(failures) == 1


async def test_a_handler_that_forgets_to_answer_leaves_nobody_waiting(nursery: trio.Nursery) -> None:
    send, receive = trio.open_memory_channel[Job](10)

    async def handle(job: Job) -> None:
        await trio.lowlevel.checkpoint()

    nursery.start_soon(lambda: serve(receive, handle, failed=Failures()))
    with pytest.raises(AnswererGone):
        await ask(send, lambda reply: Job(1, reply), deadline_s=60)
    await send.aclose()


async def test_messages_need_no_reply() -> None:
    failures = Failures()

    async def handle(message: object) -> None:
        raise ValueError(message)

    await serve(filled("text", Job(1, None)), handle, failed=failures)
    assert [str(error) for _, error in failures] == ["text", "Job(number=1, reply=None)"]


async def test_a_group_from_the_handlers_own_nursery_is_caught_too() -> None:
    failures = Failures()

    async def handle(number: int) -> None:
        async def fail(error: Exception) -> None:
            raise error

        async with trio.open_nursery() as nursery:
            for _ in range(number):
                nursery.start_soon(fail, KeyError(number))

    await serve(filled(1, 2), handle, failed=failures)
    (_, one), (_, two) = failures
    assert isinstance(one, KeyError)
    assert isinstance(two, ExceptionGroup)
    assert [type(error) for error in two.exceptions] == [KeyError, KeyError]


@pytest.mark.parametrize("concurrency", [1, 2])
async def test_cancellation_mixed_with_a_failure_loses_neither(concurrency: int) -> None:
    failures = Failures()
    job = Job(1)

    async def handle(job: Job) -> None:
        async def clean_up_badly() -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise OSError("clean-up")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(clean_up_badly)
            nursery.start_soon(trio.sleep_forever)

    send, receive = trio.open_memory_channel[Job](10)
    send.send_nowait(job)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: serve(receive, handle, failed=failures, concurrency=concurrency))
            await wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught
    assert [type(error) for _, error in failures] == [OSError]
    with pytest.raises(HandlerFailed):
        job.reply.result_nowait()


@pytest.mark.parametrize("concurrency", [1, 2])
async def test_cancellation_ends_a_request_in_hand_at_once_and_keeps_the_queue(concurrency: int) -> None:
    send, receive = trio.open_memory_channel[Job](10)
    jobs = [Job(number) for number in range(4)]
    for job in jobs:
        send.send_nowait(job)

    async def handle(job: Job) -> None:
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: serve(receive, handle, failed=Failures(), concurrency=concurrency))
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert [job.reply.ended for job in jobs] == [number < concurrency for number in range(4)]
    assert receive.statistics().current_buffer_used == 4 - concurrency


async def test_many_failures_in_a_row_crash_the_actor_and_keep_the_queue() -> None:
    failures = Failures()
    receive = filled(*range(10))

    async def handle(number: int) -> None:
        if number != 2:
            raise ValueError(number)

    with pytest.raises(TooManyFailures, match="5 messages") as caught:
        await serve(receive, handle, failed=failures, max_failures_in_a_row=5)
    assert str(caught.value.__cause__) == "7"
    assert [number for number, _ in failures] == [0, 1, 3, 4, 5, 6, 7]
    assert receive.receive_nowait() == 8


async def test_many_failures_at_once_crash_the_actor_and_close_what_is_in_hand(autojump_clock: MockClock) -> None:
    slow = Job(0)

    async def handle(job: Job) -> None:
        await trio.sleep(0 if job.number else 60)
        raise ValueError(job.number)

    with pytest.raises(ExceptionGroup) as caught:
        await serve(
            filled(slow, *map(Job, range(1, 10))), handle, failed=Failures(), concurrency=3, max_failures_in_a_row=5
        )
    assert caught.group_contains(TooManyFailures, depth=1)
    with pytest.raises(AnswererGone):
        slow.reply.result_nowait()


@pytest.mark.parametrize("concurrency", [1, 2])
async def test_it_beats_while_idle_and_with_each_message_but_not_while_all_hands_are_busy(
    concurrency: int, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    beats_s = []
    send, receive = trio.open_memory_channel[int](10)

    async def handle(number: int) -> None:
        await trio.sleep(30)

    nursery.start_soon(
        lambda: serve(
            receive,
            handle,
            failed=Failures(),
            concurrency=concurrency,
            beat=lambda: beats_s.append(round(trio.current_time())),
            beat_every_s=2,
        )
    )
    await trio.sleep(7)
    assert beats_s == [2, 4, 6]
    for number in range(concurrency):
        send.send_nowait(number)
    await trio.sleep(29)
    assert set(beats_s) == {2, 4, 6, 7}
    await trio.sleep(4)
    assert set(beats_s) == {2, 4, 6, 7, 37, 39}
    await send.aclose()


async def test_an_unwatched_actor_needs_no_beat(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    send, receive = trio.open_memory_channel[int](10)
    seen = []

    async def handle(number: int) -> None:
        seen.append(number)

    nursery.start_soon(lambda: serve(receive, handle, failed=Failures()))
    await trio.sleep(5)
    await send.send(1)
    await send.aclose()
    await wait_all_tasks_blocked()
    assert seen == [1]


# --- passing on


@pytest.mark.parametrize("concurrency", [1, 2])
async def test_a_message_that_is_passed_on_needs_no_hand_and_its_reply_ends_later(
    concurrency: int, nursery: trio.Nursery
) -> None:
    send, receive = trio.open_memory_channel[Job](100)
    passed: list[Job] = []
    handled: list[int] = []

    async def pass_on(job: Job) -> bool:
        if job.number % 2:
            passed.append(job)
        return bool(job.number % 2)

    async def handle(job: Job) -> None:
        handled.append(job.number)

    jobs = [Job(number) for number in range(3 * BURST)]
    for job in jobs[:100]:
        send.send_nowait(job)
    nursery.start_soon(lambda: serve(receive, handle, failed=Failures(), passes_on=pass_on, concurrency=concurrency))
    await wait_all_tasks_blocked()
    assert [job.number for job in passed] == [number for number in range(len(jobs)) if number % 2]
    assert sorted(handled) == [number for number in range(len(jobs)) if not number % 2]
    assert not any(job.reply.ended for job in passed)
    await send.aclose()


@pytest.mark.parametrize("concurrency", [1, 2])
async def test_what_was_gathered_goes_on_after_each_burst_and_before_every_wait(
    nursery: trio.Nursery, concurrency: int
) -> None:
    send, receive = trio.open_memory_channel[Job](200)
    gathered: list[int] = []
    sent: list[list[int]] = []

    async def gather(job: Job) -> bool:
        gathered.append(job.number)
        return True

    async def rest() -> None:
        if gathered:
            sent.append(gathered[:])
            gathered.clear()

    async def handle(job: Job) -> None:
        raise AssertionError

    nursery.start_soon(
        lambda: serve(receive, handle, failed=Failures(), passes_on=gather, rests=rest, concurrency=concurrency)
    )
    await wait_all_tasks_blocked()
    for number in range(BURST + 5):
        send.send_nowait(Job(number))
    await wait_all_tasks_blocked()
    send.send_nowait(Job(99))
    await wait_all_tasks_blocked()
    # The first is taken by the wait itself.
    assert [len(numbers) for numbers in sent] in ([1, BURST, 4, 1], [BURST, 5, 1], [BURST + 1, 4, 1])
    assert [number for numbers in sent for number in numbers] == [*range(BURST + 5), 99]
    await send.aclose()


@pytest.mark.parametrize("concurrency", [1, 2])
async def test_what_was_gathered_goes_on_before_the_end_of_the_mailbox(concurrency: int) -> None:
    send, receive = trio.open_memory_channel[Job](200)
    gathered: list[int] = []
    sent: list[int] = []

    async def gather(job: Job) -> bool:
        gathered.append(job.number)
        return True

    async def rest() -> None:
        sent.extend(gathered)
        gathered.clear()

    async def handle(job: Job) -> None:
        raise AssertionError

    for number in range(5):
        send.send_nowait(Job(number))
    send.close()
    await serve(receive, handle, failed=Failures(), passes_on=gather, rests=rest, concurrency=concurrency)
    assert (sent, gathered) == ([*range(5)], [])


@pytest.mark.parametrize("concurrency", [1, 2])
async def test_a_message_that_cannot_be_passed_on_fails_alone_until_too_many_do(concurrency: int) -> None:
    failures = Failures()
    jobs = [Job(1), Job(2), Job(3, None), Job(4)]

    async def pass_on(job: Job) -> bool:
        raise ValueError(job.number)

    async def handle(job: Job) -> None:
        raise AssertionError

    with pytest.RaisesGroup(TooManyFailures) if concurrency > 1 else pytest.raises(TooManyFailures):
        await serve(
            filled(*jobs),
            handle,
            failed=failures,
            passes_on=pass_on,
            concurrency=concurrency,
            max_failures_in_a_row=3,
        )
    assert [job.number for job, _ in failures] == [1, 2, 3]
    for job in jobs[:2]:
        with pytest.raises(HandlerFailed):
            job.reply.result_nowait()
    assert not jobs[3].reply.ended


@pytest.mark.parametrize("reply", [None, Reply()])
async def test_a_crash_while_passing_on_leaves_nobody_waiting(reply: Reply[int] | None) -> None:
    async def pass_on(job: Job) -> bool:
        await trio.sleep_forever()
        raise AssertionError

    async def handle(job: Job) -> None:
        raise AssertionError

    with trio.move_on_after(0.01):
        await serve(filled(Job(1, reply)), handle, failed=Failures(), passes_on=pass_on)
    if reply is not None:
        with pytest.raises(AnswererGone):
            reply.result_nowait()
