"""What the client may need: the standard library, and nothing of the daemon."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import asapd
from asapd.client import address, event
from asapd.client.address import Socket, Web
from tests.client.fake import Fake

ROOT = Path(asapd.__file__).parent.parent


def test_it_needs_nothing_but_the_standard_library() -> None:
    script = """
import sys
before = set(sys.modules)
import asapd.client
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
strange = loaded - set(sys.stdlib_module_names) - {"asapd"}
rooms = {name for name in sys.modules if name.startswith("asapd.") and not name.startswith("asapd.client")}
assert not strange, strange
assert not rooms, rooms
assert "trio" not in sys.modules and "asyncio" not in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    outcome = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert outcome.returncode == 0, outcome.stderr


def test_all_that_the_thread_needs_is_imported_before(home: Path, fake: Fake) -> None:
    """A child that is forked while the thread imports something would wait for the end of that for ever."""
    fake.http = lambda path, headers, body: (200, {})
    script = """
import logging, sys
from asapd.client import Meter
logging.getLogger("asapd.client").addHandler(logging.NullHandler())
before = set(sys.modules)
for address in sys.argv[1:3]:
    with Meter(address, agent="urn:asap:agent:w", consumer="urn:asap:agent:c", spool=sys.argv[3]) as meter:
        meter.record()
        meter.settle("r")
        assert meter.flush(0 if "http" in address else 10) == ("http" not in address)
        meter.authorize("del_1", task_id="t")
        meter.close(0.1)
assert meter.stats().pending == 0
assert set(sys.modules) == before, set(sys.modules) - before
"""
    arguments = [sys.executable, "-c", script, "http://localhost:1", home / "ingest.sock", home / "spool"]
    outcome = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr


def test_files_that_nobody_installed_are_enough(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "asapd" / "client", tmp_path / "asapd" / "client")
    shutil.copy(ROOT / "asapd" / "__init__.py", tmp_path / "asapd")
    # Neither the environment's packages nor what this interpreter has are in sight.
    script = f"""
import sys
sys.path[:] = [{str(tmp_path)!r}, *(one for one in sys.path if not one.endswith("-packages"))]
import asapd.client
assert asapd.__file__.startswith({str(tmp_path)!r})
assert asapd.__version__ == "unknown"
"""
    outcome = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr


def test_every_setting_and_every_figure_is_documented() -> None:
    page = (ROOT / "docs" / "client.md").read_text(encoding="utf-8")
    from asapd.client import Rules, Stats, __all__
    from asapd.client.meter import Settings

    named = set(re.findall(r"`([A-Za-z_]+)`", page))
    wanted = {*Settings.__annotations__, *Stats.__annotations__, *Rules.__annotations__}
    assert wanted - named == set()
    assert {name for name in __all__ if name not in page} == set()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/run/x.sock", Socket(("/run/x.sock",))),
        ("unix:/run/x.sock", Socket(("/run/x.sock",))),
        ("unix:///run/x.sock", Socket(("/run/x.sock",))),
        ("http://127.0.0.1:8727", Web(False, "127.0.0.1", 8727, "")),
        ("http://[::1]", Web(False, "::1", 80, "")),
        ("https://asapd.example/base/", Web(True, "asapd.example", 443, "/base")),
    ],
)
def test_addresses(text: str, expected: Socket | Web) -> None:
    assert address.parse(text) == expected
    assert address.parse(str(expected)) == expected


def test_without_an_address_it_is_the_one_in_the_environment_or_the_socket_that_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ASAPD_INGEST", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    found = address.parse(None)
    assert isinstance(found, Socket)
    assert found.path() == "/run/asapd/ingest.sock"
    (tmp_path / "asapd").mkdir()
    (tmp_path / "asapd" / "ingest.sock").write_text("")
    assert found.path() == str(tmp_path / "asapd" / "ingest.sock")
    monkeypatch.setenv("ASAPD_INGEST", "http://host:1")
    assert address.parse(None) == Web(False, "host", 1, "")


def test_ids_sort_by_time_and_times_have_microseconds() -> None:
    ids = [event.new_id(number * 1_000_000) for number in range(1, 50)]
    assert ids == sorted(ids)
    assert {len(one) for one in ids} == {26}
    assert event.new_id() > event.new_id(1_700_000_000_000_000_000)
    assert event.timestamp(1_700_000_000_000_001_999) == "2023-11-14T22:13:20.000001Z"
