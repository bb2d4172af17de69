"""Running a program with something on its standard input, within a deadline."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from functools import partial

import msgspec
import trio

_KEPT_BYTES = 1024
_REAP_S = 5.0
# What a program said last is in the pipe when it has ended; whoever inherited the pipe may hold it open for long.
_REST_S = 1.0


class Ended(msgspec.Struct, frozen=True):
    """How a program ended: its exit code, negative for a signal, and the last of what it wrote to stderr."""

    code: int
    stderr: str


class CommandFailed(msgspec.Struct, frozen=True):
    """It could not be started, or did not end in time and was killed; `detail` is for people."""

    detail: str


async def run_command(argv: Sequence[str], stdin: bytes, *, timeout_s: float) -> Ended | CommandFailed:
    """Run a program in a session of its own, its stdout thrown away; past `timeout_s` its whole session is killed.

    Cancellation kills it too.
    """
    try:
        process = await trio.lowlevel.open_process(
            list(argv),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        return CommandFailed(f"{argv[0]} cannot be run: {error.strerror or error}")
    assert process.stdin is not None
    assert process.stderr is not None
    kept = bytearray()
    try:
        with trio.move_on_after(timeout_s) as patience:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(_feed, process.stdin, stdin))
                nursery.start_soon(partial(_keep, process.stderr, kept))
                await process.wait()
                patience.deadline = trio.current_time() + _REST_S
        if process.returncode is not None:
            return Ended(process.returncode, kept.decode("utf-8", "replace"))
        return CommandFailed(f"{argv[0]} did not end within {timeout_s:g} s and was killed")
    finally:
        if process.returncode is None:
            # Not reaped yet, so the number is still this session's.
            os.killpg(process.pid, signal.SIGKILL)
            with trio.move_on_after(_REAP_S, shield=True):
                await process.wait()
        await trio.aclose_forcefully(process.stdin)
        await trio.aclose_forcefully(process.stderr)


async def _feed(pipe: trio.abc.SendStream, content: bytes) -> None:
    # A program need not read what it is given.
    with contextlib.suppress(trio.BrokenResourceError):
        await pipe.send_all(content)
    await pipe.aclose()


async def _keep(pipe: trio.abc.ReceiveStream, kept: bytearray) -> None:
    async for part in pipe:
        kept += part
        del kept[:-_KEPT_BYTES]
