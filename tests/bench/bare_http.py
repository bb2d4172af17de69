"""The bare fast lane: a Trio listener on a Unix socket that parses with httptools, decodes one event, and answers.

No check of the event, no store, no commit: what HTTP and Trio alone cost for single events.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httptools
import msgspec
import trio

from tests.bench.ceiling import Event

ANSWER = (
    b"HTTP/1.1 201 Created\r\ncontent-type: application/json\r\ncontent-length: 25\r\n\r\n"
    + b'{"status":"recorded","n":1}'[:25]
)


class _Connection:
    def __init__(self) -> None:
        self.body = b""
        self.complete = 0
        self._parser = httptools.HttpRequestParser(self)
        self._decoder = msgspec.json.Decoder(Event)

    def feed(self, data: bytes) -> int:
        """How many requests ended in it."""
        self.complete = 0
        self._parser.feed_data(data)
        return self.complete

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self._decoder.decode(self.body)
        self.body = b""
        self.complete += 1


async def _serve(stream: trio.SocketStream) -> None:
    connection = _Connection()
    async with stream:
        while data := await stream.receive_some(65_536):
            if count := connection.feed(bytes(data)):
                await stream.send_all(ANSWER * count)


async def _main(path: str) -> None:
    sock = trio.socket.socket(trio.socket.AF_UNIX)
    await sock.bind(path)
    sock.listen(128)
    print("ready", flush=True)
    await trio.serve_listeners(_serve, [trio.SocketListener(sock)])


@contextmanager
def bare_lane(path: Path) -> Iterator[Path]:
    """A bare lane on a socket at `path`."""
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.bench.bare_http", os.fspath(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield path
        finally:
            process.terminate()


if __name__ == "__main__":
    trio.run(_main, sys.argv[1])
