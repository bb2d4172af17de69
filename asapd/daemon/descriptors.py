"""File descriptors: as many as the doors may need, or fewer connections, so that some are always left for the store."""

from __future__ import annotations

import contextlib
import logging
import resource

from asapd import config

# 400 probes and fetches of manifests at once, 64 refused connections that linger, 4 readers of the store with 3 files
# and what they sort into; listeners, the writer, the loop and the log are some thirty. The rest is slack.
RESERVE = 640

# Kept connections to agents, where the limit has room for them: as many agents as one host is expected to have.
KEPT = 2048


def kept_connections(settings: config.Config, connections: int) -> int:
    """To how many agents connections may stay open, when each door takes so many."""
    limit = _raised_to(_doors(settings) * connections + RESERVE + KEPT)
    return max(0, min(KEPT, limit - _doors(settings) * connections - RESERVE))


def max_connections(settings: config.Config, log: logging.Logger) -> int:
    """How many connections each door may have: `limits.max_connections`, or fewer where the host does not allow it.

    Raises the process's soft limit as far as needed and allowed (RLIMIT_NOFILE, getrlimit(2)).
    """
    wanted = settings.limits.max_connections
    doors = _doors(settings)
    limit = _raised_to(doors * wanted + RESERVE)
    if limit >= doors * wanted + RESERVE:
        return wanted
    # With hardly any descriptors there is no good answer: half of them keep the doors open.
    possible = max(1, max(limit - RESERVE, limit // 2) // doors)
    log.warning(
        "limits.max_connections is %s, and this process may have only %s open files: a door takes %s connections; "
        "raise LimitNOFILE= of the service, or `ulimit -Hn`, to %s, or lower the setting",
        wanted,
        limit,
        possible,
        doors * wanted + RESERVE,
    )
    return possible


def _doors(settings: config.Config) -> int:
    """The HTTP door with the admin socket, the ingest socket, and the lane on TCP: each has as many connections."""
    return 2 + bool(settings.ingest.bind)


def _raised_to(needed: int) -> int:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and soft < needed:
        most = needed if hard == unlimited else min(needed, hard)
        # A sandbox may forbid it, as the service's own does: then the service's limit is the one that counts.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return needed if soft == unlimited else soft
