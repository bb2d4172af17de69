"""The bare fast lane: a Trio listener that parses with httptools, decodes one event, and answers.

No check of the event, no store, no commit: what HTTP and Trio alone cost for single events. It tells requests apart by
method and path and sees their fields, as a server must; the *blind* one looks at nothing but bodies.
"""

from __future__ import annotations

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
NOT_FOUND = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"


class _Blind:
    """What one connection receives, of which it looks at bodies."""

    def __init__(self) -> None:
        self.body = b""
        self.answers = b""
        self._parser = httptools.HttpRequestParser(self)
        self._decoder = msgspec.json.Decoder(Event)

    def feed(self, data: bytes) -> bytes:
        """The answers to the requests that ended in it."""
        self.answers = b""
        self._parser.feed_data(data)
        return self.answers

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self._decoder.decode(self.body)
        self.body = b""
        self.answers += ANSWER


class _Seeing(_Blind):
    """The same, which looks at the head as well."""

    def on_message_begin(self) -> None:
        self.url = b""
        self.fields: dict[bytes, bytes] = {}

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields[name.lower()] = value

    def on_message_complete(self) -> None:
        if self._parser.get_method() == b"POST" and self.url == b"/usage" and b"host" in self.fields:
            super().on_message_complete()
        else:
            self.answers += NOT_FOUND


KINDS: dict[str, type[_Blind]] = {"seeing": _Seeing, "blind": _Blind}


async def _main(kind: str, path: str) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        connection = KINDS[kind]()
        async with stream:
            while data := await stream.receive_some(65_536):
                if answers := connection.feed(bytes(data)):
                    await stream.send_all(answers)

    if path:
        sock = trio.socket.socket(trio.socket.AF_UNIX)
        await sock.bind(path)
        sock.listen(128)
        listeners = [trio.SocketListener(sock)]
    else:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=128)
    address = listeners[0].socket.getsockname()
    print(address[1] if not path else 0, flush=True)
    await trio.serve_listeners(serve, listeners)


@contextmanager
def bare_lane(kind: str, path: Path | None = None) -> Iterator[dict[str, object]]:
    """A bare lane of a kind on a socket at `path`, or over TCP; what a job of `tests.bench.load` says to reach it."""
    if path is not None:
        path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.bench.bare_http", kind, "" if path is None else str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        try:
            yield {"host": "127.0.0.1", "port": port} if path is None else {"socket": str(path)}
        finally:
            process.terminate()


if __name__ == "__main__":
    trio.run(_main, *sys.argv[1:])
