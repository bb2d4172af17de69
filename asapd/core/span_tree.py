"""Which spans of a trace have one below them that counts, whatever order they come in.

A span counts once, and an agent's span only while no span below it does. All that is asked of a trace is monotone: what
has a counted span below it keeps it. So the answer for a set of spans is the same in whatever order and pieces it came.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

MAX_LINKS: Final = 10_000
"""Links that are remembered of one trace, some 250 kB of them; of a larger one the oldest are forgotten."""

MAX_PARENTS: Final = 16
"""Parents that are remembered of one span: it has one, and only senders that are wrong tell of many."""


class SpanTree(msgspec.Struct, array_like=True, gc=False):
    """What is known of one trace. Spans are their ids of 8 bytes.

    `parents` are of spans with nothing counted in them or below them; where there is, all that is above is in
    `covered`. `work` has the row of usage of each agent's span that counts.
    """

    parents: dict[bytes, list[bytes]] = {}
    covered: set[bytes] = set()
    work: dict[bytes, int] = {}

    @property
    def is_counted(self) -> bool:
        """Whether a span of it is, or was, counted that has others near it."""
        return bool(self.covered or self.work)

    def grow(self, links: Iterable[tuple[bytes, bytes]], counted: Iterable[bytes]) -> list[int]:
        """Take in pairs of span and parent, and spans that count; returns rows of usage that count no longer."""
        reached = list(counted)
        full = {*reached, *self.covered}
        for span, parent in links:
            if parent in self.covered:
                continue  # and all above it: the link says nothing any more, and comes with each part of its trace
            if span in full:
                reached.append(span)
            known = self.parents.setdefault(span, [])
            if parent != span and len(known) < MAX_PARENTS and parent not in known:
                known.append(parent)
        superseded: list[int] = []
        while reached:
            for parent in self.parents.pop(reached.pop(), ()):
                if parent not in self.covered:
                    self.covered.add(parent)
                    reached.append(parent)
                    row = self.work.pop(parent, None)
                    if row is not None:
                        superseded.append(row)
        for span in list(self.parents)[: max(0, len(self.parents) - MAX_LINKS)]:
            del self.parents[span]
        return superseded
