"""Push targets as the configuration describes them, and the networks that they may be in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import trio

from asapd import config
from asapd.actors.dispatcher import Target
from asapd.actors.senders import CommandSender, WebhookSender
from asapd.config import ConfigError, Problem
from asapd.core.types import SECOND_US
from asapd.runtime.fetch import Fetched, Fetcher, FetchFailed, own_networks
from asapd.wire.webhook import SecretError, read_secret

# Commands of an operator are short, and two cores have other work.
COMMANDS_AT_ONCE = 4

KEPT_CONNECTIONS = 16
"""Receivers are few, and alerts rare."""


def read_secrets(alerts: config.Alerts, name: str) -> dict[Path, bytes]:
    """The secrets of webhooks by their files; `name` is the configuration file's.

    Raises:
        ConfigError: with every file that cannot be used.
    """
    secrets: dict[Path, bytes] = {}
    problems: list[Problem] = []
    for index, hook in enumerate(alerts.webhooks):
        if hook.secret_file is None:
            continue
        try:
            secrets[hook.secret_file] = read_secret(hook.secret_file.read_bytes())
        except OSError as error:
            reason = f"{hook.secret_file} cannot be read: {error.strerror or error}"
            problems.append(Problem(None, f"alerts.webhook[{index}].secret_file", reason))
        except SecretError as error:
            reason = f"{hook.secret_file}: {error}"
            problems.append(Problem(None, f"alerts.webhook[{index}].secret_file", reason))
    if problems:
        raise ConfigError(problems, name)
    return secrets


class Targets:
    """Makes the push targets of each configuration; what they share outlives a reload."""

    def __init__(self, origin: str) -> None:
        self._origin = origin
        self._fetcher = SwappableFetcher(KEPT_CONNECTIONS)
        self._limiter: trio.CapacityLimiter | None = None

    def of(self, settings: config.Config, secrets: Mapping[Path, bytes]) -> tuple[Target, ...]:
        """The targets of a configuration, in its order. Only inside Trio."""
        self._limiter = self._limiter or trio.CapacityLimiter(COMMANDS_AT_ONCE)
        alerts = settings.alerts
        self._fetcher.allow(settings.prober.allow if alerts.allow is None else alerts.allow)
        hooks = [
            Target(
                hook.target,
                "webhook",
                hook.events,
                hook.min_severity,
                hook.retry_for_us,
                WebhookSender(
                    hook.url,
                    None if hook.secret_file is None else secrets[hook.secret_file],
                    hook.target,
                    hook.format == "alertmanager",
                    self._origin,
                    self._fetcher,
                ),
                in_groups=hook.format == "alertmanager",
            )
            for hook in alerts.webhooks
        ]
        commands = [
            Target(
                command.target,
                "command",
                command.events,
                command.min_severity,
                command.retry_for_us,
                CommandSender(command.argv, command.timeout_us / SECOND_US, self._limiter),
            )
            for command in alerts.commands
        ]
        return (*hooks, *commands)


class SwappableFetcher:
    """A fetcher whose allowed networks a reload may change; connections to `max_idle` servers are kept."""

    def __init__(self, max_idle: int) -> None:
        self._max_idle = max_idle
        self._networks: list[Any] = []
        self._fetcher: Fetcher | None = None

    def allow(self, allowed: Sequence[Any]) -> None:
        """Reach these networks from now on; `host` among them is loopback and the host's own networks."""
        networks = [network for network in allowed if network != "host"]
        if "host" in allowed:
            networks += own_networks()
        if networks != self._networks or self._fetcher is None:
            self._networks = networks
            self._fetcher = Fetcher(networks, max_idle=self._max_idle)

    async def get(self, url: str, *, deadline_s: float, max_bytes: int) -> Fetched | FetchFailed:
        """GET, see `Fetcher`."""
        assert self._fetcher is not None
        return await self._fetcher.get(url, deadline_s=deadline_s, max_bytes=max_bytes)

    async def post(
        self, url: str, body: bytes, *, headers: Mapping[str, str], deadline_s: float
    ) -> Fetched | FetchFailed:
        """POST, see `Fetcher`."""
        assert self._fetcher is not None
        return await self._fetcher.post(url, body, headers=headers, deadline_s=deadline_s)
