from __future__ import annotations

import os
import pwd
import socket
import stat
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio

from asapd.edge import sockets
from asapd.edge.sockets import CannotListen, Peer


async def port_of(listener: trio.SocketListener) -> int:
    port = listener.socket.getsockname()[1]
    assert isinstance(port, int)
    return port


async def test_a_tcp_listener_takes_connections_on_the_port_it_was_given() -> None:
    (listener,) = await sockets.open_tcp("127.0.0.1:0", 8)
    async with listener, await trio.open_tcp_stream("127.0.0.1", await port_of(listener)):
        await (await listener.accept()).aclose()


async def test_a_taken_port_is_named_and_so_is_the_way_out() -> None:
    (listener,) = await sockets.open_tcp("127.0.0.1:0")
    async with listener:
        port = await port_of(listener)
        with pytest.raises(CannotListen, match=f"127.0.0.1:{port} is in use: stop the process"):
            await sockets.open_tcp(f"127.0.0.1:{port}")


async def test_a_port_can_be_listened_on_again_at_once() -> None:
    (listener,) = await sockets.open_tcp("127.0.0.1:0")
    port = await port_of(listener)
    client = await trio.open_tcp_stream("127.0.0.1", port)
    served = await listener.accept()
    await served.aclose()
    await client.aclose()
    await listener.aclose()
    (again,) = await sockets.open_tcp(f"127.0.0.1:{port}")
    await again.aclose()


async def test_ipv6_is_written_in_brackets() -> None:
    try:
        (listener,) = await sockets.open_tcp("[::1]:0")
    except CannotListen as error:
        pytest.skip(f"no IPv6 here: {error}")
    async with listener:
        assert listener.socket.family == socket.AF_INET6


@pytest.mark.parametrize(
    ("bind", "message"),
    [
        ("127.0.0.1", "write host:port"),
        ("127.0.0.1:http", "write host:port"),
        ("127.0.0.1:65536", "write host:port"),
        ("127.0.0.1:\u0661", "write host:port"),
        ("::1:80", "in brackets"),
        ("192.0.2.1:0", "is not an address of this host"),
        ("no.such.host.invalid:80", "cannot listen on no.such.host.invalid:80"),
    ],
)
async def test_a_bad_bind_says_what_to_write(bind: str, message: str) -> None:
    with pytest.raises(CannotListen, match=message):
        await sockets.open_tcp(bind)


@pytest.mark.parametrize(
    ("bind", "loopback"),
    [
        ("127.0.0.1:8727", True),
        ("127.8.0.1:1", True),
        ("[::1]:8727", True),
        ("localhost:8727", True),
        ("0.0.0.0:8727", False),
        ("*:8727", False),
        (":8727", False),
        ("[::]:8727", False),
        ("10.0.0.1:8727", False),
        ("localhost.example.org:80", False),
    ],
)
def test_only_this_host_reaches_loopback(bind: str, loopback: bool) -> None:
    assert sockets.is_loopback(bind) is loopback


async def test_a_unix_socket_has_the_mode_group_and_directory_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "run" / "a.sock"
    mask = os.umask(0o022)
    try:
        listener = sockets.open_unix(path, 0o660, str(os.getgid()))
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(mask)
    async with listener:
        status = path.stat()
        assert stat.S_ISSOCK(status.st_mode)
        assert stat.S_IMODE(status.st_mode) == 0o660
        assert status.st_gid == os.getgid()
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o750


