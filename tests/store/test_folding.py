"""What was committed goes from the WAL into the database beside the commits, not in one of them."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from pathlib import Path

from asapd.store.writer import fold_wal, open_for_writing

WAIT_S = 10.0
MEBIBYTE = 1 << 20


def test_commits_are_folded_into_the_database_without_a_commit_having_to_do_it(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    path.touch()
    done = threading.Event()
    with closing(open_for_writing(path)) as connection:
        connection.execute("CREATE TABLE filled (content BLOB)")
        folding = threading.Thread(target=fold_wal, args=(path, done))
        folding.start()
        try:
            for _ in range(2):  # it goes on folding
                before = path.stat().st_size
                connection.execute("INSERT INTO filled VALUES (zeroblob(?))", (MEBIBYTE,))
                deadline_s = time.monotonic() + WAIT_S
                while path.stat().st_size < before + MEBIBYTE:
                    assert time.monotonic() < deadline_s, "nothing was folded"
                    time.sleep(0.01)
        finally:
            done.set()
            folding.join()
