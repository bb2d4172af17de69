"""Files that commands write, when a signal ends them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

_PROGRAM = """
import signal, sys
from pathlib import Path
from asapd.cli.written import whole

# Who runs the tests behind nohup has it ignored.
signal.signal(signal.SIGHUP, signal.SIG_IGN if "ignoring" in sys.argv else signal.SIG_DFL)
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
        while program.poll() is None:  # one may come just before it begins to wait, and wake it from nothing
            program.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                program.wait(0.1)
        assert program.returncode == -number
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
    # Measuring takes SIGTERM for itself.
    environ = {name: value for name, value in os.environ.items() if name != "COVERAGE_PROCESS_CONFIG"}
    program = subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert program.stdout is not None
    assert program.stdout.readline() == b"begun\n"
    return program
