"""Documents wherever a token is taken, parents that are only named, and denials that explain themselves."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest
from trio.testing import wait_all_tasks_blocked

from tests.edge.house import T0, Edge
from tests.edge.http.test_hostile_tokens import teach
from tests.wire.hostile_tokens import A, B, C, D, document, jws

SECOND_US = 1_000_000
ESTIMATE = {"cost_usd": "0.50"}


async def register(edge: Edge, body: Any, **options: Any) -> Any:
    return (await edge.post("/delegations", body, **options)).ok(201)


async def authorize(edge: Edge, task_id: str = "t1", **sent: Any) -> Any:
    return await edge.post("/delegations/authorize", {"task_id": task_id, "estimate": ESTIMATE, **sent})


@pytest.fixture
async def taught(edge: Edge) -> Edge:
    await teach(edge)
    return edge


async def test_a_document_is_registered_as_a_body_an_object_or_text(taught: Edge) -> None:
    made = document()
    first = await register(taught, made)
    assert first["id"] == "doc-a-b"
    assert json.loads(first["token"]) == made
    shown = first["delegation"]
    assert (shown["delegator"], shown["delegate"], shown["scopes"]) == (A, B, ["task.*", "data.read"])
    assert shown["constraints"]["max_cost_usd"] == Decimal("1.5")
    for again in ({"token": made}, {"token": json.dumps(made, indent=1)}, {"token": first["token"]}, made):
        assert (await taught.post("/delegations", again)).ok(200)["id"] == "doc-a-b"
    assert (await taught.get("/delegations")).ok()["count"] == 1


async def test_a_document_with_the_id_of_another_is_refused(taught: Edge) -> None:
    await register(taught, document())
    other = document(constraints={"expires_at": "2027-01-15T09:00:01Z"})
    problem = (await taught.post("/delegations", other)).refused(409)
    assert problem["code"] == "jti_reused"
    assert (problem["explain"]["token"], problem["explain"]["position"]) == ("doc-a-b", 0)
    verdict = (await taught.post("/delegations/validate", {"token": other})).ok()
    assert (verdict["code"], verdict["explain"]["position"]) == ("jti_reused", 0)


async def test_a_document_and_other_terms_beside_it_are_not_mixed(taught: Edge) -> None:
    for token in (document(), {"token": jws()}):
        for beside in ({"scopes": ["*"]}, {"constraints": {"max_tasks": 1}}, {"parent": "x"}):
            problem = (await taught.post("/delegations", {**token, **beside})).refused(422)
            assert problem["errors"][0]["field"] in beside
    both = (await taught.post("/delegations", {"token": jws(), **document()})).refused(422)
    assert both["errors"][0]["field"] == "delegation"
    assert (await taught.get("/delegations")).ok()["count"] == 0


async def test_a_document_is_authorized_spent_and_revoked_like_any_token(taught: Edge) -> None:
    allowed = (await authorize(taught, token=document())).ok()
    assert allowed["delegation"] == "doc-a-b"
    assert allowed["remaining"] == {"cost_usd": Decimal("1.0"), "tasks": 4}
    by_id = (await authorize(taught, "t2", delegation="doc-a-b")).ok()
    assert by_id["remaining"]["cost_usd"] == Decimal("0.5")
    assert (await taught.delete("/delegations/doc-a-b")).ok()["count"] == 1
    assert (await authorize(taught, "t3", token=document())).refused(403)["code"] == "revoked"


async def test_a_parent_may_be_named_by_the_id_it_is_registered_by(taught: Edge) -> None:
    child = document(B, C, parent="doc-a-b")
    before = (await taught.post("/delegations/validate", {"token": child})).ok()
    assert before["code"] == "chain_broken"
    assert before["explain"] == {
        "rule": "parent_known",
        "remedy": "register that first, or send it whole",
        "token": "doc-b-c",
        "position": 0,
        "granted": None,
        "asked": "doc-a-b",
    }
    await register(taught, document())
    verdict = (await taught.post("/delegations/validate", {"token": child, "delegate": C})).ok()
    assert verdict["valid"]
    assert [link["id"] for link in verdict["chain"]] == ["doc-a-b", "doc-b-c"]
    allowed = (await authorize(taught, token=child)).ok()
    parent = (await taught.get("/delegations/doc-a-b")).ok()
    assert parent["children"] == ["doc-b-c"]
    assert parent["reserved_usd"] == Decimal("0.5")
    assert (await authorize(taught, "t2", delegation=allowed["delegation"])).ok()
    assert (await taught.delete("/delegations/doc-a-b")).ok()["count"] == 2
    assert (await taught.post("/delegations/validate", {"token": child})).ok()["code"] == "revoked"


async def test_a_named_parent_may_itself_name_one(taught: Edge) -> None:
    await register(taught, {"token": jws()})
    await register(taught, document(B, C, id="middle", parent="a-b"))
    leaf = document(C, D, parent="middle")
    verdict = (await taught.post("/delegations/validate", {"token": leaf})).ok()
    assert [link["id"] for link in verdict["chain"]] == ["a-b", "middle", "doc-c-d"]
    assert verdict["valid"]
    whole = jws(C, D, prf=json.dumps(document(B, C, id="middle", parent="a-b")))
    assert (await taught.post("/delegations/validate", {"token": whole})).ok()["valid"]


async def test_a_named_parent_whose_key_is_gone_is_told_from_the_token_presented(taught: Edge) -> None:
    await register(taught, {"token": jws()})
    await register(taught, document(B, C, id="middle", parent="a-b"))
    leaf = document(C, D, parent="middle")
    assert (await taught.delete(f"/agents/{B}")).status == 200
    await wait_all_tasks_blocked()
    verdict = (await taught.post("/delegations/validate", {"token": leaf})).ok()
    assert (verdict["code"], verdict["explain"]["token"], verdict["explain"]["position"]) == (
        "unknown_key",
        "middle",
        1,
    )


async def test_a_named_parent_is_held_to_the_rules(taught: Edge) -> None:
    await register(taught, document())
    wider = document(B, C, parent="doc-a-b", scopes=["*"])
    verdict = (await taught.post("/delegations/validate", {"token": wider})).ok()
    assert (verdict["code"], verdict["explain"]["granted"]) == ("scope_exceeded", ["task.*", "data.read"])
    stranger = document(C, D, parent="doc-a-b")
    assert (await taught.post("/delegations/validate", {"token": stranger})).ok()["code"] == "chain_broken"
    back = document(B, A, parent="doc-a-b")
    assert (await taught.post("/delegations/validate", {"token": back})).ok()["code"] == "cycle"


async def test_chains_of_named_parents_end_at_the_bound_of_depth(taught: Edge) -> None:
    await register(taught, document(id="n0", delegate=A))
    for number in range(1, 8):
        await register(taught, document(id=f"n{number}", delegate=A, parent=f"n{number - 1}"))
    ninth = document(id="n8", delegate=A, parent="n7")
    assert (await taught.post("/delegations/validate", {"token": ninth})).ok()["code"] == "chain_too_deep"
    tenth = document(id="n9", delegate=A, parent=ninth)
    assert (await taught.post("/delegations/validate", {"token": tenth})).ok()["code"] == "chain_too_deep"


async def test_another_tenants_parent_is_not_there(edge: Edge) -> None:
    taught = edge
    await teach(taught, tenant="own")
    await taught.new_key("own", "admin", tenant="own")
    await taught.new_key("other", "admin", tenant="other")
    await register(taught, document(), key="own")
    sent = {"token": document(B, C, parent="doc-a-b")}
    assert (await taught.post("/delegations/validate", sent, key="own")).ok()["valid"]
    verdict = (await taught.post("/delegations/validate", sent, key="other")).ok()
    assert (verdict["code"], verdict["chain"]) == ("chain_broken", [])
    assert (await taught.post("/delegations", sent, key="other")).refused(422)["code"] == "chain_broken"


async def test_the_daemon_issues_under_a_document(taught: Edge) -> None:
    terms = {"delegator": A, "delegate": C, "scopes": ["task.x"], "constraints": {"expires_at": "2027-01-15T08:30:00Z"}}
    to_self = document(delegate=A)
    for parent in (to_self, json.dumps(to_self)):
        made = await register(taught, {**terms, "parent": parent})
        assert (await taught.post("/delegations/validate", {"token": made["token"]})).ok()["valid"]
        assert made["delegation"]["parent"] == "doc-a-b"
    made = await register(taught, {**terms, "parent": "doc-a-b"})
    assert (await taught.get("/delegations/doc-a-b")).ok()["children"][-1] == made["id"]


async def test_a_document_that_says_no_time_of_issue_has_that_of_its_registration(taught: Edge) -> None:
    assert (await register(taught, document()))["delegation"]["created_at"] == "2027-01-15T08:00:00.000000Z"
    said = document(id="x", issued_at="2027-01-14T00:00:00Z")
    assert (await register(taught, said))["delegation"]["created_at"] == "2027-01-14T00:00:00.000000Z"


# --- explanations


@pytest.mark.parametrize(
    ("sent", "explain"),
    [
        (
            {"token": jws(), "action": "money.spend"},
            {
                "rule": "action",
                "token": "a-b",
                "position": 0,
                "granted": ["task.*", "data.read"],
                "asked": "money.spend",
                "remedy": f"ask {A} for a token with that scope",
            },
        ),
        (
            {"token": jws(B, C, prf=jws(exp=T0 // SECOND_US)), "delegate": C},
            {
                "rule": "expires_at",
                "token": "b-c",
                "position": 0,
                "granted": "2027-01-15T08:00:00.000000Z",
                "asked": "2027-01-15T09:00:00.000000Z",
                "remedy": "issue it with 2027-01-15T08:00:00.000000Z or tighter",
            },
        ),
        (
            {"token": jws(B, C, prf=jws(exp=T0 // SECOND_US), exp=T0 // SECOND_US)},
            {
                "rule": "expires_at",
                "token": "a-b",
                "position": 1,
                "granted": "2027-01-15T08:00:00.000000Z",
                "asked": "2027-01-15T08:00:00.000000Z",
                "remedy": f"ask {A} for a new one",
            },
        ),
        (
            {"token": jws(B, C, prf=jws(), **{"x-asap-constraints": {"max_cost_usd": 2}})},
            {
                "rule": "max_cost_usd",
                "token": "b-c",
                "position": 0,
                "granted": "1.5",
                "asked": "2.0",
                "remedy": "issue it with 1.5 or tighter",
            },
        ),
        (
            {"token": jws(B, C, prf=jws(exp="never"))},
            {"rule": "form", "token": None, "position": 1, "granted": None, "asked": None},
        ),
    ],
)
async def test_a_denial_names_token_rule_values_and_remedy(
    taught: Edge, sent: dict[str, Any], explain: dict[str, Any]
) -> None:
    said = (await taught.post("/delegations/validate", sent)).ok()["explain"]
    assert {name: said[name] for name in explain} == explain
    denied = (await authorize(taught, **sent)).refused(403)["explain"]
    assert denied == said


async def test_a_denial_of_the_ledger_counts_from_the_token_presented(taught: Edge) -> None:
    parent = jws(**{"x-asap-constraints": {"max_cost_usd": 0.6, "max_tasks": 2}})
    child = jws(B, C, prf=parent, **{"x-asap-constraints": ...})
    assert (await authorize(taught, token=child)).ok()
    short = (await authorize(taught, "t2", token=child)).refused(403)
    assert short["code"] == "insufficient_budget"
    said = short["explain"]
    assert (said["rule"], said["token"], said["position"]) == ("max_cost_usd", "a-b", 1)
    assert (said["granted"], said["asked"]) == ("0.1", "0.5")
    assert said["remedy"].startswith("estimate no more than that")
    free = {"cost_usd": 0}
    assert (await authorize(taught, "t2", token=child, estimate=free)).ok()
    full = (await authorize(taught, "t3", token=child, estimate=free)).refused(403)["explain"]
    assert (full["rule"], full["position"], full["granted"], full["asked"]) == ("max_tasks", 1, 0, 1)


# --- spend by task


async def test_a_delegation_shows_what_each_task_spent_under_it(taught: Edge) -> None:
    parent = jws()
    child = jws(B, C, prf=parent)
    for task, cost in (("t1", "0.25"), ("t2", "0.40")):
        one = (await authorize(taught, task, token=child)).ok()["reservation"]["id"]
        assert (await taught.post(f"/reservations/{one}/settle", {"cost_usd": cost})).ok()
    shown = (await taught.get("/delegations/a-b?limit=1")).ok()
    assert shown["spent_usd"] == Decimal("0.65")
    assert shown["spend_by_task"] == [{"task_id": "t2", "spent_usd": Decimal("0.4"), "reserved_usd": Decimal("0.0")}]
    rest = (await taught.get(f"/delegations/a-b?cursor={shown['spend_by_task_cursor']}")).ok()
    assert [row["task_id"] for row in rest["spend_by_task"]] == ["t1"]
    assert (rest["spend_by_task_cursor"], rest["spend_unattributed_usd"]) == (None, Decimal("0.0"))
    assert (await taught.get("/delegations/a-b?cursor=nonsense")).refused(400)
    assert (await taught.get("/delegations/a-b?colour=red")).refused(400)


def body(*members: tuple[str, Any]) -> bytes:
    return ("{" + ",".join(f"{name}:{json.dumps(value)}" for name, value in members) + "}").encode()


@pytest.mark.parametrize(
    ("path", "members"),
    [
        ("/delegations", [('"delegation"', document()["delegation"]), ('"delegation"', document()["delegation"])]),
        ("/delegations", [('"token"', "x"), ('"token"', jws())]),
        ("/delegations", [('"token"', jws()), ('"\\u0074oken"', jws())]),
        ("/delegations", [('"delegate"', B), ('"delegate"', C)]),
        ("/delegations/validate", [('"token"', "x"), ('"token"', jws())]),
        ("/delegations/validate", [('"token"', jws()), ('"delegate"', C), ('"delegate"', B)]),
        ("/delegations/authorize", [('"task_id"', "t"), ('"token"', "x"), ('"token"', jws())]),
    ],
)
async def test_a_body_that_says_a_thing_twice_is_malformed(taught: Edge, path: str, members: list[Any]) -> None:
    problem = (await taught.post(path, body(*members))).refused(400)
    assert problem["code"] == "malformed"
    assert "twice" in problem["detail"]
    assert (await taught.get("/delegations")).ok()["count"] == 0


async def test_an_estimate_that_stands_twice_is_malformed_and_words_that_repeat_are_not(taught: Edge) -> None:
    sent = b'{"task_id":"action","action":"task.execute","token":%s,"estimate":{"cost_usd":0.1,"cost_usd":0.2}}'
    text = json.dumps(document()).encode()
    assert (await taught.post("/delegations/authorize", sent % text)).refused(400)["code"] == "malformed"
    once = sent.replace(b',"cost_usd":0.2', b"")
    assert (await taught.post("/delegations/authorize", once % text)).ok()["decision"] == "allow"


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        # Whatever is longer than a token is not looked through for keys that stand twice: it would hold up the loop.
        (b'{"token":{"delegation":[%s]}}' % b",".join([b"{}"] * 100_000), 403, "malformed"),
        (b'{"token":[%s]}' % b",".join([b"{}"] * 100_000), 422, "invalid"),
        (b'{"token":"%s"}' % (b"x" * 300_000), 403, "malformed"),
        (b'{"token":{"delegation":[%s]},"token":"x"}' % b",".join([b"{}"] * 100_000), 413, "too_large"),
        (b'{"token":"x"%s}' % (b" " * 300_000), 413, "too_large"),
    ],
)
async def test_what_is_longer_than_a_token_can_be_is_refused(taught: Edge, sent: bytes, status: int, code: str) -> None:
    body = b'{"task_id":"\\u0061",' + sent[1:]
    assert (await taught.post("/delegations/authorize", body)).refused(status)["code"] == code


async def test_a_key_twice_in_a_token_is_for_the_verdict(taught: Edge) -> None:
    text = json.dumps(document()).replace('"id"', '"id":"other","id"', 1)
    verdict = (await taught.post("/delegations/validate", f'{{"token":{text}}}'.encode())).ok()
    assert (verdict["valid"], verdict["code"]) == (False, "malformed")


async def test_a_revocation_names_the_tokens_of_the_same_id_that_it_leaves(taught: Edge) -> None:
    """Whoever was given a token can register one of their own under the id of another that was not shown yet."""
    await taught.new_key("issuer", "operator", A)
    await register(taught, {"token": jws(B, C, jti="j", prf=jws(jti="given"))})
    mine = (await register(taught, {"token": jws(A, D, jti="j")}))["id"]
    refused = (await taught.delete("/delegations/j", key="issuer")).refused(404)
    assert f"the token of {A} with this id goes by {mine} here" in refused["detail"]
    gone = (await taught.delete("/delegations/j")).ok()
    assert (gone["revoked"], gone["namesakes"]) == (["j"], [{"id": mine, "delegator": A}])
    assert (await taught.delete(f"/delegations/{mine}", key="issuer")).ok()["namesakes"] == []
    assert (await taught.delete("/delegations/j")).ok()["namesakes"] == []
