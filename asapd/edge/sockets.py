"""Listening sockets: TCP, Unix, handed over by systemd; and who is at the other end of a Unix socket."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import socket
import stat
import struct
from ipaddress import ip_address
from pathlib import Path

import msgspec
import trio

BACKLOG = 1024
DIRECTORY_MODE = 0o750

# struct ucred of unix(7): pid_t is signed, uid_t and gid_t are not.
_UCRED = struct.Struct("iII")
# Linux 4.13, asm-generic/socket.h; Python has no name for it. getsockopt(3) of Python takes at most 1024 bytes.
_SO_PEERGROUPS = 59
_GID = struct.Struct("I")
_MOST_GROUPS = 1024 // _GID.size


class CannotListen(Exception):  # noqa: N818 -- says what happened, as `raise CannotListen` reads
    """A listening socket could not be opened; the operator's to mend, the message says how."""


class Peer(msgspec.Struct, frozen=True):
    """The process at the other end of a Unix socket, as the kernel knew it when it connected (SO_PEERCRED, unix(7)).

    `groups` are its supplementary groups (SO_PEERGROUPS). Where the kernel does not tell them (before Linux 4.13, or
    more than 256), they are those that the account database gives its user.
    """

    pid: int
    uid: int
    gid: int
    groups: tuple[int, ...] = ()


def split_bind(bind: str) -> tuple[str, int]:
    """`host:port` or `[ipv6]:port` as host and port; an empty host or `*` means every interface.

    Raises: CannotListen.
    """
    host, colon, port = bind.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise CannotListen(f"{bind!r} is ambiguous: write an IPv6 address in brackets, as in [::1]:8727")
    if not colon or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise CannotListen(f"{bind!r} is not an address: write host:port, as in 127.0.0.1:8727")
    return ("" if host == "*" else host), int(port)


def is_loopback(bind: str) -> bool:
    """Whether only this host can reach the address; names other than `localhost` are taken to be reachable.

    Raises: CannotListen when `bind` is not an address.
    """
    host, _ = split_bind(bind)
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def open_tcp(bind: str, backlog: int = BACKLOG) -> list[trio.SocketListener]:
    """Listens on `host:port`, one listener an address the host has (SO_REUSEADDR is set; port 0 picks a free one).

    Raises: CannotListen.
    """
    host, port = split_bind(bind)
    try:
        return await trio.open_tcp_listeners(port, host=host or None, backlog=backlog)
    except OSError as error:
        # trio wraps an address family that the host lacks, with the reasons in a group below.
        raise CannotListen(_tcp_advice(bind, error)) from error


def open_unix(path: Path, mode: int, group: str | None, backlog: int = BACKLOG) -> trio.SocketListener:
    """Listens on a Unix socket with the permission bits `mode` and, if given, the group (name or number).

    A missing directory is created (0750); a socket file that nobody serves is replaced; anything else stays.

    Raises: CannotListen.
    """
    gid = None if group is None else group_id(group)
    _make_directory(path.parent)
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    bound = False
    # Nobody may connect between bind and chmod. The mask is the whole process's, but strict.
    previous_mask = os.umask(0o177)
    try:
        sock.bind(os.fspath(path))
        bound = True
        if gid is not None:
            os.chown(path, -1, gid)
        path.chmod(mode)
        sock.listen(backlog)
    except OSError as error:
        sock.close()
        if bound:
            path.unlink(missing_ok=True)
        raise CannotListen(_unix_advice(path, group, error)) from error
    finally:
        os.umask(previous_mask)
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock))


def adopt(fd: int) -> trio.SocketListener:
    """Takes over a listening stream socket that the parent passed on (systemd's LISTEN_FDS, sd_listen_fds(3)).

    Raises: CannotListen.
    """
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise CannotListen(
            f"file descriptor {fd} is not a socket ({error.strerror}): check the .socket unit"
        ) from error
    try:
        sock.set_inheritable(False)
        return trio.SocketListener(trio.socket.from_stdlib_socket(sock))
    except (OSError, ValueError) as error:
        sock.detach()
        raise CannotListen(
            f"file descriptor {fd} is no listening stream socket: the .socket unit needs ListenStream= and Accept=no"
        ) from error


