"""Who is calling and what they may do; docs/http.md has the table."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from asapd.core.types import Role, pattern_matches


class Permission(StrEnum):
    """One thing a route needs."""

    INGEST = "ingest"
    """Report usage and tasks, validate, authorize, settle."""
    READ = "read"
    """See rows that the key's patterns match."""
    READ_ALL = "read all"
    """See what is not any one agent's: the audit log, the daemon's status."""
    OPERATE = "operate"
    """Agents, acknowledge, silence, revoke, issue."""
    ADMINISTER = "administer"
    """Keys, reload, actors."""


_GRANTS: dict[Role, frozenset[Permission]] = {
    Role.INGEST: frozenset({Permission.INGEST}),
    Role.READER: frozenset({Permission.READ, Permission.READ_ALL}),
    Role.OPERATOR: frozenset({Permission.READ, Permission.READ_ALL, Permission.OPERATE}),
    Role.ADMIN: frozenset(Permission),
}


class Caller(msgspec.Struct, frozen=True):
    """An authenticated caller. `actor` is its name in the audit log; `agents` are its name patterns.

    `tenant` None sees every tenant and writes to the default one.
    """

    actor: str
    role: Role
    agents: tuple[str, ...] = ("*",)
    tenant: str | None = None
    may_sign: bool = False

    def may(self, permission: Permission) -> bool:
        """Whether the role grants a permission."""
        return permission in _GRANTS[self.role]

    def may_touch(self, *names: str | None) -> bool:
        """Whether a pattern of the caller matches at least one of the names."""
        return any(pattern_matches(pattern, name) for pattern in self.agents for name in names if name is not None)

    def may_read(self, *names: str | None) -> bool:
        """Whether the caller may see a row that belongs to these names."""
        return self.may(Permission.READ) and self.may_touch(*names)

    @property
    def sees_everything(self) -> bool:
        """Whether no pattern and no tenant narrows the rows this caller may see."""
        return "*" in self.agents and self.tenant is None

    @property
    def own_agent(self) -> str | None:
        """The one agent this key stands for, when its pattern names exactly one."""
        return self.agents[0] if len(self.agents) == 1 and not self.agents[0].endswith("*") else None
