"""Which spans of a trace give way to others of it, whatever order they come in.

A span with tokens counts, if it is a call; one that gives way (an agent's, a gateway's) counts while no span below it
has any. So tokens count once. A span that has none gives way to any below it that counts, if it is one of those, and in
any case to a span above it that counts: that tells the tokens of the same call.

What is asked of a trace for its tokens is monotone: what has a span with tokens below it keeps it. So the answer for a
set of spans is the same in whatever order and pieces it came. Only of spans without tokens one that gave way stays so
when the span above it gives way in turn.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

import msgspec

MAX_LINKS: Final = 10_000
"""Links that are remembered of one trace, some 250 kB of them; of a larger one the oldest are forgotten."""

MAX_PARENTS: Final = 16
"""Parents that are remembered of one span: it has one, and only senders that are wrong tell of many."""


class Grown(NamedTuple):
    """What a tree found when it grew: rows of usage that count no longer, and all spans below those of `tops`."""

    covered: list[int]
    """For the sake of spans below them."""
    topped: list[int]
    """For the sake of spans above them."""
    below: set[bytes]


class SpanTree(msgspec.Struct, array_like=True, gc=False):
    """What is known of one trace. Spans are their ids of 8 bytes.

    `parents` are of spans with no tokens told by them or below them; where there are, all that is above is in
    `covered`. What is above spans that tell of calls without tokens, and not in `covered`, is in `hollow`. The rows of
    usage of spans that count: `work` has those of spans without tokens that give way to any below them, `tops` those of
    spans with tokens that give way to such, and `empty` those of all without tokens that have a parent.
    """

    parents: dict[bytes, list[bytes]] = {}
    covered: set[bytes] = set()
    work: dict[bytes, int] = {}
    hollow: set[bytes] = set()
    tops: dict[bytes, int] = {}
    empty: dict[bytes, int] = {}

    @property
    def is_counted(self) -> bool:
        """Whether a span of it is, or was, counted that has others near it."""
        return bool(self.covered or self.hollow or self.work or self.tops)

    def grow(
        self,
        links: Iterable[tuple[bytes, bytes]],
        told: Iterable[bytes],
        untold: Iterable[bytes] = (),
        tops: Iterable[bytes] = (),
    ) -> Grown:
        """Take in pairs of span and parent, spans with tokens and without, and which of the former give way.

        Those of `tops` that count get the row 0, until somebody knows it.
        """
        reached, hollow = list(told), list(untold)
        full, half = {*reached, *self.covered}, {*hollow, *self.hollow}
        for span, parent in links:
            if parent in self.covered:
                continue  # and all above it: the link says nothing any more, and comes with each part of its trace
            if span in full:
                reached.append(span)
            elif span in half:
                hollow.append(span)
            known = self.parents.setdefault(span, [])
            if parent != span and len(known) < MAX_PARENTS and parent not in known:
                known.append(parent)
        giving_way = list(tops)
        for span in giving_way:  # an older build kept them with those that have no tokens
            row = self.work.pop(span, None)
            if row is not None:
                self.tops[span] = row
        covered = self._cover(reached)
        covered += self._hollow_out(hollow)
        for span in giving_way:
            if span not in self.covered:
                self.tops.setdefault(span, 0)
        below = self._below() if self.tops else set()
        topped = [self.empty.pop(span) for span in below & self.empty.keys()]
        for span in list(self.parents)[: max(0, len(self.parents) - MAX_LINKS)]:
            del self.parents[span]
            self.empty.pop(span, None)
        return Grown(covered, topped, below)

    def note(self, span: bytes, row: int, *, has_tokens: bool, gives_way: bool) -> None:
        """Remember the row of usage of a span that counts and may yet give way."""
        if has_tokens:
            self.tops[span] = row
            return
        if gives_way:
            self.work[span] = row
        if span in self.parents:
            self.empty[span] = row

    def _cover(self, reached: list[bytes]) -> list[int]:
        rows = []
        while reached:
            for parent in self.parents.pop(reached.pop(), ()):
                if parent not in self.covered:
                    self.covered.add(parent)
                    self.hollow.discard(parent)
                    reached.append(parent)
                    self.empty.pop(parent, None)
                    rows += [of.pop(parent) for of in (self.work, self.tops) if parent in of]
        return rows

    def _hollow_out(self, hollow: list[bytes]) -> list[int]:
        rows = []
        while hollow:
            for parent in self.parents.get(hollow.pop(), ()):
                if parent not in self.covered and parent not in self.hollow:
                    self.hollow.add(parent)
                    hollow.append(parent)
                    if parent in self.work:
                        self.empty.pop(parent, None)
                        rows.append(self.work.pop(parent))
        return rows

    def _below(self) -> set[bytes]:
        children: dict[bytes, list[bytes]] = {}
        for span, parents in self.parents.items():
            for parent in parents:
                children.setdefault(parent, []).append(span)
        found: set[bytes] = set()
        reached = list(self.tops)
        while reached:
            new = [span for span in children.get(reached.pop(), ()) if span not in found]
            found.update(new)
            reached += new
        return found
