"""Where the daemon is: its ingest socket, or an address of HTTP."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

ENVIRONMENT = "ASAPD_INGEST"
"""The environment variable that gives the address when the program gives none."""


@dataclass(frozen=True)
class Socket:
    """A Unix socket: the first of these paths that exists when a connection is made."""

    paths: tuple[str, ...]

    def path(self) -> str:
        """The path to connect to now."""
        return next((path for path in self.paths if Path(path).exists()), self.paths[0])

    def __str__(self) -> str:
        return "unix:" + "|".join(self.paths)


@dataclass(frozen=True)
class Web:
    """HTTP or HTTPS."""

    is_tls: bool
    host: str
    port: int
    prefix: str

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.is_tls else 'http'}://{host}:{self.port}{self.prefix}"


Address = Socket | Web


def parse(text: str | os.PathLike[str] | None) -> Address:
    """An address from `/path`, `unix:/path`, `http://host:port` or `https://host`; None means the default.

    The default is `$ASAPD_INGEST`, else `ingest.sock` in `/run/asapd` or in `$XDG_RUNTIME_DIR/asapd`, whichever exists.

    Raises:
        ValueError: for anything else.
    """
    text = os.fspath(text) if text is not None else os.environ.get(ENVIRONMENT, "")
    if not text:
        own = os.environ.get("XDG_RUNTIME_DIR")
        return Socket(("/run/asapd/ingest.sock", *([f"{own}/asapd/ingest.sock"] if own else [])))
    if text.startswith("unix:"):
        text = text.removeprefix("unix:")
        text = text.removeprefix("//") if text.startswith("///") else text
    if text.startswith("/"):
        return Socket((text,))
    parts = urlsplit(text)
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.fragment or parts.username:
        raise ValueError(f"{text!r} is no address of asapd: give /path/to/ingest.sock or http(s)://host:port")
    is_tls = parts.scheme == "https"
    return Web(is_tls, parts.hostname, parts.port or (443 if is_tls else 80), parts.path.rstrip("/"))
