"""Everything that was captured of the reference implementation, asked again: where it was asked, and under `/asap`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from asapd.core.types import HOUR_US
from tests.edge.house import A, Edge, Reply

PEER = "urn:asap:agent:peer-b"
CAPTURES: dict[str, dict[str, Any]] = {
    path.stem: {name: one for name, one in json.loads(path.read_text()).items() if isinstance(one, dict)}
    for path in sorted((Path(__file__).parent / "reference").glob("wire-*.json"))
}
_TURN = {"POST": 0, "GET": 1, "DELETE": 2}


def members(value: Any) -> Any:
    """What a reader finds: names, and below a list those of its first row."""
    if isinstance(value, dict):
        return {name: members(inner) for name, inner in value.items()}
    return [members(row) for row in value[:1]] if isinstance(value, list) else None


def covers(ours: Any, theirs: Any) -> bool:
    """Whether a reader finds all that it found there."""
    if isinstance(theirs, dict):
        return isinstance(ours, dict) and all(name in ours and covers(ours[name], theirs[name]) for name in theirs)
    if isinstance(theirs, list):
        return isinstance(ours, list) and all(covers(*pair) for pair in zip(ours, theirs, strict=True))
    return True


async def prepared(edge: Edge) -> str:
    """What was there before: an agent, a breach of its, the key of another; and a delegation, whose id is given."""
    edge.clock.us += 2 * HOUR_US
    sla = {"availability": "99.5%", "max_latency_p95_ms": 500}
    assert (await edge.post("/agents", {"id": PEER, "url": "http://127.0.0.1:1", "sla": sla})).ok(201)
    await edge.breach(agent=PEER)
    await edge.new_key("own", "operator", A, sign=True)
    wanted = {"delegate": PEER, "scopes": ["*"]}
    assert (await edge.post("/asap/delegations", wanted, key="own")).ok(201)
    (row,) = (await edge.get("/asap/delegations", key="own")).ok()
    return str(row["id"])


def held(name: str, path: str, exchange: dict[str, Any], answer: Reply) -> None:
    """Whether an answer is what a client of the reference implementation can read."""
    # Without /asap the status of an event that is invalid is ours.
    status = 422 if (name, path) == ("usage_post_neg_400", "/usage") else exchange["status"]
    assert answer.status == status, (name, path, answer.body)
    theirs = exchange["body"]
    if path.startswith("/.well-known/") or not theirs:
        return
    if isinstance(theirs, str):
        columns, ours = theirs.splitlines()[0].split(","), answer.body.decode().splitlines()
        assert answer.headers["content-type"] == exchange["headers"]["content-type"]
        assert set(columns) <= set(ours[0].split(","))
        assert len(ours) == len(theirs.splitlines()), (name, path)
        return
    ours, theirs = members(answer.json), members(theirs)
    assert covers(ours, theirs), (name, path, ours)
    if path.startswith("/asap/"):
        assert ours == theirs, (name, path)


@pytest.mark.parametrize("capture", CAPTURES)
async def test_what_was_captured_is_answered_where_it_was_asked_and_under_asap(edge: Edge, capture: str) -> None:
    delegation = await prepared(edge)
    exchanges = CAPTURES[capture]
    assert len(exchanges) == 28
    captured = exchanges["delegation_get"]["request"]["path"].rpartition("/")[2]
    for name, one in sorted(exchanges.items(), key=lambda item: _TURN[item[1]["request"]["method"]]):
        sent = one["request"]
        path = sent["path"].replace(captured, delegation)
        # What was reported then is older than what is taken now.
        body = sent["json"] and json.loads(json.dumps(sent["json"]).replace("2026-11-20T", "2027-01-15T"))
        headers = {} if body is None else {"Content-Type": "application/json"}
        query = f"?{urlencode(sent['params'])}" if sent["params"] else ""
        key = "own" if sent["auth"] else "admin"
        for place in (path,) if path.startswith(("/asap/", "/.well-known/")) else (path, f"/asap{path}"):
            answer = await edge.call(sent["method"], place + query, body, key=key, headers=headers)
            held(name, place, one, answer)
