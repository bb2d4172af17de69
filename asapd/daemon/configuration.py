"""The configuration as it is shown: what is in force, what differs from it, and what was accepted before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from asapd import config
from asapd.config import Config, ConfigError
from asapd.core.errors import FieldError, Refusal
from asapd.core.types import format_us
from asapd.daemon.reloading import Reloader
from asapd.daemon.versions import Versions

_NO_FILE = Refusal(
    "no_config_file",
    "asapd runs without a configuration file: start it with `asapd run --config FILE` to have versions",
)


class Configuration:
    """Views over the reloader and the versions; nothing here changes anything."""

    def __init__(self, path: Path | None, reloader: Reloader, versions: Versions) -> None:
        self._path = None if path is None else path.absolute()
        self._reloader = reloader
        self._versions = versions

    async def show(self) -> dict[str, Any]:
        """What is in force, without secrets: as values and as the file would have it."""
        shown = config.masked(config.written(self._reloader.in_force))
        return {
            **self._reloader.status(),
            "path": None if self._path is None else str(self._path),
            "version": self._number,
            "waiting_for_restart": list(self._waiting()),
            "config": shown,
            "toml": config.as_toml(shown),
        }

    async def diff(self, number: int | None) -> dict[str, Any] | Refusal:
        """What would change in what is in force: by a reload of the file, or with an earlier version of it."""
        path = self._path
        if path is None:
            return _NO_FILE
        text: str | Refusal | None
        if number is None:
            found = await self._parsed(lambda: config.load(path))
        else:
            text = await self.text(number)
            if isinstance(text, Refusal):
                return text
            given = text
            found = await self._parsed(lambda: config.parse_at(path, given))
        if isinstance(found, Refusal):
            return found
        before, after = config.written(self._reloader.in_force), config.written(found)
        rows = _differences(before, after)
        return {
            "against": "file" if number is None else number,
            "path": str(path),
            "changes": rows,
            "restart_required": list(config.diff(self._reloader.in_force, found).restart_required),
        }

    async def versions(self) -> list[dict[str, Any]] | Refusal:
        """Every version that is kept, the newest first."""
        if self._path is None:
            return _NO_FILE
        kept = await trio.to_thread.run_sync(self._versions.all)
        return [
            {
                "version": version.number,
                "accepted_at": format_us(version.accepted_us),
                "sha256": version.sha256,
                "in_force": version.number == self._number,
            }
            for version in kept
        ]

    async def text(self, number: int) -> str | Refusal:
        """The text of a version, secrets and all."""
        text = await trio.to_thread.run_sync(self._versions.text, number)
        if text is None:
            detail = f"version {number} is not kept: `asapctl config versions` lists those that are"
            return Refusal("config_version_not_found", detail)
        return text

    @property
    def _number(self) -> int | None:
        kept = self._reloader.version
        return None if kept is None else kept.number

    def _waiting(self) -> tuple[str, ...]:
        return config.diff(self._reloader.in_force, self._reloader.accepted).restart_required

    async def _parsed(self, parse: Callable[[], Config]) -> Config | Refusal:
        try:
            return await trio.to_thread.run_sync(parse)
        except ConfigError as error:
            problems = str(error).splitlines()
            errors = tuple(FieldError(problem.field, problem.reason) for problem in error.problems)
            detail = f"this would be refused: {problems[0]}"
            return Refusal("config_refused", detail, errors, {"problems": problems})


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, Any]]:
    """Told apart by the whole values, shown without secrets."""
    old, new = config.flat(before), config.flat(after)
    old_shown, new_shown = config.flat(config.masked(before)), config.flat(config.masked(after))
    return [
        {"setting": name, "in_force": old_shown.get(name), "there": new_shown.get(name)}
        for name in dict.fromkeys((*old, *new))
        if old.get(name) != new.get(name)
    ]
