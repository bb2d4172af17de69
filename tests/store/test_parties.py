"""What is debited across tenants is found again by whatever takes it back, corrects it or counts it anew."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from asapd.core.budgets import Budget, Limits, Match
from asapd.core.repricing import Correction
from asapd.store import delegation_news, parties
from asapd.store.agents import AgentRecord
from asapd.store.budget_queries import get_budget
from asapd.store.ledger_queries import find_account, is_cause_seen
from asapd.store.reservation_queries import get_reservation
from asapd.store.task_spend import spend_by_task
from asapd.store.units.agents import ImportAgentKey, RetireAgentKey, SyncAgents, SyncKeys
from asapd.store.units.delegations import RegisterDelegation, Reserve, SyncBudgets
from asapd.store.units.usage import CorrectCosts
from asapd.store.visibility import EVERYTHING, Visibility
from asapd.wire.keys import jwk_thumbprint
from tests.store.ledger_desk import CHILD, ROOT, USD, A, B, C, Ledger, code, link

LIMITED = Budget("under", Match(delegation="root"), "day", "UTC", hard=Limits(microusd=100 * USD, tasks=9))


@pytest.fixture
def ledger(connection: object) -> Ledger:
    """A of tenant ta gives to B of tenant tb."""
    opened = Ledger(connection)  # type: ignore[arg-type]  # the fixture of tests/store
    agents = [AgentRecord(agent, "http://127.0.0.1:1", tenant) for agent, tenant in ((A, "ta"), (B, "tb"))]
    opened.submit(SyncAgents(agents, "asapd", opened.now_us))
    return opened


def counted(ledger: Ledger) -> tuple[int, int]:
    """Spent and tasks of the budget."""
    shown = get_budget(ledger.connection, EVERYTHING, "under", ledger.now_us)
    assert shown is not None
    return int(shown["spent"]["usd"] * USD), shown["spent"]["tasks"]


@pytest.mark.parametrize("under", ["delegation", "reservation"])
@pytest.mark.parametrize(("tenant", "is_bound"), [("default", False), ("tb", True)])
def test_every_book_agrees_on_what_was_debited_across_tenants(
    ledger: Ledger, under: str, tenant: str, *, is_bound: bool
) -> None:
    ledger.register(ROOT)
    named = {"delegation": "root"} if under == "delegation" else {"reservation": ledger.reserved(ROOT)}
    flags = ledger.use(USD, tenant=tenant, is_bound=is_bound, **named)
    assert flags == ({"unreserved"} if under == "delegation" else set())
    seq, account = ledger.newest(), find_account(ledger.connection, A, "root")
    assert account is not None
    ledger.submit(SyncBudgets([LIMITED], "key:x", ledger.now_us))
    for cost in (USD, 3 * USD):
        page = spend_by_task(ledger.connection, account, limit=9)
        assert [(one.task_id, one.spent_microusd) for one in page.tasks] == [("t", cost)]
        assert page.unattributed_microusd == 0
        assert (ledger.counters("root")[0], ledger.counters("root")[2]) == (cost, 1)
        assert counted(ledger) == (cost, 1)
        if cost == USD:
            change = Correction(seq, USD, 3 * USD, "priced", 2 * USD)
            ledger.submit(CorrectCosts([change], "v2", "key:x", ledger.now_us))
    ledger.void(seq)
    assert ledger.counters("root")[0] == 0
    assert counted(ledger)[0] == 0


@pytest.mark.parametrize("under", ["delegation", "reservation"])
def test_a_third_tenant_debits_nothing_and_is_told_what_an_unknown_id_says(ledger: Ledger, under: str) -> None:
    ledger.register(ROOT)
    held = ledger.reserved(ROOT)
    flags = [
        ledger.use(USD, tenant="tc", **{under: name}, task_id=name)
        for name in ({"delegation": "root", "reservation": held}[under], "none")
    ]
    assert flags[0] == flags[1]
    assert ledger.counters("root") == (0, USD, 1, 0)


def test_a_token_is_registered_for_its_delegators_tenant_or_for_whom_it_came_down_to(ledger: Ledger) -> None:
    def tenant_of(*chain: object, key: str) -> object:
        outcome = ledger.submit(RegisterDelegation(list(chain), "key:x", key, ledger.now_us, is_bound=key != "default"))  # type: ignore[arg-type]  # links
        return ledger.connection.execute("SELECT tenant FROM delegation WHERE account = ?", (outcome.account,)).get

    assert tenant_of(ROOT, key="tb") == "ta"
    assert tenant_of(link("r1", C, B), key="default") == "tb"
    assert tenant_of(link("r2", C, C), key="default") == "default"
    assert tenant_of(link("r3", C, C), key="tz") == "tz"
    # An agent that nobody knows stands for whom it was given to.
    given = link("g", A, C)
    assert tenant_of(given, link("below", C, C), key="ta") == "ta"
    refused = ledger.submit(
        RegisterDelegation([given, link("other", C, C)], "key:x", "tz", ledger.now_us, is_bound=True)
    )
    assert code(refused) == "forbidden"


def test_a_reservation_of_nobodys_key_is_the_delegations(ledger: Ledger) -> None:
    ledger.register(ROOT)
    ledger.reserved(ROOT)
    assert ledger.connection.execute("SELECT tenant FROM reservation").get == "ta"
    wish = ledger.wish(ROOT, task="t2", tenant="tb")
    bound = Reserve(**{name: getattr(wish, name) for name in wish.__struct_fields__} | {"is_bound": True})
    ledger.submit(bound)
    assert ledger.connection.execute("SELECT tenant FROM reservation WHERE task_id = 't2'").get == "tb"


def test_work_without_permission_is_told_to_its_agents_tenant(ledger: Ledger) -> None:
    ledger.use(USD, delegation="none")
    ledger.use(USD, delegation="none", tenant="tz", agent=C)
    ledger.use(USD, delegation="none", agent=C)
    told = delegation_news.news_after(ledger.connection, 0, 9)
    assert [one.tenant for one in told] == ["tb", "tz", "default"]


def test_the_directory_says_whose_an_agent_is(ledger: Ledger) -> None:
    assert [parties.home(ledger.connection, agent) for agent in (A, B, C)] == ["ta", "tb", None]


KEY = bytes(range(1, 33))


@pytest.mark.parametrize("source", ["held", "import", "retired"])
def test_an_agent_of_which_the_host_has_a_key_is_the_hosts_whoever_shows_its_chain_first(
    ledger: Ledger, source: str
) -> None:
    if source == "held":
        ledger.submit(SyncKeys([(C, KEY)], None, "asapd", ledger.now_us, 0))
    else:
        ledger.submit(ImportAgentKey(C, KEY, "key:x", ledger.now_us, 0))
    if source == "retired":
        ledger.submit(RetireAgentKey(C, jwk_thumbprint(KEY), "key:x", ledger.now_us, 0))
    assert parties.home(ledger.connection, C) == "default"
    chain = [link("r", C, B), link("own", C, C), link("nobody", C, "urn:asap:agent:nobody")]
    for one in chain[:1] + chain[2:]:
        unit = RegisterDelegation([one], "key:x", "tb", ledger.now_us, is_bound=True)
        assert not hasattr(ledger.submit(unit), "code")
    refused = ledger.submit(RegisterDelegation([chain[1]], "key:x", "tb", ledger.now_us, is_bound=True))
    assert code(refused) == "forbidden"
    held = get_reservation(ledger.connection, ledger.reserved(chain[0]))
    assert held is not None
    assert (held.owner, held.holder) == ("default", "tb")
    # What it gives to an agent that nobody knows is there for who showed it.
    assert ledger.connection.execute("SELECT tenant FROM delegation WHERE id = 'nobody'").get == "tb"


SETTLED = 500_000


def spent_by(ledger: Ledger) -> list[int]:
    """What the root and its child have spent."""
    return [ledger.counters(one)[0] for one in ("root", "child")]


@pytest.mark.parametrize(
    ("by", "refunded_to"),
    [
        (Visibility("ta"), None),  # of the tenant of the root alone
        (Visibility(None, (A,)), None),
        (Visibility(None, (C,)), None),  # who spent it
        (Visibility("tb"), ["child"]),
        (Visibility(None, (B,)), ["child"]),
        (Visibility(None, (B, C)), ["child"]),
        (Visibility(None, (A, B)), ["child", "root"]),
        (EVERYTHING, ["child", "root"]),
    ],
)
def test_a_refund_goes_to_the_accounts_that_are_the_givers_to_fill_again(
    ledger: Ledger, by: Visibility, refunded_to: list[str] | None
) -> None:
    held = ledger.reserved(ROOT, CHILD)
    ledger.settle(held, SETTLED)
    result = ledger.refund(held, SETTLED, by)
    if refunded_to is None:
        assert code(result) == "forbidden"
        assert spent_by(ledger) == [SETTLED, SETTLED]
    else:
        assert (result.refunded_to, result.refunded_microusd) == (refunded_to, SETTLED)
        assert spent_by(ledger) == [SETTLED if one not in refunded_to else 0 for one in ("root", "child")]


def test_who_hands_on_what_it_was_given_gives_itself_nothing_back(ledger: Ledger) -> None:
    own = link("own", B, B), link("again", B, B)
    held = ledger.reserved(ROOT, *own)
    ledger.settle(held, SETTLED)
    assert ledger.refund(held, SETTLED, Visibility(None, (B,))).refunded_to == ["again", "own"]
    assert ledger.counters("root")[0] == SETTLED


def test_what_an_issuer_gave_back_is_given_back_above_once_as_well(ledger: Ledger) -> None:
    held, issuer = ledger.reserved(ROOT, CHILD), Visibility(None, (B,))
    ledger.settle(held, SETTLED)
    ledger.refund(held, 300_000, issuer)
    assert code(ledger.refund(held, 200_001, issuer)) == "invalid"
    # Each gets no more than it is still owed.
    later = ledger.refund(held, 400_000)
    assert (later.refunded_to, later.refunded_microusd) == (["child", "root"], SETTLED)
    assert spent_by(ledger) == [100_000, 0]
    assert ledger.refund(held, 100_000).refunded_to == ["root"]
    assert spent_by(ledger) == [0, 0]
    assert code(ledger.refund(held, 1)) == "invalid"
    assert ledger.state()["refund_withheld"] == []


def test_a_void_gives_back_above_what_an_issuer_gave_back_below(ledger: Ledger) -> None:
    held = ledger.reserved(ROOT, CHILD)
    ledger.use(SETTLED, reservation=held, agent=C)
    ledger.refund(held, 400_000, Visibility(None, (B,)))
    assert ledger.void(ledger.newest()).refunded_microusd == 100_000
    assert spent_by(ledger) == [0, 0]


def test_only_the_host_refunds_to_its_hard_limits(ledger: Ledger) -> None:
    ledger.submit(SyncBudgets([LIMITED], "key:x", ledger.now_us))
    held = ledger.reserved(ROOT)
    ledger.settle(held, SETTLED)
    spent = "SELECT spent_microusd FROM budget_period"
    withheld = ledger.refund(held, 200_000, Visibility("ta"))
    assert (withheld.refunded_to, withheld.refunded_to_budgets) == (["root"], [])
    assert ledger.connection.execute(spent).get == SETTLED
    whole = ledger.refund(held, SETTLED)
    assert (whole.refunded_to, whole.refunded_to_budgets) == (["root"], ["under"])
    assert (ledger.connection.execute(spent).get, ledger.counters("root")[0]) == (0, 0)


def test_a_budget_without_a_hard_limit_gets_it_with_the_whole_path(ledger: Ledger) -> None:
    soft = replace(LIMITED, soft=LIMITED.hard, hard=Limits())
    ledger.submit(SyncBudgets([soft], "key:x", ledger.now_us))
    held = ledger.reserved(ROOT, CHILD)
    ledger.settle(held, SETTLED)
    spent = "SELECT spent_microusd FROM budget_period"
    ledger.refund(held, SETTLED, Visibility(None, (B,)))
    assert ledger.connection.execute(spent).get == SETTLED
    ledger.refund(held, SETTLED, Visibility(None, (A, B)))
    assert (ledger.connection.execute(spent).get, ledger.counters("root")[0]) == (0, 0)


def test_the_cause_of_a_revocation_is_the_topmost_that_went_with_it(ledger: Ledger) -> None:
    asked: list[tuple[str, ...]] = []

    def may_see(*said: str) -> bool:
        asked.append(said)
        return True

    ledger.register(ROOT, CHILD, link("below", C, C))
    ledger.revoke("below")
    ledger.now_us += 1
    ledger.revoke("root")
    for delegation in ("root", "child", "below"):
        account = ledger.connection.execute("SELECT account FROM delegation WHERE id = ?", (delegation,)).get
        assert is_cause_seen(ledger.connection, account, may_see)
    assert asked == [("ta", "tb", A, B), ("ta", "tb", A, B), ("tb", "tb", C, C)]
