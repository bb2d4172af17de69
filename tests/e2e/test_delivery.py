"""Alerts reach whoever is to be told, through kills of the daemon and receivers that are away, slow or broken."""

from __future__ import annotations

import hashlib
import hmac
import itertools
import json
import socket
import sys
import time
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio

from tests.e2e.daemon import QUICK, Daemon, running, until
from tests.e2e.test_promises import subscribed

pytestmark = pytest.mark.load

SECRET = b"an e2e secret of enough bytes"
TIER = '[[sla.tier]]\nname = "fast"\nmax_latency_p95_ms = 500\n'
SETTINGS = QUICK.replace("[sla]\n", '[sla]\nmin_samples = 1\ndefault_tier = "fast"\n') + TIER
_numbers = itertools.count(1)


def agents(count: int) -> str:
    return "".join(f'[[agents]]\nid = "{urn(n)}"\nurl = "http://127.0.0.1:9"\n' for n in range(1, count + 1))


def urn(number: int) -> str:
    return f"urn:asap:agent:late-{number}"


def hook(port: int, name: str = "hook", **more: str) -> str:
    settings = "".join(f'{key} = "{value}"\n' for key, value in more.items())
    return f'[[alerts.webhook]]\nname = "{name}"\nurl = "http://127.0.0.1:{port}/in/secret-path"\n{settings}'


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


async def breach(daemon: Daemon, *numbers: int) -> None:
    """Have agents break their promises, and wait until that is in the store."""
    async with daemon.client() as client:
        for number in numbers:
            event = {
                "id": f"e{next(_numbers)}",
                "task_id": f"t{next(_numbers)}",
                "agent": urn(number),
                "consumer": "urn:asap:agent:desk",
                "timestamp": time.time(),
                "metrics": {"duration_ms": 900},
            }
            answer = await client.post("/usage", json=event)
            assert answer.status_code == 201, answer.text

        async def opened() -> bool:
            found = (await client.get("/sla/breaches", params={"limit": 1000})).json()["data"]
            return {urn(number) for number in numbers} <= {one["agent_id"] for one in found}

        await until(opened)


@dataclass
class Receiver:
    """What a webhook posts to; `status` says what the next request is answered with."""

    status: Callable[[int], int] = lambda asked: 204
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    asked: int = 0

    @property
    def seqs(self) -> list[int]:
        return [json.loads(body)["data"]["seq"] for _, body in self.got]

    async def has(self, *seqs: int) -> None:
        async def arrived() -> bool:
            return set(seqs) <= set(self.seqs)

        await until(arrived)

    @asynccontextmanager
    async def open(self, port: int) -> AsyncIterator[None]:
        async def serve(stream: trio.SocketStream) -> None:
            raw = b""
            try:
                while True:
                    while b"\r\n\r\n" not in raw:
                        part = await stream.receive_some()
                        if not part:
                            return
                        raw += part
                    head, _, raw = raw.partition(b"\r\n\r\n")
                    lines = dict(line.lower().split(": ", 1) for line in head.decode().split("\r\n")[1:])
                    size = int(lines["content-length"])
                    while len(raw) < size:
                        raw += await stream.receive_some()
                    originals = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
                    headers = {name.lower(): value for name, value in originals.items()}
                    body, raw = raw[:size], raw[size:]
                    self.asked += 1
                    status = self.status(self.asked)
                    if status < 300:
                        self.got.append((headers, body))
                    await stream.send_all(f"HTTP/1.1 {status} X\r\nContent-Length: 0\r\n\r\n".encode())
            except trio.BrokenResourceError:
                pass

        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_tcp, serve, port)
            yield
            nursery.cancel_scope.cancel()


async def test_a_kill_between_detection_and_delivery_loses_nothing_to_a_webhook() -> None:
    port, receiver = free_port(), Receiver()
    with running(SETTINGS + agents(3)) as daemon:
        secret = daemon.home / "hook.secret"
        secret.write_bytes(b"whsec_" + b64encode(SECRET))
        daemon.config.write_text(SETTINGS + agents(3) + hook(port, secret_file=str(secret)))
        assert daemon.admin_request("POST", "/reload").status_code == 200
        await breach(daemon, 1, 2)
        (target,) = daemon.status()["alerts"]["targets"]
        assert (target["cursor"], target["backlog"]) == (0, 2)
        daemon.kill()
        daemon.start()
        await breach(daemon, 3)
        async with receiver.open(port):
            await receiver.has(1, 2, 3)
        once = list(dict.fromkeys(receiver.seqs))
        assert once == [1, 2, 3]
        headers, body = receiver.got[0]
        signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
        version, _, signature = headers["webhook-signature"].partition(",")
        assert version == "v1"
        assert b64decode(signature) == hmac.digest(SECRET, signed, hashlib.sha256)
        assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60
        log = daemon.stderr.read_text()
        assert "secret-path" not in log
        assert secret.read_text() not in log

        async def caught_up() -> bool:
            (now,) = daemon.status()["alerts"]["targets"]
            return bool(now["state"] == "ok" and now["backlog"] == 0 and now["cursor"] == 3)

        await until(caught_up)
        # A clean restart sends nothing again.
        daemon.stop()
        daemon.start()
        async with receiver.open(port):
            await trio.sleep(0.5)
        assert list(dict.fromkeys(receiver.seqs)) == once


