"""The keys of agents: which of them verify a token, and what it means that a manifest was signed by one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum, auto
from typing import Literal

from msgspec import Struct

Source = Literal["held", "configuration", "api", "import", "tenant", "manifest", "identity", "former"]
"""Where a key comes from: a file of `keys_dir`, a pin of the configuration, `POST /agents`, an import by an operator of
the host or by one of the agent's tenant, a manifest; `identity` is the daemon's own key, which signs no tokens.
`former`: it was retired before its agent left the directory, or before a manifest claimed it again, and comes back
neither by adding the agent again nor by a manifest."""

KeyState = Literal["active", "claimed", "retired"]
"""`claimed`: a manifest was signed with it, and nobody said that it is the agent's."""

# What stands higher rules out what stands lower: a pin would be none if anything else could add a key to it.
_RANK: dict[Source, int] = {"held": 0, "configuration": 0, "api": 1, "import": 1, "tenant": 1, "manifest": 2}

FOUNDING: frozenset[Source] = frozenset({"held", "configuration", "import"})
"""Sources whose keys may begin a chain: who runs the host put them there as keys. What an agent says of itself, or
whoever keeps the directory says of it, verifies its links alone."""

OF_THE_HOST: tuple[Source, ...] = ("held", "identity", "import")
"""Sources whose keys, also retired ones, make an agent that no directory holds the host's own."""


class AgentKey(Struct, frozen=True):
    """One public key (32 raw bytes) of an agent from one source.

    A retired one verifies what was issued before `retired_us`, until `until_us`.
    """

    agent: str
    public_key: bytes
    source: Source
    state: KeyState
    since_us: int
    retired_us: int | None = None
    until_us: int | None = None

    def is_retiring(self, now_us: int) -> bool:
        """Whether the key was replaced and its overlap still runs."""
        return self.state == "retired" and self.until_us is not None and now_us < self.until_us

    def covers(self, issued_at_us: int | None, now_us: int) -> bool:
        """Whether the key still verifies a token of this time although it was replaced; None says no time."""
        if issued_at_us is None or self.retired_us is None:
            return False
        return self.is_retiring(now_us) and issued_at_us < self.retired_us


class Sighting(Enum):
    """What a manifest's sound signature by a key means to those who know the agent's keys."""

    KNOWN = auto()
    FIRST = auto()
    CHANGED = auto()


class Signers(Struct, frozen=True):
    """Whose signature on a manifest counts. `given` came from the operator, `seen` from manifests before.

    `is_new`: nothing is known of the agent but its `former` keys, so that the first key beside those is taken.
    """

    given: frozenset[bytes]
    seen: frozenset[bytes]
    is_new: bool
    former: frozenset[bytes] = frozenset()

    def takes(self, public_key: bytes | None) -> bool:
        """Whether a key that nobody gave is the agent's because it is the first."""
        return self.is_new and public_key not in self.former


def verifying(
    keys: Iterable[AgentKey], *, issued_at_us: int | None, now_us: int, believe_manifests: bool
) -> frozenset[bytes]:
    """The raw keys that verify a token which one agent issued at `issued_at_us`; `keys` are all of that agent.

    A token that does not say when it was issued (None) is not older than any key.
    """
    counted = [key for key in keys if key.source in _RANK and (believe_manifests or key.source != "manifest")]
    active = [key for key in counted if key.state == "active"]
    best = min((_RANK[key.source] for key in active), default=None)
    before = [
        key
        for key in counted
        if key.covers(issued_at_us, now_us)
        # Else a key that an operator imported once could speak for an agent that was pinned since.
        and (best != 0 or _RANK[key.source] == 0)
    ]
    return frozenset(key.public_key for key in [*before, *(key for key in active if _RANK[key.source] == best)])


def signers(keys: Sequence[AgentKey], now_us: int) -> Signers:
    """Whose signature on an agent's manifest counts.

    A key that the daemon holds does not: it is for tokens, and the agent may sign its manifests with another.
    """
    own = _own(keys)
    given = verifying(own, issued_at_us=0, now_us=now_us, believe_manifests=False)
    seen = {
        key.public_key for key in own if key.source == "manifest" and (key.state == "active" or key.is_retiring(now_us))
    }
    former = frozenset(key.public_key for key in keys if key.source == "former")
    return Signers(given, frozenset(seen), not own, former)


def sighting(keys: Sequence[AgentKey], public_key: bytes, now_us: int) -> Sighting:
    """What it means that a manifest of the agent is soundly signed by a key."""
    known = signers(keys, now_us)
    if known.takes(public_key):
        return Sighting.FIRST
    return Sighting.KNOWN if public_key in (known.given or known.seen) else Sighting.CHANGED


def _own(keys: Iterable[AgentKey]) -> list[AgentKey]:
    return [key for key in keys if key.source not in ("held", "identity", "former")]
