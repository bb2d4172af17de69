"""What was set aside can be sent, whatever it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from asapd.client import Meter
from asapd.client.resend import main
from tests.client.fake import Fake, refused

AGENT, CONSUMER = "urn:asap:agent:writer", "urn:asap:agent:desk"


def recorded(body: list[Any]) -> tuple[int, dict[str, Any]]:
    return 201, {"status": "recorded", "recorded": len(body), "duplicates": 0}


def no(*places: int) -> tuple[int, dict[str, Any]]:
    return 422, {key: value for key, value in refused("invalid", *places).items() if key != "ok"}


@pytest.fixture
def path(home: Path) -> Path:
    """A file as a meter leaves it, with one of each kind."""

    def http(path: str, headers: dict[str, str], body: Any) -> tuple[int, dict[str, Any]]:
        return no(0) if path == "/usage" else (422, {"code": "invalid"})

    def handle(events: list[dict[str, Any]]) -> dict[str, Any]:
        return refused("invalid", *range(len(events)))

    with Fake(home / "refusing.sock", handle, http) as fake:
        meter = Meter(fake.path, agent=AGENT, consumer=CONSUMER, spool=home / "spool")
        meter.record(task_id="plain")
        meter.record(task_id="under a token", delegation_token="a.b.c")
        meter.settle("res_1")
        assert meter.flush()
        meter.close()
    path = home / "spool" / "refused.ndjson"
    with path.open("a") as file:
        file.write('{"code":"damaged","reason":"r","refused_at":null,"event":"u 00\\ufffd"}\nno JSON\n"no line"\n')
    return path


def test_each_kind_is_sent_as_what_it_is_and_the_rest_is_given_back(
    home: Path, path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASAPD_KEY", "secret\n")
    before = path.read_text()

    def http(path: str, headers: dict[str, str], body: Any) -> tuple[int, dict[str, Any]]:
        return recorded(body) if path == "/usage" else (200, {"state": "settled"})

    with Fake(home / "ingest.sock", http=http) as fake:
        assert main([str(path), "--address", str(fake.path)]) == 1
        requests = [(path, headers.get("x-asap-delegation-token"), body) for path, headers, body in fake.requests]
        assert {headers["authorization"] for _, headers, _ in fake.requests} == {"Bearer secret"}
    sent = {body[0]["task_id"]: (token, body[0]) for path, token, body in requests if path == "/usage"}
    assert {name: token for name, (token, _) in sent.items()} == {"plain": None, "under a token": "a.b.c"}
    assert all({"id", "source", "seq"} <= event.keys() for _, event in sent.values())
    assert all("delegation_token" not in event for _, event in sent.values())
    assert ("/reservations/res_1/settle", None, None) in requests
    out, err = capsys.readouterr()
    assert [json.loads(line)["event"] for line in out.splitlines()] == ["u 00\ufffd", "no JSON", '"no line"']
    assert err == "taken: 3, refused again: 3\n"
    assert path.read_text() == before


def test_what_is_refused_again_is_given_back_with_the_reason_of_today(
    home: Path, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = path.read_text().splitlines(keepends=True)[:3]
    path.write_text("".join(lines))

    def http(path: str, headers: dict[str, str], body: Any) -> tuple[int, dict[str, Any]]:
        if path != "/usage":
            return 500, {"code": "internal"}
        return (413, {"code": "too_large", "detail": "long"}) if "x-asap-delegation-token" in headers else no(0)

    with Fake(home / "ingest.sock", http=http) as fake:
        assert main([str(path), "--address", str(fake.path)]) == 1
        rest = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert sorted((line["code"], line["reason"]) for line in rest) == [
            ("internal", "internal 500"),
            ("invalid", "agent is bad"),
            ("too_large", "long"),
        ]
        assert sorted(json.dumps(line["event"]) for line in rest) == sorted(
            json.dumps(json.loads(line)["event"]) for line in lines
        )
        fake.http = lambda path, headers, body: recorded(body) if path == "/usage" else (200, {"state": "settled"})
        assert main([str(path), "--address", str(fake.path)]) == 0


def test_what_was_damaged_keeps_nothing_else_from_being_taken(
    home: Path, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = path.read_bytes().splitlines()[0]
    assert json.loads(good)["event"]["task_id"] == "plain"

    def changed(before: bytes, after: bytes) -> bytes:
        assert before in good
        return good.replace(before, after)

    tokens = [
        changed(b'"task_id"', b'"delegation_token":"%b","task_id"' % token)
        for token in (b"a\\n.b", b"\xc3\xbf\xe2\x82\xac")
    ]
    damaged = [
        changed(b'"metrics":{', b'"metrics":{"tokens_in":4e999'),
        changed(b"agent:desk", b"agent:d\xffsk"),
        b"[" * 20_000,
        b'{"event":' * 20_000,
    ]
    path.write_bytes(b"\n".join([*tokens, *damaged, changed(b"agent:desk", "agent:bläh".encode())]) + b"\n")
    with Fake(home / "ingest.sock", http=lambda path, headers, body: recorded(body)) as fake:
        assert main([str(path), "--address", str(fake.path)]) == 1
        assert [body[0]["consumer"] for _, _, body in fake.requests] == ["urn:asap:agent:bläh"]
    out, err = capsys.readouterr()
    assert err == "taken: 1, refused again: 6\n"
    rest = [json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()]
    assert [line["code"] for line in rest] == ["malformed"] * 2 + ["damaged"] * 4
    assert [line["event"] for line in rest[2:]] == [line.decode("utf-8", "replace") for line in damaged]


def test_a_daemon_that_is_away_ends_it(home: Path, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(path), "--address", str(home / "none.sock")]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert "0 of the 0 lines before this one were taken. Run it again" in err


@pytest.mark.parametrize("arguments", [["missing.ndjson"], ["missing.ndjson", "--address", "ftp://asapd"]])
def test_wrong_usage_is_said(home: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(home / arguments[0]), *arguments[1:]])
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err
