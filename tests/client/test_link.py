"""The ways to the daemon, against servers that behave as servers do: well, badly, or not at all."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from asapd.client import link as links
from asapd.client.address import Socket, Web, parse
from asapd.client.link import Away, FrameLink, Refused, Requests, Taken, WebLink, make_link, report, settle
from tests.client.fake import PATIENCE_S, Fake, refused, taken

EVENT = b'{"id":"a"}'


@contextlib.contextmanager
def server(*answers: bytes, reads: bool = True) -> Iterator[Web]:
    """A TCP server that gives each connection the next answer and closes it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for answer in answers:
                with contextlib.suppress(OSError):
                    connection, _ = listener.accept()
                    with connection:
                        if reads:
                            connection.recv(65536)
                        connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield Web(False, "127.0.0.1", listener.getsockname()[1], "/base")
        thread.join(5)


def test_events_go_over_http_with_the_key(home: Path) -> None:
    answers: list[tuple[int, dict[str, Any]]] = [
        (201, {"status": "recorded", "recorded": 1, "duplicates": 1}),
        (201, {"status": "recorded", "recorded": "many"}),
        (413, {}),
        (422, {"code": "invalid", "detail": "no", "errors": [{"field": "a", "reason": "b", "index": 0}, "x"]}),
        (401, {"code": "unauthorized", "detail": "no"}),
        (502, {}),
        (431, {}),
    ]
    expected = [
        Taken(1, 1),
        Taken(0, 0),
        Refused("too_large", "the request is too large"),
        Refused("invalid", "no", {0: "a b"}),
        Away("unauthorized: no"),
        Away("HTTP status 502"),
        Away("HTTP status 431"),  # about the key, which is no fault of the event
    ]
    with Fake(home / "s", taken, lambda path, headers, body: answers.pop(0)) as fake:
        requests = Requests(parse(home / "s"), "secret", None)
        link = WebLink(requests)
        assert [link.report([EVENT]) for _ in expected] == expected
        link.abort()
        link.close()
        requests.close()
        assert fake.requests[0][1]["authorization"] == "Bearer secret"
        assert fake.requests[0][0] == "/usage"
        assert fake.requests[0][2] == [{"id": "a"}]


@pytest.mark.parametrize(
    ("status", "is_bug"),
    [
        *((status, True) for status in (400, 403, 404, 405, 422, 500)),
        *((status, False) for status in (200, 302, 401, 407, 408, 425, 429, 431, 502, 503, 504)),
    ],
)
def test_what_a_proxy_says_may_be_about_the_events_or_not(home: Path, status: int, is_bug: bool) -> None:
    with Fake(home / "s", http=lambda path, headers, body: (status, {"error": "a proxy's page"})):
        requests = Requests(parse(home / "s"), None, None)
        assert report(requests, [EVENT]) == Away(f"HTTP status {status}", is_bug)
        if status not in {200, 431}:
            assert settle(requests, "res_1") == Away(f"HTTP status {status}", is_bug)
        requests.close()


def test_what_is_too_large_under_a_token_is_refused(home: Path) -> None:
    with Fake(home / "s", http=lambda path, headers, body: (431, {})):
        requests = Requests(parse(home / "s"), None, None)
        answer = report(requests, [EVENT], "token")
        assert isinstance(answer, Refused)
        assert answer.code == "headers_too_large"
        requests.close()


def test_the_handler_of_a_signal_may_close_the_connections_in_the_middle_of_anything(home: Path) -> None:
    with Fake(home / "s", http=lambda path, headers, body: (200, {})):
        requests = Requests(parse(home / "s"), None, None)
        answers: list[int] = []

        def handle(frame: FrameType, event: str, argument: object) -> Any:
            if frame.f_code.co_filename == links.__file__:
                requests.close()
            return handle

        def ask() -> None:
            sys.settrace(handle)
            answers.extend(requests.post("/x", b"").status for _ in range(2))

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(PATIENCE_S)
        assert answers == [200, 200]
        requests.close()