async def test_the_peer_is_the_process_that_connected(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    async with sockets.open_unix(path, 0o600, None) as listener:
        client = await trio.open_unix_socket(path)
        served = await listener.accept()
        groups = tuple(sorted(os.getgroups()))
        peer = sockets.peer_credentials(served)
        assert msgspec.structs.replace(peer, groups=tuple(sorted(peer.groups))) == Peer(
            pid=os.getpid(), uid=os.getuid(), gid=os.getgid(), groups=groups
        )
        await client.aclose()
        await served.aclose()
        with pytest.raises(OSError, match="Bad file descriptor"):
            sockets.peer_credentials(served)


async def test_a_tcp_client_has_no_credentials() -> None:
    (listener,) = await sockets.open_tcp("127.0.0.1:0")
    async with listener:
        client = await trio.open_tcp_stream("127.0.0.1", await port_of(listener))
        async with client, await listener.accept() as served:
            with pytest.raises(OSError, match="only a Unix socket"):
                sockets.peer_credentials(served)


async def test_a_socket_in_use_is_left_to_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    async with sockets.open_unix(path, 0o600, None):
        before = sockets.inode(path)
        with pytest.raises(CannotListen, match="in use by a running process"):
            sockets.open_unix(path, 0o600, None)
        assert sockets.inode(path) == before


async def test_a_socket_with_a_full_backlog_is_in_use_too(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    async with sockets.open_unix(path, 0o600, None, backlog=0):
        waiting = [socket.socket(socket.AF_UNIX) for _ in range(4)]
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(os.fspath(path))
        with pytest.raises(CannotListen, match="in use by a running process"):
            sockets.open_unix(path, 0o600, None)
        for client in waiting:
            client.close()


async def test_a_socket_file_left_by_a_dead_process_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    await sockets.open_unix(path, 0o600, None).aclose()
    assert path.exists()
    async with sockets.open_unix(path, 0o600, None) as listener, await trio.open_unix_socket(path):
        await (await listener.accept()).aclose()


def test_a_file_that_is_no_socket_is_never_touched(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(CannotListen, match="exists and is not a socket"):
        sockets.open_unix(path, 0o600, None)
    assert path.read_text() == "data"
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(CannotListen, match="exists and is not a socket"):
        sockets.open_unix(link, 0o600, None)
    assert link.is_symlink()


def test_a_datagram_socket_is_not_taken_for_stale(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(os.fspath(path))
        with pytest.raises(CannotListen, match="cannot tell whether"):
            sockets.open_unix(path, 0o600, None)
    assert path.exists()


def test_what_cannot_be_made_is_explained(tmp_path: Path) -> None:
    with pytest.raises(CannotListen, match="no group 'no-such-group'"):
        sockets.open_unix(tmp_path / "a.sock", 0o600, "no-such-group")
    with pytest.raises(CannotListen, match="at most 107 bytes"):
        sockets.open_unix(tmp_path / ("x" * 120), 0o600, None)
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotListen, match="cannot create"):
        sockets.open_unix(tmp_path / "file" / "run" / "a.sock", 0o600, None)
    with pytest.raises(CannotListen, match="cannot look at"):
        sockets.open_unix(tmp_path / ("x" * 300), 0o600, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.skipif(os.getuid() == 0, reason="root may give files to any group")
def test_a_group_one_is_not_in_is_explained_and_leaves_no_socket(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with pytest.raises(CannotListen, match="must be a member"):
        sockets.open_unix(path, 0o600, "0")
    assert not path.exists()


async def test_closing_removes_only_the_socket_one_made(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    listener = sockets.open_unix(path, 0o600, None)
    own = sockets.inode(path)
    assert own is not None
    await listener.aclose()
    path.rename(tmp_path / "kept")
    async with sockets.open_unix(path, 0o600, None):
        assert not sockets.close_unix(path, own)
        assert path.exists()
    (tmp_path / "kept").rename(path)
    assert sockets.close_unix(path, own)
    assert not path.exists()
    assert not sockets.close_unix(path, own)
    path.write_text("")
    assert sockets.inode(path) is None


@pytest.fixture
def listening_fd() -> Iterator[int]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield os.dup(sock.fileno())


async def test_a_socket_passed_on_by_systemd_is_served(listening_fd: int) -> None:
    os.set_inheritable(listening_fd, True)
    async with sockets.adopt(listening_fd) as listener:
        assert not os.get_inheritable(listening_fd)
        async with await trio.open_tcp_stream("127.0.0.1", await port_of(listener)):
            await (await listener.accept()).aclose()


def test_what_is_no_listening_socket_is_not_adopted(tmp_path: Path) -> None:
    with socket.socket() as sock:
        with pytest.raises(CannotListen, match="no listening stream socket"):
            sockets.adopt(sock.fileno())
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_STREAM
    with (tmp_path / "file").open("w") as file, pytest.raises(CannotListen, match="is not a socket"):
        sockets.adopt(file.fileno())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a process other groups")
async def test_the_supplementary_groups_are_those_of_the_process(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    script = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({str(path)!r}); s.recv(1)"
    async with sockets.open_unix(path, 0o600, None) as listener, trio.open_nursery() as nursery:
        run = partial(trio.run_process, [sys.executable, "-c", script], extra_groups=[54321, 12345])
        nursery.start_soon(run)
        served = await listener.accept()
        assert sorted(sockets.peer_credentials(served).groups) == [12345, 54321]
        await served.aclose()


async def test_where_the_kernel_tells_no_groups_the_account_database_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "_SO_PEERGROUPS", 9_999)
    path = tmp_path / "a.sock"
    async with sockets.open_unix(path, 0o600, None) as listener, await trio.open_unix_socket(path):
        served = await listener.accept()
        user = pwd.getpwuid(os.getuid()).pw_name
        assert sockets.peer_credentials(served).groups == tuple(os.getgrouplist(user, os.getgid()))
        assert sockets._peer_groups(served, 2**31 - 7, 1) == ()
        await served.aclose()
