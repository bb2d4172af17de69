"""The registry over a real store: every reason to say no, and what changes take effect at once."""

from __future__ import annotations

import base64
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import apsw
import msgspec
import pytest
import trio
from nacl.signing import SigningKey
from trio.testing import wait_all_tasks_blocked

from asapd import config
from asapd.actors.messages import (
    Authorize,
    ChangeReservation,
    ImportRevocationList,
    Issue,
    Issued,
    ReconfigureRegistry,
    Register,
    RegistryMessage,
    RevokeDelegation,
    Validate,
    Validity,
)
from asapd.actors.registry import KeysNotSyncedError, RegistrySettings, run_registry
from asapd.core.access import Caller
from asapd.core.delegation import Claims, Denied, Reason
from asapd.core.errors import Refusal
from asapd.core.ledger import Estimate, Remaining
from asapd.core.types import DAY_US, HOUR_US, SECOND_US, Role
from asapd.runtime.ask import HandlerFailed, ask
from asapd.runtime.fanout import Wakeup
from asapd.store.database import OUTCOME_UNKNOWN, Database, InlineReaders, InlineRunner
from asapd.store.units.agents import (
    AgentRecord,
    ImportAgentKey,
    PutAgent,
    RecordManifest,
    RemoveAgent,
    RetireAgentKey,
    SyncKeys,
)
from asapd.store.units.delegations import AuthorizationDenied, ReservationChanged, Reserve, Reserved, Revoke, Revoked
from asapd.store.units.exchange import Answer, AnyUnit, Idempotency
from asapd.wire.keys import jwk_thumbprint, private_pem, public_base64
from asapd.wire.revocations import Entry, sign_list
from asapd.wire.token import sign, sign_document
from tests.slow_reads import giving_up

A, B, C, D = (f"urn:asap:agent:{letter}" for letter in "abcd")
KEYS = {agent: SigningKey(bytes([number]) * 32) for number, agent in enumerate((A, B, C, D), 1)}
FOREIGN = SigningKey(b"f" * 32)
T0 = 1_800_000_000 * SECOND_US
ADMIN = Caller("admin", Role.ADMIN, may_sign=True)
log = logging.getLogger("test.registry")
Inline = tuple[Database, apsw.Connection]


def raw(key: SigningKey) -> bytes:
    return bytes(key.verify_key)


def token(
    delegator: str = A,
    delegate: str = B,
    *,
    id_: str = "j1",
    parent: str | None = None,
    key: SigningKey | None = None,
    **claims: Any,
) -> str:
    said: dict[str, Any] = {
        "scopes": ("task.*",),
        "max_tasks": None,
        "max_cost_microusd": 1_000_000,
        "issued_at_us": T0,
        "expires_at_us": T0 + DAY_US,
        **claims,
    }
    return sign(Claims(id_, delegator, delegate, **said), key or KEYS[delegator], parent=parent)


class StandingClock:
    now = T0

    def now_us(self) -> int:
        return self.now

    def monotonic_s(self) -> float:
        return trio.current_time()


class Desk:
    """A registry, and short ways to ask it."""

    def __init__(self, inline: Inline, keys_dir: Path) -> None:
        self.database = inline[0]
        self.keys_dir = keys_dir
        self.settings = RegistrySettings(config.Delegation(), keys_dir, {A: raw(KEYS[A])})
        self.directory_changed = Wakeup()
        self.send, self.receive = trio.open_memory_channel[RegistryMessage](10)
        self.clock = StandingClock()
        self.numbers = count(1)

    def hold(self, agent: str, key: SigningKey | None = None) -> None:
        path = self.keys_dir / f"{agent.rpartition(':')[2]}.pem"
        path.write_bytes(private_pem(key or KEYS[agent]))
        path.chmod(0o600)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Desk]:
        async def run(*, task_status: trio.TaskStatus[None]) -> None:
            await run_registry(
                self.receive.clone(),
                database=self.database,
                clock=self.clock,
                settings=self.settings,
                directory_changed=self.directory_changed,
                new_id=lambda now_us: f"del_{next(self.numbers)}",
                beat=lambda: None,
                log=log,
                task_status=task_status,
            )

        async with trio.open_nursery() as nursery:
            await nursery.start(run)
            yield self
            nursery.cancel_scope.cancel()

    async def ask(self, build: Callable[[Any], RegistryMessage]) -> Any:
        return await ask(self.send, build, deadline_s=5)

    async def validate(
        self, text: str, action: str | None = "task.execute", delegate: str | None = None
    ) -> Reason | None:
        verdict: Validity = await self.ask(lambda to: Validate(ADMIN, text, action, delegate, to))
        return None if verdict.denied is None else verdict.denied.reason

    async def register(
        self, text: str, caller: Caller = ADMIN, idempotency: Idempotency | None = None
    ) -> Issued | Denied | Refusal:
        outcome: Issued | Denied | Refusal = await self.ask(lambda to: Register(caller, text, idempotency, to))
        return outcome

    async def issue(self, delegator: str = A, delegate: str = B, **said: Any) -> Issued | Denied | Refusal:
        outcome: Issued | Denied | Refusal = await self.ask(
            lambda to: Issue(
                said.get("caller", ADMIN),
                delegator,
                delegate,
                said.get("scopes", ("task.*",)),
                said.get("max_cost_microusd", 1_000_000),
                said.get("max_tasks"),
                said.get("expires_at_us", T0 + HOUR_US),
                said.get("parent"),
                said.get("idempotency"),
                to,
            )
        )
        return outcome

    async def authorize(
        self, text: str | None = None, delegation: str | None = None, *, cost: int | None = 100, **said: Any
    ) -> Reserved | AuthorizationDenied | Denied | Refusal:
        outcome: Reserved | AuthorizationDenied | Denied | Refusal = await self.ask(
            lambda to: Authorize(
                said.get("caller", ADMIN),
                text,
                delegation,
                said.get("action", "task.execute"),
                said.get("task_id", "t1"),
                said.get("delegate"),
                None,
                None,
                Estimate(cost),
                said.get("ttl_us"),
                said.get("idempotency"),
                to,
            )
        )
        return outcome

    async def change(
        self, verb: Any, reservation: str, cost: int | None = None, *, caller: Caller = ADMIN
    ) -> ReservationChanged | Refusal:
        outcome: ReservationChanged | Refusal = await self.ask(
            lambda to: ChangeReservation(caller, verb, reservation, cost, None, "why", None, to)
        )
        return outcome

    async def revoke(self, delegation: str, caller: Caller = ADMIN) -> Revoked | Refusal:
        outcome: Revoked | Refusal = await self.ask(lambda to: RevokeDelegation(caller, delegation, "why", to))
        return outcome

    async def reconfigure(self, pinned: dict[str, bytes], **delegation: Any) -> None:
        chosen = config.Delegation.model_validate(delegation)
        self.rekeyed = await self.ask(lambda to: ReconfigureRegistry(chosen, pinned, to))
        assert isinstance(self.rekeyed, tuple)

    async def know(self, agent: str, key: SigningKey | None, manifest: tuple[SigningKey, str] | None = None) -> None:
        """Put an agent into the directory, with the key its operator gave or the one of its manifest."""
        shown = None if key is None else public_base64(raw(key))
        record = AgentRecord(agent, "http://127.0.0.1:1", "default", shown)
        assert not isinstance(await self.database.submit(PutAgent(record, "test", T0)), Refusal)
        if manifest is not None:
            key_text = public_base64(raw(manifest[0]))
            unit = RecordManifest(agent, T0, "d", b"{}", manifest[1], None, None, None, key_text)
            assert not isinstance(await self.database.submit(unit), Refusal)
        self.directory_changed.notify()
        await wait_all_tasks_blocked()