def test_what_does_not_speak_http_is_away() -> None:
    garbage = b"SSH-2.0-something\r\n\r\n"
    cut = b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nshort"
    text = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"
    with server(garbage, cut, text, b"") as address:
        link = make_link(address, Requests(address, None, None))
        answers = [link.report([EVENT]) for _ in range(4)]
    assert [type(answer) for answer in answers] == [Away] * 4
    with server() as address:
        pass
    assert isinstance(make_link(address, Requests(address, None, None)).report([EVENT]), Away)


def test_a_body_that_is_refused_before_it_was_read_is_known_to_be_too_large() -> None:
    answer = b"HTTP/1.1 413 Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
    with server(answer) as address:
        assert make_link(address, Requests(address, None, None)).report([EVENT]) == Refused(
            "too_large", "the request is too large"
        )


def test_https_goes_by_the_context_that_was_given() -> None:
    with server(b"", b"") as plain:
        address = Web(True, plain.host, plain.port, "")
        for context in (ssl.create_default_context(), None):
            answer = make_link(address, Requests(address, "k", context)).report([EVENT])
            assert isinstance(answer, Away)
            assert "SSL" in answer.reason or "EOF" in answer.reason or "Connection" in answer.reason


def test_a_key_that_no_header_can_have_is_no_crash(home: Path) -> None:
    with Fake(home / "s") as fake:
        requests = Requests(parse(home / "s"), "two\nlines", None)
        assert isinstance(WebLink(requests).report([EVENT]), Away)
        assert isinstance(settle(requests, "res_1"), Away)
        assert fake.requests == []


def test_frames_reconnect_once_when_the_idle_connection_was_closed(home: Path) -> None:
    link = FrameLink(Socket((str(home / "s"),)))
    for _ in range(2):
        with Fake(home / "s") as fake:
            assert link.report([EVENT]) == Taken(1, 0)
            assert link.report([EVENT]) == Taken(1, 0)
            assert len(fake.batches) == 2
        (home / "s").unlink()
    assert isinstance(link.report([EVENT]), Away)


def test_a_frame_over_the_limit_is_refused_and_the_next_one_has_a_new_connection(home: Path) -> None:
    with Fake(home / "s", lambda events: refused("too_large")) as fake:
        link = FrameLink(Socket((str(home / "s"),)))
        assert link.report([EVENT]) == Refused("too_large", "no")
        fake.handle = taken
        assert link.report([EVENT]) == Taken(1, 0)
        link.close()


def test_after_an_abort_there_are_no_more_connections(home: Path) -> None:
    with Fake(home / "s") as fake:
        link = FrameLink(Socket((str(home / "s"),)))
        assert link.report([EVENT]) == Taken(1, 0)
        link.abort()
        assert isinstance(link.report([EVENT]), Away)
        link.abort()
        assert len(fake.batches) == 1


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\0\0\0\2hi", b"\0\0"])
def test_what_does_not_speak_frames_is_away(home: Path, answer: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(home / "s"))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        assert isinstance(FrameLink(Socket((str(home / "s"),))).report([EVENT]), Away)
        thread.join()


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (200, "", Taken),
        (409, "reservation_closed", Taken),
        (404, "reservation_not_found", Taken),
        (422, "invalid", Refused),
        (431, "headers_too_large", Refused),
        (414, "", Refused),
        (404, "", Away),
        (403, "forbidden", Away),
        (403, "host_not_allowed", Away),
        (404, "not_found", Away),
        (500, "internal", Away),
        (503, "overloaded", Away),
    ],
)
def test_a_settlement_is_done_refused_or_open(home: Path, status: int, code: str, expected: type) -> None:
    document = {"code": code, "detail": "because"} if code else {}
    with Fake(home / "s", http=lambda path, headers, body: (status, document)) as fake:
        requests = Requests(parse(home / "s"), None, None)
        assert isinstance(settle(requests, "res_1"), expected)
        for strange in ("../status", "\u00e9", "r" * 129, ""):
            assert isinstance(settle(requests, strange), Refused)
        requests.close()
        assert len(fake.requests) == 1
        assert "authorization" not in fake.requests[0][1]
        assert json.dumps(fake.requests[0][2]) == "null"
