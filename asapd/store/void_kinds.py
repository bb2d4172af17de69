"""Kinds of voids, as `usage_void.superseded` has them."""

from typing import Final

BY_HAND: Final = 0
SUPERSEDED: Final = 1
WITHHELD: Final = 2
"""It was superseded as well, but delegations and hard limits go on to count its event."""
