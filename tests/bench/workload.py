"""What is sent: events as agents send them, each with an identity of its own."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator

import msgspec

ARRAY = 1_000


def events(count: int, name: str, *, random_ids: bool = False) -> Iterator[dict[str, object]]:
    """Events of the last minute, of ten agents, five consumers and four models; `name` keeps their ids apart.

    Ids are ordered, as those of a source that counts or of UUIDv7 are, or random (UUIDv4); those of tasks are random.
    """
    now_s = int(time.time())
    for number in range(count):
        yield {
            "id": str(uuid.uuid4()) if random_ids else f"{name}-{number:06d}",
            "task_id": str(uuid.uuid4()),
            "agent": f"urn:asap:agent:worker-{number % 10}",
            "consumer": f"urn:asap:agent:client-{number % 5}",
            "metrics": {
                "tokens_in": 900 + number % 300,
                "tokens_out": 200 + number % 100,
                "duration_ms": 50 + number % 2_000,
                "api_calls": 1 + number % 3,
            },
            "timestamp": now_s - number % 60,
            "model": f"model-{number % 4}",
            "outcome": "failed" if number % 50 == 0 else "completed",
        }


def arrays(count: int, name: str, *, random_ids: bool = False) -> list[bytes]:
    """`count` bodies of a thousand events each."""
    return [
        msgspec.json.encode(list(events(ARRAY, f"{name}-{number:04d}", random_ids=random_ids)))
        for number in range(count)
    ]


def singles(count: int, name: str) -> list[bytes]:
    """`count` bodies of one event each, which are sent as they happen: now, ten in a millisecond."""
    now_ms = int(time.time() * 1000)
    return [
        msgspec.json.encode({**event, "timestamp": now_ms + number // 10})
        for number, event in enumerate(events(count, name))
    ]
