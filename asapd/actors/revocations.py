"""Revocations: in memory for whoever decides, as a signed list and as a stream of news for whoever asks."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from typing import Any

import msgspec
import trio
from nacl.signing import SigningKey

from asapd import config
from asapd.actors.notifier import Gap
from asapd.core.delegation import Claims
from asapd.core.denial import ANCESTOR_REVOKED
from asapd.core.errors import Refusal
from asapd.core.types import DAY_US, pattern_matches
from asapd.runtime.clock import Clock
from asapd.runtime.fanout import FeedClosed, Wakeup
from asapd.store import delegation_news, revocations
from asapd.store.database import Database
from asapd.store.delegation_news import (
    News as News,  # noqa: PLC0414 -- handed on to the doors, which do not know the store
)
from asapd.store.delegation_news import Party
from asapd.store.units.delegations import ImportRevocations, Revocation, RevocationsImported
from asapd.wire.keys import key_id, load_public
from asapd.wire.revocations import (
    DAEMON_PREFIX,
    Entry,
    ListMalformed,
    RevocationList,
    daemon_name,
    decode_list,
    sign_list,
    verify_list,
)

PAGE = 20
"""Pieces of news in one read, of up to 500 tokens each."""

PART = 10_000
"""Entries of a part of the list: with the longest names under 7 MB, which every daemon takes by default."""

_LOOK_EVERY_S = 1.0


class RevokedTokens:
    """A mirror of the store: which tokens are revoked. It only ever learns; what has long expired is dropped."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._number = 0
        self._expiries: dict[tuple[str, str], int] = {}
        self._clear_at_us = clock.now_us() + DAY_US

    def __len__(self) -> int:
        return len(self._expiries)

    def __contains__(self, claims: Claims) -> bool:
        return (claims.delegator, claims.id) in self._expiries

    async def refresh(self) -> None:
        """Learn what the store has recorded by now; any number may do so at once."""
        rows = await self._database.read(revocations.revoked_after, self._number)
        for number, issuer, jti, expires_us in rows:
            self._number = max(self._number, number)
            self._expiries[issuer, jti] = expires_us
        now_us = self._clock.now_us()
        if now_us >= self._clear_at_us:
            # A day is more than any two clocks differ that still agree on a token.
            self._clear_at_us = now_us + DAY_US
            self._expiries = {name: us for name, us in self._expiries.items() if us > now_us - DAY_US}

    async def follow(self, changed: Wakeup) -> None:
        """Learn of revocations as they are committed; at the latest a second after, for those of a writer that died."""
        seen = changed.count
        while True:
            with trio.move_on_after(_LOOK_EVERY_S):
                seen = await changed.wait(seen)
            await self.refresh()


# --- lists of others


class Signer(msgspec.Struct, frozen=True):
    """Whose list it is, the key that signed it, and whose delegations it may revoke, as patterns."""

    name: str
    public_key: bytes
    issuers: tuple[str, ...]

    def may_revoke(self, issuer: str) -> bool:
        """Whether a delegation of this issuer is the signer's to revoke."""
        return any(pattern_matches(pattern, issuer) for pattern in self.issuers)


class Imported(msgspec.Struct, frozen=True):
    """What became of a list; `not_allowed` are tokens that were not the signer's to revoke, as issuer and id."""

    signer: str
    key_id: str
    number: int
    entries: int
    added: int
    known: int
    expired: int
    revoked: list[str]
    not_allowed: list[tuple[str, str]]


