"""Chains of delegation: a link never widens what it inherits, and every refusal says which rule and why."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from asapd.core.delegation import (
    Claims,
    Denied,
    Reason,
    check_chain,
    check_standing,
    effective,
    is_action,
    is_scope,
    narrows,
    scope_allows,
    scope_covers,
)

NOW_US = 1_795_169_203_000_000
HOUR_US = 3_600_000_000

ROOT = Claims(
    id="del_1",
    delegator="urn:asap:agent:a",
    delegate="urn:asap:agent:b",
    scopes=("task.*", "data.read"),
    max_tasks=10,
    max_cost_microusd=5_000_000,
    issued_at_us=NOW_US - HOUR_US,
    expires_at_us=NOW_US + HOUR_US,
    not_before_us=NOW_US - HOUR_US,
)
MIDDLE = replace(ROOT, id="del_2", delegator="urn:asap:agent:b", delegate="urn:asap:agent:c")
LEAF = replace(ROOT, id="del_3", delegator="urn:asap:agent:c", delegate="urn:asap:agent:d", scopes=("task.execute",))
CHAIN = (ROOT, MIDDLE, LEAF)


def check(chain: Sequence[Claims], **changes: Any) -> Denied | None:
    settings: dict[str, Any] = {
        "now_us": NOW_US,
        "max_depth": 8,
        "is_trusted_root": lambda delegator: delegator == "urn:asap:agent:a",
        "is_revoked": lambda claims: False,
        "action": "task.execute",
        "delegate": "urn:asap:agent:d",
    }
    return check_chain(chain, **(settings | changes))


def refusal(chain: Sequence[Claims], **changes: Any) -> Denied:
    denied = check(chain, **changes)
    assert denied is not None
    return denied


@pytest.mark.parametrize(
    ("scope", "action", "allowed"),
    [
        ("a.b", "a.b", True),
        ("a.b", "a.b.c", False),
        ("a.b", "a", False),
        ("a.*", "a.b", True),
        ("a.*", "a.b.c", True),
        ("a.*", "a", False),
        ("a.*", "ab", False),
        ("a.*", "ab.c", False),
        ("a.*", "a.", False),
        ("a.*", "a.*", False),
        ("*", "a", True),
        ("*", "a.b.c", True),
        ("*", "*", False),
        ("*", "", False),
        ("*", "a b", False),
        ("*", "a.b\n", False),
        ("A.b", "a.b", False),
    ],
)
def test_a_scope_allows_exactly_by_trailing_star_or_everything(scope: str, action: str, allowed: bool) -> None:
    assert scope_allows([scope], action) is allowed
    assert scope_allows(["other", scope], action) is allowed


def test_no_scopes_allow_nothing() -> None:
    assert not scope_allows([], "a")


@pytest.mark.parametrize(
    ("parent", "child", "covered"),
    [
        ("*", "*", True),
        ("*", "a.*", True),
        ("*", "a", True),
        ("a.*", "*", False),
        ("a.*", "a.*", True),
        ("a.*", "a.b.*", True),
        ("a.*", "a.b", True),
        ("a.*", "a", False),
        ("a.b.*", "a.*", False),
        ("a", "a.*", False),
        ("a", "a", True),
        ("a.*", "ab.*", False),
    ],
)
def test_a_scope_covers_what_it_contains(parent: str, child: str, covered: bool) -> None:
    assert scope_covers([parent], child) is covered


@pytest.mark.parametrize("text", ["a", "task.execute", "mcp:tool/x-1.run_2", "A.0", "a" * 128])
def test_actions_are_scopes(text: str) -> None:
    assert is_action(text)
    assert is_scope(text)


@pytest.mark.parametrize("text", ["*", "a.*", "a.b.*"])
def test_wildcards_are_scopes_and_no_actions(text: str) -> None:
    assert is_scope(text)
    assert not is_action(text)


@pytest.mark.parametrize(
    "text", ["", ".", "a.", ".a", "a..b", "*.a", "a*", "a.*.b", "**", ".*", "a b", "a\n", "é", "a" * 129]
)
def test_other_text_is_no_scope(text: str) -> None:
    assert not is_scope(text)
    assert not is_action(text)


def test_a_chain_that_only_narrows_holds() -> None:
    assert check(CHAIN) is None


def test_neither_action_nor_delegate_is_asked_when_left_out() -> None:
    assert check(CHAIN, action=None, delegate=None) is None


def test_a_chain_that_held_is_asked_only_what_time_can_change() -> None:
    asked: dict[str, Any] = {
        "now_us": NOW_US,
        "max_depth": 3,
        "is_trusted_root": lambda _: True,
        "is_revoked": lambda _: False,
        "action": "task.execute",
        "delegate": LEAF.delegate,
    }
    for changes, reason in (
        ({}, None),
        ({"max_depth": 2}, Reason.CHAIN_TOO_DEEP),
        ({"is_trusted_root": lambda _: False}, Reason.UNTRUSTED_ROOT),
        ({"is_revoked": lambda claims: claims is MIDDLE}, Reason.REVOKED),
        ({"now_us": ROOT.expires_at_us}, Reason.EXPIRED),
        ({"delegate": "x"}, Reason.WRONG_DELEGATE),
    ):
        for judge in (check_standing, check_chain):
            denied = judge(CHAIN, **(asked | changes))
            assert (None if denied is None else denied.reason) is reason


def test_an_empty_chain_is_a_bug_of_the_caller() -> None:
    with pytest.raises(ValueError, match="at least one"):
        check(())
    with pytest.raises(ValueError, match="at least one"):
        effective(())


@pytest.mark.parametrize(
    ("chain", "changes", "reason", "token_id", "words"),
    [
        (CHAIN, {"max_depth": 2}, Reason.CHAIN_TOO_DEEP, "del_3", ["3", "2"]),
        ((ROOT, MIDDLE, replace(LEAF, delegator=ROOT.delegator, id=ROOT.id)), {}, Reason.CYCLE, "del_1", ["twice"]),
        (CHAIN, {"is_trusted_root": lambda _: False}, Reason.UNTRUSTED_ROOT, "del_1", [ROOT.delegator]),
        ((ROOT, LEAF), {}, Reason.CHAIN_BROKEN, "del_3", [LEAF.delegator, ROOT.delegate]),
        ((ROOT, replace(MIDDLE, scopes=("task.x", "*"))), {}, Reason.SCOPE_EXCEEDED, "del_2", ["*", "data.read"]),
        ((ROOT, replace(MIDDLE, max_tasks=11)), {}, Reason.CONSTRAINT_EXCEEDED, "del_2", ["max_tasks", "11", "10"]),
        (
            (ROOT, replace(MIDDLE, max_cost_microusd=5_000_001)),
            {},
            Reason.CONSTRAINT_EXCEEDED,
            "del_2",
            ["max_cost_usd", "5.000001", "5.0"],
        ),
        (
            (ROOT, replace(MIDDLE, expires_at_us=ROOT.expires_at_us + 1)),
            {},
            Reason.CONSTRAINT_EXCEEDED,
            "del_2",
            ["expiry", "11:06:43.000001Z", "11:06:43.000000Z"],
        ),
        (
            (ROOT, replace(MIDDLE, not_before_us=NOW_US - HOUR_US - 1)),
            {},
            Reason.CONSTRAINT_EXCEEDED,
            "del_2",
            ["start", "09:06:42.999999Z", "09:06:43.000000Z"],
        ),
        (CHAIN, {"is_revoked": lambda claims: claims.id == "del_1"}, Reason.REVOKED, "del_1", [ROOT.delegator]),
        (CHAIN, {"is_revoked": lambda claims: claims.id == "del_3"}, Reason.REVOKED, "del_3", [LEAF.delegator]),
        (CHAIN, {"now_us": ROOT.expires_at_us}, Reason.EXPIRED, "del_1", ["11:06:43"]),
        (CHAIN, {"now_us": NOW_US - HOUR_US - 1}, Reason.NOT_YET_VALID, "del_1", ["09:06:43", "09:06:42"]),
        (CHAIN, {"delegate": "urn:asap:agent:x"}, Reason.WRONG_DELEGATE, "del_3", [LEAF.delegate, "agent:x"]),
        (CHAIN, {"action": "data.read"}, Reason.ACTION_NOT_ALLOWED, "del_3", ["data.read", "task.execute"]),
    ],
)
def test_a_refusal_names_the_token_the_rule_and_both_values(
    chain: Sequence[Claims], changes: dict[str, Any], reason: Reason, token_id: str, words: list[str]
) -> None:
    denied = refusal(chain, **changes)
    assert (denied.reason, denied.token_id) == (reason, token_id)
    assert f"token {token_id}" in denied.detail
    for word in words:
        assert word in denied.detail


def test_rules_are_asked_in_a_fixed_order() -> None:
    """Everything is wrong at once; as faults are mended from the front, the next one shows."""
    root = replace(ROOT, expires_at_us=NOW_US, not_before_us=NOW_US + 1)
    child = replace(ROOT, scopes=("*",), max_tasks=11, expires_at_us=NOW_US, not_before_us=NOW_US + 1)
    changes: dict[str, Any] = {
        "max_depth": 1,
        "is_trusted_root": lambda _: False,
        "is_revoked": lambda _: True,
        "delegate": "urn:asap:agent:x",
        "action": "data.read",
    }
    assert refusal((root, child), **changes).reason is Reason.CHAIN_TOO_DEEP
    del changes["max_depth"]
    assert refusal((root, child), **changes).reason is Reason.CYCLE
    child = replace(child, id="del_2")
    assert refusal((root, child), **changes).reason is Reason.UNTRUSTED_ROOT
    del changes["is_trusted_root"]
    assert refusal((root, child), **changes).reason is Reason.CHAIN_BROKEN
    child = replace(child, delegator=ROOT.delegate)
    assert refusal((root, child), **changes).reason is Reason.SCOPE_EXCEEDED
    child = replace(child, scopes=("task.execute",))
    assert refusal((root, child), **changes).reason is Reason.CONSTRAINT_EXCEEDED
    child = replace(child, max_tasks=1)
    assert refusal((root, child), **changes).reason is Reason.REVOKED
    del changes["is_revoked"]
    assert refusal((root, child), **changes).reason is Reason.EXPIRED
    root, child = replace(root, expires_at_us=NOW_US + 9), replace(child, expires_at_us=NOW_US + 9)
    assert refusal((root, child), **changes).reason is Reason.NOT_YET_VALID
    root, child = replace(root, not_before_us=None), replace(child, not_before_us=None)
    assert refusal((root, child), **changes).reason is Reason.WRONG_DELEGATE
    changes["delegate"] = child.delegate
    assert refusal((root, child), **changes).reason is Reason.ACTION_NOT_ALLOWED
    changes["action"] = "task.execute"
    assert check((root, child), **changes) is None


@pytest.mark.parametrize("action", ["*", "data.*", "data read", "", "a" * 129])
def test_what_no_scope_allows_is_not_sent_for_a_token_with_that_scope(action: str) -> None:
    denied = refusal((replace(ROOT, scopes=("*",)),), action=action, delegate=None)
    assert denied.reason is Reason.ACTION_NOT_ALLOWED
    assert "ask " not in denied.detail
    assert denied.explain is not None
    assert denied.explain.remedy == "name one, such as a.b"


def test_a_link_that_states_no_limit_inherits() -> None:
    child = replace(MIDDLE, max_tasks=None, max_cost_microusd=None, not_before_us=None)
    assert check((ROOT, child), delegate=None) is None
    assert effective((ROOT, child)) == effective((ROOT,))


@pytest.mark.parametrize(
    "wider", [{"max_tasks": 11}, {"max_cost_microusd": 5_000_001}, {"not_before_us": NOW_US - HOUR_US - 1}]
)
def test_limits_are_inherited_through_a_link_that_states_none(wider: dict[str, int]) -> None:
    middle = replace(MIDDLE, max_tasks=None, max_cost_microusd=None, not_before_us=None)
    denied = refusal((ROOT, middle, replace(LEAF, **wider)))
    assert (denied.reason, denied.token_id) == (Reason.CONSTRAINT_EXCEEDED, "del_3")


def test_a_limit_may_appear_further_down() -> None:
    root = replace(ROOT, max_tasks=None, max_cost_microusd=None, not_before_us=None)
    assert check((root, MIDDLE, LEAF)) is None
    assert effective((root, MIDDLE)).max_tasks == 10


def test_a_chain_that_leads_back_to_its_root_is_a_cycle() -> None:
    back = replace(MIDDLE, delegate=ROOT.delegator)
    again = replace(MIDDLE, id="del_3", delegator=ROOT.delegator, delegate="urn:asap:agent:d")
    for chain in ((ROOT, back), (ROOT, back, again), (ROOT, MIDDLE, replace(LEAF, delegate=ROOT.delegator))):
        denied = refusal(chain, delegate=None)
        assert denied.reason is Reason.CYCLE
        assert denied.explain is not None
        assert denied.explain.rule == "away_from_root"


def test_other_agents_may_stand_twice_in_a_chain_under_other_ids() -> None:
    back = replace(LEAF, delegate=ROOT.delegate, scopes=ROOT.scopes)
    again = replace(LEAF, id="del_4", delegator=ROOT.delegate, delegate="urn:asap:agent:d")
    assert check((ROOT, MIDDLE, back, again)) is None


def test_an_agent_may_narrow_what_it_holds_for_itself() -> None:
    own = replace(ROOT, delegate=ROOT.delegator)
    narrower = replace(ROOT, id="del_2", scopes=("task.execute",))
    assert check((own, narrower), delegate=None) is None
    assert check((own, replace(own, id="del_2"), replace(own, id="del_3")), delegate=None, action=None) is None


def test_two_agents_may_choose_the_same_id() -> None:
    assert check((ROOT, replace(MIDDLE, id=ROOT.id)), delegate=None) is None


def test_leeway_widens_both_ends_of_validity() -> None:
    assert check(CHAIN, now_us=ROOT.expires_at_us + 4, leeway_us=5) is None
    assert refusal(CHAIN, now_us=ROOT.expires_at_us + 5, leeway_us=5).reason is Reason.EXPIRED
    assert check(CHAIN, now_us=NOW_US - HOUR_US - 5, leeway_us=5) is None
    assert refusal(CHAIN, now_us=NOW_US - HOUR_US - 6, leeway_us=5).reason is Reason.NOT_YET_VALID


def test_effective_rights_are_the_common_part_of_any_chain() -> None:
    """Also of one that check_chain refuses: what only one link holds is not there."""
    other = replace(
        MIDDLE,
        scopes=("data.*", "task.a", "task.a"),
        max_tasks=99,
        max_cost_microusd=1,
        not_before_us=0,
        expires_at_us=NOW_US,
    )
    rights = effective((ROOT, other))
    assert set(rights.scopes) == {"data.read", "task.a"}
    assert (rights.max_tasks, rights.max_cost_microusd) == (10, 1)
    assert (rights.not_before_us, rights.expires_at_us) == (ROOT.not_before_us, NOW_US)
    assert effective((replace(ROOT, not_before_us=None), other)).not_before_us == 0


SEGMENTS = ("a", "b", "ab")
ACTIONS = [*SEGMENTS, *(f"{x}.{y}" for x in SEGMENTS for y in SEGMENTS), "a.b.a", "b.a.b"]
SCOPES = ["*", *(f"{action}.*" for action in ACTIONS[:8]), *ACTIONS]
AGENTS = ["r", "s", "t"]
scope_lists = st.lists(st.sampled_from(SCOPES), min_size=1, max_size=3, unique=True).map(tuple)
limits = st.none() | st.integers(0, 4)


@given(scope_lists, scope_lists, st.sampled_from(SCOPES), st.sampled_from(ACTIONS))
def test_covering_means_allowing_all_the_same_actions(
    left: tuple[str, ...], right: tuple[str, ...], scope: str, action: str
) -> None:
    if scope_covers(left, scope) and scope_allows([scope], action):
        assert scope_allows(left, action)
    joined = effective((replace(ROOT, scopes=left), replace(MIDDLE, scopes=right))).scopes
    assert scope_allows(joined, action) is (scope_allows(left, action) and scope_allows(right, action))


any_chain = st.lists(
    st.builds(
        Claims,
        id=st.sampled_from(["1", "2", "3", "4"]),
        delegator=st.sampled_from(AGENTS),
        delegate=st.sampled_from(AGENTS),
        scopes=scope_lists,
        max_tasks=limits,
        max_cost_microusd=limits,
        issued_at_us=st.just(0),
        expires_at_us=st.integers(1, 8),
        not_before_us=limits,
    ),
    min_size=1,
    max_size=4,
)


@st.composite
def linked_chains(draw: st.DrawFn) -> list[Claims]:
    """Chains in which each link goes on from the one before, with scopes mostly from its own."""
    chain = draw(any_chain)
    for index in range(1, len(chain)):
        parent = chain[index - 1]
        inside = [scope for scope in SCOPES if scope_covers(parent.scopes, scope)]
        scopes = draw(st.lists(st.sampled_from(inside), min_size=1, max_size=3, unique=True).map(tuple))
        chain[index] = replace(chain[index], id=str(index), delegator=parent.delegate, scopes=scopes)
    return chain


def wider(child: int | None, parent: int | None) -> bool:
    return child is not None and parent is not None and child > parent


def may_hold(chain: Sequence[Claims], now_us: int, action: str, delegate: str) -> bool:
    """The rules again, over all pairs of ancestor and descendant and in no order."""
    leaf = chain[-1]
    pairs = [(chain[i], chain[j]) for j in range(len(chain)) for i in range(j)]
    return (
        len({(claims.delegator, claims.id) for claims in chain}) == len(chain)
        and not any(link.delegate == chain[0].delegator != link.delegator for link in chain[1:])
        and chain[0].delegator == "r"
        and all(chain[i].delegate == chain[i + 1].delegator for i in range(len(chain) - 1))
        and all(scope_covers(above.scopes, scope) for above, below in pairs for scope in below.scopes)
        and not any(wider(below.max_tasks, above.max_tasks) for above, below in pairs)
        and not any(wider(below.max_cost_microusd, above.max_cost_microusd) for above, below in pairs)
        and not any(below.expires_at_us > above.expires_at_us for above, below in pairs)
        and not any(wider(above.not_before_us, below.not_before_us) for above, below in pairs)
        and all((claims.not_before_us or 0) <= now_us < claims.expires_at_us for claims in chain)
        and not any(claims.max_tasks == 4 for claims in chain)
        and leaf.delegate == delegate
        and scope_allows(leaf.scopes, action)
    )


@settings(max_examples=400, deadline=None)
@given(any_chain | linked_chains(), st.integers(0, 8), st.sampled_from(ACTIONS), st.sampled_from(AGENTS))
def test_a_chain_holds_exactly_when_every_rule_does(
    chain: list[Claims], now_us: int, action: str, delegate: str
) -> None:
    denied = check_chain(
        chain,
        now_us=now_us,
        max_depth=4,
        is_trusted_root=lambda name: name == "r",
        is_revoked=lambda claims: claims.max_tasks == 4,
        action=action,
        delegate=delegate,
    )
    assert (denied is None) == may_hold(chain, now_us, action, delegate)


@settings(max_examples=400, deadline=None)
@given(linked_chains())
def test_what_narrows_is_for_no_moment_and_no_root_to_judge(chain: list[Claims]) -> None:
    first, last = chain[0], chain[-1]
    begins = max(claims.not_before_us or 0 for claims in chain)
    denied = check(
        chain,
        now_us=min(begins, last.expires_at_us - 1),
        is_trusted_root=lambda delegator: delegator == first.delegator,
        action=None,
        delegate=None,
    )
    by_moment = denied is None or denied.reason in {Reason.EXPIRED, Reason.NOT_YET_VALID}
    assert narrows(chain) == by_moment


@settings(max_examples=400, deadline=None)
@given(linked_chains())
def test_rights_at_the_leaf_are_a_subset_of_those_of_every_ancestor(chain: list[Claims]) -> None:
    """A chain never widens a right."""
    denied = check_chain(
        chain,
        now_us=max((claims.not_before_us or 0) for claims in chain),
        max_depth=4,
        is_trusted_root=lambda _: True,
        is_revoked=lambda _: False,
        action=None,
        delegate=None,
    )
    assume(denied is None)
    leaf = effective(chain)
    assert set(leaf.scopes) >= set(chain[-1].scopes)
    for depth in range(1, len(chain) + 1):
        above = effective(chain[:depth])
        for action in ACTIONS:
            if scope_allows(leaf.scopes, action):
                assert scope_allows(above.scopes, action)
                assert scope_allows(chain[depth - 1].scopes, action)
        for limit, outer in (
            (leaf.max_tasks, above.max_tasks),
            (leaf.max_cost_microusd, above.max_cost_microusd),
            (leaf.expires_at_us, above.expires_at_us),
        ):
            assert outer is None or (limit is not None and limit <= outer)
        if above.not_before_us is not None:
            assert leaf.not_before_us is not None
            assert leaf.not_before_us >= above.not_before_us


def test_a_token_from_the_future_is_not_valid_yet() -> None:
    ahead = replace(CHAIN[-1], issued_at_us=NOW_US + 6)
    chain = (*CHAIN[:-1], ahead)
    assert check(chain) is None
    assert check(chain, skew_us=6) is None
    denied = refusal(chain, skew_us=5)
    assert (denied.reason, denied.token_id) == (Reason.NOT_YET_VALID, ahead.id)
    assert check((*CHAIN[:-1], replace(ahead, issued_at_us=None)), skew_us=0) is None
    late = replace(ahead, issued_at_us=ahead.expires_at_us + 1)
    assert refusal((*CHAIN[:-1], late), skew_us=10**15).reason is Reason.NOT_YET_VALID
