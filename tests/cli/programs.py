"""A daemon in a process of its own, and what a program left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

CONFIG = """
[http]
bind = ["127.0.0.1:0"]
[prober]
interval = "1h"
[sla]
min_samples = 1
evaluate_every = "100ms"
[metering.pricing]
file = "prices.toml"
"""
PRICES = 'version = "1"\ncurrency = "USD"\n[[price]]\nmodel = "m"\ninput_per_mtok = "1.5"\noutput_per_mtok = "2"\n'


@dataclass(frozen=True)
class Ran:
    """What a program left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.out)


Program = Callable[..., Ran]


@dataclass(frozen=True)
class Daemon:
    """A daemon that runs, and its files."""

    process: subprocess.Popen[bytes]
    directory: Path

    @property
    def socket(self) -> Path:
        return self.directory / "admin.sock"

    @property
    def config(self) -> Path:
        return self.directory / "asapd.toml"


def daemon_in(directory: Path, more: str = "") -> Iterator[Daemon]:
    """Start a daemon, with more of configuration, wait until it serves, and end it."""
    (directory / "asapd.toml").write_text(CONFIG + more)
    (directory / "prices.toml").write_text(PRICES)
    environment = {**os.environ, "RUNTIME_DIRECTORY": str(directory)}
    command = [sys.executable, "-m", "asapd", "run", "--config", directory / "asapd.toml", "--state-dir", directory]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if b"serving on" in line:
                break
        drain = threading.Thread(target=process.stderr.read)
        drain.start()
        try:
            assert process.poll() is None
            yield Daemon(process, directory)
        finally:
            process.terminate()
            process.wait(20)
            drain.join()
