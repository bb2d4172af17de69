"""Where state and sockets go when nobody says."""

from __future__ import annotations

from pathlib import Path

import pytest

from asapd.config import default_runtime_dir, default_state_dir

STATE = Path("/srv/state")


@pytest.mark.parametrize(
    ("environ", "is_root", "expected"),
    [
        ({"STATE_DIRECTORY": "/var/lib/private/asapd:/other", "HOME": "/h"}, False, "/var/lib/private/asapd"),
        ({"HOME": "/root", "XDG_STATE_HOME": "/s"}, True, "/var/lib/asapd"),
        ({"HOME": "/h", "XDG_STATE_HOME": "/s"}, False, "/s/asapd"),
        ({"HOME": "/h", "XDG_STATE_HOME": "relative"}, False, "/h/.local/state/asapd"),
        ({"HOME": "/h"}, False, "/h/.local/state/asapd"),
        ({"STATE_DIRECTORY": ""}, False, "/var/lib/asapd"),
    ],
)
def test_the_state_directory(environ: dict[str, str], is_root: bool, expected: str) -> None:
    assert default_state_dir(environ, is_root) == Path(expected)


@pytest.mark.parametrize(
    ("environ", "is_root", "expected"),
    [
        ({"RUNTIME_DIRECTORY": "/run/x:/run/y", "XDG_RUNTIME_DIR": "/r"}, False, "/run/x"),
        ({"XDG_RUNTIME_DIR": "/r"}, True, "/run/asapd"),
        ({"XDG_RUNTIME_DIR": "/r"}, False, "/r/asapd"),
        ({"XDG_RUNTIME_DIR": "relative"}, False, "/srv/state/run"),
        ({}, False, "/srv/state/run"),
    ],
)
def test_the_runtime_directory(environ: dict[str, str], is_root: bool, expected: str) -> None:
    assert default_runtime_dir(environ, is_root, STATE) == Path(expected)
