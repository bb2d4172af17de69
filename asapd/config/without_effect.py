"""Settings that the file format has and this version does not act on: said aloud, never silently ignored."""

from __future__ import annotations

from asapd.config.model import Config


def settings_without_effect(config: Config) -> tuple[str, ...]:
    """The settings of a file that ask for something this version does not do, by their names in the file."""
    found = {
        "audit.enabled": not config.audit.enabled,
        "retention.audit": config.retention.audit_us is not None,
    }
    return tuple(name for name, asked in found.items() if asked)