def inode(path: Path) -> int | None:
    """The inode of the socket at `path`, for `close_unix`; None when there is none."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return status.st_ino if stat.S_ISSOCK(status.st_mode) else None


def group_of(path: Path) -> int | None:
    """The group of the socket at `path` as it is now; None when there is none."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_gid if stat.S_ISSOCK(status.st_mode) else None


def close_unix(path: Path, own_inode: int) -> bool:
    """Removes the socket file if it still is the one with `own_inode`; whether it was."""
    if inode(path) != own_inode:
        return False
    path.unlink(missing_ok=True)
    return True


def peer_credentials(stream: trio.SocketStream) -> Peer:
    """Who connected. Raises: OSError when the stream is no Unix socket or is closed."""
    if stream.socket.family != socket.AF_UNIX:
        raise OSError(errno.EOPNOTSUPP, "only a Unix socket knows its peer")
    raw = stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, gid = _UCRED.unpack(raw)
    return Peer(pid=pid, uid=uid, gid=gid, groups=_peer_groups(stream, uid, gid))


def _peer_groups(stream: trio.SocketStream, uid: int, gid: int) -> tuple[int, ...]:
    try:
        raw = stream.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MOST_GROUPS * _GID.size)
    except OSError:
        try:
            return tuple(os.getgrouplist(pwd.getpwuid(uid).pw_name, gid))
        except KeyError:
            return ()
    return tuple(one for (one,) in _GID.iter_unpack(raw))


def _make_directory(directory: Path) -> None:
    if directory.is_dir():
        return
    try:
        directory.mkdir(parents=True)
        directory.chmod(DIRECTORY_MODE)
    except OSError as error:
        raise CannotListen(
            f"cannot create {directory} for a socket ({error.strerror}): create it, or choose another path"
        ) from error


def _remove_stale(path: Path) -> None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise CannotListen(f"cannot look at {path} ({error.strerror}): check the directory's permissions") from error
    if not stat.S_ISSOCK(status.st_mode):
        raise CannotListen(f"{path} exists and is not a socket: move it away, or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        outcome = probe.connect_ex(os.fspath(path))
    # A full backlog answers EAGAIN: somebody serves it, slowly.
    if outcome in {0, errno.EAGAIN}:
        raise CannotListen(f"{path} is in use by a running process: stop that one, or choose another path")
    if outcome != errno.ECONNREFUSED:
        raise CannotListen(
            f"cannot tell whether {path} is in use ({os.strerror(outcome)}): remove it, or choose another path"
        )
    close_unix(path, status.st_ino)


def group_id(group: str) -> int:
    """The number of a group, which may be given as one.

    Raises:
        CannotListen: this host knows no such group.
    """
    if group.isascii() and group.isdigit():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError as error:
        raise CannotListen(f"there is no group {group!r} on this host: create it, or leave `group` out") from error


def _tcp_advice(bind: str, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"{bind} is in use: stop the process that listens there (`ss -ltnp`), or choose another port"
    if error.errno in {errno.EACCES, errno.EPERM}:
        return f"not allowed to listen on {bind}: ports below 1024 need CAP_NET_BIND_SERVICE"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{bind} is not an address of this host: choose one of `ip address`"
    return f"cannot listen on {bind}: {error.strerror or error}"


def _unix_advice(path: Path, group: str | None, error: OSError) -> str:
    if error.errno is None:
        return f"cannot listen on {path} ({error}): a Unix socket's path has at most 107 bytes, choose a shorter one"
    if error.errno == errno.EPERM and group is not None:
        return f"not allowed to give {path} to the group {group!r}: the daemon's user must be a member of it"
    return f"cannot listen on {path} ({error.strerror}): check the directory's permissions"
