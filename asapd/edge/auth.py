"""Who is at the door: API keys on TCP, peer credentials on Unix sockets."""

from __future__ import annotations

import re
from functools import lru_cache
from ipaddress import ip_address
from typing import Protocol

from asapd import config
from asapd.actors.gatekeeper import KeyRing
from asapd.core.access import Caller
from asapd.core.errors import Refusal
from asapd.core.types import Role
from asapd.edge.sockets import Peer

_NETLOC = re.compile(r"(?:\[(?P<v6>[0-9a-f:.]+)\]|(?P<name>[^:\[\]]*))(?::[0-9]{0,5})?\Z")
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
UNAUTHORIZED = Refusal(
    "unauthorized",
    "send a valid key as `Authorization: Bearer KEY`; the first one is in admin.key in the state directory",
)


class Fields(Protocol):
    """The header fields of a request, found by their names in any case."""

    def get(self, name: str, /) -> str | None:
        """The value of a field."""
        ...


def admin_socket_caller(peer: Peer, group: int | None, daemon_uid: int) -> Caller | Refusal:
    """Root and the daemon's own user are admin, members of the socket's group operators; its mode admits nobody."""
    is_admin = peer.uid in {0, daemon_uid}
    if not is_admin and (group is None or group not in (peer.gid, *peer.groups)):
        return Refusal(
            "forbidden",
            f"the admin socket serves root, the user of asapd and members of the socket's group, and uid {peer.uid} is "
            "none of them: join that group and log in again, or run this as root",
        )
    role = Role.ADMIN if is_admin else Role.OPERATOR
    return Caller(f"uid:{peer.uid} pid:{peer.pid}", role, may_sign=is_admin)


def ingest_socket_caller(peer: Peer, ingest: config.Ingest, groups: frozenset[str], user: str | None) -> Caller | None:
    """Whoever the socket's mode lets in may report, narrowed by `[[ingest.allow]]` where there is any.

    `user` and `groups` are the names of the peer's user and groups; of several rules that fit, all count. None when no
    rule admits the peer.
    """
    if not ingest.allow:
        return _anybody(peer.uid, peer.pid)
    agents = tuple(
        agent
        for rule in ingest.allow
        if (rule.uid is not None and rule.uid == peer.uid)
        or (rule.gid is not None and (rule.gid == peer.gid or rule.gid in peer.groups))
        or (rule.user is not None and rule.user == user)
        or (rule.group is not None and rule.group in groups)
        for agent in rule.agents
    )
    return Caller(_local(peer.uid, peer.pid), Role.INGEST, agents) if agents else None


def _local(uid: int, pid: int) -> str:
    return f"uid:{uid} pid:{pid}"


@lru_cache(maxsize=1024)  # asked for with each request
def _anybody(uid: int, pid: int) -> Caller:
    return Caller(_local(uid, pid), Role.INGEST)


def tcp_caller(headers: Fields, ring: KeyRing, http: config.Http) -> Caller | Refusal:
    """The caller behind a bearer key; under `auth = "none"` everybody is admin."""
    if http.auth == "none":
        return Caller("anonymous", Role.ADMIN, may_sign=True)
    scheme, _, key = (headers.get("Authorization") or "").partition(" ")
    if scheme.lower() != "bearer" or not key:
        return UNAUTHORIZED
    return ring.find(key.strip()) or UNAUTHORIZED


def check_host(headers: Fields, http: config.Http) -> Refusal | None:
    """Refuse a host name or a browser's origin that is not ours: what DNS rebinding and foreign pages would use."""
    host = _host_of(headers.get("Host") or "")
    own = LOCAL_HOSTS | {bind.host for bind in http.bind} | set(http.allowed_hosts)
    if host and host not in own and not _is_address(host):
        return Refusal("host_not_allowed", f"{host} is not served: add it to http.allowed_hosts if it should be")
    origin = headers.get("Origin")
    if origin is None or origin in http.allowed_origins:
        return None
    if _host_of(origin.partition("://")[2]) == host and origin.partition("://")[2] == headers.get("Host"):
        return None
    return Refusal("host_not_allowed", f"pages of {origin} may not call: add it to http.allowed_origins if they should")


def _host_of(netloc: str) -> str:
    """The host of `host`, `host:port` or `[v6]:port`; a text that is none of them is its own, unknown, host."""
    found = _NETLOC.match(netloc.lower())
    return netloc.lower() if found is None else found["v6"] or found["name"] or ""


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
