"""The writer: group commits change nothing but the number of commits, and a unit that fails leaves nothing behind."""

from __future__ import annotations

import queue
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import apsw
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl.signing import SigningKey
from ulid import base32

from asapd.core.budgets import Budget, Limits, Match
from asapd.core.delegation import Claims, Denied
from asapd.core.errors import Refusal
from asapd.core.ledger import Estimate
from asapd.core.repricing import Correction
from asapd.core.usage import Cost, UsageEvent
from asapd.store import handlers, verifying
from asapd.store import usage as usage_module
from asapd.store.frames import HEADER
from asapd.store.units.agents import (
    AgentRecord,
    AgentsChanged,
    ChangeAgentState,
    ImportAgentKey,
    PutAgent,
    RecordManifest,
    RecordProbe,
    RemoveAgent,
    RetireAgentKey,
    SyncAgents,
    SyncKeys,
)
from asapd.store.units.alerts import (
    AckBreach,
    AddSilence,
    BreachRow,
    EndRedelivery,
    MoveCursor,
    MoveTarget,
    PassTarget,
    Redeliver,
    RemoveSilence,
    RetireAlerts,
    Silence,
    SyncTargets,
    WriteBreach,
)
from asapd.store.units.audit import EraseConsumer, KeepArchive, KeepCosignature, RetireAudit, Seal, SealHours, Witness
from asapd.store.units.delegations import (
    ExtendReservation,
    ImportRevocations,
    NewDelegation,
    RecoverReservations,
    RefundReservation,
    RegisterDelegation,
    ReleaseReservation,
    Reserve,
    Revocation,
    Revoke,
    SettleReservation,
    SyncBudgets,
)
from asapd.store.units.exchange import Answer, AnyUnit, Envelope, Idempotency
from asapd.store.units.house import ApiKey, CreateKey, Note, RevokeKey, SetMasks, Sweep
from asapd.store.units.promises import (
    BreachHold,
    CreditTerms,
    DeclareMaintenance,
    EndMaintenance,
    KeepAlive,
    KeepHolds,
    PromiseRecord,
    RecordBlind,
    RecordCredits,
    RecordPromises,
    UndoJump,
)
from asapd.store.units.unit import Failed, NotWritten, RowWritten
from asapd.store.units.usage import (
    AddUpDays,
    CorrectCosts,
    KeepHorizon,
    Recall,
    Recorded,
    RecordTask,
    RecordTelemetry,
    RecordUsage,
    RetireUsage,
    StreamChanged,
    StreamsMoved,
    StreamValue,
    TaskEvent,
    UsageConflict,
    VoidUsage,
)
from asapd.store.visibility import EVERYTHING, Visibility
from asapd.store.writer import WARY_COMMITS, Writer, replay, serve
from asapd.wire.keys import jwk_thumbprint, public_base64

NOW_US = 1_795_169_203_000_000
HOUR_US = 3_600_000_000
DAY_US = 24 * HOUR_US
PUBLIC_KEYS = tuple(bytes(SigningKey(bytes([number]) * 32).verify_key) for number in (1, 2))
AGENTS = ("urn:asap:agent:a", "urn:asap:agent:b", "urn:asap:agent:c")

OpenStore = Callable[[], AbstractContextManager[apsw.Connection]]


def zeros(count: int) -> bytes:
    """Entropy that makes an id a function of its unit's time."""
    return bytes(count)


def event(**fields: Any) -> UsageEvent:
    return UsageEvent(
        **({"task_id": "t", "agent": AGENTS[0], "consumer": AGENTS[1], "timestamp_us": NOW_US, "id": "e"} | fields)
    )


def usage(*events: UsageEvent, partial: bool = False, now_us: int = NOW_US) -> RecordUsage:
    return RecordUsage("default", "key:x", now_us, list(events), [Cost(250, "reported")] * len(events), partial)


def link(jti: str, delegator: str, delegate: str, **limits: Any) -> NewDelegation:
    claims = Claims(
        **(
            {
                "id": jti,
                "delegator": delegator,
                "delegate": delegate,
                "scopes": ("task.execute",),
                "max_tasks": 3,
                "max_cost_microusd": 1_000,
                "issued_at_us": NOW_US,
                "expires_at_us": NOW_US + HOUR_US,
            }
            | limits
        )
    )
    return NewDelegation(claims, f"token of {jti}", msgspec.json.encode(claims)[:16])


CHAINS = (
    [link("del_root", AGENTS[0], AGENTS[1])],
    [link("del_root", AGENTS[0], AGENTS[1]), link("del_leaf", AGENTS[1], AGENTS[2])],
    [link("del_root", AGENTS[0], AGENTS[1], max_tasks=4)],  # the same id, other bytes
)
DELEGATIONS = ("del_root", "del_leaf", "del_none")
LEAF_ISSUER = Visibility(None, (AGENTS[1],))
EVERYBODY = Budget("all", Match(), "day", "UTC", Limits(300, 4, 1), Limits(900, 9, 2))
OF_ROOT = Budget("root", Match(delegation="del_root"), "week", "Europe/Berlin", hard=Limits(tokens=6))
BUDGETS: tuple[list[Budget], ...] = (
    [],
    [EVERYBODY],
    [msgspec.structs.replace(EVERYBODY, soft=Limits(500), hard=Limits()), OF_ROOT],
    [msgspec.structs.replace(EVERYBODY, period="month"), OF_ROOT],
)


def run(writer: Writer, unit: AnyUnit, idempotency: Idempotency | None = None) -> Any:
    return writer.run([Envelope(1, unit, False, idempotency)])[0].result


def contents(connection: apsw.Connection) -> dict[str, list[Any]]:
    """Every row of every table."""
    tables = connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name").fetchall()
    return {name: sorted(map(repr, connection.execute(f"SELECT * FROM {name}").fetchall())) for (name,) in tables}


def assert_log_is_whole(connection: apsw.Connection) -> None:
    """The chain holds, and sums and ledger are what the log and the events come to; what seals is made up."""
    connection.execute("SAVEPOINT looking; DROP TRIGGER audit_node_no_delete; DELETE FROM audit_node")
    connection.execute("DELETE FROM audit_cosignature")
    found = verifying.report(connection, verifying.Request())
    connection.execute("ROLLBACK TO looking; RELEASE looking")
    assert found.walk.fault is None
    assert found.walk.verified == connection.execute("SELECT count(*) FROM audit").get
    assert found.tallies is not None
    assert not [tally for tally in found.tallies if tally.table in {"usage_hour", "ledger"} and tally.findings]