@pytest.fixture
async def desk(inline_database: Inline, tmp_path: Path) -> AsyncIterator[Desk]:
    keys_dir = tmp_path / "keys"
    keys_dir.mkdir()
    async with Desk(inline_database, keys_dir).open() as opened:
        yield opened


def issued(outcome: Issued | Denied | Refusal) -> Issued:
    assert isinstance(outcome, Issued), outcome
    return outcome


def reserved(outcome: Any) -> Reserved:
    assert isinstance(outcome, Reserved), outcome
    return outcome


def code(outcome: object) -> str:
    match outcome:
        case AuthorizationDenied(denied=Denied(reason=reason)) | Denied(reason=reason):
            return str(reason)
        case Refusal(code=said):
            return said
    raise AssertionError(outcome)


# --- judging


async def test_a_chain_that_holds_is_valid_and_shows_what_is_left(desk: Desk) -> None:
    await desk.know(B, KEYS[B])
    leaf = token(B, C, id_="j2", parent=token(), max_cost_microusd=400_000, max_tasks=3)
    verdict: Validity = await desk.ask(lambda to: Validate(ADMIN, leaf, "task.execute", C, to))
    assert verdict.denied is None
    assert [claims.id for claims in verdict.chain] == ["j1", "j2"]
    assert verdict.remaining == Remaining(400_000, 3)


DENIALS: list[tuple[Reason, Callable[[], str], dict[str, Any]]] = [
    (Reason.MALFORMED, lambda: "nonsense", {}),
    (Reason.BAD_SIGNATURE, lambda: token(key=FOREIGN), {}),
    (Reason.UNKNOWN_KEY, lambda: token(D), {}),
    (Reason.UNTRUSTED_ROOT, lambda: token(B, C), {}),
    (Reason.EXPIRED, lambda: token(expires_at_us=T0 - SECOND_US, issued_at_us=T0 - HOUR_US), {}),
    (Reason.NOT_YET_VALID, lambda: token(not_before_us=T0 + HOUR_US), {}),
    (Reason.WRONG_DELEGATE, token, {"delegate": C}),
    (Reason.SCOPE_EXCEEDED, lambda: token(B, C, id_="j2", parent=token(), scopes=("*",)), {}),
    (Reason.ACTION_NOT_ALLOWED, token, {"action": "money.spend"}),
    (Reason.CONSTRAINT_EXCEEDED, lambda: token(B, C, id_="j2", parent=token(), max_cost_microusd=2_000_000), {}),
    (Reason.CHAIN_BROKEN, lambda: token(B, D, id_="j2", parent=token(A, C)), {}),
    (Reason.CYCLE, lambda: token(B, A, id_="j2", parent=token()), {}),
]


@pytest.mark.parametrize(("reason", "make", "asked"), DENIALS, ids=[case[0].value for case in DENIALS])
async def test_every_reason_to_deny_is_given(
    desk: Desk, reason: Reason, make: Callable[[], str], asked: dict[str, Any]
) -> None:
    await desk.know(B, KEYS[B])
    text = make()
    if reason is Reason.CYCLE:
        text = token(A, B, parent=text)
    assert await desk.validate(text, **asked) is reason
    assert code(await desk.authorize(text, **asked)) == reason


