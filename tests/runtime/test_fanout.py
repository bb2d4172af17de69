from __future__ import annotations

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

from asapd.runtime.fanout import Feed, FeedClosed, Wakeup

STEPS = st.lists(st.integers(1, 3), max_size=30)


@given(capacity=st.integers(1, 8), last=st.integers(0, 50), steps=STEPS, cursor=st.integers(-5, 150))
def test_after_gives_exactly_what_is_above_the_cursor_or_admits_a_gap(
    capacity: int, last: int, steps: list[int], cursor: int
) -> None:
    """Against a log that forgets nothing: the answer is complete, and None only when an item was really evicted."""
    feed: Feed[str] = Feed(capacity, last)
    log = []
    seq = last
    for step in steps:
        seq += step
        feed.publish(seq, f"item {seq}")
        log.append((seq, f"item {seq}"))
    assert feed.last == seq
    newer = feed.after(cursor)
    expected = [entry for entry in log if entry[0] > cursor]
    if newer is None:
        assert cursor < last or len(expected) > capacity
    else:
        assert newer == expected
        assert cursor >= last or len(log) > capacity


def test_a_fresh_feed_has_nothing_after_its_last_and_does_not_know_what_was_before() -> None:
    feed: Feed[str] = Feed(3, last=7)
    assert feed.last == 7
    assert feed.after(7) == feed.after(8) == []
    assert feed.after(6) is None
    assert Feed(3).after(0) == []


@pytest.mark.parametrize("seq", [7, 6, -1])
def test_sequence_numbers_only_rise(seq: int) -> None:
    feed: Feed[str] = Feed(3, last=7)
    with pytest.raises(ValueError, match="not above"):
        feed.publish(seq, "again")
    assert feed.after(7) == []


def test_a_feed_that_keeps_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity"):
        Feed(0)


async def test_a_follower_waits_for_what_is_above_its_cursor_only(nursery: trio.Nursery) -> None:
    feed: Feed[str] = Feed(10)
    woken = []

    @nursery.start_soon
    async def follower() -> None:
        await feed.wait_after(5)
        woken.append(feed.last)

    await wait_all_tasks_blocked()
    feed.publish(5, "seen already")
    await wait_all_tasks_blocked()
    assert woken == []
    feed.publish(6, "new")
    await wait_all_tasks_blocked()
    assert woken == [6]
    with assert_checkpoints():
        await feed.wait_after(5)


async def test_closing_ends_every_follower_but_not_the_publisher(nursery: trio.Nursery) -> None:
    feed: Feed[str] = Feed(10)
    ended = []

    async def follower(cursor: int) -> None:
        with pytest.raises(FeedClosed):
            await feed.wait_after(cursor)
        ended.append(cursor)

    for cursor in range(3):
        nursery.start_soon(follower, cursor)
    await wait_all_tasks_blocked()
    feed.close()
    feed.close()
    await wait_all_tasks_blocked()
    assert sorted(ended) == [0, 1, 2]
    feed.publish(1, "late")
    with pytest.raises(FeedClosed):
        await feed.wait_after(0)
    assert feed.after(0) == [(1, "late")]


async def test_a_cancelled_follower_disturbs_nobody(nursery: trio.Nursery) -> None:
    feed: Feed[str] = Feed(10)
    wakeup = Wakeup()
    seen = []

    @nursery.start_soon
    async def follower() -> None:
        await feed.wait_after(0)
        seen.append(await wakeup.wait(0))

    async with trio.open_nursery() as cancelled:
        cancelled.start_soon(feed.wait_after, 0)
        cancelled.start_soon(wakeup.wait, 0)
        await wait_all_tasks_blocked()
        cancelled.cancel_scope.cancel()
    feed.publish(1, "item")
    wakeup.notify()
    await wait_all_tasks_blocked()
    assert seen == [1]


@given(
    capacity=st.integers(1, 6),
    bursts=st.lists(st.integers(0, 8), max_size=12),
    pauses=st.lists(st.integers(0, 4), min_size=1, max_size=4),
)
def test_every_follower_sees_every_item_once_and_in_order(capacity: int, bursts: list[int], pauses: list[int]) -> None:
    """Whatever the interleaving: a follower that fills its gaps from the store misses nothing and repeats nothing."""
    store: list[tuple[int, int]] = []

    async def main() -> None:
        feed: Feed[int] = Feed(capacity)
        seen: list[list[tuple[int, int]]] = [[] for _ in pauses]

        async def follow(pause: int, log: list[tuple[int, int]]) -> None:
            cursor = 0
            while cursor < sum(bursts):
                await feed.wait_after(cursor)
                newer = feed.after(cursor)
                log += [entry for entry in store if entry[0] > cursor] if newer is None else newer
                cursor = log[-1][0]
                for _ in range(pause):
                    await trio.lowlevel.checkpoint()

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                for pause, log in zip(pauses, seen, strict=True):
                    nursery.start_soon(follow, pause, log)
                for burst in bursts:
                    for _ in range(burst):
                        store.append((len(store) + 1, len(store)))
                        feed.publish(*store[-1])
                    await trio.lowlevel.checkpoint()
        assert all(log == store for log in seen)

    trio.run(main)


@given(bursts=st.lists(st.integers(0, 4), max_size=12), pauses=st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_no_waiter_misses_the_last_notification(bursts: list[int], pauses: list[int]) -> None:
    """Every waiter gets to the final count, however notifications and waits interleave; counts only rise."""

    async def main() -> None:
        wakeup = Wakeup()
        assert wakeup.count == 0

        async def wait(pause: int) -> None:
            seen = 0
            while seen < sum(bursts):
                count = await wakeup.wait(seen)
                assert count > seen
                seen = count
                for _ in range(pause):
                    await trio.lowlevel.checkpoint()

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                for pause in pauses:
                    nursery.start_soon(wait, pause)
                for burst in bursts:
                    for _ in range(burst):
                        wakeup.notify()
                    await trio.lowlevel.checkpoint()
        assert wakeup.count == sum(bursts)

    trio.run(main)


async def test_a_notification_nobody_waited_for_is_still_there() -> None:
    wakeup = Wakeup()
    wakeup.notify()
    wakeup.notify()
    with assert_checkpoints():
        assert await wakeup.wait(0) == 2
    with trio.move_on_after(0) as scope:
        await wakeup.wait(2)
    assert scope.cancelled_caught
