"""The registry: verifies chains of delegation, and has the ledger debit them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import assert_never

import trio
from msgspec.structs import replace

from asapd import config
from asapd.actors.budgets import BudgetsNotSyncedError, sync_budgets
from asapd.actors.chains import MAX_TOKEN_BYTES, Chain, Chains
from asapd.actors.keyring import KeyDirectory, load_held
from asapd.actors.messages import (
    Attribute,
    Attribution,
    Authorize,
    ChangeReservation,
    Idempotency,
    ImportRevocationList,
    Issue,
    Issued,
    ReconfigureRegistry,
    Register,
    RegistryMessage,
    RevokeDelegation,
    Validate,
    Validity,
)
from asapd.actors.revocations import Imported, RevokedTokens, find_signer, imported, plan_import, read_list
from asapd.actors.slow_reads import after_commit, refusing_slow
from asapd.core.access import Caller, Permission, Tenants
from asapd.core.agent_keys import OF_THE_HOST
from asapd.core.delegation import Claims
from asapd.core.denial import Denied, Reason, deeper, deny, legible
from asapd.core.errors import FieldError, Refusal
from asapd.core.ledger import Remaining
from asapd.core.types import DEFAULT_TENANT, MINUTE_US, OWN_ID, SECOND_US
from asapd.runtime import mailbox
from asapd.runtime.clock import Clock
from asapd.runtime.fanout import Wakeup
from asapd.store import agent_keys, chain_queries, ledger_queries, reservation_queries
from asapd.store.database import Database, UnitFailedError
from asapd.store.parties import FOREIGN
from asapd.store.units.agents import SyncKeys
from asapd.store.units.delegations import (
    AuthorizationDenied,
    ExtendReservation,
    RefundReservation,
    RegisterDelegation,
    Registered,
    ReleaseReservation,
    ReservationChanged,
    Reserve,
    Reserved,
    Revoke,
    Revoked,
    SettleReservation,
)
from asapd.store.visibility import Visibility
from asapd.wire.problem import denied_as_refusal
from asapd.wire.token import TokenMalformed, decode, sign

# Verifying is 54 us of arithmetic; what bounds us is the group commit, which gathers what is in hand.
CONCURRENCY = 256
# Authorisations on their way to their commit without a task: half a second of the most that was measured.
DECISIONS_IN_FLIGHT = 1_024

NOT_FOUND = "delegation_not_found"

# Of the reservations that a revocation leaves open, as many as a page has.
MAX_LEFT_OPEN = 1_000

# Tokens under which usage came, and the ids of their delegations: a hundred bytes each.
MAX_ATTRIBUTED = 10_000

# The longest id that a delegation is registered under; a token is longer by its signature and claims.
_MAX_ID_CHARS = 128


@dataclass
class RegistrySettings:
    """What the registry goes by. It outlives an incarnation, so that a restarted one uses the newest.

    `keys_dir` is where keys are unless the configuration says.
    """

    delegation: config.Delegation
    keys_dir: Path
    pinned: dict[str, bytes] = field(default_factory=dict)
    budgets: tuple[config.Budget, ...] = ()
    identity: bytes | None = None
    """The daemon's own public key: a list of revocations that it signed is believed."""
    skew_us: int = 5 * MINUTE_US
    """How long after its expiry a revoked token is remembered."""
    key_problems: list[str] = field(default_factory=list)
    """Which files of keys are not used, and why."""
    tenants: Tenants = field(default_factory=Tenants)
    """Told of the host's own agents, off which callers of tenants keep: listed roots, and whose keys it has."""


class KeysNotSyncedError(Exception):
    """The store could not take the public keys at the registry's start; a later start may do. See its reason."""