async def test_a_chain_beyond_the_configured_depth_is_too_deep(desk: Desk) -> None:
    await desk.know(B, KEYS[B])
    await desk.reconfigure(desk.settings.pinned, max_depth=1)
    assert await desk.validate(token()) is None
    assert await desk.validate(token(B, C, id_="j2", parent=token())) is Reason.CHAIN_TOO_DEEP


async def test_the_ledger_denies_what_is_spent(desk: Desk) -> None:
    limited = token(max_cost_microusd=150, max_tasks=2)
    assert code(await desk.authorize(limited, cost=200)) == Reason.INSUFFICIENT_BUDGET
    assert code(await desk.authorize(limited, cost=None)) == "missing_estimate"
    first = reserved(await desk.authorize(limited, cost=150))
    assert first.remaining == Remaining(0, 1)
    assert code(await desk.authorize(limited, task_id="t2")) == Reason.BUDGET_EXHAUSTED
    reserved(await desk.authorize(token(id_="j3", max_tasks=1), task_id="t1"))
    assert code(await desk.authorize(token(id_="j3", max_tasks=1), task_id="t2")) == Reason.TASK_LIMIT


async def test_a_denial_says_what_is_left(desk: Desk) -> None:
    reserved(await desk.authorize(token(), cost=300_000))
    denied = await desk.authorize(token(), action="other")
    assert isinstance(denied, AuthorizationDenied)
    assert denied.remaining == Remaining(700_000, None)


async def test_an_id_belongs_to_the_first_token_that_has_it(desk: Desk) -> None:
    issued(await desk.register(token()))
    other = token(max_tasks=5)
    assert code(await desk.register(other)) == Reason.JTI_REUSED
    assert code(await desk.authorize(other)) == Reason.JTI_REUSED


# --- keys


async def test_a_learned_key_verifies_a_link_and_never_makes_a_root(desk: Desk) -> None:
    link = token(B, C, id_="j2", parent=token())
    assert await desk.validate(link) is Reason.UNKNOWN_KEY
    await desk.know(B, KEYS[B])
    assert await desk.validate(link) is None
    assert await desk.validate(token(B, C)) is Reason.UNTRUSTED_ROOT


@pytest.mark.parametrize(
    ("verification", "verdict"),
    [("verified", None), ("self_signed", None), ("invalid", Reason.UNKNOWN_KEY), ("unsigned", Reason.UNKNOWN_KEY)],
)
async def test_a_key_is_learned_only_from_a_manifest_that_it_signed(
    desk: Desk, verification: str, verdict: Reason | None
) -> None:
    await desk.know(B, None, (KEYS[B], verification))
    assert await desk.validate(token(B, C, id_="j2", parent=token())) is verdict


async def test_the_key_an_operator_gave_rules_out_the_manifests(desk: Desk) -> None:
    await desk.know(B, FOREIGN, (KEYS[B], "self_signed"))
    assert await desk.validate(token(B, C, id_="j2", parent=token())) is Reason.BAD_SIGNATURE
    assert await desk.validate(token(B, C, id_="j2", parent=token(), key=FOREIGN)) is None


async def test_with_roots_listed_only_they_begin_a_chain(desk: Desk) -> None:
    await desk.database.submit(ImportAgentKey(B, raw(KEYS[B]), "test", T0, 0))
    desk.directory_changed.notify()
    await desk.reconfigure(desk.settings.pinned, roots=(B,))
    assert await desk.validate(token()) is Reason.UNTRUSTED_ROOT
    assert await desk.validate(token(B, C)) is None


@pytest.mark.parametrize("of_manifest", [True, False], ids=["of its manifest", "that came with it"])
async def test_a_listed_root_begins_no_chain_with_a_key(desk: Desk, *, of_manifest: bool) -> None:
    await desk.know(B, None if of_manifest else KEYS[B], (KEYS[B], "self_signed") if of_manifest else None)
    await desk.reconfigure(desk.settings.pinned, roots=(A, B))
    assert await desk.validate(token(B, C, id_="j2", parent=token())) is None
    verdict: Validity = await desk.ask(lambda to: Validate(ADMIN, token(B, C), None, None, to))
    assert verdict.denied is not None
    assert verdict.denied.reason is Reason.UNTRUSTED_ROOT
    assert "import it" in verdict.denied.detail
    assert isinstance(await desk.register(token(B, C)), Denied)
    await desk.database.submit(ImportAgentKey(B, raw(KEYS[B]), "test", T0, 0))
    desk.directory_changed.notify()
    assert await desk.validate(token(B, C)) is None


async def test_a_signature_once_verified_does_not_outlive_its_key(desk: Desk) -> None:
    text = token()
    link = token(B, C, id_="j2", parent=text)
    await desk.know(B, KEYS[B])
    assert await desk.validate(link) is None
    await desk.know(B, FOREIGN)
    assert await desk.validate(link) is Reason.BAD_SIGNATURE
    await desk.reconfigure({A: raw(FOREIGN)})
    assert await desk.validate(text) is Reason.BAD_SIGNATURE
    await desk.reconfigure({})
    assert await desk.validate(text) is Reason.UNKNOWN_KEY
    await desk.database.submit(RemoveAgent(B, "test", T0))
    desk.directory_changed.notify()
    await wait_all_tasks_blocked()
    assert await desk.validate(token(B, C)) is Reason.UNKNOWN_KEY


