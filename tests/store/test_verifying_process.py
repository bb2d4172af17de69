"""The verifying process, when the daemon that asked is gone."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import msgspec

from asapd.store.verifying import Request
from asapd.store.writer import open_for_writing


def test_with_nobody_left_to_tell_it_ends_without_a_word(tmp_path: Path) -> None:
    file = tmp_path / "asapd.db"
    file.touch()
    open_for_writing(file).close()
    command = [sys.executable, "-m", "asapd.store.verifying_process", str(file)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None
        process.stdout.close()
        _, said = process.communicate(msgspec.json.encode(Request()))
    assert (said, process.returncode) == (b"", -signal.SIGPIPE)
