"""Revoking through SQL: whole subtrees, tokens that nobody has seen, and lists in any order."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from itertools import count
from pathlib import Path
from typing import Any

import apsw
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asapd.core.delegation import Denied, Reason
from asapd.store import chain_queries, delegation_news, migrations, revocations
from asapd.store.reconciling import reconcile
from asapd.store.rows import fetch
from asapd.store.units.delegations import (
    AuthorizationDenied,
    ImportRevocations,
    Registered,
    Reserved,
    Revocation,
    RevocationsImported,
)
from asapd.store.units.house import Note, Sweep
from asapd.store.writer import open_for_writing
from tests.store.ledger_desk import CHILD, GRANDCHILD, HOUR_US, NOW_US, ROOT, A, B, C, D, Ledger, link, reason

OpenStore = Callable[[], AbstractContextManager[apsw.Connection]]
LATER_US = NOW_US + HOUR_US


@pytest.fixture
def ledger(connection: apsw.Connection) -> Ledger:
    return Ledger(connection)


def take(ledger: Ledger, *entries: Revocation) -> RevocationsImported:
    unit = ImportRevocations(list(entries), "asapd/x", "x", 1, b"d" * 32, 0, "key:x", ledger.now_us, ledger.now_us)
    outcome = ledger.submit(unit)
    assert isinstance(outcome, RevocationsImported)
    return outcome


def of(issuer: str, jti: str, *, revoked_us: int = NOW_US, expires_us: int = LATER_US) -> Revocation:
    return Revocation(issuer, jti, revoked_us, expires_us)


def audited(ledger: Ledger, event_type: str = "delegation.revoked") -> list[str]:
    rows = fetch(ledger.connection, "SELECT subject FROM audit WHERE event_type = ? ORDER BY seq", (event_type,))
    return [subject for (subject,) in rows]


def listed(ledger: Ledger) -> set[tuple[str, str]]:
    return {(one.issuer, one.jti) for one in revocations.standing(ledger.connection, 0).entries}


def test_a_token_that_was_revoked_before_it_was_seen_is_refused_wherever_it_stands(ledger: Ledger) -> None:
    outcome = take(ledger, of(A, "root"))
    assert (outcome.added, outcome.known, outcome.revoked) == (1, 0, [])
    for chain in ((ROOT,), (ROOT, CHILD)):
        denied = ledger.register(*chain)
        assert isinstance(denied, Denied)
        assert (denied.reason, denied.token_id) == (Reason.REVOKED, "root")
        refused = ledger.reserve(*chain)
        assert isinstance(refused, Denied)
        assert refused.reason is Reason.REVOKED
    assert fetch(ledger.connection, "SELECT count(*) FROM delegation") == [(0,)]
    assert audited(ledger) == ["root"]
    # The same id by another issuer is another token.
    assert isinstance(ledger.register(link("root", D, A)), Registered)


def test_a_registered_token_goes_with_its_subtree_and_open_reservations_may_settle(ledger: Ledger) -> None:
    ledger.register(ROOT, CHILD, GRANDCHILD)
    held = ledger.reserved(delegation="grandchild")
    outcome = take(ledger, of(B, "child"))
    assert (outcome.added, outcome.revoked) == (1, ["child", "grandchild"])
    assert listed(ledger) == {(B, "child"), (C, "grandchild")}
    denied = ledger.reserve(delegation="grandchild", task="u")
    assert isinstance(denied, AuthorizationDenied)
    assert isinstance(ledger.reserve(delegation="root"), Reserved)
    assert ledger.settle(held).state == "settled"


def test_a_list_of_a_whole_tree_revokes_each_of_it_once(ledger: Ledger) -> None:
    ledger.register(ROOT, CHILD, GRANDCHILD)
    ledger.register(ROOT, link("other", B, D))
    entries = [of(C, "grandchild"), of(B, "child"), of(A, "root"), of(D, "unseen")]
    outcome = take(ledger, *entries)
    assert (outcome.added, sorted(outcome.revoked)) == (4, ["child", "grandchild", "other", "root"])
    assert sorted(audited(ledger)) == ["child", "grandchild", "other", "root", "unseen"]
    assert listed(ledger) == {(A, "root"), (B, "child"), (B, "other"), (C, "grandchild"), (D, "unseen")}
    again = take(ledger, *entries)
    assert (again.added, again.known, again.revoked) == (0, 4, [])
    assert len(audited(ledger)) == 5
    assert audited(ledger, "revocations.imported") == ["asapd/x", "asapd/x"]


def test_of_a_registered_token_no_list_says_that_it_has_expired(ledger: Ledger) -> None:
    ledger.register(ROOT)
    outcome = take(ledger, of(A, "root", expires_us=NOW_US - HOUR_US), of(A, "unseen", expires_us=NOW_US))
    assert (outcome.added, outcome.known, outcome.expired, outcome.revoked) == (1, 0, 1, ["root"])
    assert listed(ledger) == {(A, "root")}
    assert [one.expires_us for one in revocations.standing(ledger.connection, 0).entries] == [LATER_US]
    # What has expired by its own word as well needs no revocation.
    ledger.now_us = LATER_US
    again = take(ledger, of(A, "root"))
    assert (again.added, again.known, again.expired) == (0, 0, 1)


def test_what_was_revoked_here_is_known_to_a_list(ledger: Ledger) -> None:
    ledger.register(ROOT, CHILD)
    ledger.revoke("root")
    number = revocations.newest_number(ledger.connection)
    outcome = take(ledger, of(A, "root"), of(B, "child"))
    assert (outcome.added, outcome.known, outcome.revoked) == (0, 2, [])
    assert revocations.newest_number(ledger.connection) == number


def test_a_list_that_says_too_early_an_end_has_no_registered_token_forgotten(ledger: Ledger) -> None:
    ledger.register(ROOT, CHILD)
    for end_us in (NOW_US + 2, NOW_US + 1):
        take(ledger, of(A, "root", expires_us=end_us))
    ledger.submit(Sweep(NOW_US, 0, 0, revocations_before_us=NOW_US + 60_000_000))
    assert listed(ledger) == {(A, "root"), (B, "child")}
    assert {one.expires_us for one in revocations.standing(ledger.connection, 0).entries} == {
        ROOT.claims.expires_at_us,
        CHILD.claims.expires_at_us,
    }
    assert reason(ledger.reserve(ROOT)) is Reason.REVOKED


def test_what_is_marked_revoked_is_refused_also_where_its_revocation_was_forgotten(ledger: Ledger) -> None:
    ledger.register(ROOT, CHILD)
    ledger.revoke("root")
    ledger.connection.execute("DELETE FROM revocation")
    fresh = link("fresh", C, D)
    accounts = [(one.claims, one.digest) for one in (ROOT, CHILD, fresh)]
    known = chain_queries.standing(ledger.connection, accounts, None)
    assert known is not None
    denied, _ = known
    assert denied is not None
    assert (denied.reason, denied.token_id) == (Reason.REVOKED, "root")
    rest = chain_queries.standing(ledger.connection, accounts[2:], None)
    assert rest is not None
    assert rest[0] is None


@given(
    st.lists(
        st.lists(
            st.builds(
                Revocation,
                st.sampled_from((A, B)),
                st.sampled_from(("x", "y", "root")),
                st.integers(NOW_US, NOW_US + 3),
                st.integers(LATER_US, LATER_US + 3),
            ),
            max_size=4,
        ),
        max_size=4,
    ),
    st.randoms(use_true_random=False),
)
def test_lists_may_come_in_any_order_and_as_often_as_they_like(
    open_store: OpenStore, lists: list[list[Revocation]], random: Any
) -> None:
    """The merge is associative, commutative and idempotent."""

    def after(order: list[list[Revocation]]) -> list[Revocation]:
        with open_store() as connection:
            ledger = Ledger(connection)
            for entries in order:
                take(ledger, *entries)
            return revocations.standing(connection, 0).entries

    expected: dict[tuple[str, str], Revocation] = {}
    for one in (entry for entries in lists for entry in entries):
        name = (one.issuer, one.jti)
        old = expected.get(name, one)
        expected[name] = Revocation(*name, min(one.revoked_us, old.revoked_us), max(one.expires_us, old.expires_us))
    shuffled = [*lists, *lists]
    random.shuffle(shuffled)
    for order in (lists, shuffled, [[entry for entries in lists for entry in entries]]):
        assert after(order) == [expected[name] for name in sorted(expected)]


def test_whoever_remembers_a_number_finds_what_came_after_changes_too(ledger: Ledger) -> None:
    take(ledger, of(A, "x"), of(A, "y"))
    seen = revocations.newest_number(ledger.connection)
    take(ledger, of(A, "x"))
    assert revocations.revoked_after(ledger.connection, seen) == []
    take(ledger, of(A, "x", expires_us=LATER_US + 1))
    ((number, *row),) = revocations.revoked_after(ledger.connection, seen)
    assert (number > seen, row) == (True, [A, "x", LATER_US + 1])


def test_a_revocation_is_forgotten_once_its_token_has_expired(ledger: Ledger) -> None:
    take(ledger, of(A, "x"), of(A, "y", expires_us=LATER_US + 1))
    number = revocations.newest_number(ledger.connection)
    ledger.submit(Sweep(LATER_US, 0, 0, revocations_before_us=LATER_US + 9))
    assert len(listed(ledger)) == 2, "verification goes by the time of the newest entry"
    ledger.submit(Note("daemon.started", "asapd", "asapd", {}, LATER_US + 9))
    for before_us, left in ((LATER_US, 2), (LATER_US + 1, 1), (LATER_US + 2, 0)):
        ledger.submit(Sweep(LATER_US, 0, 0, revocations_before_us=before_us))
        assert len(listed(ledger)) == left
    assert revocations.newest_number(ledger.connection) == number
    assert revocations.standing(ledger.connection, 0).updated_us is None


def test_news_come_in_pieces_in_order_and_go_after_a_while(ledger: Ledger) -> None:
    numbers = count()
    ledger.register(ROOT)
    for _ in range(delegation_news.AT_ONCE + 1):
        ledger.register(ROOT, link(f"c{next(numbers)}", B, C))
    ledger.revoke("root")
    first, second = delegation_news.news_after(ledger.connection, 0, 10)
    assert [len(first.revoked), len(second.revoked)] == [delegation_news.AT_ONCE, 2]
    assert first.params == second.params
    assert (first.params["cause"], first.revoked[0].id) == ("root", "root")
    ledger.submit(Sweep(NOW_US, NOW_US, 0))
    assert len(delegation_news.news_after(ledger.connection, 0, 10)) == 2
    ledger.submit(Sweep(NOW_US, NOW_US + 1, 0))
    assert delegation_news.news_after(ledger.connection, 0, 10) == []
    assert delegation_news.newest_news(ledger.connection) == 2


def test_what_an_older_store_had_revoked_is_in_the_list(tmp_path: Path) -> None:
    path = tmp_path / "asapd.db"
    with closing(open_for_writing(path)) as connection:
        ledger = Ledger(connection)
        ledger.register(ROOT, CHILD)
        ledger.revoke("child")
        connection.execute("DROP TABLE revocation; DROP TABLE delegation_news")
        connection.pragma("user_version", 2)
        while connection.pragma("user_version") < len(migrations.MIGRATIONS):
            version = connection.pragma("user_version")
            if "CREATE TABLE revocation " in migrations.MIGRATIONS[version]:
                connection.execute(migrations.MIGRATIONS[version])
            connection.pragma("user_version", version + 1)
        assert listed(Ledger(connection)) == {(B, "child")}


def test_a_revocation_of_a_token_that_ends_in_centuries_is_held_to_the_log(ledger: Ledger) -> None:
    take(ledger, of(A, "unseen"))
    take(ledger, of(A, "unseen", expires_us=2**54))
    (told,) = fetch(ledger.connection, "SELECT details FROM audit WHERE event_type = 'revocation.changed'")
    assert f'"expires_us":"{2**54}"' in told[0]
    assert [finding for tally in reconcile(ledger.connection) for finding in tally.named] == []
    ledger.connection.execute("UPDATE revocation SET expires_us = expires_us - 1")
    assert [finding for tally in reconcile(ledger.connection) for finding in tally.named] != []
