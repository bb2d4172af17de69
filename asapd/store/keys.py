"""API keys: a digest each, never a secret."""

from __future__ import annotations

import apsw
import msgspec

from asapd.core.errors import Refusal
from asapd.core.row_digest import row_digest
from asapd.store.rows import Row, fetch
from asapd.store.tx import RefuseError, Tx
from asapd.store.units.house import ApiKey, CreateKey, RevokeKey


def create(tx: Tx, unit: CreateKey) -> ApiKey:
    """Store a key; its name must be free among keys that are in use."""
    key = unit.key
    if tx.row("SELECT 1 FROM api_key WHERE name = ? AND revoked_us IS NULL", (key.name,)) is not None:
        raise RefuseError(
            Refusal("key_name_taken", f"a key named {key.name} is in use: choose another name, or revoke that one")
        )
    tx.execute(
        "INSERT INTO api_key VALUES (?,?,?,?,?,?,?,?,NULL)",
        (
            key.id,
            key.name,
            key.role,
            msgspec.json.encode(key.agents).decode(),
            key.tenant,
            key.may_sign,
            key.digest,
            key.created_us,
        ),
    )
    details = {
        "agents": key.agents,
        "id": key.id,
        "name": key.name,
        "role": key.role,
        "row_digest": unsaid_digest(key),
        "tenant": key.tenant,
    }
    tx.audit("key.created", unit.actor, key.id, details, unit.now_us)
    return key


def revoke(tx: Tx, unit: RevokeKey) -> ApiKey:
    """Revoke a key by its id or name; revoking twice answers the same."""
    row = tx.row("SELECT * FROM api_key WHERE id = ?1 OR name = ?1 ORDER BY revoked_us IS NOT NULL LIMIT 1", (unit.id,))
    if row is None:
        raise RefuseError(Refusal("key_not_found", f"there is no key {unit.id}: see the list of keys"))
    key = _key(row)
    if key.revoked_us is not None:
        return key
    tx.execute("UPDATE api_key SET revoked_us = ? WHERE id = ?", (unit.now_us, key.id))
    tx.audit("key.revoked", unit.actor, key.id, {"id": key.id, "name": key.name}, unit.now_us)
    return msgspec.structs.replace(key, revoked_us=unit.now_us)


def _key(row: Row) -> ApiKey:
    return ApiKey(row[0], row[1], row[2], msgspec.json.decode(row[3]), row[4], bool(row[5]), row[6], row[7], row[8])


def unsaid_digest(key: ApiKey) -> str:
    """The digest of what the entry of a key does not say: that of its secret, and whether it may sign."""
    return row_digest((key.digest, int(key.may_sign)))


def list_keys(connection: apsw.Connection) -> list[ApiKey]:
    """All keys, revoked ones too, the oldest first."""
    return [_key(row) for row in fetch(connection, "SELECT * FROM api_key ORDER BY created_us, id")]
