"""Names are looked up off the loop, and who answers for them is told."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import trio

from asapd.runtime.lookup import Lookups, is_address, is_answered, is_own


async def test_names_are_looked_up_both_ways() -> None:
    trio.socket.set_custom_hostname_resolver(Lookups())
    found = await trio.socket.getaddrinfo("localhost", 80, type=socket.SOCK_STREAM)
    assert {entry[4][0] for entry in found} <= {"127.0.0.1", "::1"}
    _, service = await trio.socket.getnameinfo(("127.0.0.1", 80), socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)
    assert service == "80"


class Scripted(trio.abc.HostnameResolver):
    def __init__(self, answer: int | None) -> None:
        self.answer = answer

    async def getaddrinfo(self, *args: Any, **named: Any) -> Any:
        if self.answer is None:
            await trio.sleep_forever()
        if self.answer:
            raise socket.gaierror(self.answer, "as told")
        return []

    async def getnameinfo(self, sockaddr: Any, flags: int) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("answer", "is_one"), [(0, True), (socket.EAI_NONAME, True), (socket.EAI_AGAIN, False), (None, False)]
)
async def test_no_such_name_is_an_answer_and_silence_is_none(answer: int | None, is_one: bool) -> None:
    trio.socket.set_custom_hostname_resolver(Scripted(answer))
    assert await is_answered("agent.test", 0.01) is is_one


def test_what_needs_no_network_is_own(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n10.0.0.1 Listed.test other # commented.test\n")
    own = ("127.0.0.9", "::1", "localhost", "a.localhost", "listed.test", "other")
    assert [host for host in own if not is_own(host, hosts)] == []
    assert [host for host in ("10.0.0.1", "agent.test", "commented.test") if is_own(host, hosts)] == []
    assert not is_own("agent.test", tmp_path / "missing")


def test_an_address_is_told_from_a_name() -> None:
    assert (is_address("10.0.0.1"), is_address("fd00::1"), is_address("agent.test")) == (True, True, False)