async def test_a_change_of_keys_that_was_answered_holds_for_the_next_message(desk: Desk) -> None:
    """Whoever changes the directory notifies before it answers; the registry may not have been woken by then."""
    link = token(B, C, id_="j2", parent=token())
    assert await desk.validate(link) is Reason.UNKNOWN_KEY
    await desk.database.submit(ImportAgentKey(B, raw(KEYS[B]), "test", T0, 0))
    desk.directory_changed.notify()
    assert await desk.validate(link) is None
    await desk.database.submit(RetireAgentKey(B, jwk_thumbprint(raw(KEYS[B])), "test", T0, 0))
    desk.directory_changed.notify()
    assert await desk.validate(link) is Reason.UNKNOWN_KEY


async def test_a_replaced_key_verifies_older_tokens_while_its_overlap_runs(desk: Desk) -> None:
    old = token(B, C, id_="j2", parent=token())
    new = token(B, C, id_="j3", parent=token(), issued_at_us=T0 + 2 * SECOND_US)
    await desk.know(B, KEYS[B])
    record = AgentRecord(B, "http://127.0.0.1:1", "default", public_base64(raw(FOREIGN)))
    await desk.database.submit(PutAgent(record, "test", T0 + SECOND_US, 10 * SECOND_US))
    desk.directory_changed.notify()
    desk.clock.now = T0 + 5 * SECOND_US
    assert await desk.validate(old) is None
    assert await desk.validate(new) is Reason.BAD_SIGNATURE
    assert await desk.validate(token(B, C, id_="j4", parent=token(), key=FOREIGN)) is None
    desk.clock.now = T0 + 11 * SECOND_US
    assert await desk.validate(old) is Reason.BAD_SIGNATURE


async def test_a_held_key_that_is_replaced_leaves_its_tokens_valid_and_one_that_is_removed_does_not(desk: Desk) -> None:
    desk.hold(A)
    await desk.reconfigure({})
    text = issued(await desk.issue()).token
    desk.clock.now = T0 + SECOND_US
    desk.hold(A, FOREIGN)
    await desk.reconfigure({}, key_overlap="1h")
    assert await desk.validate(text) is None
    assert await desk.validate(token(key=KEYS[A])) is None
    desk.clock.now = T0 + SECOND_US + HOUR_US
    assert await desk.validate(token(key=KEYS[A])) is Reason.BAD_SIGNATURE
    (desk.keys_dir / "a.pem").unlink()
    await desk.reconfigure({})
    assert await desk.validate(token(key=FOREIGN)) is Reason.UNKNOWN_KEY


async def test_strict_takes_no_key_from_a_manifest_unless_an_operator_imports_it(desk: Desk) -> None:
    link = token(B, C, id_="j2", parent=token())
    await desk.know(B, None, (KEYS[B], "self_signed"))
    await desk.reconfigure(desk.settings.pinned, manifest_keys="strict")
    assert await desk.validate(link) is Reason.UNKNOWN_KEY
    await desk.database.submit(ImportAgentKey(B, raw(KEYS[B]), "test", T0, 0))
    desk.directory_changed.notify()
    assert await desk.validate(link) is None


async def test_the_key_of_a_second_manifest_verifies_nothing_and_the_first_goes_on(desk: Desk) -> None:
    await desk.know(B, None, (KEYS[B], "self_signed"))
    await desk.know(B, None, (FOREIGN, "key_changed"))
    assert await desk.validate(token(B, C, id_="j2", parent=token())) is None
    assert await desk.validate(token(B, C, id_="j3", parent=token(), key=FOREIGN)) is Reason.BAD_SIGNATURE