# --- grouping

agents = st.sampled_from(AGENTS)
costs = st.integers(0, 600)
events = st.builds(
    event,
    id=st.sampled_from(("", "e1", "e2", "e3")),
    agent=agents,
    task_id=st.sampled_from(("t1", "t2", "t3")),
    tokens_in=st.sampled_from((1, 2, 2, 2**63)),  # the last one does not fit into a column: a bug in the handler
    model=st.text("mn", max_size=2),
    project=st.text("pq", max_size=2),
    timestamp_us=st.sampled_from((NOW_US, NOW_US + HOUR_US)),
    delegation=st.sampled_from((None, *DELEGATIONS)),
    partial=st.booleans(),
)


def units_at(number: int, *kinds: type[Any]) -> st.SearchStrategy[Any]:
    """Every kind of unit, or these kinds, at the time of the `number`th; reservations have ids of earlier times."""
    now_us = NOW_US + number * 1000
    at = st.just(now_us)
    actor = st.sampled_from(("key:x", "key:y"))
    reservation = st.integers(0, 4).map(
        lambda earlier: f"rsv_{base32.encode_timestamp((NOW_US // 1000 + earlier).to_bytes(6, 'big'))}{'0' * 16}"
    )
    agent = st.builds(
        AgentRecord,
        agents,
        st.sampled_from(("http://x", "http://y")),
        st.just("default"),
        st.none() | st.sampled_from(PUBLIC_KEYS).map(public_base64),
    )
    event_under = st.builds(
        lambda plain, named: msgspec.structs.replace(plain, reservation=named), events, st.none() | reservation
    )
    batches = st.lists(st.tuples(event_under, st.none() | costs), max_size=4)
    breach = st.builds(
        BreachRow,
        id=st.sampled_from(("brc_1", "brc_2")),
        agent_id=agents,
        breach_type=st.just("latency"),
        window_us=st.just(HOUR_US),
        threshold=st.just("100"),
        threshold_value=st.just(100.0),
        actual=st.just("200"),
        actual_value=st.just(200.0),
        severity=st.sampled_from(("warning", "critical")),
        state=st.sampled_from(("open", "resolved")),
        detected_at_us=at,
        samples=st.just(20),
        tenant=st.just("default"),
    )
    key = st.builds(
        ApiKey,
        id=st.sampled_from(("key_1", "key_2")),
        name=st.sampled_from(("one", "two")),
        role=st.just("reader"),
        agents=st.just(["*"]),
        tenant=st.none(),
        may_sign=st.just(False),
        digest=st.just(b"d"),
        created_us=at,
    )
    task = st.builds(
        TaskEvent, st.sampled_from(("t1", "t2")), agents, agents, st.sampled_from(("started", "failed")), at
    )
    of_kind: dict[type[Any], st.SearchStrategy[Any]] = {
        Recall: st.builds(Recall, st.just(Refusal("invalid", "too late"))),
        KeepHorizon: st.builds(KeepHorizon, at, st.integers(0, HOUR_US)),
        RecordUsage: batches.flatmap(
            lambda batch: st.builds(
                RecordUsage,
                st.just("default"),
                actor,
                at,
                st.just([plain for plain, _ in batch]),
                st.just([Cost(cost, None if cost is None else "reported") for _, cost in batch]),
                st.booleans(),
            )
        ),
        RecordTelemetry: st.builds(
            lambda usage, stream, last: RecordTelemetry(
                usage,
                now_us - 3000,
                [StreamChanged(stream, None if last is None else StreamValue(1, last, 1, 1), StreamValue(1, 2, 1, 1))],
                [(stream, now_us)],
            ),
            st.builds(RecordUsage, st.just("default"), actor, at, st.just([]), st.just([])),
            st.sampled_from((b"a", b"b")),
            st.sampled_from((None, 2, 3)),
        ),
        VoidUsage: st.builds(VoidUsage, st.integers(1, 6), st.just("why"), actor, at),
        CorrectCosts: st.builds(
            CorrectCosts,
            st.lists(
                st.builds(
                    Correction, st.integers(1, 8), st.none() | costs, costs, st.just("priced"), st.integers(-5, 5)
                ),
                max_size=3,
            ),
            st.just("v"),
            actor,
            at,
        ),
        RetireUsage: st.builds(RetireUsage, at, actor, at, st.integers(1, 3)),
        KeepArchive: st.builds(
            KeepArchive, st.just(1), st.integers(1, 5), st.just(b"h"), at, st.just("f"), st.just("s"), actor, at
        ),
        SealHours: st.builds(
            SealHours, st.just([(2**40, 1, "d")]), actor, at
        ),  # not over: what it says is held to nothing
        RetireAudit: st.builds(RetireAudit, actor, at, st.integers(1, 3)),
        AddUpDays: st.builds(AddUpDays, st.just(now_us) | st.just(now_us + DAY_US)),
        RecordTask: st.builds(RecordTask, task, actor, st.just("default"), at),
        RegisterDelegation: st.builds(RegisterDelegation, st.sampled_from(CHAINS), actor, st.just("default"), at),
        Reserve: st.builds(
            Reserve,
            task_id=st.sampled_from(("t1", "t2", "t3")),
            action=st.just("task.execute"),
            estimate=st.builds(Estimate, st.none() | costs, st.integers(1, 2), st.none() | st.integers(0, 3)),
            ttl_us=st.sampled_from((1, HOUR_US)),
            actor=actor,
            tenant=st.just("default"),
            now_us=at,
            chain=st.sampled_from(([], *CHAINS)),
            delegation=st.sampled_from(DELEGATIONS),
        ),
        SettleReservation: st.builds(SettleReservation, reservation, st.none() | costs, actor, at),
        ReleaseReservation: st.builds(ReleaseReservation, reservation, actor, at),
        ExtendReservation: st.builds(ExtendReservation, reservation, st.just(HOUR_US), actor, at),
        RefundReservation: st.builds(
            RefundReservation, reservation, costs, st.just("why"), actor, at, st.sampled_from((EVERYTHING, LEAF_ISSUER))
        ),
        RecoverReservations: st.builds(RecoverReservations, at, st.integers(1, 3)),
        Revoke: st.builds(Revoke, st.sampled_from(DELEGATIONS), actor, st.just("why"), at),
        SyncBudgets: st.builds(SyncBudgets, st.sampled_from(BUDGETS), actor, at),
        PutAgent: st.builds(PutAgent, agent, actor, at),
        RemoveAgent: st.builds(RemoveAgent, agents, actor, at),
        SyncAgents: st.builds(
            SyncAgents, st.lists(agent, max_size=2, unique_by=lambda one: one.id), st.just("asapd"), at
        ),
        RecordProbe: st.builds(
            RecordProbe,
            agent=agents,
            ts_us=at,
            up=st.booleans(),
            status=st.none(),
            latency_us=st.none(),
            reason=st.none(),
            detail=st.none(),
            hold_us=st.sampled_from((0, 1500, 10_000)),
            state=st.just("healthy"),
            since_us=at,
            ok_streak=st.just(1),
            fail_streak=st.just(0),
            transition_from=st.sampled_from((None, "unknown")),
        ),
        RecordManifest: st.builds(
            RecordManifest,
            agents,
            at,
            st.just("d"),
            st.just(b"{}"),
            st.sampled_from(("unsigned", "self_signed")),
            st.sampled_from((None, {"availability": 99})),
            st.none(),
            st.none(),
            st.none() | st.sampled_from(PUBLIC_KEYS).map(public_base64),
        ),
        ChangeAgentState: st.builds(
            ChangeAgentState, agents, st.sampled_from(("pause", "resume", "silence")), actor, at, st.none()
        ),
        ImportAgentKey: st.builds(
            ImportAgentKey, agents, st.sampled_from(PUBLIC_KEYS), actor, at, st.just(5000), st.booleans()
        ),
        RetireAgentKey: st.builds(
            RetireAgentKey, agents, st.sampled_from(PUBLIC_KEYS).map(jwk_thumbprint), actor, at, st.just(5000)
        ),
        SyncKeys: st.builds(
            SyncKeys,
            st.lists(st.tuples(agents, st.sampled_from(PUBLIC_KEYS)), max_size=2, unique_by=lambda one: one[0]),
            st.none(),
            actor,
            at,
            st.just(5000),
        ),
        WriteBreach: st.builds(WriteBreach, st.sampled_from(("opened", "escalated", "resolved")), breach, at),
        AckBreach: st.builds(AckBreach, st.sampled_from(("brc_1", "brc_2")), st.just("seen"), actor, at),
        AddSilence: st.builds(
            AddSilence,
            st.builds(
                Silence,
                id=st.just(""),
                agent=st.none() | agents,
                breach_type=st.none(),
                severity=st.none(),
                tenant=st.none(),
                created_us=at,
                ends_us=st.just(now_us + 3000),
                author=st.just("key:x"),
                comment=st.just("known"),
            ),
            actor,
            at,
            at.map(lambda us: us - 4000),
        ),
        RemoveSilence: st.builds(RemoveSilence, st.just("sil_none"), actor, at),
        MoveCursor: st.builds(MoveCursor, actor, st.sampled_from(("a", "b")), st.integers(0, 3), st.booleans(), at),
        SyncTargets: st.builds(SyncTargets, st.lists(st.sampled_from(("hook", "pager")), unique=True)),
        PassTarget: st.builds(PassTarget, st.sampled_from(("hook", "pager")), st.integers(0, 3)),
        RetireAlerts: st.builds(RetireAlerts, at, actor, at, st.integers(1, 3)),
        MoveTarget: st.builds(
            MoveTarget,
            st.sampled_from(("hook", "pager")),
            st.integers(0, 3),
            at,
            st.sampled_from((None, "refused")),
            st.sampled_from(((), (1,), (1, 2))),
        ),
        Redeliver: st.builds(Redeliver, st.integers(1, 2), actor, at),
        EndRedelivery: st.builds(EndRedelivery, st.integers(1, 2), st.sampled_from((None, "refused"))),
        DeclareMaintenance: st.builds(
            DeclareMaintenance, st.none() | agents, at, at.map(lambda us: us + HOUR_US), st.just("upkeep"), actor, at
        ),
        EndMaintenance: st.builds(EndMaintenance, st.just("mnt_none"), actor, at),
        KeepAlive: st.builds(KeepAlive, at),
        RecordBlind: st.builds(RecordBlind, at, at, st.just("stopped")),
        UndoJump: st.builds(UndoJump, at, at.map(lambda us: us + HOUR_US), at),
        KeepHolds: st.builds(
            KeepHolds,
            st.lists(st.builds(BreachHold, agents, st.just("latency"), st.none() | st.just("pending"), at), max_size=2),
        ),
        RecordCredits: st.builds(
            RecordCredits, st.builds(CreditTerms, at, st.lists(st.just(("99.9%", "10.0%")), max_size=1))
        ),
        RecordPromises: st.builds(
            RecordPromises,
            st.lists(
                st.builds(
                    PromiseRecord,
                    agents,
                    st.just("default"),
                    at,
                    st.none() | st.just("manifest"),
                    st.just({"availability": "99.5%"}),
                    st.none(),
                    st.none() | st.just("no"),
                ),
                max_size=2,
            ),
        ),
        CreateKey: st.builds(CreateKey, key, actor, at),
        SetMasks: st.builds(SetMasks, st.sampled_from(([], ["x"]))),
        RevokeKey: st.builds(RevokeKey, st.sampled_from(("key_1", "two")), actor, at),
        Note: st.builds(Note, st.just("config.reloaded"), actor, st.just("asapd"), st.just({"n": 1}), at),
        EraseConsumer: st.builds(
            EraseConsumer, st.sampled_from(("c", "none")), st.just("ers_1"), st.just([]), st.just("asked"), actor, at
        ),
        Witness: st.builds(Witness, st.just("o"), st.integers(0, 1), st.just(1), st.just(bytes(32)), st.just([]), at),
        KeepCosignature: st.builds(KeepCosignature, st.just(1), st.just("w"), st.sampled_from(("a", "b")), at),
        Seal: st.builds(Seal, st.just(1), st.just(b""), st.just([(8, 0, bytes(32))]), st.none(), at),
        Sweep: st.builds(Sweep, at, at, at, st.integers(1, 3), tasks_before_us=at),
    }
    of_kind[ImportRevocations] = st.builds(
        ImportRevocations,
        st.lists(
            st.builds(
                Revocation,
                agents,
                st.sampled_from(DELEGATIONS),
                st.sampled_from((NOW_US, NOW_US + 5)),
                st.just(NOW_US + HOUR_US),
            ),
            max_size=2,
        ),
        agents,
        st.just("kid"),
        st.just(number),
        st.just(b"d"),
        st.just(0),
        st.just(1),
        actor,
        at,
    )
    assert of_kind.keys() == set(handlers._HANDLERS)
    often = [RecordUsage, Reserve, SettleReservation]
    return st.sampled_from(kinds or [*of_kind, *often, *often]).flatmap(lambda kind: of_kind[kind])


