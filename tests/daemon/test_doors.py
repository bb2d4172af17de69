"""Opening the doors: TLS, inherited sockets, and the names behind a local user."""

from __future__ import annotations

import grp
import os
import pwd
import socket
import ssl
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from asapd import config
from asapd.daemon.doors import Doors, _tls_context, names_of
from asapd.edge.sockets import CannotListen


@pytest.fixture(scope="module", name="certificate")
def made_certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("tls")
    cert, key = directory / "c.pem", directory / "k.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-days", "2", "-subj", "/CN=localhost", "-keyout", str(key), "-out", str(cert)),
        ],
        check=True,
        capture_output=True,
    )
    return cert, key


def tls(cert: Path, key: Path, client_ca: Path | None = None) -> config.Tls:
    named = {"cert_file": str(cert), "key_file": str(key)}
    return config.Tls(**named, **({} if client_ca is None else {"client_ca_file": str(client_ca)}))


def test_a_client_certificate_is_asked_for_when_an_authority_is_named(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    assert _tls_context(None) is None
    plain, mutual = _tls_context(tls(cert, key)), _tls_context(tls(cert, key, cert))
    assert plain is not None
    assert mutual is not None
    assert plain.verify_mode is ssl.CERT_NONE
    assert mutual.verify_mode is ssl.CERT_REQUIRED


def test_a_certificate_that_cannot_be_used_is_said_in_one_line(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = certificate
    (tmp_path / "bad.pem").write_text("nonsense")
    for section in (tls(tmp_path / "none", key), tls(tmp_path / "bad.pem", key), tls(cert, key, tmp_path / "bad.pem")):
        with pytest.raises(CannotListen, match=r"\[http\.tls\] cannot be used"):
            _tls_context(section)


async def test_with_tls_the_address_says_https(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    http = config.Http(bind=["127.0.0.1:0"], tls=tls(*certificate))
    doors = Doors(config.Config(http=http), tmp_path, {})
    with closing(doors):
        async with await doors.open():
            assert doors.addresses[0].startswith("https://127.0.0.1:")
            assert doors.addresses[1:] == [f"unix:{tmp_path / 'admin.sock'}", f"unix:{tmp_path / 'ingest.sock'}"]
            for door in doors.http:
                await door.listener.aclose()
    assert not any((tmp_path / name).exists() for name in ("admin.sock", "ingest.sock"))


@pytest.mark.parametrize(("host", "allowed"), [("127.0.0.1", True), ("0.0.0.0", False)])
async def test_an_inherited_socket_is_held_to_the_rule_of_the_configuration(
    tmp_path: Path, host: str, allowed: bool
) -> None:
    with socket.socket() as inherited:
        inherited.bind((host, 0))
        inherited.listen()
        name = inherited.getsockname()
        descriptor = os.dup(inherited.fileno())
        settings = config.Config(http=config.Http(bind=[f"fd://{descriptor}"]))
        doors = Doors(settings, tmp_path, {})
        with closing(doors):
            if not allowed:
                with pytest.raises(CannotListen, match=rf"the inherited socket {name[0]}:{name[1]} is reachable"):
                    await doors.open()
            else:
                async with await doors.open():
                    assert doors.addresses[0] == f"http://{name[0]}:{name[1]}"
            for door in doors.http:
                await door.listener.aclose()


def test_an_unknown_user_has_no_name_and_unknown_groups_are_left_out() -> None:
    own = grp.getgrgid(os.getgid()).gr_name
    assert names_of(2**31 - 7, frozenset({2**31 - 7, os.getgid()})) == (None, frozenset({own}))
    assert names_of(os.getuid(), frozenset()) == (pwd.getpwuid(os.getuid()).pw_name, frozenset())
