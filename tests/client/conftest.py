"""A short directory for sockets, and what stands for other programs there."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree

import pytest

from tests.client.fake import Fake


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory whose path is short, because that of a Unix socket has 107 bytes at most."""
    path = Path(tempfile.mkdtemp(prefix="asapd-"))
    yield path
    rmtree(path, ignore_errors=True)


@pytest.fixture
def fake(home: Path) -> Iterator[Fake]:
    """A daemon that takes everything unless it is told otherwise."""
    with Fake(home / "ingest.sock") as daemon:
        yield daemon