# Reservations that the rest of a log can settle, charge and refund.
HELD = [
    Reserve(f"t{n}", "task.execute", Estimate(200), HOUR_US, "key:x", "default", NOW_US + n * 1000, chain=CHAINS[1])
    for n in range(3)
]


@st.composite
def logs(draw: st.DrawFn) -> list[Envelope]:
    size = draw(st.integers(1, 14))
    held = [Envelope(number, unit, True) for number, unit in enumerate(HELD)] if draw(st.booleans()) else []
    keys = st.none() | st.builds(
        Idempotency, st.sampled_from((b"k1", b"k2")), st.sampled_from((b"r1", b"r2")), st.just(NOW_US)
    )
    numbers = range(len(held), len(held) + size)
    return held + [Envelope(number, draw(units_at(number)), draw(st.booleans()), draw(keys)) for number in numbers]


def left_nothing(envelope: Envelope, result: Any) -> bool:
    """Whether a unit wrote nothing; an authorisation may have closed what had lapsed before it was denied."""
    failed = isinstance(result, Refusal | Denied | UsageConflict | StreamsMoved | Failed | NotWritten)
    return failed and not isinstance(envelope.unit, Reserve)


@settings(max_examples=60, deadline=None)
@given(log=logs(), sizes=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 7))), few=st.sampled_from((0, 2)))
def test_any_grouping_equals_running_the_successful_units_one_by_one(
    open_store: OpenStore, log: list[Envelope], sizes: list[tuple[int, int]], few: int
) -> None:
    """However many of those that come next are prepared behind a commit."""
    with open_store() as grouped, open_store() as one_by_one, pytest.MonkeyPatch.context() as patched:
        patched.setattr(usage_module, "FEW", few)
        writer = Writer(grouped, zeros)
        answers: list[Answer] = []
        rest = list(log)
        for size, ahead in [*sizes, (len(log), 0)]:
            answers += writer.run(rest[:size], meanwhile=lambda: False)
            del rest[:size]
            for envelope in rest[:ahead]:
                writer.prepare(envelope)
        assert [answer.number for answer in answers] == [envelope.number for envelope in log]
        done = [
            (envelope, answer.result)
            for envelope, answer in zip(log, answers, strict=True)
            if not left_nothing(envelope, answer.result)
        ]
        alone = Writer(one_by_one, zeros)
        assert [alone.run([envelope])[0].result for envelope, _ in done] == [result for _, result in done]
        assert contents(grouped) == contents(one_by_one)
        assert_log_is_whole(grouped)


