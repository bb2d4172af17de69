"""Chains as the registry judges them: hostile tokens refused by their codes, nothing remembered that can change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from nacl.signing import SigningKey

from asapd.actors import chains
from asapd.actors.chains import Chain, Chains
from asapd.actors.keyring import KeyDirectory
from asapd.core.agent_keys import AgentKey
from asapd.core.delegation import Claims, effective, scope_allows
from asapd.core.denial import Denied, Reason, explanation
from asapd.wire.token import sign, sign_document
from tests.wire import hostile_tokens
from tests.wire.hostile_tokens import CASES, HONEST, KEYS, LEARNED, NOW_US, ROOT, A, B, C, Case, D, jws


def raw(key: SigningKey) -> bytes:
    return bytes(key.verify_key)


# Rules are words that programs may match: each one is documented.
EXPLANATIONS = (Path(__file__).parents[2] / "docs/delegation.md").read_text("utf-8").split("\n## Explanations\n")[1]


class Judge:
    """Chains, and everything that may change around them."""

    def __init__(self) -> None:
        self.keys = KeyDirectory()
        self.keys.held = {ROOT: KEYS[ROOT]}
        self.learn({agent: KEYS[agent] for agent in LEARNED})
        self.chains = Chains(self.keys)
        self.now_us = NOW_US
        self.max_depth = 8
        self.roots: tuple[str, ...] = ()
        self.revoked: set[str] = set()

    def learn(self, keys: dict[str, SigningKey]) -> None:
        """Go by these keys of manifests."""
        self.keys.learn(AgentKey(agent, raw(key), "manifest", "active", 0) for agent, key in keys.items())

    def ask(self, text: str, action: str | None = "task.execute", delegate: str | None = None) -> Denied | None:
        """The verdict; None is valid."""
        chain = self.chains.open(text, max_depth=self.max_depth, now_us=self.now_us)
        if isinstance(chain, Denied):
            return chain
        if chain.tokens[0].parent_id is not None:
            return no_parent(chain)
        return self.chains.judge(
            chain,
            now_us=self.now_us,
            max_depth=self.max_depth,
            roots=self.roots,
            is_revoked=lambda claims: claims.id in self.revoked,
            action=action,
            delegate=delegate,
            skew_us=300_000_000,
        )

    def code(self, text: str) -> str | None:
        denied = self.ask(text)
        return None if denied is None else str(denied.reason)


def no_parent(chain: Chain) -> Denied:
    from asapd.actors.registry import parent_unknown

    return parent_unknown(chain)


@pytest.fixture
def judge() -> Judge:
    return Judge()


@pytest.mark.parametrize("case", HONEST, ids=lambda case: case.name)
def test_the_table_of_hostile_tokens_is_beside_honest_ones(judge: Judge, case: Case) -> None:
    assert judge.ask(case.token, case.action, case.delegate) is None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_hostile_token_is_refused_with_its_code_and_an_explanation(judge: Judge, case: Case) -> None:
    """Twice, since what is remembered of the first time must not change the second."""
    for _ in range(2):
        denied = judge.ask(case.token, case.action, case.delegate)
        assert denied is not None
        assert denied.reason == case.code, denied.detail
        assert denied.detail.isprintable()
        assert len(denied.detail) < 1000
        parts = explanation(denied)
        assert f"`{parts.rule}`" in EXPLANATIONS
        assert parts.remedy
        if case.position is not None:
            assert parts.position == case.position
            assert parts.token == denied.token_id is not None


def test_the_table_is_not_small() -> None:
    assert len(CASES) > 250
    assert len({case.name for case in CASES}) == len(CASES)


# --- what is remembered, and what is asked anew


PARENT, CHILD, GRANDCHILD = hostile_tokens.PARENT, hostile_tokens.CHILD, hostile_tokens.GRANDCHILD


def count_verifications(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the tokens whose signatures are computed from now on."""
    seen: list[str] = []
    real = chains.verify

    def counted(token: Any, key: bytes) -> bool:
        seen.append(token.claims.id)
        return real(token, key)

    monkeypatch.setattr(chains, "verify", counted)
    return seen


