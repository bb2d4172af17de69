"""New stores in real files, quick enough to make one for every example of a property."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import apsw
import pytest

from asapd.store.database import prepare
from asapd.store.writer import open_for_writing

OpenStore = Callable[[], contextlib.AbstractContextManager[apsw.Connection]]


@pytest.fixture(scope="session")
def open_store(tmp_path_factory: pytest.TempPathFactory) -> OpenStore:
    """Makes an empty store and opens its write connection: a copied file, because the schema takes its time."""
    directory = tmp_path_factory.mktemp("stores")
    template = directory / "template.db"
    prepare(template)
    empty = template.read_bytes()
    numbers = count()

    @contextlib.contextmanager
    def open_() -> Iterator[apsw.Connection]:
        path: Path = directory / f"{next(numbers)}.db"
        path.write_bytes(empty)
        connection = open_for_writing(path, synchronous="off")
        try:
            yield connection
        finally:
            connection.close()
            path.unlink()

    return open_


@pytest.fixture
def connection(open_store: OpenStore) -> Iterator[apsw.Connection]:
    """The write connection of an empty store."""
    with open_store() as opened:
        yield opened