async def test_another_keys_dir_is_read_at_a_reload_and_what_is_not_used_is_told(desk: Desk, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.pem").write_bytes(private_pem(KEYS[A]))
    (other / "a.pem").chmod(0o644)
    await desk.reconfigure({}, keys_dir=str(other))
    assert desk.rekeyed == ()
    (problem,) = desk.settings.key_problems
    assert problem.startswith(f"{other / 'a.pem'} is not used: its mode is 0644")
    assert str(other) in (await desk.issue()).errors[0].reason  # type: ignore[union-attr]
    (other / "a.pem").chmod(0o600)
    await desk.reconfigure({}, keys_dir=str(other))
    assert desk.settings.key_problems == []
    assert desk.rekeyed == (A,)
    await desk.reconfigure({}, keys_dir=str(other))
    assert desk.rekeyed == ()
    assert issued(await desk.issue()).created


async def test_no_private_key_is_in_the_store_or_the_log(
    desk: Desk, inline_database: Inline, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    desk.hold(A)
    await desk.reconfigure({})
    issued(await desk.issue())
    secret = bytes(KEYS[A])
    forms = (secret, secret.hex().encode(), base64.b64encode(secret), private_pem(KEYS[A]).splitlines()[1])
    content = inline_database[1].serialize("main") + caplog.text.encode()
    assert raw(KEYS[A]) in content
    assert not any(form in content for form in forms)


async def test_without_the_store_no_other_keys_are_taken(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = desk.database._runner

    class Away:
        async def execute(self, unit: AnyUnit, **options: Any) -> Answer | Refusal:
            return OUTCOME_UNKNOWN if isinstance(unit, SyncKeys) else await runner.execute(unit, **options)

    monkeypatch.setattr(desk.database, "_runner", Away())
    refused = await desk.ask(lambda to: ReconfigureRegistry(config.Delegation(), {}, to))
    assert refused == OUTCOME_UNKNOWN
    assert await desk.validate(token()) is None
    with pytest.RaisesGroup(KeysNotSyncedError):
        async with Desk((desk.database, None), desk.keys_dir).open():  # type: ignore[arg-type]  # it needs no connection
            raise AssertionError


async def test_an_agent_may_have_several_keys_at_once(desk: Desk) -> None:
    desk.hold(A, FOREIGN)
    await desk.reconfigure({A: raw(KEYS[A])})
    assert await desk.validate(token()) is None
    assert await desk.validate(token(key=FOREIGN, id_="j2")) is None
    assert await desk.validate(token(key=KEYS[B], id_="j3")) is Reason.BAD_SIGNATURE


# --- issuing and registering


async def test_issuing_needs_the_right_to_sign_a_pattern_and_a_held_key(desk: Desk) -> None:
    assert code(await desk.issue()) == "no_signing_key"
    desk.hold(A)
    await desk.reconfigure({})
    assert code(await desk.issue(caller=Caller("x", Role.ADMIN))) == "forbidden"
    assert code(await desk.issue(caller=Caller("x", Role.INGEST, (B,), may_sign=True))) == "forbidden"
    done = issued(await desk.issue(caller=Caller("x", Role.INGEST, (A,), may_sign=True)))
    assert done.created
    assert await desk.validate(done.token) is None


async def test_a_delegation_can_be_issued_under_a_parent_by_id_or_token(desk: Desk) -> None:
    desk.hold(A)
    desk.hold(B)
    await desk.reconfigure({})
    parent = issued(await desk.issue())
    for named in (parent.id, parent.token):
        child = issued(await desk.issue(B, C, parent=named, max_cost_microusd=10))
        assert await desk.validate(child.token, delegate=C) is None
    assert code(await desk.issue(B, C, parent="del_unknown")) == Reason.CHAIN_BROKEN
    assert code(await desk.issue(B, C, parent="not.a.token")) == Reason.CHAIN_BROKEN  # no token is so short
    assert code(await desk.issue(B, C, parent="not.a." + "token" * 40)) == Reason.MALFORMED
    assert code(await desk.issue(B, C, parent=parent.id, scopes=("*",))) == Reason.SCOPE_EXCEEDED
    assert code(await desk.issue(B, C, parent=parent.id, expires_at_us=T0 + DAY_US)) == Reason.CONSTRAINT_EXCEEDED


@pytest.mark.parametrize("said", [{"scopes": ("not a scope",)}, {"delegate": "no name"}, {"expires_at_us": 0}])
async def test_terms_that_make_no_token_are_refused(desk: Desk, said: dict[str, Any]) -> None:
    desk.hold(A)
    await desk.reconfigure({})
    assert code(await desk.issue(**said)) == "invalid"


async def test_an_idempotency_key_brings_back_the_delegation_with_its_own_token(desk: Desk) -> None:
    desk.hold(A)
    await desk.reconfigure({})
    key = Idempotency(b"k" * 16, b"r" * 16, T0)
    first = issued(await desk.issue(idempotency=key))
    again = issued(await desk.issue(idempotency=key))
    assert (again.id, again.token) == (first.id, first.token)
    other = await desk.issue(idempotency=msgspec.structs.replace(key, request=b"s" * 16))
    assert code(other) == "idempotency_key_reused"


async def test_a_delegation_that_was_just_made_is_told_without_a_read(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InlineReaders, "run", giving_up("get_delegation"))
    done = issued(await desk.register(token()))
    assert (done.id, done.token, done.created) == ("j1", token(), True)


@pytest.mark.parametrize("query", ["get_delegation", "revoked_after", "seen_among", "open_under", "keys_of"])
async def test_what_was_committed_is_not_denied_where_the_answer_cannot_be_read(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, query: str
) -> None:
    ways: dict[str, Callable[[], Awaitable[Any]]] = {
        "get_delegation": lambda: desk.register(token(), idempotency=Idempotency(b"k" * 16, b"r" * 16, T0)),
        "keys_of": lambda: desk.ask(lambda to: ReconfigureRegistry(config.Delegation(max_depth=1), {}, to)),
    }
    issuer = Caller("x", Role.OPERATOR, (A,))
    if query not in ways:
        assert issued(await desk.register(token())).created
    ask_for = ways.get(query, lambda: desk.revoke("j1", issuer))
    with monkeypatch.context() as patched:
        patched.setattr(InlineReaders, "run", giving_up(query))
        refused = await ask_for()
    assert isinstance(refused, Refusal)
    assert refused.code == "outcome_unknown"
    assert refused.detail.startswith("GAVE UP when this was to be answered, so it may be done, in part or whole: look")
    assert refused.retry_after_s is not None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.messages[0].endswith(" was refused: GAVE UP")
    assert not isinstance(await ask_for(), Refusal)


async def test_an_import_that_was_committed_is_not_denied_where_it_cannot_be_read(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [Entry(A, "j1", T0, T0 + DAY_US)]
    body = sign_list(entries, KEYS[A], issuer=A, number=1, updated_us=T0)
    with monkeypatch.context() as patched:
        patched.setattr(InlineReaders, "run", giving_up("revoked_after"))
        assert code(await desk.ask(lambda to: ImportRevocationList(ADMIN, body, None, to))) == "outcome_unknown"
    again = await desk.ask(lambda to: ImportRevocationList(ADMIN, body, None, to))
    assert (again.added, again.known) == (0, 1)
    assert await desk.validate(token()) is Reason.REVOKED


async def test_registering_is_for_who_may_act_for_one_of_the_parties(desk: Desk) -> None:
    assert code(await desk.register("nonsense")) == Reason.MALFORMED
    assert code(await desk.register(token(), Caller("x", Role.INGEST, (C,)))) == "forbidden"
    for caller in (Caller("x", Role.INGEST, (A,)), Caller("x", Role.INGEST, (B,))):
        done = issued(await desk.register(token(), caller))
        assert done.token == token()
    assert not done.created
    assert code(await desk.register(token(B, C), ADMIN)) == Reason.UNKNOWN_KEY


# --- authorising


async def test_a_valid_token_is_registered_by_its_first_authorisation(desk: Desk) -> None:
    first = reserved(await desk.authorize(token(), cost=300_000))
    second = reserved(await desk.authorize(delegation=first.delegation, cost=300_000, task_id="t2"))
    assert second.delegation == first.delegation
    assert second.remaining == Remaining(400_000, None)
    assert first.expires_at_us == T0 + 60 * SECOND_US
    longer = reserved(await desk.authorize(token(), task_id="t3", ttl_us=HOUR_US))
    assert longer.expires_at_us == T0 + HOUR_US
    assert code(await desk.authorize(delegation="del_unknown")) == "delegation_not_found"


class Overhears:
    """Keeps the units that are posted, and passes them on."""

    def __init__(self, inner: InlineRunner) -> None:
        self.inner = inner
        self.execute = inner.execute
        self.reserves: list[Reserve] = []

    async def post(self, unit: AnyUnit, *rest: Any, **said: Any) -> None:
        assert isinstance(unit, Reserve)
        self.reserves.append(unit)
        await self.inner.post(unit, *rest, **said)


async def test_a_chain_goes_to_the_ledger_until_that_has_it_and_is_named_from_then_on(
    inline_database: Inline, tmp_path: Path
) -> None:
    database, connection = inline_database
    runner = Overhears(database._runner)  # type: ignore[arg-type]  # the fixture's inline one
    key = Idempotency(b"k" * 16, b"r" * 16, T0)
    async with Desk((Database(runner, InlineReaders(connection)), connection), tmp_path).open() as desk:
        assert code(await desk.authorize(token(), cost=2_000_000)) == Reason.INSUFFICIENT_BUDGET
        first = reserved(await desk.authorize(token(), idempotency=key))
        # What an Idempotency-Key brings back says nothing of today's ledger.
        second = reserved(await desk.authorize(token(), task_id="t2"))
        third = reserved(await desk.authorize(token(), task_id="t3"))
        assert first.delegation == second.delegation == third.delegation
        assert code(await desk.authorize(token(), cost=2_000_000)) == Reason.INSUFFICIENT_BUDGET
        named = [(len(unit.chain), unit.delegation) for unit in runner.reserves]
        assert named == [(1, ""), (1, ""), (1, ""), (0, first.delegation), (0, first.delegation)]
        other = Caller("x", Role.INGEST, ("*",), tenant="other")
        assert code(await desk.authorize(token(), caller=other)) == "forbidden"


async def test_authorising_is_for_who_may_act_for_the_delegate(desk: Desk) -> None:
    assert code(await desk.authorize(token(), caller=Caller("x", Role.INGEST, (A,)))) == "forbidden"
    reserved(await desk.authorize(token(), caller=Caller("x", Role.INGEST, (B,))))
    reserved(await desk.authorize(token(), caller=Caller("x", Role.INGEST, ("urn:asap:agent:*",)), task_id="t2"))
    assert code(await desk.authorize(token(), delegate=C)) == Reason.WRONG_DELEGATE


async def test_an_idempotent_authorisation_reserves_once(desk: Desk) -> None:
    key = Idempotency(b"k" * 16, b"r" * 16, T0)
    first = await desk.authorize(token(), idempotency=key)
    assert await desk.authorize(token(), idempotency=key) == first


# --- reservations


async def test_a_reservation_is_changed_by_who_may_act_for_its_party(desk: Desk) -> None:
    delegate, delegator, stranger = (Caller("x", Role.OPERATOR, (agent,)) for agent in (B, A, C))
    one = reserved(await desk.authorize(token(), cost=500_000)).reservation
    assert code(await desk.change("settle", one, 1, caller=stranger)) == "reservation_not_found"
    assert code(await desk.change("settle", one, 1, caller=delegator)) == "forbidden"
    assert code(await desk.change("settle", "rsv_unknown", 1)) == "reservation_not_found"
    extended = await desk.change("extend", one, caller=delegate)
    assert isinstance(extended, ReservationChanged)
    assert extended.expires_at_us >= T0 + 60 * SECOND_US
    settled = await desk.change("settle", one, 200_000, caller=delegate)
    assert isinstance(settled, ReservationChanged)
    assert (settled.used_microusd, settled.held_microusd) == (200_000, 0)
    assert settled.remaining == Remaining(800_000, None)
    assert code(await desk.change("refund", one, 50_000, caller=delegate)) == "forbidden"
    refunded = await desk.change("refund", one, 50_000, caller=delegator)
    assert isinstance(refunded, ReservationChanged)
    assert refunded.remaining == Remaining(850_000, None)


async def test_a_released_reservation_gives_everything_back(desk: Desk) -> None:
    one = reserved(await desk.authorize(token(), cost=500_000)).reservation
    released = await desk.change("release", one)
    assert isinstance(released, ReservationChanged)
    assert released.remaining == Remaining(1_000_000, None)
    assert code(await desk.change("extend", one)) == "reservation_closed"


# --- revoking


async def test_a_revocation_is_in_force_from_the_reply_on_for_every_descendant(desk: Desk) -> None:
    await desk.know(B, KEYS[B])
    parent, child = token(), token(B, C, id_="j2", parent=token())
    parent_id, child_id = issued(await desk.register(parent)).id, issued(await desk.register(child)).id
    done = await desk.revoke(parent_id)
    assert isinstance(done, Revoked)
    assert (done.ids, done.newly) == ([parent_id, child_id], 2)
    for text in (parent, child):
        assert await desk.validate(text) is Reason.REVOKED
        assert code(await desk.authorize(text)) == Reason.REVOKED
    assert code(await desk.authorize(delegation=child_id)) == Reason.REVOKED
    assert code(await desk.register(token(B, D, id_="j3", parent=parent))) == Reason.REVOKED
    again = await desk.revoke(parent_id)
    assert isinstance(again, Revoked)
    assert (again.ids, again.newly) == (done.ids, 0)


async def test_revoking_is_for_who_may_act_for_the_delegator(desk: Desk) -> None:
    known = issued(await desk.register(token())).id
    assert code(await desk.revoke("del_unknown")) == "delegation_not_found"
    assert code(await desk.revoke(known, Caller("x", Role.OPERATOR, (C,)))) == "delegation_not_found"
    assert code(await desk.revoke(known, Caller("x", Role.OPERATOR, (B,)))) == "forbidden"
    assert isinstance(await desk.revoke(known, Caller("x", Role.OPERATOR, (A,))), Revoked)


async def test_another_tenants_delegation_is_not_there(desk: Desk) -> None:
    own, other = (Caller("x", Role.ADMIN, tenant=tenant, may_sign=True) for tenant in ("own", "other"))
    known = issued(await desk.register(token(), own)).id
    one = reserved(await desk.authorize(delegation=known, caller=own)).reservation
    assert code(await desk.authorize(delegation=known, caller=other)) == "delegation_not_found"
    assert code(await desk.change("settle", one, 1, caller=other)) == "reservation_not_found"
    assert code(await desk.revoke(known, other)) == "delegation_not_found"
    desk.hold(B)
    await desk.reconfigure(desk.settings.pinned)
    assert code(await desk.issue(B, C, parent=known, caller=other)) == Reason.CHAIN_BROKEN
    assert isinstance(await desk.revoke(known, own), Revoked)


async def test_tenants_keep_off_agents_of_which_the_host_holds_or_was_given_a_key(desk: Desk) -> None:
    tenants = desk.settings.tenants
    tenant = Caller("x", Role.ADMIN, tenant="other", may_sign=True, tenants=tenants)
    for agent in (B, D):
        desk.hold(agent)
    await desk.reconfigure(desk.settings.pinned)
    given = Caller("x", Role.ADMIN, tenant="default", tenants=tenants)
    assert not isinstance(await desk.database.submit(ImportAgentKey(C, raw(KEYS[C]), "test", T0, DAY_US)), Refusal)
    desk.directory_changed.notify()
    await wait_all_tasks_blocked()
    for agent in (B, C, D):
        assert not tenant.may_touch(agent)
        assert given.may_touch(agent)
    assert code(await desk.issue(B, "urn:asap:agent:e", caller=tenant)) == "forbidden"
    # Whose a chain is does not go by who shows it first.
    await desk.know("urn:asap:agent:e", None)
    tenants.put("urn:asap:agent:e", "other")
    await desk.database.submit(PutAgent(AgentRecord("urn:asap:agent:e", "http://127.0.0.1:1", "other"), "test", T0))
    text = token(B, "urn:asap:agent:e")
    one = reserved(await desk.authorize(text, cost=500, caller=tenant))
    assert isinstance(await desk.change("settle", one.reservation, 500, caller=tenant), ReservationChanged)
    assert code(await desk.change("refund", one.reservation, 500, caller=tenant)) == "forbidden"
    assert code(await desk.revoke(one.delegation, tenant)) == "forbidden"
    assert isinstance(await desk.change("refund", one.reservation, 500, caller=given), ReservationChanged)
    assert isinstance(await desk.revoke(one.delegation, given), Revoked)


async def test_an_issuer_refunds_its_delegate_and_not_itself(desk: Desk) -> None:
    await desk.know(B, KEYS[B])
    one = reserved(await desk.authorize(token(B, C, id_="j2", parent=token()), cost=500)).reservation
    await desk.change("settle", one, 500)
    assert code(await desk.change("refund", one, 500, caller=Caller("x", Role.OPERATOR, (C,)))) == "forbidden"
    refunded = await desk.change("refund", one, 500, caller=Caller("x", Role.OPERATOR, (B,)))
    assert isinstance(refunded, ReservationChanged)
    # Of the million that A limits B to, the 500 stay spent.
    assert (refunded.refunded_to, refunded.remaining) == (["j2"], Remaining(999_500, None))
    both = await desk.change("refund", one, 500, caller=Caller("x", Role.OPERATOR, (A, B)))
    assert isinstance(both, ReservationChanged)
    assert (both.refunded_to, both.remaining) == (["j1"], Remaining(1_000_000, None))


async def test_a_parent_that_is_named_is_settled_once_the_token_is_registered(desk: Desk) -> None:
    def named(id_: str, delegator: str, delegate: str, parent: str) -> str:
        claims = Claims(id_, delegator, delegate, ("task.*",), None, 1_000_000, T0, T0 + DAY_US)
        return sign_document(claims, KEYS[delegator], parent=parent)

    tenants = desk.settings.tenants
    for agent, tenant, key in ((A, "own", None), (B, "own", KEYS[B]), (C, "other", KEYS[C])):
        shown = None if key is None else public_base64(raw(key))
        await desk.database.submit(PutAgent(AgentRecord(agent, "http://127.0.0.1:1", tenant, shown), "test", T0))
        tenants.put(agent, tenant)
    desk.directory_changed.notify()
    await wait_all_tasks_blocked()
    own, other, third = (Caller("x", Role.ADMIN, tenant=name, tenants=tenants) for name in ("own", "other", "third"))
    above = issued(await desk.register(token(A, B), own)).id
    middle = issued(await desk.register(named("m", B, B, above), own)).id
    leaf = named("l", B, C, middle)
    assert code(await desk.register(leaf, other)) == Reason.CHAIN_BROKEN
    known = issued(await desk.register(leaf, own)).id
    assert issued(await desk.register(leaf, other)).id == known
    for asked in ({"text": leaf}, {"delegation": known}, {"text": token(C, C, id_="below", parent=leaf)}):
        reserved(await desk.authorize(**asked, cost=5, caller=other))
    assert code(await desk.authorize(leaf, caller=third)) == Reason.CHAIN_BROKEN
    # Another token under the same parent is still to be registered.
    assert code(await desk.register(named("n", B, C, middle), other)) == Reason.CHAIN_BROKEN


async def test_a_reservation_holds_no_longer_than_the_host_lets(desk: Desk) -> None:
    for settings, longest in (({}, 3600), ({"max_reservation_ttl": "10s"}, 60), ({"max_reservation_ttl": "90s"}, 90)):
        await desk.reconfigure(desk.settings.pinned, **settings)
        held = reserved(await desk.authorize(token(), cost=1, ttl_us=longest * SECOND_US))
        assert held.expires_at_us == T0 + longest * SECOND_US
        over_us = longest * SECOND_US + 1
        refused = [await desk.authorize(token(), cost=1, ttl_us=over_us)]
        refused.append(
            await desk.ask(
                lambda to, us=over_us, id_=held.reservation: ChangeReservation(
                    ADMIN, "extend", id_, None, us, "", None, to
                )
            )
        )
        for one in refused:
            assert isinstance(one, Refusal)
            assert (one.code, one.errors[0].field) == ("invalid", "ttl_seconds")


async def test_what_a_revoked_delegate_holds_is_released_by_whoever_issued_its_path(desk: Desk) -> None:
    await desk.know(B, KEYS[B])
    parent, leaf = token(), token(B, C, id_="j2", parent=token())
    issuers = [Caller("x", Role.OPERATOR, (agent,)) for agent in (A, B)]
    held = [reserved(await desk.authorize(leaf, cost=9, task_id=f"t{n}")).reservation for n in range(2)]
    assert [code(await desk.change("release", held[0], caller=one)) for one in issuers] == [
        "reservation_not_found",
        "forbidden",
    ]
    # Who may release them is told which they are: it sees none of them otherwise.
    revoked = await desk.revoke(issued(await desk.register(parent)).id, issuers[0])
    assert isinstance(revoked, Revoked)
    assert (revoked.ids, revoked.hidden, revoked.open_reservations) == (["j1"], 1, sorted(held))
    for reporter in (Caller("x", Role.INGEST, (B,)), Caller("x", Role.OPERATOR, (D,))):
        assert code(await desk.change("release", held[0], caller=reporter)) in {"forbidden", "reservation_not_found"}
    for one, issuer in zip(held, issuers, strict=True):
        assert code(await desk.change("settle", one, 1, caller=issuer)) in {"forbidden", "reservation_not_found"}
        released = await desk.change("release", one, caller=issuer)
        assert isinstance(released, ReservationChanged)
        assert released.state == "released"
    again = await desk.revoke("j1")
    assert isinstance(again, Revoked)
    assert again.open_reservations == []


async def test_a_restarted_registry_knows_what_was_revoked(desk: Desk) -> None:
    known = issued(await desk.register(token())).id
    await desk.revoke(known)
    second = Desk((desk.database, None), desk.keys_dir)  # type: ignore[arg-type]  # it needs no connection
    async with second.open() as restarted:
        assert await restarted.validate(token()) is Reason.REVOKED


class LosesAnswers:
    """Commits a revocation, and then says that nobody knows."""

    def __init__(self, inner: InlineRunner) -> None:
        self.inner = inner

    async def execute(self, unit: AnyUnit, *, urgent: bool, idempotency: Idempotency | None) -> Answer | Refusal:
        answer = await self.inner.execute(unit, urgent=urgent, idempotency=idempotency)
        return OUTCOME_UNKNOWN if isinstance(unit, Revoke) else answer


async def test_a_revocation_of_unknown_outcome_is_looked_up_before_the_next_decision(
    inline_database: Inline, tmp_path: Path
) -> None:
    database, connection = inline_database
    runner = LosesAnswers(database._runner)  # type: ignore[arg-type]  # the fixture's inline one
    async with Desk((Database(runner, InlineReaders(connection)), connection), tmp_path).open() as desk:
        known = issued(await desk.register(token())).id
        assert await desk.revoke(known) == OUTCOME_UNKNOWN
        assert await desk.validate(token()) is Reason.REVOKED


async def test_a_message_that_breaks_the_handler_is_answered_and_stops_nobody(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(HandlerFailed):
        await desk.ask(lambda to: Validate(ADMIN, None, None, None, to))  # type: ignore[arg-type]  # a bug of a door
    assert "a Validate could not be handled" in caplog.text
    assert await desk.validate(token()) is None