def test_a_chain_seen_before_costs_no_signature_and_a_new_child_costs_one(
    judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = count_verifications(monkeypatch)
    assert judge.code(CHILD) is None
    assert seen == ["a-b", "b-c"]
    assert judge.code(CHILD) is None
    assert judge.code(PARENT) is None
    assert seen == ["a-b", "b-c"]
    assert judge.code(GRANDCHILD) is None
    assert judge.code(jws(B, C, jti="sibling", prf=PARENT)) is None
    assert seen == ["a-b", "b-c", "c-d", "sibling"]


def test_a_known_parent_does_not_hide_how_deep_a_chain_is(judge: Judge) -> None:
    assert judge.code(CHILD) is None
    judge.max_depth = 2
    assert judge.code(CHILD) is None
    assert judge.code(GRANDCHILD) == "chain_too_deep"


def test_a_document_is_remembered_in_each_of_its_spellings(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = count_verifications(monkeypatch)
    spelt = [case.token for case in HONEST if case.name in {"a document", "a document in another order and spelling"}]
    for text in spelt * 2:
        assert judge.code(text) is None
    assert seen == ["doc-a-b"]


CHANGES: dict[str, tuple[Callable[[Judge], None], str]] = {
    "a revocation of the leaf": (lambda judge: judge.revoked.add("b-c"), "revoked"),
    "a revocation of the root": (lambda judge: judge.revoked.add("a-b"), "revoked"),
    "another key of the root": (lambda judge: judge.keys.held.update({A: KEYS[D]}), "bad_signature"),
    "another key of a link": (lambda judge: judge.learn({B: KEYS[D]}), "bad_signature"),
    "a link's key forgotten": (lambda judge: judge.learn({}), "unknown_key"),
    "a pin that rules a learned key out": (lambda judge: judge.keys.pinned.update({B: raw(KEYS[D])}), "bad_signature"),
    "the root's key forgotten": (lambda judge: judge.keys.held.clear(), "unknown_key"),
    "the root no longer listed": (lambda judge: setattr(judge, "roots", (C,)), "untrusted_root"),
    "a shorter chain allowed": (lambda judge: setattr(judge, "max_depth", 1), "chain_too_deep"),
    "the clock at its end": (lambda judge: setattr(judge, "now_us", NOW_US + 3_600_000_000), "expired"),
    "the clock set back": (lambda judge: setattr(judge, "now_us", NOW_US - 1), "not_yet_valid"),
}


@pytest.mark.parametrize(("change", "code"), CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("form", ["jws", "document"])
def test_whatever_changes_is_in_force_for_a_chain_that_held_before(
    judge: Judge, change: Callable[[Judge], None], code: str, form: str
) -> None:
    claims = Claims("b-c", B, C, ("task.*",), None, None, NOW_US, NOW_US + 3_600_000_000, NOW_US)
    root = replace(claims, id="a-b", delegator=A, delegate=B)
    write = sign if form == "jws" else sign_document
    text = write(claims, KEYS[B], parent=write(root, KEYS[A]))
    for _ in range(2):
        assert judge.code(text) is None
    change(judge)
    for _ in range(2):
        assert judge.code(text) == code


def test_what_changed_and_changed_back_holds_again(judge: Judge) -> None:
    assert judge.code(CHILD) is None
    held = dict(judge.keys.held)
    judge.keys.held = {A: KEYS[D]}
    assert judge.code(CHILD) == "bad_signature"
    judge.keys.held = held
    assert judge.code(CHILD) is None


def test_a_key_that_is_added_beside_leaves_a_chain_as_it_is(judge: Judge) -> None:
    assert judge.code(CHILD) is None
    judge.keys.pinned = {A: raw(KEYS[D])}
    assert judge.code(CHILD) is None


def test_the_memory_is_bounded_and_keeps_what_was_used_last(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "MAX_REMEMBERED_CHARS", 4 * len(PARENT))
    seen = count_verifications(monkeypatch)
    texts = [jws(jti=f"j-{number}") for number in range(6)]
    for text in texts:
        assert judge.code(text) is None
        assert judge.code(texts[0]) is None
    assert seen == [f"j-{number}" for number in range(6)]
    assert judge.code(texts[1]) is None
    assert seen[6:] == ["j-1"]


def test_a_text_longer_than_the_memory_is_judged_each_time(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "MAX_REMEMBERED_CHARS", 10)
    for _ in range(2):
        assert judge.code(CHILD) is None


# --- laws


AGENTS = [A, B, C, D]
SCOPES = ["*", "task.*", "task.execute", "task.read.*", "task.read.x", "data.read"]
ACTIONS = ["task.execute", "task.read.x", "task.read.y", "data.read", "money.spend"]
SECOND_US = 1_000_000


@st.composite
def claims_of_chains(draw: st.DrawFn) -> list[Claims]:
    """Mostly chains that narrow; some widen somewhere."""
    made: list[Claims] = []
    for index in range(draw(st.integers(1, 3))):
        above = made[-1] if made else None
        end_us = NOW_US + draw(st.integers(1, 5)) * SECOND_US
        made.append(
            Claims(
                f"t{index}",
                AGENTS[index],
                AGENTS[index + 1],
                draw(st.lists(st.sampled_from(SCOPES), min_size=1, max_size=3, unique=True).map(tuple)),
                draw(st.none() | st.integers(0, 5)),
                draw(st.none() | st.integers(0, 5_000_000)),
                NOW_US,
                end_us if above is None else min(end_us, above.expires_at_us),
                draw(st.none() | st.just(NOW_US)),
            )
        )
    return made


def written(claims: list[Claims], forms: list[bool]) -> str:
    text: str | None = None
    for link, as_document in zip(claims, forms, strict=True):
        text = (sign_document if as_document else sign)(link, KEYS[link.delegator], parent=text)
    assert text is not None
    return text


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_rights_at_the_leaf_are_a_subset_of_those_of_every_ancestor(data: st.DataObject) -> None:
    """In whatever mixture of forms the chain is written, and signed by the right keys throughout."""
    claims = data.draw(claims_of_chains())
    text = written(claims, data.draw(st.lists(st.booleans(), min_size=len(claims), max_size=len(claims))))
    judge = Judge()
    judge.learn({agent: KEYS[agent] for agent in (*LEARNED, D)})
    assume(judge.ask(text, action=None) is None)
    chain = judge.chains.open(text, max_depth=8, now_us=judge.now_us)
    assert isinstance(chain, Chain)
    assert chain.claims == tuple(claims)
    leaf = effective(chain.claims)
    for ancestor in chain.claims:
        for action in ACTIONS:
            if judge.ask(text, action=action) is None:
                assert scope_allows(ancestor.scopes, action)
        assert ancestor.max_tasks is None or (leaf.max_tasks is not None and leaf.max_tasks <= ancestor.max_tasks)
        limit, most = leaf.max_cost_microusd, ancestor.max_cost_microusd
        assert most is None or (limit is not None and limit <= most)
        assert leaf.expires_at_us <= ancestor.expires_at_us
        assert ancestor.not_before_us is None or (leaf.not_before_us or 0) >= ancestor.not_before_us


def mutated(data: st.DataObject, text: str) -> str:
    """The text with one stretch of up to four characters replaced, put in or taken out."""
    start = data.draw(st.integers(0, len(text) - 1))
    width = data.draw(st.integers(0, 4))
    alphabet = st.sampled_from('ABab01-_.+/="{}[]:, \n\\é')
    return text[:start] + data.draw(st.text(alphabet, max_size=4)) + text[start + width :]


WIDE = Claims("t0", A, B, ("*",), 5, 1_500_000, NOW_US, NOW_US + 3_600 * SECOND_US, NOW_US)
CHAIN = [
    WIDE,
    replace(WIDE, id="t1", delegator=B, delegate=C, scopes=("task.*", "data.read")),
    replace(WIDE, id="t2", delegator=C, delegate=D, scopes=("task.execute",), max_tasks=1),
]


@settings(max_examples=300, deadline=None)
@given(st.data(), st.lists(st.booleans(), min_size=3, max_size=3))
def test_a_mutation_of_any_token_of_a_chain_is_refused(data: st.DataObject, forms: list[bool]) -> None:
    """One token, whichever, is changed after it was signed; those below it are signed anew over what became of it.

    White space and the order of members of a document are nobody's statement: what reads as the same token is it.
    """
    place = data.draw(st.integers(0, 2))
    texts = [written(CHAIN[: index + 1], forms[: index + 1]) for index in range(3)]
    text = mutated(data, texts[place])
    assume(text != texts[place])
    judge = Judge()
    for link, as_document in zip(CHAIN[place + 1 :], forms[place + 1 :], strict=True):
        try:
            text = (sign_document if as_document else sign)(link, KEYS[link.delegator], parent=text)
        except (ValueError, UnicodeError):
            return  # nobody can sign over it
    denied = judge.ask(text)
    if denied is None:
        chain = judge.chains.open(text, max_depth=8, now_us=judge.now_us)
        honest = judge.chains.open(texts[2], max_depth=8, now_us=judge.now_us)
        assert isinstance(chain, Chain)
        assert isinstance(honest, Chain)
        assert chain.claims == honest.claims
        assert chain.tokens[place].text == honest.tokens[place].text
        assert forms[place]


MEMBERS: list[tuple[str, Any]] = [
    ("id", "other"),
    ("delegator", D),
    ("delegate", A),
    ("scopes", ("*", "money.*")),
    ("max_tasks", None),
    ("max_tasks", 6),
    ("max_cost_microusd", 1_500_001),
    ("issued_at_us", NOW_US + SECOND_US),
    ("expires_at_us", NOW_US + 3_601 * SECOND_US),
    ("not_before_us", None),
]


@pytest.mark.parametrize(("member", "value"), MEMBERS)
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("as_document", [False, True])
def test_no_claim_of_any_token_can_be_changed_under_its_signature(
    judge: Judge, member: str, value: Any, place: int, as_document: bool
) -> None:
    """Each claim of each token is rewritten in good form with the signature of the token that it was."""
    forged = [replace(link, **{member: value}) if index == place else link for index, link in enumerate(CHAIN)]
    text: str | None = None
    for index, link in enumerate(forged):
        write = sign_document if as_document else sign
        was, honest = text, CHAIN[index]
        text = write(link, KEYS[honest.delegator], parent=was)
        if index == place:
            text = hostile_tokens.with_signature_of(text, write(honest, KEYS[honest.delegator], parent=was))
    assert text is not None
    denied = judge.ask(text)
    assert denied is not None
    assert denied.reason in {Reason.BAD_SIGNATURE, Reason.UNKNOWN_KEY}
    assert explanation(denied).position == 2 - place


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200) | st.binary(max_size=200).map(lambda data: data.decode("latin-1")))
def test_any_text_is_judged(text: str) -> None:
    denied = Judge().ask(text)
    assert denied is not None
    assert denied.reason is Reason.MALFORMED
