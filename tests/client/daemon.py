"""The daemon itself, in a process of its own, to be asked, killed and started again."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

PATIENCE_S = 30.0


class Daemon:
    """One state directory with its sockets, and the process that serves it now."""

    def __init__(self, home: Path, more_config: str = "") -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._home = home
        self.ingest = home / "run" / "ingest.sock"
        self.url = f"http://127.0.0.1:{self.port}"
        (home / "asapd.toml").write_text(f'[http]\nbind = ["127.0.0.1:{self.port}"]\nauth = "none"\n{more_config}')
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it is ready; after a kill the writer of the former one may take a moment to go."""
        environment = {**os.environ, "RUNTIME_DIRECTORY": str(self._home / "run")}
        command = [sys.executable, "-m", "asapd", "run", "--state-dir", str(self._home / "state")]
        deadline_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline_s:
            if self._process is None or self._process.poll() is not None:
                with (self._home / "stderr").open("ab") as log:
                    config = ["--config", str(self._home / "asapd.toml")]
                    self._process = subprocess.Popen([*command, *config], env=environment, stderr=log)
            try:
                self.get("/readyz")
            except (OSError, AssertionError):
                time.sleep(0.05)
            else:
                return
        raise AssertionError((self._home / "stderr").read_text())

    def kill(self) -> None:
        """SIGKILL."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._process = None

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, dict[str, Any]]:
        """One request with JSON; the caller is admin."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def get(self, path: str) -> dict[str, Any]:
        """What is there."""
        status, document = self.request("GET", path)
        assert status == 200, document
        return document

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