def find_signer(
    found: RevocationList,
    *,
    own: bytes | None,
    sources: tuple[config.RevocationSource, ...],
    keys_of: Callable[[str], frozenset[bytes]],
) -> Signer | Refusal:
    """Who signed a list, when anybody here may trust it.

    An agent may revoke what it issued itself, known by any key that verifies its tokens. Another daemon may revoke what
    the configuration says. What this daemon signed itself it believes.
    """
    candidates = [] if own is None else [Signer(daemon_name(own), own, ("*",))]
    if found.issuer.startswith(DAEMON_PREFIX):
        for source in sources:
            key = load_public(source.public_key)
            candidates.append(Signer(daemon_name(key), key, source.issuers))
    else:
        candidates = [Signer(found.issuer, key, (found.issuer,)) for key in sorted(keys_of(found.issuer))]
    named = [candidate for candidate in candidates if candidate.name == found.issuer]
    if not named:
        hint = "name its key and what it may revoke in [[delegation.revocation_source]]"
        if not found.issuer.startswith(DAEMON_PREFIX):
            hint = "pin its key in [[agents]]"
        return Refusal("unknown_key", f"nothing was revoked: no key of {found.issuer} is known here; {hint}")
    key_used = verify_list(found, [candidate.public_key for candidate in named])
    if key_used is None:
        detail = f"nothing was revoked: the list is not signed by the key of {found.issuer}; export it again"
        return Refusal("bad_signature", detail)
    patterns = tuple(pattern for one in named if one.public_key == key_used for pattern in one.issuers)
    return Signer(found.issuer, key_used, patterns)


def read_list(_: Any, raw: bytes) -> RevocationList | Refusal:
    """Decode a list, in a reader's thread: a long one would hold up the loop."""
    try:
        return decode_list(raw)
    except ListMalformed as error:
        return Refusal("malformed", f"nothing was revoked: {error}")


def plan_import(
    found: RevocationList, signer: Signer, raw: bytes, *, actor: str, now_us: int, skew_us: int
) -> tuple[ImportRevocations, list[tuple[str, str]]]:
    """What of a list to merge, and the tokens that are not the signer's to revoke.

    A revocation that says it lies ahead is in force at once: who signs it has withdrawn its word.
    """
    entries: list[Revocation] = []
    foreign: list[tuple[str, str]] = []
    for entry in found.entries:
        if not signer.may_revoke(entry.issuer):
            foreign.append((entry.issuer, entry.id))
        else:
            entries.append(Revocation(entry.issuer, entry.id, min(entry.revoked_us, now_us), entry.expires_us))
    unit = ImportRevocations(
        entries,
        signer.name,
        key_id(signer.public_key),
        found.number,
        sha256(raw).digest(),
        len(foreign),
        actor,
        now_us,
        now_us - skew_us,
    )
    return unit, foreign


def imported(unit: ImportRevocations, outcome: RevocationsImported, foreign: list[tuple[str, str]]) -> Imported:
    """What to answer."""
    return Imported(
        unit.signer,
        unit.key_id,
        unit.number,
        len(unit.entries) + unit.not_allowed,
        outcome.added,
        outcome.known,
        outcome.expired,
        outcome.revoked,
        foreign,
    )


# --- serving


class SignedList(msgspec.Struct, frozen=True):
    """The list as it is sent, and the tag that changes whenever it does."""

    body: bytes
    etag: str
    number: int
    lapses_us: int | None


class Follower:
    """One subscriber's place in the news of delegations; it reads the store at its own pace."""

    def __init__(self, database: Database, changed: Wakeup, stopping: trio.Event, cursor: int) -> None:
        self._database = database
        self._changed = changed
        self._stopping = stopping
        self.cursor = cursor
        """The number up to which all was handed out."""

    async def next_news(self) -> list[News | Gap]:
        """The next pieces in order, at least one; a gap comes in the place of what is missing.

        Raises:
            FeedClosed: at shutdown.
        """
        while True:
            seen = self._changed.count
            rows, newest = await self._database.read(_page, self.cursor)
            # A cursor from before a restore is ahead of this store: it must not hide what comes now.
            self.cursor = min(self.cursor, newest)
            if rows:
                found: list[News | Gap] = []
                if rows[0].seq > self.cursor + 1:
                    found.append(Gap(self.cursor + 1, rows[0].seq - 1))
                self.cursor = rows[-1].seq
                return [*found, *rows]
            if self._stopping.is_set():
                raise FeedClosed("the news have ended")
            with trio.move_on_after(_LOOK_EVERY_S):
                await self._changed.wait(seen)


def _page(connection: Any, cursor: int) -> tuple[list[News], int]:
    newest = delegation_news.newest_news(connection)
    return delegation_news.news_after(connection, min(cursor, newest), PAGE), newest


