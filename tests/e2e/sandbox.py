"""Runs a command under the filter of system calls that a systemd unit describes: `python sandbox.py UNIT COMMAND...`.

What systemd would allow is worked out by its own tool, and the filter is loaded with the library that systemd uses.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_ALLOW = 0x7FFF_0000
_ERRNO = 0x0005_0000
_LIBRARY = "libseccomp.so.2"


def _members(name: str) -> set[str]:
    """The system calls of a set of systemd's, those of sets in it too."""
    if not name.startswith("@"):
        return {name}
    shown = subprocess.run(["systemd-analyze", "syscall-filter", name], capture_output=True, text=True, check=True)
    words = [line.strip() for line in shown.stdout.splitlines()[1:]]
    return {call for word in words if word and not word.startswith("#") for call in _members(word)}


def allowed(unit: str) -> set[str]:
    """What the unit's service may call."""
    found = _members("@default")
    for line in unit.splitlines():
        key, _, value = line.partition("=")
        if key == "SystemCallFilter":
            for word in value.removeprefix("~").split():
                found = found - _members(word) if value.startswith("~") else found | _members(word)
    return found


def enter(calls: set[str]) -> None:
    """Have every other system call of this process, and of those it starts, fail with EPERM from now on."""
    library = ctypes.CDLL(_LIBRARY, use_errno=True)
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(_ERRNO | errno.EPERM)))
    for call in sorted(calls):
        number = library.seccomp_syscall_resolve_name(call.encode())
        if number >= 0:  # others are not of this architecture
            library.seccomp_rule_add(context, ctypes.c_uint32(_ALLOW), ctypes.c_int(number), ctypes.c_uint(0))
    if library.seccomp_load(context):
        raise OSError("the filter cannot be loaded")


def main(arguments: Sequence[str]) -> None:
    """Become the command."""
    enter(allowed(Path(arguments[0]).read_text(encoding="utf-8")))
    os.execv(arguments[1], list(arguments[1:]))


if __name__ == "__main__":
    main(sys.argv[1:])
