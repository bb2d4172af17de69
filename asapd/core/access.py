"""Who is calling and what they may do; docs/http.md has the table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum

import msgspec

from asapd.core.types import DEFAULT_TENANT, Role, pattern_matches


class Permission(StrEnum):
    """One thing a route needs."""

    INGEST = "ingest"
    """Report usage and tasks, validate, authorize, settle, register a token."""
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


class Tenants:
    """Which tenant each agent of the directory is of; whoever follows the directory keeps it, callers look it up.

    Agents of which the host has a key or that it lists as roots are, when no directory holds them, the host's, which is
    the default tenant.
    """

    def __init__(self) -> None:
        self._of: dict[str, str] = {}
        self._own: frozenset[str] = frozenset()

    def of(self, agent: str) -> str | None:
        """The tenant of an agent; None when the directory does not hold it, and it is not the host's own."""
        return self._of.get(agent) or (DEFAULT_TENANT if agent in self._own else None)

    def fitting(self, pattern: str) -> Iterator[str]:
        """The tenant of each agent in the directory that a name or pattern fits."""
        if not pattern.endswith("*"):
            tenant = self.of(pattern)
            return iter(() if tenant is None else (tenant,))
        return (tenant for agent, tenant in self._of.items() if pattern_matches(pattern, agent))

    def take_own(self, agents: Iterable[str]) -> None:
        """Take these for the host's own."""
        self._own = frozenset(agents)

    def replace(self, tenants: Mapping[str, str]) -> None:
        """Hold exactly these agents."""
        self._of = dict(tenants)

    def put(self, agent: str, tenant: str | None) -> None:
        """Hold one agent; None forgets it."""
        if tenant is None:
            self._of.pop(agent, None)
        else:
            self._of[agent] = tenant


class Caller(msgspec.Struct, frozen=True):
    """An authenticated caller. `actor` is its name in the audit log; `agents` are its name patterns.

    `tenant` None sees every tenant and writes to the default one. `tenants` is what tells a caller that is bound to a
    tenant from which agents it has to keep off; an agent that is in no directory is open to all tenants.
    """

    actor: str
    role: Role
    agents: tuple[str, ...] = ("*",)
    tenant: str | None = None
    may_sign: bool = False
    tenants: Tenants | None = None

    def may(self, permission: Permission) -> bool:
        """Whether the role grants a permission."""
        return permission in _GRANTS[self.role]

    def matches(self, *names: str | None) -> bool:
        """Whether a pattern of the caller matches at least one of the names, whatever their tenants."""
        return any(pattern_matches(pattern, name) for pattern in self.agents for name in names if name is not None)

    def may_touch(self, *names: str | None) -> bool:
        """Whether the caller may act for at least one of the names: a pattern matches it, no other tenant has it."""
        if self.tenant is None:
            return self.matches(*names)
        return any(self.matches(name) and not self.keeps_off(name) for name in names if name is not None)

    def may_see(self, tenant: str, *names: str | None) -> bool:
        """Whether a row of a tenant that belongs to these names is one the caller may know of."""
        return self.tenant in {None, tenant} and self.matches(*names)

    def may_see_given(self, owner: str, holder: str, delegator: str, delegate: str) -> bool:
        """Whether the caller may know of a delegation by its delegator's tenant, its delegate's, and both of them."""
        return self.tenant in {None, owner, holder} and self.matches(delegator, delegate)

    def keeps_off(self, agent: str) -> bool:
        """Whether the directory says that an agent is of another tenant than the caller is bound to."""
        return self.tenant is not None and self._tenant_of(agent) not in {None, self.tenant}

    def keeps_off_all(self, pattern: str) -> bool:
        """Whether a name or pattern fits agents of the directory, and each of them is of another tenant."""
        if self.tenant is None or self.tenants is None:
            return False
        fits = False
        for tenant in self.tenants.fitting(pattern):
            if tenant == self.tenant:
                return False
            fits = True
        return fits

    def _tenant_of(self, agent: str) -> str | None:
        return None if self.tenants is None else self.tenants.of(agent)

    def may_read(self, *names: str | None) -> bool:
        """Whether the caller may see a row that belongs to these names."""
        return self.may(Permission.READ) and self.matches(*names)

    @property
    def sees_everything(self) -> bool:
        """Whether no pattern and no tenant narrows the rows this caller may see."""
        return "*" in self.agents and self.tenant is None

    @property
    def own_agent(self) -> str | None:
        """The one agent this key stands for, when its pattern names exactly one."""
        return self.agents[0] if len(self.agents) == 1 and not self.agents[0].endswith("*") else None
