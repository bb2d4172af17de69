"""Opening the doors: TCP, Unix and inherited sockets, TLS, and the names behind a local user."""

from __future__ import annotations

import contextlib
import functools
import grp
import os
import pwd
import ssl
from collections.abc import Mapping
from pathlib import Path

import trio

from asapd import config
from asapd.core.access import Caller
from asapd.edge import sockets
from asapd.edge.auth import ingest_socket_caller
from asapd.edge.serve import Door
from asapd.edge.sockets import CannotListen, Peer
from asapd.runtime.sdnotify import listen_fds


class Doors:
    """Every listener of the daemon; leaving the context removes the socket files it made.

    Raises:
        CannotListen: with what to do.
    """

    def __init__(self, settings: config.Config, runtime_dir: Path, environ: Mapping[str, str]) -> None:
        self._settings = settings
        self._runtime_dir = runtime_dir
        self._environ = environ
        self._unlinking = contextlib.ExitStack()
        self.http: list[Door] = []
        self.lane: list[trio.SocketListener] = []
        self.addresses: list[str] = []
        self.pages: list[str] = []

    async def open(self) -> trio.SocketListener:
        """Open the HTTP and admin doors, the fast lane, and the ingest socket, which is returned."""
        http = self._settings.http
        tls = _tls_context(http.tls)
        # systemd's sockets take the place of http.bind.
        passed = [fd for fd, name in listen_fds(self._environ, os.getpid()) if name in {"http", "unknown"}]
        self.http += [Door(sockets.adopt(descriptor), "http", ssl_context=tls) for descriptor in passed]
        for bind in () if passed else http.bind:
            if bind.path is not None:
                self.http.append(Door(self._open_unix(bind.path, 0o660, None), "http"))
            elif bind.kind == "fd":
                self.http.append(Door(sockets.adopt(bind.fd), "http", ssl_context=tls))
            else:
                self.http += [Door(one, "http", ssl_context=tls) for one in await sockets.open_tcp(bind.text)]
        for door in self.http:
            _check_inherited(door.listener, http)
        scheme = "http" if tls is None else "https"
        self.pages = [_address(door.listener, scheme) for door in self.http]
        self.addresses = list(self.pages)
        admin = self._open_local(self._settings.admin, "admin.sock")
        path = self._settings.admin.socket or self._runtime_dir / "admin.sock"
        self.http.append(Door(admin, "admin", functools.partial(_at_admin_socket, path)))
        await self._open_lane()
        return self._open_local(self._settings.ingest, "ingest.sock")

    async def _open_lane(self) -> None:
        for bind in self._settings.ingest.bind:
            if bind.path is not None:
                self.lane.append(self._open_unix(bind.path, 0o660, None))
            elif bind.kind == "fd":
                self.lane.append(sockets.adopt(bind.fd))
            else:
                self.lane += await sockets.open_tcp(bind.text)
        for listener in self.lane:
            name = listener.socket.getsockname()
            if not isinstance(name, str | bytes) and not sockets.is_loopback(_netloc(name)):
                raise CannotListen(f"{_netloc(name)} is reachable from outside, and ingest.bind speaks plain HTTP only")
            self.addresses.append(_address(listener, "http"))

    def close(self) -> None:
        """Remove the socket files."""
        self._unlinking.close()

    def _open_local(self, section: config.Admin | config.Ingest, name: str) -> trio.SocketListener:
        path = section.socket or self._runtime_dir / name
        listener = self._open_unix(path, section.mode, section.group)
        self.addresses.append(f"unix:{path}")
        return listener

    def _open_unix(self, path: Path, mode: int, group: str | None) -> trio.SocketListener:
        listener = sockets.open_unix(path, mode, group)
        own = sockets.inode(path)
        if own is not None:
            self._unlinking.callback(sockets.close_unix, path, own)
        return listener


def _at_admin_socket(path: Path, stream: trio.SocketStream) -> dict[str, object]:
    return {"peer": sockets.peer_credentials(stream), "group": sockets.group_of(path)}


def _check_inherited(listener: trio.SocketListener, http: config.Http) -> None:
    """Hold an inherited socket to the same rule as the configuration holds `http.bind`."""
    name = listener.socket.getsockname()
    if isinstance(name, str | bytes) or sockets.is_loopback(_netloc(name)):
        return
    if http.auth == "none" or http.tls is None:
        raise CannotListen(
            f'the inherited socket {_netloc(name)} is reachable from outside: that needs [http.tls] and auth = "keys"'
        )


def _netloc(name: tuple[str, int]) -> str:
    return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"


def _address(listener: trio.SocketListener, scheme: str) -> str:
    name = listener.socket.getsockname()
    if isinstance(name, str | bytes):
        return f"unix:{name if isinstance(name, str) else name.decode()}"
    return f"{scheme}://{_netloc(name)}"


def _tls_context(tls: config.Tls | None) -> ssl.SSLContext | None:
    if tls is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(tls.cert_file, tls.key_file)
        if tls.client_ca_file is not None:
            context.load_verify_locations(tls.client_ca_file)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        raise CannotListen(f"the certificate or key of [http.tls] cannot be used: {error}") from None
    return context


@functools.lru_cache(maxsize=1024)
def names_of(uid: int, groups: frozenset[int]) -> tuple[str | None, frozenset[str]]:
    """The names of a user and of groups; remembered until `names_of.cache_clear()`."""
    user: str | None = None
    with contextlib.suppress(KeyError):
        user = pwd.getpwuid(uid).pw_name
    names = set()
    for one in groups:
        with contextlib.suppress(KeyError):
            names.add(grp.getgrgid(one).gr_name)
    return user, frozenset(names)


def ingest_caller(peer: Peer, ingest: config.Ingest) -> Caller | None:
    """Who a local user is at the ingest socket; None for one who may not report there."""
    if not ingest.allow:
        return ingest_socket_caller(peer, ingest, frozenset(), None)
    user, groups = names_of(peer.uid, frozenset((peer.gid, *peer.groups)))
    return ingest_socket_caller(peer, ingest, groups, user)
