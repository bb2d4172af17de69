"""Which spans count follows from the spans that are there, not from when each was told."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asapd.core import span_tree
from asapd.core.span_tree import SpanTree

A, B, C, D = (bytes([number]) * 8 for number in range(1, 5))

# A span: the one it is below (None for the root), and whether it is an agent's work or a call of a model, with tokens
# or without, or neither.
Spans = dict[int, tuple[int | None, str]]
KINDS = ["work", "call", "empty work", "empty call", "plain"]


@st.composite
def traces(draw: st.DrawFn) -> Spans:
    found: Spans = {}
    for number in range(draw(st.integers(1, 9))):
        parent = draw(st.none() | st.integers(0, number - 1)) if number else None
        found[number] = (parent, draw(st.sampled_from(KINDS)))
    return found


def counting(spans: Spans) -> tuple[set[int], set[int]]:
    """Those that count, and those of which it depends on what came first: they have no tokens, and are below work
    that has some but gives way itself.
    """

    def above(number: int) -> set[int]:
        parent = spans[number][0]
        return set() if parent is None else {parent} | above(parent)

    of = {kind: {number for number, (_, its) in spans.items() if its == kind} for kind in KINDS}
    covered = set().union(*(above(number) for number in of["work"] | of["call"]))
    hollow = set().union(*(above(number) for number in of["empty work"] | of["empty call"]))
    tops = of["work"] - covered
    empty = of["empty call"] | (of["empty work"] - covered - hollow)
    empty = {number for number in empty if not above(number) & tops}
    unsure = {number for number in empty if above(number) & of["work"]}
    return of["call"] | tops | (empty - unsure), unsure


@given(spans=traces(), data=st.data())
def test_whatever_the_order_and_the_pieces_the_same_spans_count(spans: Spans, data: st.DataObject) -> None:
    order = data.draw(st.permutations(list(spans)))
    # Some are sent twice.
    order += data.draw(st.lists(st.sampled_from(order), max_size=4))
    tree = SpanTree()
    counted: set[int] = set()
    named = {number: bytes([number + 1]) * 8 for number in spans}
    while order:
        size = data.draw(st.integers(1, len(order)))
        piece, order = order[:size], order[size:]
        links = [(named[number], named[parent]) for number in piece if (parent := spans[number][0]) is not None]
        of = {kind: [number for number in piece if spans[number][1] == kind] for kind in KINDS}
        told, untold = of["work"] + of["call"], of["empty work"] + of["empty call"]
        grown = tree.grow(
            links, [named[one] for one in told], [named[one] for one in untold], [named[one] for one in of["work"]]
        )
        counted -= {*grown.covered, *grown.topped}
        for number in told + untold:
            name, has_tokens, gives_way = named[number], number in told, spans[number][1].endswith("work")
            is_covered = gives_way and (name in tree.covered or (not has_tokens and name in tree.hollow))
            if not is_covered and (has_tokens or name not in grown.below):
                counted.add(number)
                if gives_way or not has_tokens:
                    tree.note(name, number, has_tokens=has_tokens, gives_way=gives_way)
        # As it is kept between two exports.
        tree = msgspec.msgpack.decode(msgspec.msgpack.encode(tree), type=SpanTree)
    sure, unsure = counting(spans)
    assert counted - unsure == sure


def test_calls_without_tokens_give_way_to_one_above_them_that_tells_theirs() -> None:
    tree = SpanTree()
    assert tree.grow([(A, B), (B, C)], [], [A]) == ([], [], set())
    tree.note(A, 1, has_tokens=False, gives_way=False)
    assert tree.is_counted
    assert tree.grow([], [C], [], [C]) == ([], [1], {A, B})
    assert tree.tops == {C: 0}
    tree.note(C, 2, has_tokens=True, gives_way=True)
    # A call with tokens takes the place of what is above it, and of nothing beside it.
    assert tree.grow([(D, B)], [D]) == ([2], [], set())
    assert (tree.covered, tree.hollow, tree.tops) == ({B, C}, set(), {})


def test_a_span_in_a_circle_is_below_itself_once() -> None:
    tree = SpanTree()
    assert tree.grow([(A, B), (B, A)], [], [], [A]).below == {A, B}


def test_what_an_earlier_version_kept_is_read_as_it_was_meant() -> None:
    kept = msgspec.msgpack.encode([{A: [B]}, {C}, {B: 7}])
    tree = msgspec.msgpack.decode(kept, type=SpanTree)
    assert tree.grow([(D, B)], [], [D]).covered == [7]


def test_a_span_that_is_its_own_parent_or_goes_in_a_circle_does_not_hang() -> None:
    tree = SpanTree()
    assert tree.grow([(A, A), (B, C), (C, B)], [A, B]) == ([], [], set())
    assert tree.covered == {B, C}


def test_two_parents_of_one_span_are_both_above_it() -> None:
    tree = SpanTree(work={B: 1, C: 2})
    assert tree.is_counted
    assert sorted(tree.grow([(A, B), (A, C), (A, B)], [A]).covered) == [1, 2]


def test_what_is_above_a_counted_span_needs_no_link_any_more() -> None:
    tree = SpanTree()
    tree.grow([(A, B), (B, C)], [])
    assert (len(tree.parents), tree.is_counted) == (2, False)
    tree.grow([], [A])
    assert (tree.parents, tree.covered) == ({}, {B, C})
    tree.grow([(C, D)], [])
    assert (tree.parents, tree.covered) == ({}, {B, C, D})
    # Nor is it kept when it comes again.
    tree.grow([(A, B), (B, C)], [])
    assert (tree.parents, tree.covered) == ({}, {B, C, D})


def test_a_span_with_tokens_of_an_older_build_counts_on_when_it_comes_again() -> None:
    tree = SpanTree(work={B: 7})
    assert tree.grow([(A, B)], [B], [A], [B]).covered == []
    assert (tree.work, tree.tops) == ({}, {B: 7})


def test_of_a_huge_trace_the_oldest_links_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(span_tree, "MAX_LINKS", 2)
    tree: Any = SpanTree()
    tree.grow([(A, B), (B, C), (C, D)], [])
    assert list(tree.parents) == [B, C]


def test_a_span_with_many_parents_keeps_some_of_them() -> None:
    tree = SpanTree()
    parents = [number.to_bytes(8, "big") for number in range(1_000, 1_100)]
    tree.grow([(A, parent) for parent in parents], [])
    assert tree.parents == {A: parents[: span_tree.MAX_PARENTS]}
