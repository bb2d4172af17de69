"""How long revoking a big tree takes: `python -m tests.bench.revocation [DESCENDANTS]` prints medians of five rounds.

Beside them stands the bare work of the same round: one durable transaction that updates as many rows and inserts two
for each, with one SHA-256.
"""

from __future__ import annotations

import base64
import hashlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw
import trio

from tests.e2e.daemon import QUICK, Daemon, running
from tests.e2e.forest import multiply
from tests.e2e.tokens import Party, jti_of

ROOT, WORKER, HELPER = Party("root"), Party("worker"), Party("helper")
CONFIG = f'{QUICK}[delegation]\nroots = ["{ROOT.urn}"]\n' + "".join(
    f'[[agents]]\nid = "{party.urn}"\nurl = "http://127.0.0.1:9"\npublic_key = "{party.public_key}"\n'
    for party in (ROOT, WORKER)
)
ROUNDS = 5


def ceiling_s(count: int) -> float:
    """The bare work."""
    with tempfile.TemporaryDirectory() as directory:
        connection = apsw.Connection(str(Path(directory) / "bare.db"))
        connection.pragma("journal_mode", "wal")
        connection.pragma("synchronous", "full")
        connection.execute("CREATE TABLE token (id INTEGER PRIMARY KEY, revoked INTEGER, text TEXT)")
        connection.execute("CREATE TABLE audit (id INTEGER PRIMARY KEY, text TEXT, hash BLOB)")
        connection.execute("CREATE TABLE list (id INTEGER PRIMARY KEY, issuer TEXT, jti TEXT, UNIQUE (issuer, jti))")
        with connection:
            rows = ((number, None, "x" * 500) for number in range(count))
            connection.executemany("INSERT INTO token VALUES (?, ?, ?)", rows)
        began_s = time.perf_counter()
        with connection:
            connection.execute("UPDATE token SET revoked = 1")
            connection.executemany(
                "INSERT INTO audit VALUES (?, ?, ?)",
                ((number, "x" * 200, hashlib.sha256(b"%d" % number).digest()) for number in range(count)),
            )
            connection.executemany(
                "INSERT INTO list VALUES (?, ?, ?)", ((number, ROOT.urn, f"jti-{number}") for number in range(count))
            )
        took_s = time.perf_counter() - began_s
        connection.close()
    return took_s


async def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """How long a request takes, and its answer."""
    began_s = time.perf_counter()
    answer = await call()
    took_s = time.perf_counter() - began_s
    assert answer.status_code in {200, 304}, answer.text
    return took_s, answer


async def one_round(daemon: Daemon, other: Daemon, root: str, count: int) -> dict[str, float]:
    """Everything once."""
    async with daemon.client() as client, other.client() as there:
        revoke_s, answer = await timed(lambda: client.delete(f"/delegations/{jti_of(root)}"))
        assert answer.json()["newly"] == count + 2, answer.json()["newly"]
        list_s, listed = await timed(lambda: client.get("/delegations/revocations"))
        tag = {"If-None-Match": listed.headers["etag"]}
        unchanged_s, _ = await timed(lambda: client.get("/delegations/revocations", headers=tag))
        import_s, _ = await timed(lambda: there.post("/delegations/revocations", content=listed.content))
        again_s, _ = await timed(lambda: there.post("/delegations/revocations", content=listed.content))
    return {
        "revoke a root with its descendants": revoke_s,
        "GET the list, made and signed": list_s,
        "GET the list, unchanged (304)": unchanged_s,
        "import the list, tokens never seen": import_s,
        "import the list again": again_s,
        "ceiling: bare rows of one revocation": ceiling_s(count),
    }


async def measured(count: int) -> dict[str, float]:
    """One round on two new daemons."""
    root = ROOT.grant(WORKER)
    child = WORKER.grant(HELPER, parent=root)
    with running(CONFIG) as daemon:
        async with daemon.client() as client:
            for token in (root, child):
                assert (await client.post("/delegations", json={"token": token})).status_code == 201
        daemon.stop()
        multiply(daemon.state_dir / "asapd.db", jti_of(child), count)
        daemon.start()
        key = _public_key(daemon)
        source = f'[[delegation.revocation_source]]\npublic_key = "{key}"\nissuers = ["*"]\n'
        with running(CONFIG.replace("[[agents]]", f"{source}[[agents]]", 1)) as other:
            return await one_round(daemon, other, root, count)


def _public_key(daemon: Daemon) -> str:
    from asapd.wire.keys import load_private_pem

    key = load_private_pem((daemon.state_dir / "identity.pem").read_bytes())
    return base64.b64encode(bytes(key.verify_key)).decode()


def main() -> None:
    """Print the table."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    rounds = [trio.run(measured, count) for _ in range(ROUNDS)]
    print(f"{count} descendants, {ROUNDS} rounds\n\n| what | median, ms | rounds |\n|---|---|---|")
    for name in rounds[0]:
        values = [one[name] * 1000 for one in rounds]
        print(f"| {name} | {statistics.median(values):.1f} | {min(values):.1f} to {max(values):.1f} |")


if __name__ == "__main__":
    main()
