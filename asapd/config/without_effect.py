"""Settings that do not do what their writer may think: said aloud, never silently ignored."""

from __future__ import annotations

import grp
import pwd
import stat
from collections.abc import Iterator

from asapd.config.model import Config
from asapd.config.values import duration_text, is_link_local


def settings_without_effect(config: Config) -> tuple[str, ...]:
    """The settings of a file that ask for something this version does not do, by their names in the file."""
    found = {
        "audit.enabled": not config.audit.enabled,
    }
    return tuple(name for name, asked in found.items() if asked)


def remarks(config: Config) -> tuple[str, ...]:
    """What is no problem of a file, and yet not as its writer may think."""
    found = [f"{setting} is not acted on by this version" for setting in settings_without_effect(config)]
    sla, interval_us = config.sla, config.prober.interval_us
    if sla.breach_window_us < sla.min_samples * interval_us:
        fitting = sla.breach_window_us // interval_us
        window, interval = duration_text(sla.breach_window_us), duration_text(interval_us)
        found.append(
            f"sla.min_samples is {sla.min_samples}, and sla.breach_window ({window}) has {fitting} probes at a "
            f"prober.interval of {interval}: no breach of availability can open; lower it, or lengthen the window"
        )
    longest_us = max((*sla.windows_us, sla.breach_window_us))
    for name, kept_us in (("usage", config.retention.usage_us), ("probes", config.retention.probes_us)):
        if kept_us < longest_us:
            found.append(
                f"retention.{name} is {duration_text(kept_us)}, and figures are kept for {duration_text(longest_us)}: "
                "after a restart they lack what was retired; keep it for longer, or the windows shorter"
            )
    if config.admin.mode & stat.S_IWOTH:
        found.append(
            f'admin.mode is "{config.admin.mode:04o}", and who is not root, the user of asapd or in the group of the '
            'socket is refused all the same: set "0660", and admin.group to the group of those who may'
        )
    found += _unknown_reporters(config)
    held, most = config.delegation.reservation_ttl_us, config.delegation.max_reservation_ttl_us
    if held > most and "max_reservation_ttl_us" in config.delegation.model_fields_set:
        found.append(
            f"delegation.max_reservation_ttl is {duration_text(most)}, and reservations stand for "
            f"{duration_text(held)} (delegation.reservation_ttl), which may be asked for all the same: "
            "raise the one, or lower the other"
        )
    found += (
        f"{agent.id} is at a link-local address, which is never probed: give its url another address of that host"
        for agent in config.agents
        if agent.url is not None and is_link_local(agent.url)
    )
    return tuple(found)


def _unknown_reporters(config: Config) -> Iterator[str]:
    """Rules for those whom this host does not know now, though a directory service may tell it of them later."""
    for index, rule in enumerate(config.ingest.allow):
        for what, name, find in (("user", rule.user, pwd.getpwnam), ("group", rule.group, grp.getgrnam)):
            try:
                if name is not None:
                    find(name)
            except KeyError:
                who = f'{what} "{name}"'
                yield f"ingest.allow[{index}] is for the {who}, whom this host does not know: it lets nobody in"