class Revocations:
    """What the doors are given: the signed list, and followers of the news."""

    def __init__(
        self,
        database: Database,
        clock: Clock,
        identity: SigningKey,
        *,
        skew_us: Callable[[], int],
        changed: Wakeup,
        stopping: trio.Event,
    ) -> None:
        self._database = database
        self._clock = clock
        self._identity = identity
        self._issuer = daemon_name(bytes(identity.verify_key))
        self._skew_us = skew_us
        self._changed = changed
        self._stopping = stopping
        self._list: SignedList | None = None

    async def current(self) -> SignedList:
        """The list as it stands; made and signed anew only when a token came to it or lapsed."""
        after_us = self._clock.now_us() - self._skew_us()
        kept = self._list
        if kept is not None and (kept.lapses_us is None or kept.lapses_us > after_us):
            number = await self._database.read(revocations.newest_number)
            if number == kept.number:
                return kept
        self._list = await self._database.read(self._make, after_us)
        return self._list

    async def since(self, number: int) -> SignedList:
        """What came to the list behind a number, at most `PART` entries, signed as a list of its own."""
        after_us = self._clock.now_us() - self._skew_us()
        return await self._database.read(self._part, number, after_us)

    def _make(self, connection: Any, after_us: int) -> SignedList:
        """In a reader's thread, with the signature: a list may have ten thousands of entries."""
        return self._sign(revocations.standing(connection, after_us))

    def _part(self, connection: Any, number: int, after_us: int) -> SignedList:
        return self._sign(revocations.recorded_since(connection, number, after_us, PART))

    def _sign(self, standing: revocations.Standing) -> SignedList:
        body = sign_list(
            (Entry(one.issuer, one.jti, one.revoked_us, one.expires_us) for one in standing.entries),
            self._identity,
            issuer=self._issuer,
            number=standing.number,
            updated_us=standing.updated_us,
        )
        lapses_us = min((one.expires_us for one in standing.entries), default=None)
        return SignedList(body, f'"{sha256(body).hexdigest()[:32]}"', standing.number, lapses_us)

    async def follow(self, resume_after: int | None) -> tuple[Follower, int]:
        """A follower from behind `resume_after`, or from now on, and the newest number there is."""
        newest = await self._database.read(delegation_news.newest_news)
        cursor = newest if resume_after is None else resume_after
        return Follower(self._database, self._changed, self._stopping, cursor), newest


def public_news(
    news: News,
    may_know: Callable[[tuple[str | None, ...], tuple[str | None, ...]], bool],
    wants: Callable[[tuple[str | None, ...]], bool],
) -> list[tuple[str, Any]]:
    """News as one follower receives it: (method, params), of what it may see alone; often nothing.

    `may_know` says of the agents concerned, and of their tenants, whether it may; `wants` whether it asked for them.
    """
    told: list[tuple[str, Any]] = []
    tokens = [one for one in news.revoked if may_know(*_concerned(one)) and wants((one.issuer, one.delegate))]
    if tokens:
        shown = [
            {"id": one.id, "issuer": one.issuer, "jti": one.jti, "delegate": one.delegate, "expires_at": one.expires_at}
            for one in tokens
        ]
        params = news.params
        if news.cause is not None and not may_know(*_concerned(news.cause)):
            # Who may not know of an ancestor is not told what its issuer wrote.
            params = {**params, "cause": None, "reason": ANCESTOR_REVOKED, "source": None}
        told.append(("delegation.revoked", {"seq": news.seq, **params, "delegations": shown}))
    events = [
        one
        for one in news.unauthorised
        if may_know((one.agent, one.delegator), (news.tenant,)) and wants((one.agent, one.delegator))
    ]
    if events:
        shown = [msgspec.to_builtins(one) for one in events]
        told.append(("delegation.unauthorised", {"seq": news.seq, **news.params, "events": shown}))
    return told


def _concerned(one: Party) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
    """The agents that a token concerns, and their tenants."""
    return (one.issuer, one.delegate), (one.tenant, one.holder)
