"""The prober's rounds: each agent is asked in its turn how it is and what it promises, and the answers are stored.

What it cannot know it does not record: a probe that asapd itself was not allowed or not able to make says nothing of
the agent.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import trio

from asapd import config
from asapd.actors.agent_watch import AgentWatch
from asapd.actors.probe_answers import CLOCK_SLACK_S, MAX_DETAIL, disturbed, judge, read_manifest
from asapd.actors.second_opinion import SecondOpinion
from asapd.actors.unprobed import Unprobed
from asapd.core.errors import Refusal
from asapd.core.health import ProbeResult
from asapd.core.types import SECOND_US
from asapd.runtime.clock import Clock
from asapd.runtime.fanout import Wakeup
from asapd.runtime.fetch import Fetched, FetchFailed
from asapd.runtime.together import Together
from asapd.store.agents import directory, probes
from asapd.store.database import OUTCOME_UNKNOWN, Database, ReadTooLongError
from asapd.store.manifests import StoredManifest
from asapd.store.units.agents import AgentRecord, RecordManifest
from asapd.store.units.unit import RowWritten, Unit
from asapd.store.visibility import EVERYTHING
from asapd.wire.keys import jwk_thumbprint, load_public, public_base64

HEALTH_PATH = "/.well-known/asap/health"
MANIFEST_PATH = "/.well-known/asap/manifest.json"
HEALTH_MAX_BYTES = 64 << 10
MANIFEST_MAX_BYTES = 256 << 10

# When none of 2000 agents answers within the default 5 s of every 30, 334 probes are under way.
PROBES_AT_ONCE = 384
# Apart from the probes, so that large manifests never hold these up; 16 of the largest are 4 MiB.
MANIFESTS_AT_ONCE = 16
# A new agent is known within this time, and a start does not ask everybody in the same moment.
FIRST_WITHIN_S = 1.0

# A good answer like the one before tells nobody anything: some eight of 2000 agents share a commit, and each commit's
# followers look once for all of them.
SHARED_WITHIN_S = 0.1

# Six tries with doubling waits in between take 6 s, in which a writer is back from most restarts.
RECORD_TRIES = 6
RETRY_BASE_S = 0.2


class HealthFetcher(Protocol):
    """Whatever makes the requests, within the allowed networks: `asapd.runtime.fetch.Fetcher`."""

    async def get(self, url: str, *, deadline_s: float, max_bytes: int) -> Fetched | FetchFailed:
        """GET a whole answer within all bounds."""
        ...


@dataclass(slots=True)
class ProberSettings:
    """What the prober goes by, and the configured agents; outlives an incarnation, so that the next has the newest."""

    prober: config.Prober
    agents: list[AgentRecord]
    key_overlap_us: int = 0
    unprobed: Unprobed = field(default_factory=Unprobed)
    """Agents that cannot be probed, for whoever asks why nothing is known of them."""
    without_manifest: Unprobed = field(default_factory=Unprobed)
    """Agents whose manifest could not be taken when it was last fetched."""


class Rounds:
    """Asks each agent in turns of its own; what bounds them all is shared."""

    def __init__(
        self,
        database: Database,
        fetcher: HealthFetcher,
        clock: Clock,
        random: Callable[[], float],
        settings: ProberSettings,
        directory_changed: Wakeup,
        everybody: Callable[[], Iterable[AgentWatch]],
        log: logging.Logger,
    ) -> None:
        self._database = database
        self._fetcher = fetcher
        self._clock = clock
        self._random = random
        self._settings = settings
        self._directory_changed = directory_changed
        self._everybody = everybody
        self._log = log
        self.reconfigured = Wakeup()
        """To be raised when the settings have changed."""
        self._probing = trio.CapacityLimiter(PROBES_AT_ONCE)
        self._fetching_manifests = trio.CapacityLimiter(MANIFESTS_AT_ONCE)
        self._good_news = Together(SHARED_WITHIN_S)
        self._opinion = SecondOpinion(self._ask)

    # --- turns

    async def keep_asking(self, watch: AgentWatch) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_fetching_manifests, watch)
            await self._spread(self._settings.prober.interval_us)
            while True:
                started_s = trio.current_time()
                await self.guard(watch, "probe", self._probe)
                await self._wait_turn(started_s, lambda prober: prober.interval_us)

    async def _keep_fetching_manifests(self, watch: AgentWatch) -> None:
        def interval_us(prober: config.Prober) -> int:
            # An agent that was not there at all is likely to come back, and its promise is wanted then.
            soon = watch.manifest_unanswered
            return min(prober.interval_us, prober.manifest_interval_us) if soon else prober.manifest_interval_us

        await self._spread(self._settings.prober.manifest_interval_us)
        while True:
            started_s = trio.current_time()
            await self.guard(watch, "manifest", self._fetch_manifest)
            await self._wait_turn(started_s, interval_us)

    async def _spread(self, interval_us: int) -> None:
        await trio.sleep(self._random() * min(FIRST_WITHIN_S, interval_us / SECOND_US))

    async def _wait_turn(self, started_s: float, interval_us: Callable[[config.Prober], int]) -> None:
        """Wait until an interval, with jitter, has passed since a start; a change of settings moves the end at once."""
        chance = 2 * self._random() - 1
        while True:
            seen = self.reconfigured.count
            prober = self._settings.prober
            wait_s = interval_us(prober) / SECOND_US * (1 + chance * float(prober.jitter_percent) / 100)
            with trio.move_on_at(started_s + wait_s):
                await self.reconfigured.wait(seen)
                continue
            return

    async def guard(self, watch: AgentWatch, what: str, work: Callable[[AgentWatch], Awaitable[None]]) -> None:
        """One turn; whatever it meets ends it alone."""
        try:
            await work(watch)
            watch.said.pop(f"{what} failed", None)
        except* OSError as group:
            if what == "probe":
                self._settings.unprobed.note(watch.id, "host_failed", _named(group), self._clock.now_us())
            watch.say(
                self._log, f"{what} failed", logging.WARNING, f"{what} not made, this host failed: {_named(group)}"
            )
        except* ReadTooLongError as group:
            watch.say(self._log, f"{what} failed", logging.WARNING, f"{what} not followed up: {_named(group)}")
        except* Exception as group:  # noqa: BLE001 -- a bug met with one agent must not end the watch over the others
            watch.say(self._log, f"{what} failed", logging.ERROR, f"{what} met a bug: {_named(group)}", error=group)

    # --- probes

    async def _probe(self, watch: AgentWatch) -> None:
        found = await self._ask_health(watch)
        if found is not None:
            result, ttl_s = found
            await self._weigh(watch, result, ttl_s)

    async def _weigh(self, watch: AgentWatch, result: ProbeResult, ttl_s: int | None) -> None:
        """Store a probe's result, and go on from it."""
        weighed = watch.weigh(result, ttl_s, self._settings.prober, pushed=False)

        async def stored() -> bool:
            unit = weighed.unit
            return bool(await self._database.read(probes, watch.id, unit.ts_us, unit.ts_us + 1, 1, None))

        if result.up and not watch.state.fail_streak and weighed.transition is None:
            await self._good_news.wait()
        if await self._record(watch, weighed.unit, stored):
            watch.take(weighed, self._log)

    async def _ask_health(self, watch: AgentWatch) -> tuple[ProbeResult, int | None] | None:
        """One probe's result and the ttl in its answer; None when it says nothing of the agent."""
        for _ in range(2):
            async with self._probing:
                timeout_s = self._settings.prober.timeout_us / SECOND_US
                begun_s = trio.current_time()
                ts_us, started_s = self._clock.now_us(), self._clock.monotonic_s()
                answer = await self._ask(watch.url)
                elapsed_s = self._clock.monotonic_s() - started_s
                wall_s = (self._clock.now_us() - ts_us) / SECOND_US
            if wall_s < -CLOCK_SLACK_S:
                continue  # It began at a time that has not come yet.
            if isinstance(answer, FetchFailed):
                if answer.reason == "not_allowed":
                    self._settings.unprobed.note(watch.id, answer.reason, answer.detail[:MAX_DETAIL], ts_us)
                    watch.say(self._log, "probe", logging.WARNING, f"not probed: {answer.detail}")
                    return None
                if disturbed(elapsed_s, wall_s, timeout_s):
                    continue
                others = (other.url for other in self._everybody() if other.is_asked)
                blamed = await self._opinion.blames_host(watch.url, answer, begun_s, others, timeout_s)
                if blamed is not None:
                    self._settings.unprobed.note(watch.id, "host_failed", blamed, ts_us)
                    watch.say(self._log, "probe", logging.WARNING, f"probe not counted: {blamed}")
                    return None
            self._opinion.heard(watch.url, answer)
            watch.said.pop("probe", None)
            self._settings.unprobed.clear(watch.id)
            return judge(answer, watch.id, ts_us, elapsed_s * 1000)
        reason = "asapd itself was held up, or the clock was set"
        self._settings.unprobed.note(watch.id, "disturbed", reason, self._clock.now_us())
        watch.say(self._log, "probe", logging.WARNING, f"probe not counted: {reason}")
        return None

    async def _ask(self, url: str) -> Fetched | FetchFailed:
        deadline_s = self._settings.prober.timeout_us / SECOND_US
        return await self._fetcher.get(_join(url, HEALTH_PATH), deadline_s=deadline_s, max_bytes=HEALTH_MAX_BYTES)

    async def _record(self, watch: AgentWatch, unit: Unit[RowWritten], stored: Callable[[], Awaitable[bool]]) -> bool:
        """Write a unit, in several tries; whether it is in the store. `stored` looks, once that is uncertain."""
        outcome: RowWritten | Refusal = OUTCOME_UNKNOWN
        uncertain = False
        for tried in range(RECORD_TRIES):
            await back_off(tried, self._random)
            async with watch.recording:
                if uncertain and await stored():
                    return True
                outcome = await self._database.submit(unit)
            if not isinstance(outcome, Refusal):
                watch.said.pop("store", None)
                return True
            uncertain = uncertain or outcome.code == OUTCOME_UNKNOWN.code
        assert isinstance(outcome, Refusal)
        watch.say(
            self._log, "store", logging.WARNING, f"a result was dropped, the store did not take it: {outcome.detail}"
        )
        return False

    # --- manifests

    async def _fetch_manifest(self, watch: AgentWatch) -> None:
        async with self._fetching_manifests:
            timeout_s = self._settings.prober.timeout_us / SECOND_US
            answer = await self._fetcher.get(
                _join(watch.url, MANIFEST_PATH), deadline_s=timeout_s, max_bytes=MANIFEST_MAX_BYTES
            )
        watch.manifest_unanswered = isinstance(answer, FetchFailed)
        unit = read_manifest(answer, watch.id, watch.public_key, self._clock.now_us(), watch.keys)
        if isinstance(unit, str):
            self._settings.without_manifest.note(watch.id, "not_taken", unit, self._clock.now_us())
            watch.say(self._log, "manifest", logging.INFO, f"no manifest taken: {unit}")
            return
        self._settings.without_manifest.clear(watch.id)
        watch.said.pop("manifest", None)
        newest = _as_stored(unit)
        old = watch.manifest
        unchanged = old is not None and msgspec.structs.replace(old, fetched_us=newest.fetched_us) == newest
        # An agent that was removed and added again has its old manifest, and its key is not on file any more.
        signer = None if unit.public_key is None else load_public(unit.public_key)
        if unchanged and (signer is None or any(key.public_key == signer for key in watch.keys)):
            return

        async def stored() -> bool:
            rows = await self._database.read(directory, EVERYTHING, watch.id)
            return [row.manifest for row in rows] == [newest]

        if await self._record(watch, unit, stored):
            watch.manifest = newest
            self._directory_changed.notify()  # before a read that may take too long: what was stored is to be known
            rows = await self._database.read(directory, EVERYTHING, watch.id)
            watch.keys = rows[0].keys if rows else ()
            if signer is not None and unit.verification in {"key_changed", "wrong_key"}:
                self._warn_of_key(watch.id, signer)
            if unit.sla_error is not None:
                self._log.warning("agent %s: the SLA in its manifest is not used: %s", watch.id, unit.sla_error)

    def _warn_of_key(self, agent: str, key: bytes) -> None:
        kid = jwk_thumbprint(key)
        self._log.warning(
            "agent %s: its manifest is signed with a key that is not known as its own, %s; nothing is believed for it. "
            "Ask the agent's owner, then `asapctl agents keys import %s %s`, or dismiss it with "
            "`asapctl agents keys retire %s %s`",
            *(agent, kid, agent, public_base64(key), agent, kid),
        )


async def back_off(tried: int, random: Callable[[], float]) -> None:
    """Wait before another try, the longer the more there were; not before the first."""
    if tried:
        await trio.sleep(RETRY_BASE_S * 2 ** (tried - 1) * (0.5 + random() / 2))


def _join(url: str, path: str) -> str:
    return url.rstrip("/") + path


def _named(group: BaseExceptionGroup[BaseException]) -> str:
    return "; ".join(f"{type(error).__name__}: {error}"[:MAX_DETAIL] for error in group.exceptions)


def _as_stored(unit: RecordManifest) -> StoredManifest:
    return StoredManifest(
        fetched_us=unit.fetched_us,
        digest=unit.digest,
        verification=unit.verification,
        sla=unit.sla,
        sla_error=unit.sla_error,
        ttl_seconds=unit.ttl_seconds,
        public_key=unit.public_key,
    )