async def test_through_kills_a_cursor_that_acknowledges_is_told_each_alert_exactly_once() -> None:
    with running(SETTINGS + agents(6)) as daemon:
        told: list[int] = []
        async with subscribed(daemon, cursor="pager"):
            pass
        for numbers in ((1, 2), (3, 4), (5, 6)):
            await breach(daemon, *numbers)
            daemon.kill()
            daemon.start()
            async with subscribed(daemon, cursor="pager") as live:
                told += [(await live.breach())["seq"] for _ in numbers]
                answer = await live.call("sla.ack", cursor="pager", seq=told[-1])
                assert answer["result"]["acknowledged"] == told[-1]
                await live.hears_nothing()
            daemon.kill()
            daemon.start()
        async with subscribed(daemon, cursor="pager") as live:
            await live.hears_nothing()
        assert told == [1, 2, 3, 4, 5, 6]


async def test_a_flapping_receiver_gets_all_in_order_and_a_slow_one_delays_nobody() -> None:
    ports = [free_port() for _ in range(3)]
    flapping, well = Receiver(lambda asked: 500 if asked % 2 else 204), Receiver()

    async def drip(stream: trio.SocketStream) -> None:
        """A slow loris on the other side: takes the request, and answers a byte a second."""
        try:
            await stream.receive_some()
            for byte in b"HTTP/1.1 200 OK":
                await stream.send_all(bytes([byte]))
                await trio.sleep(1)
        except trio.BrokenResourceError:
            pass

    hooks = hook(ports[0], "flapping") + hook(ports[1], "loris") + hook(ports[2], "well")
    with running(SETTINGS + agents(3) + hooks) as daemon:
        async with flapping.open(ports[0]), well.open(ports[2]), trio.open_nursery() as nursery:
            await nursery.start(trio.serve_tcp, drip, ports[1])
            await breach(daemon, 1, 2, 3)
            with trio.fail_after(2):
                await well.has(1, 2, 3)
            await flapping.has(1, 2, 3)
            nursery.cancel_scope.cancel()
        assert well.seqs == [1, 2, 3]
        assert list(dict.fromkeys(flapping.seqs)) == [1, 2, 3]
        backlog = {one["name"]: one["backlog"] for one in daemon.status()["alerts"]["targets"]}
        assert (backlog["well"], backlog["loris"]) == (0, 3)


async def test_a_command_is_run_with_the_alert_and_alertmanagers_shape_is_posted() -> None:
    port, receiver = free_port(), Receiver()
    with running(SETTINGS) as daemon:
        out = daemon.home / "alert.json"
        script = f"import sys; open({str(out)!r}, 'a').write(sys.stdin.read() + chr(10))"
        command = f"[[alerts.command]]\nname = 'note'\nargv = {json.dumps([sys.executable, '-S', '-c', script])}\n"
        broken = "[[alerts.command]]\nargv = ['/no/such/program']\n"
        text = SETTINGS + agents(1) + hook(port, format="alertmanager") + command + broken
        daemon.config.write_text(text)
        assert daemon.admin_request("POST", "/reload").status_code == 200
        async with receiver.open(port):
            await breach(daemon, 1)

            async def arrived() -> bool:
                return bool(receiver.got) and out.exists() and out.read_text().endswith("\n")

            await until(arrived)
        posted = json.loads(receiver.got[0][1])
        assert (posted["version"], posted["alerts"][0]["labels"]["agent_id"]) == ("4", urn(1))
        assert json.loads(out.read_text().splitlines()[0])["data"]["seq"] == 1
        shown = {one["name"]: one for one in daemon.status()["alerts"]["targets"]}
        assert "cannot be run" in shown["program"]["last_error"]
        assert shown["note"]["state"] == "ok"
        # A bad secret file is refused before anything changes.
        daemon.config.write_text(text + hook(port, "other", secret_file=str(daemon.home / "missing")))
        refused = daemon.admin_request("POST", "/reload")
        assert refused.status_code == 422
        assert "alerts.webhook[1].secret_file" in refused.text
        assert len(daemon.status()["alerts"]["targets"]) == 3


READERS, SILENT, ALERTS = 50, 50, 40


async def test_subscribers_that_never_read_keep_nothing_from_the_others() -> None:
    with running(SETTINGS + agents(ALERTS)) as daemon:
        heard: list[list[int]] = []

        async def read(*, task_status: trio.TaskStatus[None]) -> None:
            async with subscribed(daemon) as live:
                task_status.started()
                heard.append([(await live.breach(20.0))["seq"] for _ in range(ALERTS)])

        async with trio.open_nursery() as nursery:
            for _ in range(SILENT):
                nursery.start_soon(_subscribe_and_never_read, daemon)
            for _ in range(READERS):
                await nursery.start(read)
            await breach(daemon, *range(1, ALERTS + 1))
            with trio.fail_after(20):
                while len(heard) < READERS:  # noqa: ASYNC110 -- tasks of this test end at their own pace
                    await trio.sleep(0.02)
            nursery.cancel_scope.cancel()
        assert all(seqs == list(range(1, ALERTS + 1)) for seqs in heard)


async def _subscribe_and_never_read(daemon: Daemon) -> None:
    sock = trio.socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await sock.connect(("127.0.0.1", daemon.port))
    async with trio.SocketStream(sock) as stream:
        key = b64encode(b"0123456789abcdef").decode()
        head = (
            f"GET /ws HTTP/1.1\r\nHost: 127.0.0.1:{daemon.port}\r\nAuthorization: Bearer {daemon.admin_key}\r\n"
            "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: {key}\r\n\r\n"
        )
        await stream.send_all(head.encode())
        received = b""
        while b"\r\n\r\n" not in received:
            received += await stream.receive_some()
        text = b'{"jsonrpc":"2.0","id":1,"method":"sla.subscribe"}'
        # A text frame with a mask of zeros, RFC 6455, section 5.2.
        await stream.send_all(bytes([0x81, 0x80 | len(text), 0, 0, 0, 0]) + text)
        await trio.sleep_forever()
