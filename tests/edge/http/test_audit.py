"""Routes of the audit log: checkpoints and proofs that verify with the public key alone."""

from __future__ import annotations

import json

import pytest
from nacl.signing import SigningKey

from asapd import config
from asapd.core import merkle
from asapd.core.errors import Refusal
from asapd.store.units.house import Note
from asapd.wire.checkpoint import is_signed_by, read_checkpoint, sign_checkpoint
from asapd.wire.keys import public_base64
from asapd.wire.tlog_proof import read_proof
from asapd.wire.witness import write_request
from tests.core.test_masking import SECRETS
from tests.edge.house import IDENTITY, NOW, T0, A, Edge

PUBLIC = bytes(IDENTITY.verify_key)


async def enter(edge: Edge, count: int) -> None:
    for number in range(count):
        unit = Note("config.reloaded", "uid:0", f"s{number}", {"n": number, "text": "é"}, T0)
        assert not isinstance(await edge.database.submit(unit), Refusal)


async def head(edge: Edge) -> int:
    return (await edge.services.reads.audit.head())[0]


async def test_a_checkpoint_is_a_signed_note_of_the_log_as_it_is(edge: Edge) -> None:
    await enter(edge, 3)
    answer = await edge.get("/audit/checkpoint", key="reader")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    checkpoint = read_checkpoint(answer.body.decode())
    assert is_signed_by(checkpoint, PUBLIC)
    assert checkpoint.size == await head(edge)
    shown = (await edge.get("/audit/checkpoint?format=json")).ok()
    assert shown["note"] == answer.body.decode()
    assert (shown["origin"], shown["size"], shown["root_hash"]) == (
        checkpoint.origin,
        checkpoint.size,
        checkpoint.root.hex(),
    )
    await enter(edge, 1)
    assert (await edge.get(f"/audit/checkpoint?size={checkpoint.size}")).body == answer.body
    assert (await edge.get("/audit/checkpoint?size=99999")).refused(404)["code"] == "no_such_size"


async def test_every_entry_is_proved_to_be_in_the_log(edge: Edge) -> None:
    await enter(edge, 5)
    size = await head(edge)
    for seq in range(1, size + 1):
        proof = (await edge.get(f"/audit/proof/inclusion?id={seq}", key="reader")).ok()
        assert (proof["leaf_index"], proof["tree_size"]) == (seq - 1, size)
        assert merkle.leaf_hash(bytes.fromhex(proof["entry"]["hash"])).hex() == proof["leaf_hash"]
        hashes = [bytes.fromhex(node) for node in proof["hashes"]]
        root = bytes.fromhex(proof["root_hash"])
        assert merkle.includes(bytes.fromhex(proof["leaf_hash"]), seq - 1, size, hashes, root)
        assert read_checkpoint(proof["checkpoint"]).root == root
        text = (await edge.get(f"/audit/proof/inclusion?id={proof['entry']['id']}&format=tlog-proof")).body.decode()
        assert list(read_proof(text).hashes) == hashes
    await enter(edge, 1)
    assert (await edge.get(f"/audit/proof/inclusion?id={size + 1}")).ok()["tree_size"] == size + 1


async def test_the_log_is_proved_to_go_on_from_what_it_was(edge: Edge) -> None:
    await enter(edge, 4)
    before = (await edge.get("/audit/checkpoint?format=json")).ok()
    await enter(edge, 7)
    size = await head(edge)
    proof = (await edge.get(f"/audit/proof/consistency?from={before['size']}")).ok()
    assert (proof["first_root"], proof["second_size"]) == (before["root_hash"], size)
    hashes = [bytes.fromhex(node) for node in proof["hashes"]]
    roots = bytes.fromhex(proof["first_root"]), bytes.fromhex(proof["second_root"])
    assert merkle.is_consistent(before["size"], size, hashes, *roots)
    assert read_checkpoint(proof["checkpoint"]).root == roots[1]
    part = (await edge.get("/audit/proof/consistency?from=2&to=3")).ok()
    assert part["checkpoint"] is None
    for query in (f"from={size + 1}", "from=3&to=2", f"from=1&to={size + 9}"):
        assert (await edge.get(f"/audit/proof/consistency?{query}")).refused(404)["code"] == "no_such_size"


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/audit/proof/inclusion", 400, "bad_parameter"),
        ("/audit/proof/inclusion?id=1&format=x", 400, "bad_parameter"),
        ("/audit/proof/inclusion?id=aud_none", 404, "entry_not_found"),
        ("/audit/proof/consistency", 400, "bad_parameter"),
        ("/audit/proof/consistency?from=-1", 400, "bad_parameter"),
        ("/audit/checkpoint?size=0", 400, "bad_parameter"),
    ],
)
async def test_what_cannot_be_answered_is_refused_by_name(edge: Edge, path: str, status: int, code: str) -> None:
    assert (await edge.get(path)).refused(status)["code"] == code


