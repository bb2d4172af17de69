"""Where the daemon keeps its state and its sockets when nobody says otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

_SYSTEM_STATE = Path("/var/lib/asapd")
_SYSTEM_RUNTIME = Path("/run/asapd")


def default_state_dir(environ: Mapping[str, str], is_root: bool) -> Path:
    """`$STATE_DIRECTORY` under systemd, `/var/lib/asapd` for root, else `$XDG_STATE_HOME/asapd`.

    The XDG base directory specification says that a relative `$XDG_STATE_HOME` is ignored.
    """
    if given := _first(environ.get("STATE_DIRECTORY", "")):
        return given
    home = environ.get("HOME", "")
    if is_root or not home:
        return _SYSTEM_STATE
    xdg = Path(environ.get("XDG_STATE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path(home) / ".local" / "state") / "asapd"


def default_runtime_dir(environ: Mapping[str, str], is_root: bool, state_dir: Path) -> Path:
    """`$RUNTIME_DIRECTORY`, `/run/asapd` for root, `$XDG_RUNTIME_DIR/asapd`, else `run` inside the state directory."""
    if given := _first(environ.get("RUNTIME_DIRECTORY", "")):
        return given
    if is_root:
        return _SYSTEM_RUNTIME
    xdg = Path(environ.get("XDG_RUNTIME_DIR", ""))
    return xdg / "asapd" if xdg.is_absolute() else state_dir / "run"


def _first(directories: str) -> Path | None:
    # systemd joins several directories of one unit with colons; the first is the main one.
    first = directories.split(":", 1)[0]
    return Path(first) if first else None
