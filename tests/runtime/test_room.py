from __future__ import annotations

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from asapd.runtime.room import Room


async def test_who_finds_no_room_waits_and_keeps_its_turn(nursery: trio.Nursery) -> None:
    room = Room(10)
    assert await room.take(8) == 8
    served: set[int] = set()

    async def want(size: int) -> None:
        await room.take(size)
        served.add(size)

    for size in (9, 1, 3):
        nursery.start_soon(want, size)
        await wait_all_tasks_blocked()
    # The second would fit, but the first was there before it.
    assert served == set()
    room.give_back(8)
    await wait_all_tasks_blocked()
    assert served == {9, 1}
    room.give_back(9)
    await wait_all_tasks_blocked()
    assert served == {9, 1, 3}
    assert room.free_bytes == 6


async def test_more_than_there_is_takes_all_of_it() -> None:
    room = Room(10)
    assert await room.take(99) == 10
    assert room.free_bytes == 0


async def test_whoever_gives_up_holds_nothing_and_holds_nobody_up(nursery: trio.Nursery) -> None:
    room = Room(10)
    await room.take(5)
    patient = trio.CancelScope()

    async def give_up() -> None:
        with patient:
            await room.take(9)

    done = trio.Event()

    async def small() -> None:
        await room.take(5)
        done.set()

    nursery.start_soon(give_up)
    await wait_all_tasks_blocked()
    nursery.start_soon(small)
    await wait_all_tasks_blocked()
    patient.cancel()
    await done.wait()
    assert room.free_bytes == 0


async def test_whoever_is_cancelled_in_its_turn_gives_back_what_it_got(nursery: trio.Nursery) -> None:
    room = Room(10)
    await room.take(10)
    scope = trio.CancelScope()

    async def want() -> None:
        with scope:
            await room.take(6)

    nursery.start_soon(want)
    await wait_all_tasks_blocked()
    scope.cancel()
    # Its turn comes before it could leave the queue.
    room.give_back(10)
    assert room.free_bytes == 4
    await wait_all_tasks_blocked()
    assert room.free_bytes == 10


def test_no_room_at_all_is_a_bug() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Room(0)


@given(
    total=st.integers(1, 20),
    wants=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 3), st.integers(0, 6)), max_size=12),
)
def test_never_more_is_held_than_there_is_and_in_the_end_all_is_free(
    total: int, wants: list[tuple[int, int, int]]
) -> None:
    async def main() -> None:
        room = Room(total)
        held = 0

        async def hold(size: int, for_s: int, patience_s: int) -> None:
            nonlocal held
            with trio.move_on_after(patience_s):
                taken = await room.take(size)
                held += taken
                assert held <= total
                assert room.free_bytes <= total - held
                with trio.CancelScope(shield=True):
                    await trio.sleep(for_s)
                held -= taken
                room.give_back(taken)

        async with trio.open_nursery() as nursery:
            for want in wants:
                nursery.start_soon(hold, *want)
        assert room.free_bytes == total

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