async def test_a_log_that_was_altered_since_it_was_sealed_proves_nothing(edge: Edge) -> None:
    await enter(edge, 5)
    await edge.get("/audit/checkpoint")
    edge.connection.execute("DROP TRIGGER audit_no_update; UPDATE audit SET hash = zeroblob(32) WHERE seq = 2")
    assert (await edge.get("/audit/proof/inclusion?id=2")).refused(503)["code"] == "log_broken"
    assert (await edge.get("/audit/proof/inclusion?id=3")).refused(503)["code"] == "log_broken"
    assert (await edge.get("/audit/proof/consistency?from=3")).refused(503)["code"] == "log_broken"
    edge.connection.execute("UPDATE retention_gate SET open = 1; DELETE FROM audit WHERE seq = 2")
    assert (await edge.get("/audit/proof/inclusion?id=3")).refused(503)["code"] == "log_broken"
    assert (await edge.get("/audit/proof/consistency?from=3")).refused(503)["code"] == "log_broken"


async def test_the_log_is_exported_whole_or_filtered_in_every_format(
    edge: Edge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asapd.edge.http.audit.EXPORT_PAGE", 2)
    await enter(edge, 5)
    rows = (await edge.get("/audit/logs?limit=1000")).ok()["data"]
    lines = await edge.get("/audit/export", key="reader")
    assert lines.headers["asapd-snapshot"] == str(len(rows))
    assert lines.headers["content-type"] == "application/x-ndjson"
    assert [json.loads(line) for line in lines.body.splitlines()] == rows
    assert json.loads((await edge.get("/audit/export?format=json")).body)["data"] == rows
    filtered = await edge.get("/audit/export?event_type=config.reloaded&subject=s3")
    assert [json.loads(line)["subject"] for line in filtered.body.splitlines()] == ["s3"]
    assert (await edge.get("/audit/export?format=csv")).body.count(b"\r\n") == len(rows) + 1
    assert (await edge.get("/audit/export?format=syslog")).body.startswith(b"<110>1 ")
    assert (await edge.get("/audit/export?format=xml")).refused(400)["code"] == "bad_parameter"


async def test_a_secret_in_free_text_does_not_reach_an_entry(edge: Edge) -> None:
    task = {"task_id": "t", "agent": A, "consumer": "c", "state": "failed", "timestamp": NOW, "error": SECRETS[0]}
    assert (await edge.post("/tasks", task)).status == 201
    (entry,) = (await edge.get("/audit/logs?event_type=task.failed")).ok()["data"]
    assert entry["details"]["error"] == "[masked]"
    assert (await edge.get("/audit/verify")).ok()["valid"] is True


async def test_a_consumer_is_erased_and_old_proofs_keep_verifying(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asapd.actors.eraser.STEP", 2)
    event = {"task_id": "t", "agent": A, "consumer": "mailto:max", "timestamp": NOW}
    assert (await edge.post("/usage", [event] * 5)).status == 201
    before = (await edge.get("/audit/checkpoint?format=json")).ok()
    asked = {"consumer": "mailto:max", "reason": "request 17"}
    dry = (await edge.post("/audit/erase?dry_run=true", asked)).ok()
    assert (dry["entries"], dry["usage"], dry["pseudonym"]) == (5, 5, None)
    assert (await edge.post("/audit/erase", asked, key="operator")).refused(403)["code"] == "forbidden"
    done = (await edge.post("/audit/erase", asked)).ok()
    assert (done["entries"], done["more"]) == (5, False)
    rows = (await edge.get("/usage")).ok()["data"]
    assert {row["consumer_id"] for row in rows} == {done["pseudonym"]}
    verdict = (await edge.get("/audit/verify")).ok()
    assert (verdict["valid"], verdict["erased"], verdict["checkpoints"]["held"]) == (True, 5, 1)
    proof = (await edge.get(f"/audit/proof/consistency?from={before['size']}")).ok()
    assert proof["first_root"] == before["root_hash"]
    assert (await edge.post("/audit/erase", {"consumer": A, "reason": "x"})).refused(409)["code"] == "consumer_is_agent"


async def test_a_name_that_rows_are_found_by_is_erased_as_that_of_a_consumer_only(edge: Edge) -> None:
    event = {"task_id": "t", "agent": A, "timestamp": NOW, "source": "desk", "project": "desk"}
    for consumer in ("default", "desk"):
        event = {**event, "id": consumer, "consumer": consumer}
        assert (await edge.post("/usage", event)).status == 201
        done = (await edge.post("/audit/erase", {"consumer": consumer, "reason": "x"})).ok()
        assert (done["usage"], done["more"]) == (1, False)
        assert (await edge.post("/usage", event)).ok(201)["duplicates"] == 1
    rows = (await edge.get("/usage")).ok()["data"]
    assert [(row["source"], row["consumer_id"]) for row in rows] == [("desk", "ers_1"), ("desk", "ers_2")]
    assert [row["project"] for row in rows] == ["desk", "ers_2"]
    assert (await edge.get("/audit/verify")).ok()["valid"] is True


async def test_an_erasure_that_takes_long_is_done_in_parts(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asapd.actors.eraser.STEP", 2)
    monkeypatch.setattr("asapd.actors.eraser.APPLY_S", -1.0)
    event = {"task_id": "t", "agent": A, "consumer": "mailto:max", "timestamp": NOW}
    assert (await edge.post("/usage", [event] * 5)).status == 201
    asked = {"consumer": "mailto:max", "reason": "request 17"}
    assert [(await edge.post("/audit/erase", asked)).ok()["more"] for _ in range(3)] == [True, True, False]
    assert (await edge.get("/audit/verify")).ok()["erased"] == 5


async def test_a_witness_takes_no_key_and_signs_what_goes_on_from_what_it_saw(edge: Edge) -> None:
    log = SigningKey(bytes([9]) * 32)
    own = public_base64(bytes(log.verify_key))
    first = write_request(0, [], sign_checkpoint(1, bytes(32), log).note.encode())
    path = "/witness/add-checkpoint"
    assert (await edge.post(path, first, key=None)).refused(404)["code"] == "witness_unknown_log"
    edge.services.witnesses.settings = config.Audit(witness_for=({"public_key": own},))
    signed = await edge.post(path, first, key=None)
    assert signed.status == 200
    assert signed.body.decode().startswith(f"— {edge.services.sealer.origin} ")
    conflict = await edge.post(path, write_request(0, [], sign_checkpoint(2, bytes(32), log).note.encode()), key=None)
    assert (conflict.status, conflict.body, conflict.headers["content-type"]) == (409, b"1\n", "text/x.tlog.size")
    forged = write_request(1, [bytes(32)], sign_checkpoint(2, bytes(32), log).note.encode())
    assert (await edge.post(path, forged, key=None)).refused(422)["code"] == "witness_inconsistent"
    assert (await edge.post(path, b"nonsense", key=None)).refused(400)["code"] == "malformed"


async def test_a_walk_tells_its_progress_and_begins_where_it_is_asked_to(
    edge: Edge, monkeypatch: pytest.MonkeyPatch
) -> None:
    await enter(edge, 9)
    size = await head(edge)
    (line,) = (await edge.get("/audit/verify?format=ndjson", key="reader")).body.splitlines()
    assert json.loads(line)["valid"] is True
    since = (await edge.get(f"/audit/verify?since={size - 4}")).ok()
    assert (since["since"], since["verified"], since["reconciled"]) == (size - 4, 4, None)
    assert (await edge.get("/audit/verify?since=2099-01-01T00:00:00Z")).ok()["verified"] == 0
    assert (await edge.get("/audit/verify?reconcile=false")).ok()["reconciled"] is None
    assert (await edge.get("/audit/verify?since=never")).refused(400)["code"] == "bad_parameter"
    monkeypatch.setattr("asapd.actors.verifier.SHORT", 2)
    *steps, last = (await edge.get("/audit/verify?format=ndjson")).body.splitlines()
    assert json.loads(steps[0]) == {"verified": size, "entries": size}
    assert json.loads(last)["valid"] is True


async def test_the_log_is_held_to_checkpoints_that_come_with_the_question(edge: Edge) -> None:
    await enter(edge, 3)
    kept = (await edge.get("/audit/checkpoint")).body
    await enter(edge, 3)
    good = (await edge.post("/audit/verify", kept, key="reader")).ok()
    assert (good["valid"], good["checkpoints"]) == (True, {"held": 2, "remembered": 1})
    size = (await head(edge)) + 1
    forged = sign_checkpoint(size, bytes(32), IDENTITY).note.encode().encode()
    bad = (await edge.post("/audit/verify", kept + forged)).ok()
    assert (bad["valid"], bad["first_bad"]["seq"]) == (False, size)
    half = kept + b"\n" + kept[:40]
    for body in (b"nonsense", b"\xff", b"", b"\n\n", half):
        assert (await edge.post("/audit/verify", body)).refused(422)["code"] == "invalid"


async def test_an_admin_vouches_for_what_an_older_build_did_not_sign(
    edge: Edge, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"reason": "upgrade"}
    nothing = {"count": 0, "dry_run": False, "first_seq": None, "last_seq": None, "named": []}
    assert (await edge.post("/audit/vouch", asked)).ok() == nothing
    with monkeypatch.context() as older:
        older.setattr("asapd.store.tx.EXCUSES", ())
        await edge.database.submit(Note("retention.applied", "asapd", "probe", {"count": 3}, T0))
    seq = await head(edge)
    assert "see `asapctl audit vouch`" in json.dumps((await edge.get("/audit/verify")).ok()["reconciled"])
    dry = (await edge.post("/audit/vouch?dry_run=true", asked)).ok()
    assert dry["named"] == [f"entry {seq} (retention.applied probe): count 3"]
    assert (await edge.post("/audit/vouch", asked, key="operator")).refused(403)["code"] == "forbidden"
    assert (await edge.post("/audit/vouch", {})).refused(422)["code"] == "invalid"
    assert (await edge.get("/audit/verify")).ok()["valid"] is False
    assert (await edge.post("/audit/vouch", asked)).ok() == {**dry, "dry_run": False}
    assert (await edge.get("/audit/verify")).ok()["valid"] is True
    assert (await edge.post("/audit/vouch", asked)).ok() == nothing


async def test_an_admin_vouches_for_ends_of_tasks_that_an_older_build_took_without_an_entry(edge: Edge) -> None:
    edge.connection.execute(
        "UPDATE task_outcome_unsaid SET count = 3, before_us = 7; "
        "INSERT INTO sqlite_sequence VALUES ('task_outcome', 3)"
    )
    said = {"task_outcomes": {"before_us": 7, "count": 3}, "version": 22}
    await edge.database.submit(Note("upgrade.counted", "asapd", "database", said, 1))
    assert "see `asapctl audit vouch`" in json.dumps((await edge.get("/audit/verify")).ok()["reconciled"])
    dry = (await edge.post("/audit/vouch?dry_run=true", {"reason": "upgrade"})).ok()
    assert dry["named"] == ["no entry: 3 rows of task_outcome are gone, before_us 7"]
    assert (dry["count"], dry["first_seq"]) == (0, None)
    assert (await edge.post("/audit/vouch", {"reason": "upgrade"})).ok() == {**dry, "dry_run": False}
    assert (await edge.get("/audit/verify")).ok()["valid"] is True
    assert (await edge.post("/audit/vouch", {"reason": "upgrade"})).ok()["named"] == []
