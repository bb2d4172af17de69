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

# A span: the one it is below (None for the root), and whether it is an agent's work, a call of a model, or neither.
Spans = dict[int, tuple[int | None, str]]


@st.composite
def traces(draw: st.DrawFn) -> Spans:
    found: Spans = {}
    for number in range(draw(st.integers(1, 9))):
        parent = draw(st.none() | st.integers(0, number - 1)) if number else None
        found[number] = (parent, draw(st.sampled_from(["work", "call", "plain"])))
    return found


def counting(spans: Spans) -> set[int]:
    """All calls, and the agents' spans with neither a call nor another agent's span below them."""

    def above(number: int) -> set[int]:
        parent = spans[number][0]
        return set() if parent is None else {parent} | above(parent)

    told = {number for number, (_, kind) in spans.items() if kind != "plain"}
    covered = set().union(*(above(number) for number in told))
    return {number for number in told if spans[number][1] == "call" or number not in covered}


@given(spans=traces(), data=st.data())
def test_whatever_the_order_and_the_pieces_the_same_spans_count(spans: Spans, data: st.DataObject) -> None:
    order = data.draw(st.permutations(list(spans)))
    # Some are sent twice.
    order += data.draw(st.lists(st.sampled_from(order), max_size=4))
    tree = SpanTree()
    counted: set[int] = set()
    while order:
        size = data.draw(st.integers(1, len(order)))
        piece, order = order[:size], order[size:]
        named = {number: bytes([number + 1]) * 8 for number in spans}
        links = [(named[number], named[parent]) for number in piece if (parent := spans[number][0]) is not None]
        told = [number for number in piece if spans[number][1] != "plain"]
        counted -= set(tree.grow(links, [named[number] for number in told]))
        for number in told:
            if spans[number][1] == "call":
                counted.add(number)
            elif named[number] not in tree.covered:
                counted.add(number)
                tree.work[named[number]] = number
        # As it is kept between two exports.
        tree = msgspec.msgpack.decode(msgspec.msgpack.encode(tree), type=SpanTree)
    assert counted == counting(spans)


def test_a_span_that_is_its_own_parent_or_goes_in_a_circle_does_not_hang() -> None:
    tree = SpanTree()
    assert tree.grow([(A, A), (B, C), (C, B)], [A, B]) == []
    assert tree.covered == {B, C}


def test_two_parents_of_one_span_are_both_above_it() -> None:
    tree = SpanTree(work={B: 1, C: 2})
    assert tree.is_counted
    assert sorted(tree.grow([(A, B), (A, C), (A, B)], [A])) == [1, 2]


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
