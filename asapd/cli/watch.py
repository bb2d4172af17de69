"""Breaches as they happen: the WebSocket of live alerts, over the admin socket."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any

import click
import msgspec
import trio
from trio_websocket import ConnectionClosed, ConnectionRejected, HandshakeError, WebSocketConnection, wrap_client_stream

from asapd.cli.door import CONNECT_S, unreachable
from asapd.cli.options import Session
from asapd.cli.outcome import Exit, Failure
from asapd.cli.show import cell, show_json_line


def follow_breaches(session: Session, urn: str | None, severity: str | None, *, fail: bool) -> int:
    """Print what is open, then each transition, until Ctrl-C; with `fail` until one is open, which is 1.

    Raises:
        Failure: the daemon cannot be reached, or is gone.
    """
    ended: int | Failure = Exit.DONE
    try:
        ended = trio.run(_follow, session, urn, severity, fail)
    except* KeyboardInterrupt:
        ended = Exit.DONE
    if isinstance(ended, Failure):
        raise ended
    return ended


async def _follow(session: Session, urn: str | None, severity: str | None, fail: bool) -> int | Failure:
    socket = session.door.path
    try:
        with trio.fail_after(CONNECT_S):
            stream = await trio.open_unix_socket(str(socket))
    except trio.TooSlowError:
        return unreachable(socket, None)
    except OSError as error:
        return unreachable(socket, error)
    ended: int | Failure = Exit.DONE
    try:
        async with stream, trio.open_nursery() as nursery:
            try:
                with trio.fail_after(CONNECT_S):
                    # By this name the daemon knows a caller on its own host.
                    connection = await wrap_client_stream(nursery, stream, "localhost", "/ws")
                ended = await _print_alerts(connection, session, urn, severity, fail)
            except trio.TooSlowError:
                ended = unreachable(socket, None)
            except (ConnectionClosed, HandshakeError):
                ended = Failure(Exit.UNREACHABLE, f"{socket}: the daemon closed the connection: it stops or restarts")
            nursery.cancel_scope.cancel()
    except* ConnectionRejected as group:  # raised by the task that reads, not by the one that waits
        ended = _rejected(group)
    return ended


def _rejected(group: BaseExceptionGroup[ConnectionRejected]) -> Failure:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, ConnectionRejected)
    code = Exit.FORBIDDEN if error.status_code in {401, 403} else Exit.UNREACHABLE
    reason = f"with status {error.status_code}"
    with suppress(msgspec.DecodeError, KeyError, TypeError):
        reason = str(msgspec.json.decode(error.body or b"{}")["detail"])
    return Failure(code, f"the daemon refused the WebSocket: {reason}")


async def _print_alerts(
    connection: WebSocketConnection, session: Session, urn: str | None, severity: str | None, fail: bool
) -> int | Failure:
    wanted = {name: value for name, value in (("agent_id", urn), ("min_severity", severity)) if value is not None}
    request = {"jsonrpc": "2.0", "id": 1, "method": "sla.subscribe", "params": wanted}
    await connection.send_message(msgspec.json.encode(request).decode())
    answer = msgspec.json.decode(await connection.get_message())
    if "error" in answer:
        return Failure(Exit.USAGE, answer["error"]["message"])
    # Subscribed first and asked after, so that nothing falls in between; what comes twice is told by its number.
    ask = partial(session.door.rows, "/sla/breaches", state="open", agent_id=urn, severity=severity)
    shown: dict[str, int] = {}
    for breach in reversed(await trio.to_thread.run_sync(lambda: list(ask()))):
        shown[breach["id"]] = breach["seq"]
        _print(session, {"event": "open", "seq": breach["seq"], "breach": breach})
    while not (fail and shown):
        message = msgspec.json.decode(await connection.get_message())
        if message.get("method") != "sla.breach":
            continue
        params = message["params"]
        breach = params["breach"]
        if params["seq"] <= shown.get(breach["id"], 0):
            continue
        _print(session, params)
        if params["event"] == "resolved":
            shown.pop(breach["id"], None)
        else:
            shown[breach["id"]] = params["seq"]
    return Exit.NO


def _print(session: Session, params: dict[str, Any]) -> None:
    if session.as_json:
        show_json_line(params)
        return
    breach = params["breach"]
    at = breach["resolved_at"] if params["event"] == "resolved" else breach["detected_at"]
    subject = breach["agent_id"] or breach.get("budget")
    click.echo(
        f"{at}  {params['event']}  {breach['severity']}  {cell(subject)}  {breach['breach_type']}  "
        f"promised {cell(breach['threshold'])}, measured {cell(breach['actual'])}  (seq {params['seq']})"
    )