@st.composite
def runs_of_reports(draw: st.DrawFn) -> tuple[list[AnyUnit], list[RecordUsage]]:
    """Budgets and reservations, or none, and reports that follow each other."""
    before: list[AnyUnit] = [*draw(st.sampled_from(([], HELD)))]
    before += [
        SyncBudgets(budgets, "asapd", NOW_US) for budgets in draw(st.lists(st.sampled_from(BUDGETS), max_size=2))
    ]
    return before, draw(st.lists(units_at(5, RecordUsage), min_size=2, max_size=8))


@settings(max_examples=150, deadline=None)
@given(drawn=runs_of_reports(), ahead=st.integers(0, 8))
def test_reports_that_share_a_commit_are_recorded_as_if_each_had_its_own(
    open_store: OpenStore, drawn: tuple[list[AnyUnit], list[RecordUsage]], ahead: int
) -> None:
    """Refused and failing ones among them included: each hears what it would have heard alone."""
    before, reports = drawn
    with open_store() as together, open_store() as one_by_one, pytest.MonkeyPatch.context() as patched:
        patched.setattr(usage_module, "FEW", 0)
        for connection in (together, one_by_one):
            for unit in before:
                run(Writer(connection, zeros), unit)
        envelopes = [Envelope(number, unit, False) for number, unit in enumerate(reports)]
        writer = Writer(together, zeros)
        writer.run([Envelope(99, usage(event(id="first")), False)], meanwhile=lambda: False)
        run(Writer(one_by_one, zeros), usage(event(id="first")))
        for envelope in envelopes[:ahead]:
            writer.prepare(envelope)
        answers = writer.run(envelopes)
        alone = Writer(one_by_one, zeros)
        apart = [alone.run([envelope])[0] for envelope in envelopes]
        assert [answer.result for answer in answers] == [answer.result for answer in apart]
        assert any(answer.alerts for answer in answers) == any(answer.alerts for answer in apart)
        assert contents(together) == contents(one_by_one)
        assert_log_is_whole(together)


def test_replay_runs_a_log_one_by_one(connection: apsw.Connection) -> None:
    log = [Envelope(number, usage(event(id=f"e{number % 2}")), False) for number in range(3)]
    assert [result.recorded for result in replay(connection, log)] == [1, 1, 0]


# --- units that fail


def test_names_of_a_refused_unit_are_forgotten_and_can_be_used_again(connection: apsw.Connection) -> None:
    writer = Writer(connection)
    assert run(writer, usage(event())).recorded == 1
    names = connection.execute("SELECT count(*) FROM name").get
    task = RecordTask(TaskEvent("t", "new agent", "new consumer", "started", NOW_US), "key:x", "new tenant", NOW_US)
    moved = msgspec.structs.replace(task, task=msgspec.structs.replace(task.task, timestamp_us=NOW_US + 1))
    broken = usage(event(id="x", source="new source", model="new model", tokens_in=2**63))
    answers = writer.run([Envelope(number, unit, False) for number, unit in enumerate((broken, task, moved, broken))])
    assert [type(answer.result) for answer in answers] == [Failed, RowWritten, Refusal, Failed]
    assert connection.execute("SELECT count(*) FROM name").get == names + 3
    assert run(writer, usage(event(id="y", model="new model", source="new agent"))).recorded == 1
    stored = connection.execute(
        "SELECT m.name, s.name FROM usage u JOIN name m ON m.id = model JOIN name s ON s.id = source ORDER BY seq DESC"
    ).fetchone()
    assert stored == ("new model", "new agent")
    assert_log_is_whole(connection)