async def run_registry(
    inbox: trio.MemoryReceiveChannel[RegistryMessage],
    *,
    database: Database,
    clock: Clock,
    settings: RegistrySettings,
    directory_changed: Wakeup,
    new_id: Callable[[int], str],
    beat: Callable[[], None],
    log: logging.Logger,
    revocations_changed: Wakeup | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve requests until the mailbox is closed. `new_id` makes a delegation's id from the time."""
    registry = _Registry(database, clock, settings, new_id, directory_changed, log)
    await registry.load()

    def failed(message: RegistryMessage, error: Exception) -> None:
        log.error("a %s could not be handled", type(message).__name__, exc_info=error)

    async with inbox, trio.open_nursery() as nursery:
        nursery.start_soon(registry.follow_directory)
        nursery.start_soon(registry.revoked.follow, revocations_changed or Wakeup())
        task_status.started()
        await mailbox.serve(
            inbox,
            refusing_slow(registry.handle, log),
            failed=failed,
            passes_on=registry.pass_on,
            concurrency=CONCURRENCY,
            beat=beat,
        )
        nursery.cancel_scope.cancel()


class _Registry:
    """Mirrors of the store that decisions need in memory, and the handlers of messages."""

    def __init__(
        self,
        database: Database,
        clock: Clock,
        settings: RegistrySettings,
        new_id: Callable[[int], str],
        directory_changed: Wakeup,
        log: logging.Logger,
    ) -> None:
        self._directory_changed = directory_changed
        self._directory_seen = -1
        self._database = database
        self._clock = clock
        self._settings = settings
        self._new_id = new_id
        self._log = log
        self._keys = KeyDirectory()
        self.revoked = RevokedTokens(database, clock)
        self._chains = Chains(self._keys)
        self._attributed: dict[tuple[bytes, str | None], str] = {}
        self._in_flight = 0

    async def load(self) -> None:
        """Read keys and revocations, and have the store go by the configured budgets.

        Raises:
            KeysNotSyncedError, BudgetsNotSyncedError: the store could not answer.
        """
        await self.revoked.refresh()
        refusal = await self._sync_budgets(self._settings.budgets, "asapd")
        if refusal is not None:
            raise BudgetsNotSyncedError(refusal.detail)
        refusal = await self._take_keys(self._settings.delegation, self._settings.pinned, "asapd")
        if refusal is not None:
            raise KeysNotSyncedError(refusal.detail)

    async def _sync_budgets(self, budgets: tuple[config.Budget, ...], actor: str) -> Refusal | None:
        now_us = self._clock.now_us()
        return await sync_budgets(self._database, budgets, actor=actor, now_us=now_us, log=self._log)

    async def _take_keys(self, delegation: config.Delegation, pinned: dict[str, bytes], actor: str) -> Refusal | None:
        """Read the keys that the daemon holds, and go by them and by these settings."""
        keys_dir = self._settings.keys_dir if delegation.keys_dir is None else delegation.keys_dir
        held, problems = load_held(keys_dir)
        public = [(agent, bytes(key.verify_key)) for agent, key in held.items()]
        own = None if self._settings.identity is None else (OWN_ID, self._settings.identity)
        unit = SyncKeys(public, own, actor, self._clock.now_us(), delegation.key_overlap_us)
        outcome = await self._database.submit(unit, urgent=True)
        if isinstance(outcome, Refusal):
            return outcome
        for problem in problems:
            self._log.error("%s", problem)
        self._settings.key_problems = problems
        self._keys.held, self._keys.pinned, self._keys.manifest_keys = held, pinned, delegation.manifest_keys
        with after_commit():
            await self._load_keys(delegation.roots)
        return None

    async def _load_keys(self, roots: tuple[str, ...] | None = None) -> None:
        seen = self._directory_changed.count
        known = await self._database.read(agent_keys.keys_of)
        self._keys.learn(known)
        roots = self._settings.delegation.roots if roots is None else roots
        self._settings.tenants.take_own({*roots, *(key.agent for key in known if key.source in OF_THE_HOST)})
        self._directory_seen = seen

    async def follow_directory(self) -> None:
        """Learn the keys of agents as they come and go."""
        while True:
            await self._directory_changed.wait(self._directory_seen)
            await self._load_keys()

    async def handle(self, message: RegistryMessage) -> None:
        """Answer one message."""
        # A change that was answered holds from the next message on, whoever of the two wakes first.
        if self._directory_changed.count != self._directory_seen:
            await self._load_keys()
        match message:
            case Issue():
                message.reply.send(await self._issue(message))
            case Register():
                message.reply.send(await self._register(message))
            case Validate():
                message.reply.send(await self._validate(message))
            case Authorize():
                message.reply.send(await self._authorize(message))
            case ChangeReservation():
                message.reply.send(await self._change(message))
            case RevokeDelegation():
                message.reply.send(await self._revoke(message))
            case ImportRevocationList():
                message.reply.send(await self._import_revocations(message))
            case Attribute():
                message.reply.send(await self._attribute(message))
            case ReconfigureRegistry():
                message.reply.send(await self._reconfigure(message))
            case _:
                assert_never(message)

    async def _reconfigure(self, message: ReconfigureRegistry) -> Refusal | tuple[str, ...]:
        refusal = await self._sync_budgets(message.budgets, message.actor)
        if refusal is not None:
            return refusal
        self._settings.budgets = message.budgets
        before = {(agent, bytes(key)) for agent, key in self._keys.held.items()}
        refusal = await self._take_keys(message.delegation, message.pinned, message.actor)
        if refusal is not None:
            return refusal
        self._settings.delegation, self._settings.pinned = message.delegation, message.pinned
        after = {(agent, bytes(key)) for agent, key in self._keys.held.items()}
        return tuple(sorted({agent for agent, _ in before ^ after}))

    # --- judging a chain

    async def _open(self, text: str, caller: Caller) -> Chain | Denied:
        """Decode a token, check the signature of every token in its chain, and find ancestors that are only named.

        What a registered token was registered under is settled, whosever that is; the rest is looked for by its name.
        """
        max_depth = self._settings.delegation.max_depth
        chain = self._chains.open(text, max_depth=max_depth, now_us=self._clock.now_us())
        may_see_given: Callable[..., bool] | None = caller.may_see_given
        while isinstance(chain, Chain) and (parent := chain.tokens[0].parent_id) is not None:
            first = chain.tokens[0]
            child = (first.claims.delegator, first.claims.id, first.digest)
            found = await self._database.read(chain_queries.registered_parent, child, may_see_given)
            if found is None:
                found = await self._parent(parent, first.claims.delegator, caller)
            if found is None:
                return parent_unknown(chain)
            may_see_given = None
            above = self._chains.open(found, max_depth=max_depth, now_us=self._clock.now_us())
            if isinstance(above, Denied):
                return deeper(above, len(chain.tokens))
            chain = self._chains.extend(above, chain, max_depth=max_depth)
        return chain

    async def _parent(self, parent: str, issuer: str, caller: Caller) -> str | None:
        query = chain_queries.parent_token
        return await self._database.read(query, parent, issuer, caller.tenant, caller.matches)

    def _judge(self, chain: Chain, now_us: int, *, action: str | None, delegate: str | None) -> Denied | None:
        settings = self._settings.delegation
        return self._chains.judge(
            chain,
            now_us=now_us,
            max_depth=settings.max_depth,
            roots=settings.roots,
            is_revoked=self.revoked.__contains__,
            action=action,
            delegate=delegate,
            skew_us=self._settings.skew_us,
        )

    # --- messages

    async def _validate(self, message: Validate) -> Validity:
        chain = await self._open(message.token, message.caller)
        if isinstance(chain, Denied):
            return Validity(chain, (), None)
        denied = self._judge(chain, self._clock.now_us(), action=message.action, delegate=message.delegate)
        known = await self._database.read(chain_queries.standing, chain.accounts, message.caller.tenant)
        if known is None:
            return Validity(denied, chain.claims, None)
        refused, left = known
        denied = denied or refused
        return Validity(denied, chain.claims, _narrowed(left, chain.claims))

    async def _issue(self, message: Issue) -> Issued | Denied | Refusal:
        caller = message.caller
        if not caller.may_sign:
            return _forbidden("this key has no right to sign for a delegator: create one with --sign")
        if not caller.may_touch(message.delegator):
            return _forbidden(f"this key may not act for {message.delegator}")
        key = self._keys.held.get(message.delegator)
        if key is None:
            keys_dir = self._settings.delegation.keys_dir or self._settings.keys_dir
            reason = f"has no key in {keys_dir}: put <name>.pem there and reload, or sign elsewhere"
            detail = f"nothing was issued: delegator {reason}"
            return Refusal("no_signing_key", detail, (FieldError("delegator", reason),))
        parent_text: str | None = None
        above = Chain((), (), ())
        if message.parent is not None:
            found = await self._find_parent(message.parent, message.delegator, caller)
            if not isinstance(found, Chain):
                return found
            above, parent_text = found, found.tokens[-1].text
        now_us = self._clock.now_us()
        claims = Claims(
            self._new_id(now_us),
            message.delegator,
            message.delegate,
            message.scopes,
            message.max_tasks,
            message.max_cost_microusd,
            now_us // SECOND_US * SECOND_US,
            message.expires_at_us // SECOND_US * SECOND_US,
        )
        try:
            token = decode(sign(claims, key, parent=parent_text), max_depth=64, max_bytes=MAX_TOKEN_BYTES)
        except TokenMalformed as error:
            return Refusal("invalid", f"nothing was issued: {error.reason}")
        public = bytes(key.verify_key)
        chain = Chain((*above.tokens, token), (*above.keys, public), (*above.claims, token.claims))
        return await self._enter(chain, caller, message)

    async def _find_parent(self, parent: str, issuer: str, caller: Caller) -> Chain | Denied | Refusal:
        text = await self._parent(parent, issuer, caller)
        if text is None and len(parent) <= _MAX_ID_CHARS and "{" not in parent:
            what, remedy = f"there is no delegation {legible(parent)}", "register it first, or send its token instead"
            denied = deny(
                Reason.CHAIN_BROKEN, "parent_known", f"nothing was issued: parent: {what}", remedy, asked=parent
            )
            return replace(denied_as_refusal(denied), errors=(FieldError("parent", f"{what}: {remedy}"),))
        return await self._open(parent if text is None else text, caller)

    async def _register(self, message: Register) -> Issued | Denied | Refusal:
        chain = await self._open(message.token, message.caller)
        if isinstance(chain, Denied):
            return chain
        if not message.caller.may_touch(chain.leaf.delegator, chain.leaf.delegate):
            return _forbidden(f"this key may act neither for {chain.leaf.delegator} nor for {chain.leaf.delegate}")
        return await self._enter(chain, message.caller, message)

    async def _enter(self, chain: Chain, caller: Caller, message: Issue | Register) -> Issued | Denied | Refusal:
        denied = self._judge(chain, self._clock.now_us(), action=None, delegate=None)
        if denied is not None:
            return denied
        outcome = await self._take_in(chain, caller, message.idempotency)
        if not isinstance(outcome, Registered):
            return outcome
        if outcome.created and message.idempotency is None:
            return Issued(outcome.id, chain.tokens[-1].text, created=True)
        # An Idempotency-Key may have brought back an earlier delegation: its own token goes with it.
        with after_commit():
            row = await self._database.read(ledger_queries.get_delegation, outcome.id)
        return Issued(outcome.id, chain.tokens[-1].text if row is None else row.token, outcome.created)

    async def _take_in(
        self, chain: Chain, caller: Caller, idempotency: Idempotency | None = None
    ) -> Registered | Denied | Refusal:
        """Register a chain for a caller; the store refuses one whose last token is of other tenants."""
        tenant, now_us = caller.tenant or DEFAULT_TENANT, self._clock.now_us()
        unit = RegisterDelegation(chain.links, caller.actor, tenant, now_us, is_bound=caller.tenant is not None)
        return await self._database.submit(unit, urgent=True, idempotency=idempotency)

    async def _authorize(self, message: Authorize) -> Reserved | AuthorizationDenied | Denied | Refusal:
        text, delegation = message.token, message.delegation or ""
        if text is None:
            row = await self._database.read(ledger_queries.get_delegation, delegation)
            if row is None or message.caller.tenant not in {None, row.owner, row.holder}:
                return _no_delegation(delegation)
            text = row.token
        chain = await self._open(text, message.caller)
        if isinstance(chain, Denied):
            return chain
        unit = self._reservation(message, chain)
        if isinstance(unit, Refusal):
            return unit
        if isinstance(unit, Denied):
            known = await self._database.read(chain_queries.standing, chain.accounts, message.caller.tenant)
            return FOREIGN if known is None else AuthorizationDenied(unit, _narrowed(known[1], chain.claims))
        return await self._database.submit(unit, urgent=True, idempotency=message.idempotency)

    def _reservation(self, message: Authorize, chain: Chain) -> Reserve | Denied | Refusal:
        """What the store is asked for, once caller and chain allow it."""
        caller, delegation = message.caller, message.delegation or ""
        if not caller.may_touch(chain.leaf.delegate):
            if message.token is None:
                return _no_delegation(delegation)  # whoever holds no token learns nothing of it
            return _forbidden(f"this key may not act for {chain.leaf.delegate}")
        now_us = self._clock.now_us()
        denied = self._judge(chain, now_us, action=message.action, delegate=message.delegate or caller.own_agent)
        if denied is not None:
            return denied
        ttl_us = self._ttl_us(message.ttl_us)
        if isinstance(ttl_us, Refusal):
            return ttl_us
        return Reserve(
            message.task_id,
            message.action,
            message.estimate,
            ttl_us,
            caller.actor,
            caller.tenant or DEFAULT_TENANT,
            now_us,
            # A chain that was registered is four kilobytes to send and read that the ledger has.
            chain=[] if message.token is None or chain.registered else chain.links,
            delegation=chain.registered or delegation,
            delegate=chain.leaf.delegate,
            consumer=message.consumer,
            project=message.project,
            is_bound=caller.tenant is not None,
        )

    def _ttl_us(self, wanted_us: int | None) -> int | Refusal:
        """How long a reservation stands: a delegate that was revoked holds what is everybody's no longer than that."""
        settings = self._settings.delegation
        longest_us = max(settings.max_reservation_ttl_us, settings.reservation_ttl_us)
        if wanted_us is not None and wanted_us > longest_us:
            reason = f"must be at most {longest_us // SECOND_US} here: extend it while the work goes on"
            return Refusal("invalid", f"ttl_seconds {reason}", (FieldError("ttl_seconds", reason),))
        return settings.reservation_ttl_us if wanted_us is None else wanted_us

    async def pass_on(self, message: RegistryMessage) -> bool:
        """Send an authorisation to the store from the loop itself, if all that it is judged by is in memory.

        Whatever has to read first, a denial included, is left to `handle`, which has a task for each message.
        """
        if not isinstance(message, Authorize) or message.token is None or self._in_flight >= DECISIONS_IN_FLIGHT:
            return False
        if self._directory_changed.count != self._directory_seen:
            return False
        max_depth = self._settings.delegation.max_depth
        chain = self._chains.open(message.token, max_depth=max_depth, now_us=self._clock.now_us())
        if isinstance(chain, Denied) or chain.tokens[0].parent_id is not None:
            return False
        unit = self._reservation(message, chain)
        if not isinstance(unit, Reserve):
            return False
        self._in_flight += 1
        settle = partial(self._settle, message, chain)
        try:
            await self._database.post(unit, settle, urgent=True, idempotency=message.idempotency)
        except BaseException:
            self._in_flight -= 1  # it never got on its way, so nobody settles it
            raise
        return True

    def _settle(
        self,
        message: Authorize,
        chain: Chain,
        outcome: Reserved | AuthorizationDenied | Denied | Refusal | UnitFailedError,
    ) -> None:
        self._in_flight -= 1
        if isinstance(outcome, Reserved) and message.idempotency is None:
            chain.registered = outcome.delegation
        if isinstance(outcome, UnitFailedError):
            self._log.error("a %s could not be handled", type(message).__name__, exc_info=outcome)
            message.reply.fail()
        else:
            message.reply.send(outcome)

    async def _change(self, message: ChangeReservation) -> ReservationChanged | Refusal:
        row = await self._database.read(reservation_queries.get_reservation, message.reservation)
        party = None if row is None else row.delegator if message.verb == "refund" else row.delegate
        by = Visibility(message.caller.tenant, message.caller.agents)
        is_issuers = (
            row is not None
            and message.verb == "release"
            and message.caller.may(Permission.OPERATE)
            and await self._database.read(reservation_queries.is_left_behind, row.id, by)
        )
        if row is None or not (
            is_issuers or message.caller.may_see_given(row.owner, row.holder, row.delegator, row.delegate)
        ):
            return Refusal("reservation_not_found", f"there is no reservation {message.reservation}: check the id")
        side = row.owner if message.verb == "refund" else row.holder
        acts_for = message.caller.may_touch(party) and message.caller.tenant in {None, side}
        if not is_issuers and message.verb == "release" and not message.caller.may(Permission.INGEST):
            return _forbidden("to operate is enough to release what is left under a revoked delegation, not more")
        if not acts_for and not is_issuers:
            return _forbidden(f"only who may act for {party} can {message.verb} this reservation")
        now_us, actor = self._clock.now_us(), message.caller.actor
        unit: SettleReservation | ReleaseReservation | ExtendReservation | RefundReservation
        match message.verb:
            case "settle":
                unit = SettleReservation(row.id, message.cost_microusd, actor, now_us, message.tokens)
            case "release":
                unit = ReleaseReservation(row.id, actor, now_us)
            case "extend":
                ttl_us = self._ttl_us(message.ttl_us)
                if isinstance(ttl_us, Refusal):
                    return ttl_us
                unit = ExtendReservation(row.id, ttl_us, actor, now_us)
            case "refund":
                unit = RefundReservation(row.id, message.cost_microusd or 0, message.reason, actor, now_us, by)
            case _:
                assert_never(message.verb)
        return await self._database.submit(unit, urgent=True, idempotency=message.idempotency)

    async def _revoke(self, message: RevokeDelegation) -> Revoked | Refusal:
        row = await self._database.read(ledger_queries.get_delegation, message.delegation)
        # Whoever registers a token first has its id: to go by that of a token may be to name somebody else's.
        may_see = message.caller.may_see_given
        others = await self._database.read(ledger_queries.namesakes, message.delegation, may_see)
        hint = "".join(f"; the token of {delegator} with this id goes by {other} here" for other, delegator in others)
        if row is None or not may_see(row.owner, row.holder, row.delegator, row.delegate):
            return Refusal(NOT_FOUND, f"there is no delegation {message.delegation}: check the id{hint}")
        if not message.caller.may_touch(row.delegator) or message.caller.tenant not in {None, row.owner}:
            return _forbidden(f"only who may act for {row.delegator} can revoke this delegation{hint}")
        unit = Revoke(row.id, message.caller.actor, message.reason, self._clock.now_us())
        outcome = await self._database.submit(unit, urgent=True)
        with after_commit():
            # In force before the reply; and after an unknown outcome the store alone knows.
            await self.revoked.refresh()
            if isinstance(outcome, Refusal):
                return outcome
            seen = outcome.ids
            if not message.caller.sees_everything:
                seen = await self._database.read(ledger_queries.seen_among, seen, may_see)
            query_open = reservation_queries.open_under
            left = await self._database.read(query_open, outcome.ids, self._clock.now_us(), MAX_LEFT_OPEN)
        others = [one for one in others if one[0] not in outcome.ids]
        return Revoked(seen, outcome.newly, len(outcome.ids) - len(seen), others, left)

    async def _import_revocations(self, message: ImportRevocationList) -> Imported | Refusal:
        found = await self._database.read(read_list, message.body)
        if isinstance(found, Refusal):
            return found
        settings, now_us, actor = self._settings, self._clock.now_us(), message.caller.actor
        signer = find_signer(
            found,
            own=settings.identity,
            sources=settings.delegation.revocation_sources,
            # A list only takes away, so a key that was replaced may say it for as long as it verifies any token.
            keys_of=partial(self._keys.public_keys, issued_at_us=0, now_us=now_us),
        )
        if isinstance(signer, Refusal):
            return signer
        unit, foreign = plan_import(found, signer, message.body, actor=actor, now_us=now_us, skew_us=settings.skew_us)
        outcome = await self._database.submit(unit, urgent=True, idempotency=message.idempotency)
        with after_commit():
            await self.revoked.refresh()
        return outcome if isinstance(outcome, Refusal) else imported(unit, outcome, foreign)

    # --- usage that comes with a token

    async def _attribute(self, message: Attribute) -> Attribution | Refusal:
        """The delegation of a token; a token that allows nothing is said to, and nothing is registered for it."""
        caller = message.caller
        chain = await self._open(message.token, caller)
        if isinstance(chain, Denied):
            return _unattributed(chain)
        leaf = chain.tokens[-1]
        denied = self._judge(chain, self._clock.now_us(), action=None, delegate=None)
        denied = denied or _not_the_reporters(chain, caller)
        if denied is None:
            known = self._attributed.get((leaf.digest, caller.tenant))
            if known is not None:
                return Attribution(known, chain.leaf.id)
            outcome = await self._take_in(chain, caller)
            if isinstance(outcome, Refusal):
                # Usage that happened is recorded, and debits nothing of another tenant.
                is_foreign = outcome.code == FOREIGN.code
                return Attribution(None, chain.leaf.id, NOT_FOUND, outcome.detail) if is_foreign else outcome
            if isinstance(outcome, Registered):
                if len(self._attributed) >= MAX_ATTRIBUTED:
                    self._attributed.pop(next(iter(self._attributed)))
                self._attributed[leaf.digest, caller.tenant] = outcome.id
                return Attribution(outcome.id, chain.leaf.id)
            denied = outcome
        name = (chain.leaf.delegator, chain.leaf.id)
        found = await self._database.read(ledger_queries.find_registered, *name, leaf.digest, caller.tenant)
        return Attribution(found, chain.leaf.id, str(denied.reason), denied.detail)


def parent_unknown(chain: Chain) -> Denied:
    """The denial of a chain whose first token names a parent that is not registered."""
    child, position, parent = chain.claims[0], len(chain.claims) - 1, chain.tokens[0].parent_id
    if parent == child.id:
        return deny(
            Reason.CYCLE,
            "token_once",
            "names itself as its parent",
            "name the token that its delegator was given",
            token=child.id,
            position=position,
            asked=parent,
        )
    return deny(
        Reason.CHAIN_BROKEN,
        "parent_known",
        f"its parent {parent} is not registered here",
        "register that first, or send it whole",
        token=child.id,
        position=position,
        asked=parent,
    )


def _not_the_reporters(chain: Chain, caller: Caller) -> Denied | None:
    if caller.may_touch(chain.leaf.delegate):
        return None
    return deny(
        Reason.WRONG_DELEGATE,
        "reporter",
        f"given to {chain.leaf.delegate}, for whom this key may not report",
        "report with a key of that agent",
        token=chain.leaf.id,
        position=0,
        granted=chain.leaf.delegate,
    )


def _no_delegation(delegation: str) -> Refusal:
    return Refusal(NOT_FOUND, f"there is no delegation {delegation}: send its token instead")


def _unattributed(denied: Denied) -> Attribution:
    return Attribution(None, denied.token_id, str(denied.reason), denied.detail)


def _forbidden(detail: str) -> Refusal:
    return Refusal("forbidden", detail)


def _narrowed(left: Remaining, claims: tuple[Claims, ...]) -> Remaining:
    """What is left, held to the limits of tokens that are not registered yet."""
    costs = [left.cost_microusd, *(link.max_cost_microusd for link in claims)]
    tasks = [left.tasks, *(link.max_tasks for link in claims)]
    return Remaining(
        min((cost for cost in costs if cost is not None), default=None),
        min((count for count in tasks if count is not None), default=None),
    )
