"""Rules that involve more than one setting of the file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec

from asapd.config.model import Config
from asapd.config.positions import Place
from asapd.config.values import Bind, duration_text
from asapd.core.money import to_usd

STAND_INS: Final[dict[str, Any]] = {
    "agents.id": "urn:asap:agent:0.none",
    "budget.period": "day",
    "ingest.allow.agents": ["*"],
}
"""What is judged in the place of what a table must have and is wrong, or missing: the rest of it is judged then too."""


class Finding(msgspec.Struct, frozen=True):
    """A broken rule: where it is best mended, why, and which other places the judgement rests on.

    Of a whole table it rests on those only, where there are any.
    """

    place: Place
    reason: str
    rests_on: tuple[Place, ...] = ()


def findings(config: Config) -> Iterator[Finding]:
    """All rules, in the order of the sections."""
    yield from _doors(config)
    yield from _ingest_allow(config)
    yield from _metering(config)
    yield from _prober(config)
    yield from _sla(config)
    yield from _budgets(config)
    yield from _agents(config)
    yield from _alerts(config)


def _doors(config: Config) -> Iterator[Finding]:
    http = config.http
    for i, bind in enumerate(http.bind):
        place: Place = ("http", "bind", i)
        if bind.is_local:
            continue
        if http.auth == "none":
            yield Finding(
                place,
                f'{bind.text} can be reached from other hosts, and auth = "none" would let everybody there in: '
                f'set auth = "keys", or bind to 127.0.0.1 or a Unix socket',
                (("http", "auth"),),
            )
        if http.tls is None:
            yield Finding(
                place,
                f"{bind.text} can be reached from other hosts, and keys would travel in plain text: "
                f"set cert_file and key_file in [http.tls], or bind to 127.0.0.1 and put a TLS proxy before it",
                (("http", "tls"),),
            )
    for i, bind in enumerate(config.ingest.bind):
        if not bind.is_local:
            yield Finding(
                ("ingest", "bind", i),
                f"{bind.text} can be reached from other hosts, and this door speaks plain HTTP only: "
                f"bind it to 127.0.0.1, and send what comes from elsewhere to [http] bind with [http.tls]",
            )
    taken: dict[Bind, Place] = {}
    for section, binds in (("http", http.bind), ("ingest", config.ingest.bind)):
        for i, bind in enumerate(binds):
            if bind in taken and not (bind.kind == "tcp" and bind.port == 0):
                yield Finding((section, "bind", i), f"{bind.text} is already used by {taken[bind][0]}.bind")
            taken.setdefault(bind, (section, "bind", i))
    sockets = (config.admin.socket, config.ingest.socket)
    if sockets[0] is not None and sockets[0] == sockets[1]:
        yield Finding(("ingest", "socket"), "is the same file as admin.socket")


def _ingest_allow(config: Config) -> Iterator[Finding]:
    names = ("uid", "gid", "user", "group")
    for i, rule in enumerate(config.ingest.allow):
        given = [name for name in names if getattr(rule, name) is not None]
        if len(given) != 1:
            what = f"it has {' and '.join(given)}" if given else "it has none"
            place: Place = ("ingest", "allow", i)
            whose = tuple((*place, name) for name in names)
            yield Finding(place, f"needs exactly one of uid, gid, user and group: {what}", whose)


def _metering(config: Config) -> Iterator[Finding]:
    late_us, kept_us = config.metering.late_max_us, config.retention.usage_us
    if late_us > kept_us:
        yield Finding(
            ("metering", "late_max"),
            f"events up to {duration_text(late_us)} late are accepted (late_max), and kept for "
            f"{duration_text(kept_us)} (retention.usage): one that late could no longer be told from a repeat; "
            f"lower late_max or raise usage",
            (("retention", "usage"),),
        )


def _prober(config: Config) -> Iterator[Finding]:
    after, within = config.prober.unhealthy_after, config.prober.unhealthy_within
    if within is not None and within < after:
        yield Finding(
            ("prober", "unhealthy_within"),
            f"among {within} results there are never the {after} failures that prober.unhealthy_after asks for: "
            f"set it to {after} or more",
            (("prober", "unhealthy_after"),),
        )


def _sla(config: Config) -> Iterator[Finding]:
    names: set[str] = set()
    for i, tier in enumerate(config.sla.tiers):
        if tier.name in names:
            yield Finding(("sla", "tier", i, "name"), f'another tier is already named "{tier.name}"')
        names.add(tier.name)
    below = [credit.below_percent for credit in config.sla.credits]
    for i, percent in enumerate(below):
        if percent in below[:i]:
            yield Finding(("sla", "credit", i, "below"), f"another credit is already for less than {percent}%")
    windows = config.sla.windows_us
    for i, window_us in enumerate(windows):
        if window_us in windows[:i]:
            yield Finding(("sla", "windows", i), f"{duration_text(window_us)} is already listed")
    yield from _tier_known(config, config.sla.default_tier, ("sla", "default_tier"))


def _tier_known(config: Config, tier: str | None, place: Place) -> Iterator[Finding]:
    names = [declared.name for declared in config.sla.tiers]
    if tier is not None and tier not in names:
        known = f"known are: {', '.join(names)}" if names else "none is declared"
        yield Finding(place, f'no [[sla.tier]] is named "{tier}"; {known}', (("sla", "tier"),))


def _budgets(config: Config) -> Iterator[Finding]:
    names: set[str] = set()
    for i, budget in enumerate(config.budgets):
        place: Place = ("budget", i)
        if budget.name in names:
            yield Finding((*place, "name"), f'another budget is already named "{budget.name}"')
        names.add(budget.name)
        limits = (
            ("usd", budget.soft_microusd, budget.hard_microusd),
            ("tokens", budget.soft_tokens, budget.hard_tokens),
            ("tasks", budget.soft_tasks, budget.hard_tasks),
        )
        if all(soft is None and hard is None for _, soft, hard in limits):
            keys = tuple((*place, f"{side}_{unit}") for unit, *_ in limits for side in ("soft", "hard"))
            yield Finding(place, "limits nothing: give at least one of soft_ or hard_ usd, tokens or tasks", keys)
        for unit, soft, hard in limits:
            if soft is not None and hard is not None and soft > hard:
                amounts = (to_usd(soft), to_usd(hard)) if unit == "usd" else (soft, hard)
                yield Finding(
                    (*place, f"soft_{unit}"),
                    f"{amounts[0]} is above hard_{unit} ({amounts[1]}), so it would never be reached",
                    ((*place, f"hard_{unit}"),),
                )


def _agents(config: Config) -> Iterator[Finding]:
    seen: set[str] = set()
    for i, agent in enumerate(config.agents):
        if agent.id in seen:
            yield Finding(("agents", i, "id"), f"{agent.id} is already listed")
        seen.add(agent.id)
        if agent.url is None and agent.health == "probe":
            reason = 'is missing: give the address to probe, or set health = "heartbeat" if it reports by itself'
            yield Finding(("agents", i, "url"), reason)
        yield from _tier_known(config, agent.tier, ("agents", i, "tier"))


def _alerts(config: Config) -> Iterator[Finding]:
    seen: set[str] = set()
    hooks = [("webhook", i, hook.target) for i, hook in enumerate(config.alerts.webhooks)]
    for kind, i, name in [*hooks, *(("command", i, one.target) for i, one in enumerate(config.alerts.commands))]:
        if name in seen:
            place: Place = ("alerts", kind, i, "name")
            yield Finding(place, f'another target is already named "{name}": give each a name of its own')
        seen.add(name)
