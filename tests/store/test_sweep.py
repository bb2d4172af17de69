"""Housekeeping goes in small steps and takes only what is past its time."""

from __future__ import annotations

import apsw

from asapd.store.units.agents import RecordProbe
from asapd.store.units.exchange import Envelope, Idempotency
from asapd.store.units.house import Note, Sweep, Swept
from asapd.store.writer import Writer

NOW_US = 1_795_169_203_000_000
NOTE = Note("noted", "asapd", "x", {}, NOW_US)


def probe(ts_us: int) -> RecordProbe:
    return RecordProbe(
        agent="urn:asap:agent:a",
        ts_us=ts_us,
        up=True,
        status=None,
        latency_us=None,
        reason=None,
        detail=None,
        hold_us=1,
        state="healthy",
        since_us=ts_us,
        ok_streak=1,
        fail_streak=0,
    )


def test_old_probes_uptime_and_idempotency_keys_go_and_newer_ones_stay(connection: apsw.Connection) -> None:
    writer = Writer(connection)
    for offset in range(6):
        writer.run([Envelope(1, probe(NOW_US + 10 * offset), False)])
        writer.run([Envelope(1, NOTE, False, Idempotency(bytes([offset]), b"r", NOW_US + 10 * offset))])

    def left() -> list[list[int]]:
        return [
            [time - NOW_US for (time,) in connection.execute(f"SELECT {column} FROM {table} ORDER BY 1").fetchall()]
            for table, column in (("probe", "ts_us"), ("uptime_segment", "start_us"), ("idempotency", "created_us"))
        ]

    steps = []
    while not steps or steps[-1].more:
        (answer,) = writer.run(
            [Envelope(1, Sweep(NOW_US, NOW_US + 30, NOW_US + 40, limit=2, uptime_before_us=NOW_US + 30), True)]
        )
        assert isinstance(answer.result, Swept)
        steps.append(answer.result)
    assert left() == [[30, 40, 50], [30, 40, 50], [40, 50]]
    assert [step.rows_deleted for step in steps] == [6, 4, 0]
    assert [step.reservations_expired for step in steps] == [0, 0, 0]


def test_a_sweep_of_nothing_is_done_at_once(connection: apsw.Connection) -> None:
    (answer,) = Writer(connection).run([Envelope(1, Sweep(NOW_US, NOW_US, NOW_US), True)])
    assert answer.result == Swept(0, 0, more=False)
