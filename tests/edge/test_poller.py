"""One task that watches many sockets."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from asapd.edge.poller import BURST, Poller

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pairs() -> Iterator[list[Pair]]:
    made = [socket.socketpair() for _ in range(BURST + 5)]
    yield made
    for pair in made:
        for sock in pair:
            sock.close()


async def test_who_watches_is_called_when_something_comes_or_ends(nursery: trio.Nursery, pairs: list[Pair]) -> None:
    poller, called = Poller(), []
    nursery.start_soon(poller.run)
    for number, (ours, _) in enumerate(pairs):

        def ready(number: int = number, ours: socket.socket = ours) -> None:
            called.append((number, ours.recv(10)))
            if not called[-1][1]:
                poller.forget(ours.fileno())

        poller.watch(ours.fileno(), ready)
    await wait_all_tasks_blocked()
    assert not called
    for number, (_, theirs) in enumerate(pairs):
        theirs.send(b"%d" % number)
    await wait_all_tasks_blocked()
    assert sorted(called) == [(number, b"%d" % number) for number in range(len(pairs))]
    called.clear()
    pairs[3][1].close()
    await wait_all_tasks_blocked()
    assert called == [(3, b"")]


async def test_who_has_forgotten_is_not_called_even_by_one_called_before(
    nursery: trio.Nursery, pairs: list[Pair]
) -> None:
    poller, called = Poller(), []
    (one, its), (other, others) = pairs[:2]

    def forget_both() -> None:
        called.append(1)
        poller.forget(one.fileno())
        poller.forget(other.fileno())
        poller.forget(other.fileno())

    poller.watch(one.fileno(), forget_both)
    poller.watch(other.fileno(), forget_both)
    its.send(b"x")
    others.send(b"x")
    nursery.start_soon(poller.run)
    await wait_all_tasks_blocked()
    assert called == [1]
    poller.watch(one.fileno(), forget_both)
    await wait_all_tasks_blocked()
    assert called == [1, 1]
