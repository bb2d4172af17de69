"""`asapd run`: from the command line to the exit code."""

from __future__ import annotations

import gc
import logging
import os
import sys
from pathlib import Path

import trio

from asapd.config import ConfigError
from asapd.daemon.boot import BootError, LeftBehindError, load, occupy
from asapd.daemon.house import House
from asapd.edge.sockets import CannotListen
from asapd.runtime import logs
from asapd.runtime.supervisor import BootFailed, RestartLimitExceeded

EXIT_OK = 0
EXIT_CONFIG = 2
EXIT_INTERNAL = 70


def run(config_path: Path | None, state_dir: Path | None) -> int:
    """Run until told to stop; the exit code."""
    logs.configure()
    log = logging.getLogger("asapd")
    try:
        loaded = load(config_path)
        premises = occupy(loaded.config, state_dir, os.environ)
        house = House(loaded, premises, config_path, os.environ)
    except ConfigError as error:
        print(error, file=sys.stderr)  # noqa: T201 -- each problem on a line of its own, for the operator
        return EXIT_CONFIG
    except BootError as error:
        print(f"asapd: {error}", file=sys.stderr)  # noqa: T201 -- one line that says what to do
        # Not a mistake of the operator's, and over by itself: the service manager is to try again.
        return EXIT_INTERNAL if isinstance(error, LeftBehindError) else EXIT_CONFIG
    # Start-up's objects stay for good; collections of the rest are rarer and shorter.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    code = EXIT_OK
    try:
        trio.run(house.run, strict_exception_groups=True)
    except* (CannotListen, BootError) as group:
        print(f"asapd: {_first(group)}", file=sys.stderr)  # noqa: T201 -- one line that says what to do
        code = EXIT_CONFIG
    except* (RestartLimitExceeded, BootFailed) as group:
        log.critical("asapd gives up: %s", _first(group))
        code = EXIT_INTERNAL
    except* Exception:
        log.critical("asapd ends by a bug", exc_info=True)
        code = EXIT_INTERNAL
    return code


def _first(group: BaseException) -> BaseException:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group