def test_names_without_end_are_not_all_remembered(connection: apsw.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asapd.store.tx.MAX_NAMES", 5)
    writer = Writer(connection)
    for number in range(40):
        unit = usage(event(id=f"e{number}", agent=f"urn:asap:agent:{number % 20}"))
        assert run(writer, unit).recorded == 1
        assert len(writer._tx.names) <= 5 + len(("tenant", "agent", "consumer"))
    assert connection.execute("SELECT count(DISTINCT agent), count(DISTINCT tenant) FROM usage").fetchone() == (20, 1)


def test_a_unit_that_fails_after_its_audit_entries_leaves_the_chain_whole(connection: apsw.Connection) -> None:
    writer = Writer(connection)
    bad = usage(event(id="a"), event(id="b", tokens_in=2**63))
    group = [usage(event(id="1")), bad, usage(event(id="2")), bad, Note("noted", "asapd", "x", {}, NOW_US)]
    answers = writer.run([Envelope(number, unit, False) for number, unit in enumerate(group)])
    assert [type(answer.result) for answer in answers] == [Recorded, Failed, Recorded, Failed, RowWritten]
    assert answers[-1].result == RowWritten(3)
    assert_log_is_whole(connection)


def test_a_failed_unit_names_its_kind_and_the_error_and_logs_the_traceback(
    connection: apsw.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    result = run(Writer(connection), usage(event(tokens_in=2**63)))
    assert isinstance(result, Failed)
    assert result.error.startswith("RecordUsage: OverflowError")
    assert "Traceback" in caplog.text


def test_touching_an_append_only_row_is_a_bug_of_that_unit_alone(connection: apsw.Connection) -> None:
    writer = Writer(connection)
    connection.execute(
        "CREATE TRIGGER bug AFTER INSERT ON task BEGIN UPDATE task SET error = 'changed' WHERE seq = NEW.seq; END"
    )
    task = RecordTask(TaskEvent("t", "a", "b", "started", NOW_US), "key:x", "default", NOW_US)
    answers = writer.run([Envelope(1, task, False), Envelope(2, usage(event()), False)])
    assert [type(answer.result) for answer in answers] == [Failed, Recorded]
    assert connection.execute("SELECT count(*) FROM task").get == 0


def test_a_handler_whose_error_ended_the_transaction_takes_the_whole_commit_with_it(
    connection: apsw.Connection,
) -> None:
    writer = Writer(connection)
    connection.execute("CREATE TRIGGER bug AFTER INSERT ON task BEGIN SELECT RAISE(ROLLBACK, 'all of it'); END")
    task = RecordTask(TaskEvent("t", "a", "b", "started", NOW_US), "key:x", "default", NOW_US)
    answers = writer.run([Envelope(1, usage(event()), False), Envelope(2, task, False)])
    assert [type(answer.result) for answer in answers] == [NotWritten, NotWritten]
    assert connection.execute("SELECT count(*) FROM usage").get == 0
    assert run(writer, usage(event())).recorded == 1
    assert_log_is_whole(connection)


# --- a full disk


@contextmanager
def no_more_pages(connection: apsw.Connection) -> Iterator[None]:
    connection.pragma("max_page_count", connection.pragma("page_count"))
    try:
        yield
    finally:
        connection.pragma("max_page_count", 1 << 30)


def test_on_a_full_disk_nothing_of_the_commit_is_written_and_work_goes_on_once_there_is_room(
    connection: apsw.Connection,
) -> None:
    writer = Writer(connection)
    run(writer, usage(event(id="before")))
    before = contents(connection)
    large = usage(*(event(id=f"large{number}", error="x" * 5000) for number in range(50)))
    small = usage(event(id="small", model="a new model"))
    key = Idempotency(b"key", b"request", NOW_US)
    with no_more_pages(connection):
        answers = writer.run([Envelope(1, small, True, key), Envelope(2, large, False), Envelope(3, small, False)])
        assert [(type(answer.result), answer.result.full) for answer in answers] == [(NotWritten, True)] * 3
        assert contents(connection) == before
    assert run(writer, small, key).recorded == 1
    assert run(writer, large).recorded == 50
    model = connection.execute("SELECT name.name FROM usage JOIN name ON name.id = model WHERE usage.id = 'small'").get
    assert model == "a new model"
    assert_log_is_whole(connection)


def test_a_store_locked_by_another_program_fails_the_commit_and_not_as_full(connection: apsw.Connection) -> None:
    writer = Writer(connection)
    connection.set_busy_timeout(0)
    other = apsw.Connection(connection.filename)
    other.execute("BEGIN IMMEDIATE")
    result = run(writer, usage(event()))
    assert isinstance(result, NotWritten)
    assert not result.full
    other.close()
    assert run(writer, usage(event())).recorded == 1


def test_a_disk_that_fails_in_the_middle_of_a_commit_rolls_all_of_it_back(connection: apsw.Connection) -> None:
    def fail() -> None:
        raise apsw.IOError("disk I/O error")

    writer = Writer(connection)
    before = contents(connection)
    connection.create_scalar_function("fail", fail, 0)
    connection.execute("CREATE TEMP TRIGGER bad_sector AFTER INSERT ON main.task BEGIN SELECT fail(); END")
    task = RecordTask(TaskEvent("t", "new agent", "b", "started", NOW_US), "key:x", "default", NOW_US)
    answers = writer.run([Envelope(1, usage(event()), False), Envelope(2, task, False)])
    assert [(type(answer.result), answer.result.full) for answer in answers] == [(NotWritten, False)] * 2
    assert not connection.in_transaction
    assert contents(connection) == before
    connection.execute("DROP TRIGGER temp.bad_sector")
    assert [type(answer.result) for answer in writer.run([Envelope(3, task, False)])] == [RowWritten]
    assert_log_is_whole(connection)


# --- idempotency


def test_the_same_key_and_request_replay_the_result_and_write_nothing(connection: apsw.Connection) -> None:
    writer = Writer(connection)
    key = Idempotency(b"key", b"request", NOW_US)
    unit = usage(event(id=""), event(id=""))
    first = writer.run([Envelope(1, unit, False, key)])[0]
    before = contents(connection)
    again = writer.run([Envelope(2, unit, False, key)])[0]
    assert again == Answer(2, first.result, replayed=True)
    assert not first.replayed
    assert contents(connection) == before


def test_the_same_key_twice_in_one_commit_is_written_once(connection: apsw.Connection) -> None:
    key = Idempotency(b"key", b"request", NOW_US)
    first, second = Writer(connection).run([Envelope(n, usage(event(id="")), False, key) for n in range(2)])
    assert (second.result, second.replayed) == (first.result, True)
    assert connection.execute("SELECT count(*) FROM usage").get == 1


def test_the_same_key_with_another_request_is_refused(connection: apsw.Connection) -> None:
    writer = Writer(connection)
    run(writer, usage(event()), Idempotency(b"key", b"request", NOW_US))
    answer = writer.run([Envelope(2, usage(event(id="x")), False, Idempotency(b"key", b"another", NOW_US))])[0]
    assert isinstance(answer.result, Refusal)
    assert answer.result.code == "idempotency_key_reused"
    assert not answer.replayed
    assert connection.execute("SELECT count(*) FROM usage").get == 1


def test_a_refused_or_failed_request_leaves_its_key_free(connection: apsw.Connection) -> None:
    writer = Writer(connection)
    key = Idempotency(b"key", b"request", NOW_US)
    assert isinstance(run(writer, RemoveAgent("urn:asap:agent:none", "key:x", NOW_US), key), Refusal)
    assert isinstance(run(writer, usage(event(tokens_in=2**63)), key), Failed)
    assert run(writer, usage(event()), key).recorded == 1


def test_every_kind_of_result_comes_back_from_a_replay_as_it_was(connection: apsw.Connection) -> None:
    writer = Writer(connection)
    agent = AgentRecord(AGENTS[0], "http://x", "default", sla={"availability": 99.5})
    for number, unit in enumerate(
        (
            PutAgent(agent, "key:x", NOW_US),
            Reserve("t", "task.execute", Estimate(5), HOUR_US, "key:x", "default", NOW_US, chain=CHAINS[1]),
            CreateKey(ApiKey("key_1", "n", "reader", ["*"], None, False, b"\xff\x00", NOW_US), "key:x", NOW_US),
            RecordTask(TaskEvent("t", "a", "b", "started", NOW_US), "key:x", "default", NOW_US),
            Sweep(NOW_US, 0, 0),
        )
    ):
        key = Idempotency(bytes([number]), b"request", NOW_US)
        assert run(writer, unit, key) == run(writer, unit, key)
    assert run(writer, PutAgent(agent, "key:x", NOW_US)) == AgentsChanged()


# --- serving


class Served:
    """A writer that serves one end of a socket pair in a thread, and a blocking client on the other end."""

    def __init__(self, **options: Any) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.ours.settimeout(10)
        self.commits: list[list[int]] = []
        self.first = threading.Event()
        self.gate = threading.Event()
        self.after_step: Callable[[int], None] = lambda _: None
        self.thread = threading.Thread(target=self._serve, kwargs=options)

    def _serve(self, **options: Any) -> None:
        with self.theirs:
            serve(self.theirs, self, **options)  # type: ignore[arg-type] -- it uses `run` and `prepare`

    def run(
        self,
        group: Sequence[Envelope],
        joining: Callable[[], Sequence[Envelope]] = tuple,
        meanwhile: Callable[[], bool] = lambda: False,
    ) -> list[Answer]:
        """As the writer does it, with one envelope to a step."""
        joined = [] if group else list(joining())
        self.commits.append([])
        answers: list[Answer] = []
        for envelope in group:
            answers.append(self._step(envelope))
            joined += joining()
            if joined:
                break
        answers = [self._step(envelope) for envelope in joined] + answers
        while meanwhile():
            pass
        return answers

    def prepare(self, _: Envelope) -> None:
        """It has nothing to prepare."""

    def _step(self, envelope: Envelope) -> Answer:
        self.commits[-1].append(envelope.number)
        self.first.set()
        assert self.gate.wait(10)
        self.after_step(envelope.number)
        return Answer(envelope.number, RowWritten(envelope.number))

    def send(self, *envelopes: Envelope) -> None:
        bodies = [msgspec.msgpack.encode(envelope) for envelope in envelopes]
        self.ours.sendall(b"".join(HEADER.pack(len(body)) + body for body in bodies))

    def receive(self, count: int) -> list[int]:
        numbers = []
        for _ in range(count):
            (length,) = HEADER.unpack(self.ours.recv(HEADER.size, socket.MSG_WAITALL))
            body = self.ours.recv(length, socket.MSG_WAITALL)
            numbers.append(msgspec.msgpack.decode(body, type=Answer).number)
        return numbers

    def end(self) -> None:
        self.gate.set()
        self.ours.close()
        self.thread.join(10)
        assert not self.thread.is_alive()


@contextmanager
def served(**options: Any) -> Iterator[Served]:
    server = Served(**options)
    server.thread.start()
    try:
        yield server
    finally:
        server.end()


def bulk(number: int, rows: int = 1) -> Envelope:
    return Envelope(number, usage(*(event(id=f"{number}.{row}") for row in range(rows))), False)


def decision(number: int) -> Envelope:
    return Envelope(number, Sweep(NOW_US, 0, 0), True)


def test_decisions_go_ahead_of_the_ingest_that_waits() -> None:
    with served(rows_per_commit=4) as server:
        server.send(bulk(1))
        assert server.first.wait(10)
        server.send(bulk(2, 3), bulk(3, 2), decision(4), bulk(5), decision(6))
        server.gate.set()
        assert server.receive(6) == [4, 6, 1, 2, 3, 5]
        assert server.commits == [[1, 4, 6], [2], [3, 5]]


def test_decisions_cut_short_the_commit_that_is_under_way_and_share_it() -> None:
    with served(rows_per_commit=10) as server:
        arriving = {3: (decision(8), decision(9)), 4: (decision(10),)}
        server.after_step = lambda number: server.send(*arriving.pop(number, ()))
        server.send(bulk(1))
        assert server.first.wait(10)
        server.send(*(bulk(number) for number in range(2, 7)))
        server.gate.set()
        assert server.receive(9) == [1, 8, 9, 2, 3, 10, 4, 5, 6]
        assert server.commits == [[1], [2, 3, 8, 9], [4, 10], [5, 6]]


@pytest.mark.parametrize(
    ("seconds", "commits"), [(60, [[1, 11], [2, 3], [4, 5], [6, 7], [8, 9], [10]]), (0, [[1, 11], [*range(2, 11)]])]
)
def test_commits_soon_after_a_decision_take_in_a_step_of_ingest_each(
    monkeypatch: pytest.MonkeyPatch, seconds: float, commits: list[list[int]]
) -> None:
    monkeypatch.setattr("asapd.store.writer.ROWS_PER_STEP", 2)
    monkeypatch.setattr("asapd.store.writer.SMALL_S", seconds)
    with served(rows_per_commit=10) as server:
        server.send(bulk(1))
        assert server.first.wait(10)
        server.send(*(bulk(number) for number in range(2, 11)), decision(11))
        server.gate.set()
        server.receive(11)
        assert server.commits == commits


def test_decisions_that_keep_coming_leave_ingest_a_step_between_them() -> None:
    with served(rows_per_commit=10) as server:
        server.after_step = lambda number: server.send(decision(number + 1)) if 10 <= number < 14 else None
        server.send(bulk(1))
        assert server.first.wait(10)
        server.send(bulk(2), bulk(3), bulk(4), decision(10))
        server.gate.set()
        server.receive(9)
        assert server.commits == [[1, 10], [11], [2, 12], [13], [3, 14], [4]]


def test_bulk_is_read_though_a_decision_comes_during_every_commit() -> None:
    urgent, theirs = socket.socketpair()

    class Busy(Served):
        left = 50

        def run(
            self,
            group: Sequence[Envelope],
            joining: Callable[[], Sequence[Envelope]] = tuple,
            meanwhile: Callable[[], bool] = lambda: False,
        ) -> list[Answer]:
            answers = super().run(group, joining, meanwhile)
            if self.left:  # as the commit goes to the disk
                self.left -= 1
                body = msgspec.msgpack.encode(decision(100 + self.left))
                urgent.sendall(HEADER.pack(len(body)) + body)
            return answers

    with urgent, theirs:
        server = Busy(rows_per_commit=10, decisions=theirs)
        server.thread.start()
        try:
            body = msgspec.msgpack.encode(decision(99))
            urgent.sendall(HEADER.pack(len(body)) + body)
            assert server.first.wait(10)
            server.send(bulk(1))
            server.gate.set()
            server.receive(51)
            urgent.close()
        finally:
            server.end()
    assert [1] in [commit[:1] for commit in server.commits[:5]]


def coming(*waves: Sequence[Envelope]) -> Callable[[], Sequence[Envelope]]:
    """Decisions that come one wave after the other, each when it is asked for."""
    left = deque(waves)
    return lambda: left.popleft() if left else ()


def test_a_report_that_is_refused_keeps_no_other_of_its_commit_from_its_answer(connection: apsw.Connection) -> None:
    writer = Writer(connection)
    assert run(writer, usage(event(id="taken"))).recorded == 1
    noted = Note("noted", "asapd", "x", {}, NOW_US)
    conflict = usage(event(id="taken", tokens_in=7))
    group = [bulk(1, 600), Envelope(2, noted, False), bulk(3, 600), Envelope(4, conflict, False), bulk(5, 2)]
    answers = writer.run(group)
    assert [answer.number for answer in answers] == [1, 2, 3, 4, 5]
    assert [type(answer.result) for answer in answers] == [Recorded, RowWritten, Recorded, UsageConflict, Recorded]
    assert connection.execute("SELECT count(*) FROM usage").get == 1 + 600 + 600 + 2
    assert_log_is_whole(connection)


def test_who_is_refused_all_the_time_has_few_commits_begin_again(connection: apsw.Connection) -> None:
    writer = Writer(connection)
    assert run(writer, usage(event(id="taken"))).recorded == 1
    rolled_back: list[int] = []
    connection.set_rollback_hook(lambda: rolled_back.append(number))
    for number in range(WARY_COMMITS + 2):
        assert len(writer.run([], coming([decision(3_000 + number)]))) == 1, "of which none is bulk"
        conflict = Envelope(number, usage(event(id="taken", tokens_in=7)), False)
        answers = writer.run([bulk(1_000 + number, 2), conflict, bulk(2_000 + number, 2)])
        assert [type(answer.result) for answer in answers] == [Recorded, UsageConflict, Recorded]
    assert rolled_back == [0, WARY_COMMITS + 1]
    assert_log_is_whole(connection)


def test_a_commit_that_begins_again_takes_the_decisions_that_came_meanwhile(connection: apsw.Connection) -> None:
    writer = Writer(connection)
    assert run(writer, usage(event(id="taken"))).recorded == 1
    group = [bulk(1, 1_000), Envelope(2, usage(event(id="taken", tokens_in=7)), False)]
    answers = writer.run(group, coming((), [decision(3)]))
    assert [answer.number for answer in answers] == [3, 1], "cut short, so the rest is of the next commit"
    assert isinstance(writer.run(group[1:])[0].result, UsageConflict)
    assert connection.execute("SELECT count(*) FROM usage").get == 1_001
    assert_log_is_whole(connection)


def test_a_commit_that_is_cut_short_has_what_was_done_and_nothing_else(connection: apsw.Connection) -> None:
    writer = Writer(connection)
    group = [bulk(1, 600), bulk(2, 400), bulk(3, 1), bulk(4, 1)]
    answers = writer.run(group, coming([decision(5), decision(6)]))
    assert [answer.number for answer in answers] == [5, 6, 1, 2], "as many as run together"
    assert connection.execute("SELECT count(*) FROM usage").get == 1_000
    assert [answer.number for answer in writer.run(group[2:], coming())] == [3, 4]
    assert connection.execute("SELECT count(*) FROM usage").get == 1_002


def test_a_commit_takes_in_the_decisions_that_come_while_it_decides_up_to_a_number(
    connection: apsw.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asapd.store.writer.DECISIONS_PER_COMMIT", 3)
    waves = coming([decision(1)], [decision(2), decision(3)], [decision(4)])
    assert [answer.number for answer in Writer(connection).run([], waves)] == [1, 2, 3]
    assert [envelope.number for envelope in waves()] == [4]


def test_decisions_that_share_a_commit_which_fails_are_told_so(connection: apsw.Connection) -> None:
    def fail() -> None:
        raise apsw.IOError("disk I/O error")

    writer = Writer(connection)
    connection.create_scalar_function("fail", fail, 0)
    connection.execute("CREATE TEMP TRIGGER bad_sector AFTER INSERT ON main.task BEGIN SELECT fail(); END")
    task = RecordTask(TaskEvent("t", "a", "b", "started", NOW_US), "key:x", "default", NOW_US)
    before = contents(connection)
    answers = writer.run([bulk(1), bulk(2)], coming([decision(3), Envelope(4, task, True)]))
    assert {answer.number: type(answer.result) for answer in answers} == dict.fromkeys([1, 2, 3, 4], NotWritten)
    assert contents(connection) == before


def test_what_comes_during_a_large_commit_is_of_the_next_one_up_to_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asapd.store.writer.LARGE_ROWS", 3)
    with served(rows_per_commit=5) as server:
        server.send(bulk(1, 3))
        assert server.first.wait(10)
        # Each takes more than half of what is decoded in one go, and all more than a socket holds.
        large = [usage(event(id=str(number), error="x" * (600 << 10))) for number in range(2, 9)]
        server.send(*(Envelope(number, unit, False) for number, unit in enumerate(large, 2)))
        server.gate.set()
        assert server.receive(8) == list(range(1, 9))
        assert server.commits == [[1], [2, 3, 4, 5, 6], [7, 8]]


def test_a_commit_beside_which_the_next_is_read_succeeds_or_fails_as_any(connection: apsw.Connection) -> None:
    writer = Writer(connection)
    answers = writer.run([bulk(1, 2)], meanwhile=lambda: True)
    assert isinstance(answers[0].result, Recorded)
    before = contents(connection)
    connection.set_commit_hook(lambda: True)  # SQLite then rolls back
    answers = writer.run([bulk(2, 2)], meanwhile=lambda: True)
    assert isinstance(answers[0].result, NotWritten)
    connection.set_commit_hook(None)
    assert contents(connection) == before
    assert isinstance(writer.run([bulk(2, 2)])[0].result, Recorded)


def test_a_large_commit_needs_no_thread(connection: apsw.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", none)
    assert isinstance(Writer(connection).run([bulk(1, 2)], meanwhile=lambda: False)[0].result, Recorded)
    assert connection.execute("SELECT count(*) FROM usage").get == 2


def test_a_request_larger_than_a_commit_is_a_commit_of_its_own() -> None:
    with served(rows_per_commit=2) as server:
        server.send(bulk(1))
        assert server.first.wait(10)
        server.send(bulk(2, 5), bulk(3))
        server.gate.set()
        server.receive(3)
        assert server.commits == [[1], [2], [3]]


def test_what_had_arrived_when_the_peer_left_is_still_committed() -> None:
    server = Served(rows_per_commit=1)
    server.thread.start()
    server.send(bulk(1))
    assert server.first.wait(10)
    server.send(bulk(2), decision(3), bulk(4))
    server.end()
    assert server.commits == [[1, 3], [2], [4]]


def test_a_peer_that_leaves_without_reading_its_answers_ends_the_service() -> None:
    server = Served()
    server.thread.start()
    server.gate.set()
    server.send(bulk(1))
    server.ours.recv(1, socket.MSG_PEEK)
    server.end()
    assert server.commits == [[1]]


def test_half_a_frame_at_the_end_is_dropped() -> None:
    with served() as server:
        server.gate.set()
        server.send(bulk(1))
        assert server.receive(1) == [1]
        server.ours.sendall(HEADER.pack(100) + b"half")
    assert server.commits == [[1]]


def test_a_commit_that_is_not_full_waits_for_more_to_share_it() -> None:
    with served(rows_per_commit=3, wait_us=60_000_000) as server:
        server.gate.set()
        server.send(bulk(1))
        server.send(bulk(2))
        assert not server.first.is_set()
        server.send(bulk(3))
        assert server.receive(3) == [1, 2, 3]
    assert server.commits == [[1, 2, 3]]


def test_a_decision_ends_the_wait_for_a_fuller_commit() -> None:
    with served(wait_us=60_000_000) as server:
        server.gate.set()
        server.send(bulk(1))
        server.send(decision(2))
        assert sorted(server.receive(2)) == [1, 2]


def test_the_wait_for_a_fuller_commit_ends_by_itself() -> None:
    with served(wait_us=1_000) as server:
        server.gate.set()
        server.send(bulk(1))
        assert server.receive(1) == [1]


def test_the_end_of_the_peer_ends_the_wait_for_a_fuller_commit() -> None:
    server = Served(wait_us=60_000_000)
    server.thread.start()
    server.send(bulk(1))
    server.end()
    assert server.commits == [[1]]


def test_a_commit_that_many_shared_makes_the_next_one_wait_for_what_comes() -> None:
    with served(rows_per_commit=8, busy_wait_us=60_000_000, busy_gap_us=60_000_000) as server:
        server.gate.set()
        server.send(*(bulk(number) for number in range(1, 9)))
        assert server.receive(8) == list(range(1, 9))
        server.send(bulk(9, 4))
        server.send(bulk(10, 4))
        assert server.receive(2) == [9, 10]
        server.send(bulk(11))
        assert server.receive(1) == [11]
    assert server.commits == [list(range(1, 9)), [9, 10], [11]]


def test_what_nobody_waits_for_is_done_once_a_commit_is_answered() -> None:
    answered: list[int] = []
    rested: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def rest(much: bool) -> None:
        answered.extend(server.receive(1))
        rested.put(much)

    with served(rest=rest) as server:
        server.gate.set()
        server.send(bulk(1))
        assert not rested.get(timeout=10), "one event is not much"
        server.send(bulk(2, 8))
        assert rested.get(timeout=10)
        server.send(decision(3))
        assert not rested.get(timeout=10), "a decision came"
        server.send(bulk(4, 8))
        assert not rested.get(timeout=10), "not long ago"
    assert answered == [1, 2, 3, 4]


def test_the_wait_of_busy_times_ends_when_nothing_comes() -> None:
    with served(rows_per_commit=8, busy_wait_us=60_000_000, busy_gap_us=1_000) as server:
        server.gate.set()
        server.send(*(bulk(number) for number in range(1, 9)))
        assert server.receive(8) == list(range(1, 9))
        server.send(bulk(9))
        assert server.receive(1) == [9]
