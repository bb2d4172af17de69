"""The load, in a process of its own: `python -m tests.bench.load JOB`, a JSON object; prints one with what it measured.

Bodies are made before the clock starts. Plain sockets, because a comfortable client would cost more than what is
measured.
"""

from __future__ import annotations

import json
import os
import select
import selectors
import socket
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from tests.bench.workload import ARRAY, arrays, singles

HEADER = 4


def http_request(method: str, path: str, key: str, body: bytes) -> bytes:
    """One HTTP/1.1 request."""
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def http_exchange(sock: socket.socket, request: bytes) -> tuple[int, bytes]:
    """Send a request and read its whole answer."""
    sock.sendall(request)
    data = b""
    while b"\r\n\r\n" not in data:
        data += _receive(sock)
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(
        int(line.partition(b":")[2]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")
    )
    while len(body) < length:
        body += _receive(sock)
    return int(head.split(b" ", 2)[1]), body


def _connect(job: dict[str, Any]) -> socket.socket:
    if "socket" in job:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(job["socket"])
        return sock
    sock = socket.create_connection((job["host"], job["port"]))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _receive(sock: socket.socket) -> bytes:
    data = sock.recv(1 << 16)
    if not data:
        raise ConnectionError("the daemon closed the connection")
    return data


def over_http(job: dict[str, Any]) -> dict[str, Any]:
    """Requests over `connections`, one at a time each; the seconds of every one and of all together."""
    if "bodies" in job:
        waiting = deque(body.encode() for body in job["bodies"])
    else:
        waiting = deque(arrays(job["arrays"], job["name"]))
    requests = deque(http_request("POST", job["path"], job["key"], body) for body in waiting)
    count = len(requests)
    latencies_s: list[float] = []
    failed: list[str] = []
    ready = threading.Barrier(job["connections"] + 1)

    def work() -> None:
        with _connect(job) as sock:
            ready.wait()
            while requests:
                try:
                    request = requests.popleft()
                except IndexError:
                    return
                start_s = time.perf_counter()
                status, body = http_exchange(sock, request)
                latencies_s.append(time.perf_counter() - start_s)
                if status >= 300:
                    failed.append(f"{status} {body[:300]!r}")

    threads = [threading.Thread(target=work) for _ in range(job["connections"])]
    for thread in threads:
        thread.start()
    ready.wait()
    start_s = time.perf_counter()
    for thread in threads:
        thread.join()
    return {"seconds": time.perf_counter() - start_s, "count": count, "latencies_s": latencies_s, "failed": failed[:3]}


def over_frames(job: dict[str, Any]) -> dict[str, Any]:
    """Frames over `connections` of the ingest socket, sent as fast as it takes them; the answers are counted."""
    connections = job["connections"]
    if "arrays" in job:
        bodies = arrays(job["arrays"], job["name"], random_ids=job.get("random_ids", False))
    else:
        bodies = singles(job["singles"], job["name"])
    frames = [len(body).to_bytes(HEADER, "big") + body for body in bodies]
    selector = selectors.DefaultSelector()
    left = []
    for number in range(connections):
        own = frames[number::connections]
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(job["socket"])
        sock.setblocking(False)
        state = {"out": memoryview(b"".join(own)), "in": bytearray(), "answers": len(own)}
        left.append(state)
        selector.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE, state)
    failed: list[str] = []
    if "begun" in job:
        Path(job["begun"]).touch()
    start_s = time.perf_counter()
    while selector.get_map():
        for key, mask in selector.select():
            sock, state = key.fileobj, key.data
            assert isinstance(sock, socket.socket)
            if mask & selectors.EVENT_WRITE:
                sent = sock.send(state["out"][: 1 << 18]) if state["out"] else 0
                state["out"] = state["out"][sent:]
                if not state["out"]:
                    selector.modify(sock, selectors.EVENT_READ, state)
            if mask & selectors.EVENT_READ:
                buffer = state["in"]
                buffer += _receive(sock)
                start = 0
                while len(buffer) - start >= HEADER:
                    length = int.from_bytes(buffer[start : start + HEADER], "big")
                    if len(buffer) - start - HEADER < length:
                        break
                    answer = bytes(buffer[start + HEADER : start + HEADER + length])
                    start += HEADER + length
                    state["answers"] -= 1
                    if not answer.startswith(b'{"ok":true'):
                        failed.append(answer[:300].decode())
                del buffer[:start]
                if not state["answers"]:
                    selector.unregister(sock)
                    sock.close()
    seconds = time.perf_counter() - start_s
    count = len(bodies) * (ARRAY if "arrays" in job else 1)
    return {"seconds": seconds, "count": count, "failed": failed[:3]}


def over_requests(job: dict[str, Any]) -> dict[str, Any]:
    """Single events, or `bodies`, as HTTP requests over `connections`, one in flight on each.

    As lean as Python allows: what the load takes of the two cores is missing to what is measured.
    """
    bodies = [body.encode() for body in job["bodies"]] if "bodies" in job else singles(job["singles"], job["name"])
    requests = deque(http_request("POST", job["path"], job.get("key", "none"), body) for body in bodies)
    count = len(requests)
    socks = {(sock := _connect(job)).fileno(): sock for _ in range(job["connections"])}
    partly: dict[int, bytes] = {}
    lengths: dict[bytes, int] = {}
    latencies_s: list[float] = []
    failed: list[str] = []
    now_s = time.perf_counter
    poll = select.epoll()
    start_s = now_s()
    started_s: dict[int, float] = {}
    for fd, sock in socks.items():
        poll.register(fd, select.EPOLLIN)
        started_s[fd] = now_s()
        sock.sendall(requests.popleft())
    while socks:
        for fd, _ in poll.poll():
            data = os.read(fd, 1 << 16)
            if not data:
                raise ConnectionError("the daemon closed the connection")
            if fd in partly:
                data = partly.pop(fd) + data
            end = data.find(b"\r\n\r\n") + 4
            length = lengths.get(data[:end])
            if length is None and end > 3:
                head = data[:end]
                length = lengths[head] = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            if length is None or len(data) < end + length:
                partly[fd] = data
                continue
            came_s = now_s()
            latencies_s.append(came_s - started_s[fd])
            if not data.startswith(b"HTTP/1.1 20"):
                failed.append(data[:300].decode())
            if requests:
                started_s[fd] = came_s
                os.write(fd, requests.popleft())
            else:
                poll.unregister(fd)
                socks.pop(fd).close()
    return {"seconds": now_s() - start_s, "count": count, "latencies_s": latencies_s, "failed": failed[:3]}


KINDS = {"http": over_http, "frames": over_frames, "requests": over_requests}


def main(text: str) -> None:
    """Run one job."""
    job = json.loads(Path(text[1:]).read_text() if text.startswith("@") else text)
    print(json.dumps(KINDS[job["kind"]](job)))


if __name__ == "__main__":
    main(sys.argv[1])
