"""Which commit wakes whom."""

from __future__ import annotations

from collections.abc import Sequence

from asapd.core.denial import Denied
from asapd.core.errors import Refusal
from asapd.runtime.fanout import Wakeup
from asapd.store.units.alerts import AlertWritten
from asapd.store.units.delegations import AuthorizationDenied, Reserved, RevocationsImported, Revoked
from asapd.store.units.exchange import AnyResult
from asapd.store.units.usage import Recorded

# No row of usage, task or probe comes with these: to look for some behind every decision held up the next.
_DECIDED = Reserved | AuthorizationDenied | Denied | Refusal


class News:
    """What those wait for who follow the store."""

    def __init__(self) -> None:
        self.committed = Wakeup()
        """Rows of usage, tasks or probes; whoever wants no more than some looks."""
        self.alerts = Wakeup()
        self.directory = Wakeup()
        """Raised by the prober, once it goes by a change itself."""
        self.delegations = Wakeup()

    def on_commit(self, results: Sequence[AnyResult] | None) -> None:
        """Wake whom the results of a commit concern; everybody with None, when there may have been one."""
        if results is None or not all(isinstance(result, _DECIDED) for result in results):
            self.committed.notify()
        # The notifier reads the store whenever it wakes: only what concerns it wakes it.
        if results is None or any(isinstance(result, AlertWritten) for result in results):
            self.alerts.notify()
        if results is None or any(map(_is_of_delegations, results)):
            self.delegations.notify()


def _is_of_delegations(result: AnyResult) -> bool:
    return isinstance(result, Revoked | RevocationsImported) or (
        isinstance(result, Recorded) and result.unauthorised > 0
    )
