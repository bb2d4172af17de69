"""Files that commands write, when a signal ends them."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

_PROGRAM = """
import signal, sys
from pathlib import Path
from asapd.cli.written import whole

if "ignoring" in sys.argv:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
with whole(Path(sys.argv[1])) as out:
    out.write(b"half")
    out.flush()
    print("begun", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_the_program_leaves_nothing_half_written(tmp_path: Path, number: signal.Signals) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"before")
    with _running(file) as program:
        program.send_signal(number)
        assert program.wait() == -number
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_bytes() == b"before"


def test_a_signal_that_is_ignored_stays_so(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with _running(file, "ignoring") as program:
        program.send_signal(signal.SIGHUP)
        program.communicate()
        assert program.returncode == 0
    assert file.read_bytes() == b"half"


def _running(file: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", _PROGRAM, str(file), *more]
    program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert program.stdout is not None
    assert program.stdout.readline() == b"begun\n"
    return program
