"""Which rows of the store a caller may see."""

from __future__ import annotations

from asapd.core.access import Caller
from asapd.store.visibility import Visibility


def visibility(caller: Caller) -> Visibility:
    """The rows a caller may see."""
    return Visibility(caller.tenant, caller.agents)
