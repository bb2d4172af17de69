"""Parts that tests of several rooms stand on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import apsw
import coverage
import pytest

from asapd.store import usage_behind
from asapd.store.database import Database, InlineReaders, InlineRunner
from asapd.store.writer import Writer, open_for_writing

# A shell ignores SIGINT for what it starts in the background, and children inherit that: those that are interrupted
# here would never end.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Where bytecode may not be written, each of the hundreds of programs started here would compile the package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_sessionfinish() -> None:
    """Write down what was covered: a worker of pytest-xdist that takes 10 s to end is killed before it would."""
    if (measured := coverage.Coverage.current()) is not None:
        measured.save()


@pytest.fixture(scope="module", autouse=True)
def _unmeasured_under_load(request: pytest.FixtureRequest) -> Iterator[None]:
    """Neither a module marked `load` nor the programs it starts are measured: tracing takes half of their time."""
    measured = coverage.Coverage.current()
    if measured is None or request.node.get_closest_marker("load") is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
        measured.stop()
        yield
        measured.start()


@pytest.fixture(scope="module")
def entered_soon() -> Iterator[None]:
    """Have indexes that are written behind their rows hold all but the newest three, not two thousand."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(usage_behind, "AT_ONCE", 2)
        patch.setattr(usage_behind, "FEW", 2)
        yield


@pytest.fixture
def inline_database(tmp_path: Path) -> Iterator[tuple[Database, apsw.Connection]]:
    """A database in a real file whose units run at once on the connection that comes with it."""
    connection = open_for_writing(tmp_path / "asapd.db", synchronous="off")
    yield Database(InlineRunner(Writer(connection)), InlineReaders(connection)), connection
    connection.close()
