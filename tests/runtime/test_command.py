"""Programs with something on their standard input: real ones."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import trio

from asapd.runtime.command import CommandFailed, Ended, run_command


def python(text: str) -> list[str]:
    return [sys.executable, "-S", "-c", text]


async def test_a_program_reads_its_input_and_tells_how_it_ended(tmp_path: Path) -> None:
    copy = f"import sys; open({str(tmp_path / 'copy')!r}, 'wb').write(sys.stdin.buffer.read()); sys.exit(3)"
    content = b"x" * 200_000
    assert await run_command(python(copy), content, timeout_s=20) == Ended(3, "")
    assert (tmp_path / "copy").read_bytes() == content


async def test_what_it_says_on_stderr_is_kept_to_a_bound_and_what_it_does_not_read_is_no_fault() -> None:
    ended = await run_command(python("import sys; sys.stderr.write('no ' * 5000)"), b"x" * 2_000_000, timeout_s=20)
    assert isinstance(ended, Ended)
    assert ended.code == 0
    assert len(ended.stderr) <= 1024
    assert (await run_command(python("import sys; sys.exit('why not')"), b"", timeout_s=20)) == Ended(1, "why not\n")


async def test_what_it_said_last_is_kept_however_much_came_before_and_however_fast_it_ended() -> None:
    said = "for i in $(seq 200); do echo line $i xxxxxxxxxxxx >&2; done; echo the reason >&2; exit 3"
    for _ in range(20):
        for text in ("echo the reason >&2; exit 3", said):
            ended = await run_command(["/bin/sh", "-c", text], b"{}", timeout_s=20)
            assert isinstance(ended, Ended)
            assert (ended.code, ended.stderr.splitlines()[-1], len(ended.stderr) <= 1024) == (3, "the reason", True)


async def test_whoever_inherits_its_stderr_holds_up_nobody(tmp_path: Path) -> None:
    text = f"sleep 60 & echo $! > {tmp_path / 'pid'}; echo the reason >&2; exit 3"
    with trio.fail_after(10):
        assert await run_command(["/bin/sh", "-c", text], b"{}", timeout_s=20) == Ended(3, "the reason\n")
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


async def test_a_program_that_is_not_there_is_told() -> None:
    outcome = await run_command(["no-such-program-anywhere"], b"", timeout_s=5)
    assert isinstance(outcome, CommandFailed)
    assert "cannot be run" in outcome.detail


async def _gone(pid: int) -> bool:
    with trio.move_on_after(10):
        while _runs(pid):  # noqa: ASYNC110 -- what is waited for happens in another process
            await trio.sleep(0.01)
        return True
    return False


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


FAMILY = """
import os, sys, time
child = os.fork()
if child:
    open(sys.argv[1] + '.new', 'w').write(f'{os.getpid()} {child}')
    os.rename(sys.argv[1] + '.new', sys.argv[1])
time.sleep(60)
"""


@pytest.mark.parametrize("how", ["timeout", "cancel"])
async def test_past_its_time_or_cancelled_it_is_killed_with_what_it_started(tmp_path: Path, how: str) -> None:
    pids = tmp_path / "pids"
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def run() -> None:
                outcome = await run_command([*python(FAMILY), str(pids)], b"", timeout_s=2 if how == "timeout" else 60)
                assert isinstance(outcome, CommandFailed)
                assert "did not end within 2 s" in outcome.detail

            nursery.start_soon(run)
            with trio.fail_after(20):
                while not pids.exists():  # noqa: ASYNC110 -- what is waited for happens in another process
                    await trio.sleep(0.01)
            if how == "cancel":
                scope.cancel()
    for pid in map(int, pids.read_text().split()):
        assert pid != os.getpid()
        assert await _gone(pid)
