"""The gatekeeper: makes and revokes API keys, and keeps the ring that the doors look keys up in."""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import assert_never

import trio

from asapd.actors.messages import CreateKeyRequest, GatekeeperMessage, NewKey, RevokeKeyRequest
from asapd.actors.slow_reads import ReadTooLongError, after_commit, refusing_slow
from asapd.core.access import Caller, Tenants
from asapd.core.errors import FieldError, Refusal
from asapd.core.types import Role, format_us
from asapd.runtime import mailbox
from asapd.runtime.clock import Clock
from asapd.runtime.fanout import Wakeup
from asapd.store.database import Database
from asapd.store.keys import list_keys
from asapd.store.units.house import ApiKey, CreateKey, RevokeKey

KEY_PREFIX = "asapd"


class KeyRing:
    """The keys in use, in memory; a key that was revoked is gone from the reply on."""

    def __init__(self, tenants: Tenants | None = None) -> None:
        self._tenants = tenants
        self._keys: dict[str, ApiKey] = {}
        self.changed = Wakeup()
        """Raised whenever keys came or went: who is served for long looks whether he may stay."""

    def replace(self, keys: list[ApiKey]) -> None:
        """Hold exactly the keys of this list that are not revoked."""
        self._keys = {key.id: key for key in keys if key.revoked_us is None}
        self.changed.notify()

    def drop(self, key_id: str) -> None:
        """Hold a key no more."""
        self._keys.pop(key_id, None)
        self.changed.notify()

    def find(self, presented: str) -> Caller | None:
        """Who presents this text, `asapd_<id>_<secret>`; None when no key in use is like it."""
        prefix, _, rest = presented.partition("_")
        key_id, _, secret = rest.partition("_")
        key = self._keys.get(key_id)
        digest = digest_of(secret)
        # Compared even when the id is unknown, so that the time taken tells nothing.
        if not hmac.compare_digest(digest, key.digest if key is not None else bytes(32)) or key is None:
            return None
        if prefix != KEY_PREFIX:
            return None
        return Caller(f"key:{key.id}", Role(key.role), tuple(key.agents), key.tenant, key.may_sign, self._tenants)

    def is_in_use(self, caller: Caller) -> bool:
        """Whether whoever came with a key may still stay: what lives longer than a request asks again."""
        kind, _, key_id = caller.actor.partition(":")
        return kind != "key" or key_id in self._keys


def digest_of(secret: str) -> bytes:
    """SHA-256: a secret of 256 random bits needs no slow hash."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


async def run_gatekeeper(
    inbox: trio.MemoryReceiveChannel[GatekeeperMessage],
    *,
    database: Database,
    ring: KeyRing,
    clock: Clock,
    entropy: Callable[[int], bytes],
    seed: bytes,
    beat: Callable[[], None],
    log: logging.Logger,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve key requests until the mailbox is closed.

    `seed` are 16 to 64 secret bytes that stay the same over restarts.
    """
    ring.replace(await database.read(list_keys))

    async def handle(message: GatekeeperMessage) -> None:
        match message:
            case CreateKeyRequest():
                outcome = await _create(message, database, clock.now_us(), entropy, seed)
                with after_commit():
                    keys = await database.read(list_keys)
                ring.replace(keys)
                message.reply.send(_unless_revoked(outcome, keys))
            case RevokeKeyRequest():
                unit = RevokeKey(message.id, message.caller.actor, clock.now_us())
                revoked = await database.submit(unit, urgent=True)
                if isinstance(revoked, Refusal):
                    with after_commit():
                        ring.replace(await database.read(list_keys))
                    message.reply.send(revoked)
                else:
                    ring.drop(revoked.id)  # from the reply on, however slow the disk is
                    message.reply.send(revoked)
                    with suppress(ReadTooLongError):
                        ring.replace(await database.read(list_keys))
            case _:
                assert_never(message)

    def failed(message: GatekeeperMessage, error: Exception) -> None:
        log.error("a %s could not be handled", type(message).__name__, exc_info=error)

    async with inbox:
        task_status.started()
        await mailbox.serve(inbox, refusing_slow(handle, log), failed=failed, beat=beat)


async def _create(
    message: CreateKeyRequest, database: Database, now_us: int, entropy: Callable[[int], bytes], seed: bytes
) -> NewKey | Refusal:
    if message.role not in set(Role):
        error = FieldError("role", f"must be one of {', '.join(Role)}")
        return Refusal("invalid", f"no key was made: role {error.reason}", (error,))
    fresh = entropy(32)
    key_id = entropy(5).hex()

    def secret_of(key_id: str) -> str:
        """Of a key that is made once however often it is asked for, it can be computed again: it is kept nowhere."""
        if message.idempotency is None:
            return fresh.hex()
        made_of = key_id.encode() + message.idempotency.key + message.idempotency.request
        return hashlib.blake2b(made_of, digest_size=32, key=seed, person=b"asapd api key").hexdigest()

    key = ApiKey(
        key_id,
        message.name,
        message.role,
        list(message.agents),
        message.tenant,
        message.may_sign,
        digest_of(secret_of(key_id)),
        now_us,
    )
    unit = CreateKey(key, message.caller.actor, now_us)
    made = await database.submit(unit, urgent=True, idempotency=message.idempotency)
    if isinstance(made, Refusal):
        return made
    secret = secret_of(made.id)
    if digest_of(secret) != made.digest:
        detail = f"this request made {made.name} before, whose secret went with the daemon's former key: revoke it"
        return Refusal("key_name_taken", f"{detail}, and make another")
    return NewKey(made, f"{KEY_PREFIX}_{made.id}_{secret}")


def _unless_revoked(outcome: NewKey | Refusal, keys: Sequence[ApiKey]) -> NewKey | Refusal:
    """What was made under an idempotency key may have been revoked before the request came again."""
    if isinstance(outcome, Refusal):
        return outcome
    made = outcome.key
    revoked_us = next((key.revoked_us for key in keys if key.id == made.id), None)
    if revoked_us is None:
        return outcome
    what = f"this request made the key {made.id} ({made.name}) before, which was revoked at {format_us(revoked_us)}"
    return Refusal("key_revoked", f"{what}: send another Idempotency-Key to make another")
