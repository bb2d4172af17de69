"""The composition root: all wiring, and the order in which things start and stop."""

from asapd.daemon.run import run

__all__ = ["run"]
