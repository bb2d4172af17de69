"""Exit codes of every class, and how little `--help` costs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

import asapd
from asapd.cli import door, watch
from asapd.cli.asapctl import asapctl
from asapd.cli.asapd import asapd as asapd_program
from asapd.cli.outcome import Exit, Failure, run
from tests.cli.programs import Daemon, Program


def http(status: int, body: bytes, kind: str = "application/problem+json") -> bytes:
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body


def lists(command: click.Command, above: click.Context | None = None, name: str = "asapctl") -> Iterator[str]:
    """What each group of commands prints of those in it, on a terminal of 80 columns."""
    context = click.Context(command, above, name, terminal_width=78)
    if isinstance(command, click.Group):
        yield command.get_help(context)
        for each in command.list_commands(context):
            below = command.get_command(context, each)
            assert below is not None
            yield from lists(below, context, each)


@pytest.mark.parametrize("program", [asapctl, asapd_program])
def test_what_a_command_does_is_listed_in_whole_sentences(program: click.Group) -> None:
    cut = [
        line for text in lists(program) for line in text.splitlines() if line.startswith("  ") and line.endswith("...")
    ]
    assert cut == []


@pytest.mark.parametrize(
    ("status", "code"),
    [(401, 4), (403, 4), (400, 2), (404, 2), (409, 2), (422, 2), (503, 3), (504, 3), (500, 70)],
)
def test_a_refusal_of_the_daemon_has_the_exit_code_of_its_class_and_says_why(
    status: int, code: int, answers: Callable[[bytes], None], ctl: Program
) -> None:
    answers(http(status, b'{"detail": "because of this"}'))
    ran = ctl("status")
    assert (ran.code, ran.out, ran.err) == (code, "", "asapctl: because of this\n")


def test_errors_of_fields_are_listed_unless_the_detail_says_them(
    answers: Callable[[bytes], None], ctl: Program
) -> None:
    errors = b'[{"field": "id", "reason": "is odd"}, {"field": "url", "reason": "is missing"}]'
    answers(http(422, b'{"detail": "not added: id is odd", "errors": %b}' % errors))
    assert ctl("agents", "add", "x", "y").err == "asapctl: not added: id is odd\n  url: is missing\n"


@pytest.mark.parametrize("reply", [http(200, b"<html>", "text/html"), b"SSH-2.0-x\r\n"])
def test_something_else_at_the_socket_counts_as_no_daemon(
    reply: bytes, answers: Callable[[bytes], None], ctl: Program
) -> None:
    answers(reply)
    assert ctl("status").code == Exit.UNREACHABLE


def test_a_daemon_that_does_not_answer_counts_as_none(
    answers: Callable[[bytes], None], ctl: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "READ_S", 0.05)
    answers(b"")
    ran = ctl("status")
    assert (ran.code, "in time" in ran.err) == (Exit.UNREACHABLE, True)


@pytest.mark.parametrize(
    ("reply", "code"), [(http(403, b"{}"), 4), (http(503, b"{}"), 3), (b"SSH-2.0-x\r\n", 3), (b"", 3)]
)
def test_a_watch_that_is_not_let_in_ends_with_the_code_of_its_class(
    reply: bytes, code: int, answers: Callable[[bytes], None], ctl: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "CONNECT_S", 0.2)
    answers(reply)
    ran = ctl("sla", "breaches", "--watch")
    assert (ran.code, ran.out, ran.err.count("\n")) == (code, "", 1)


def test_without_a_socket_or_with_one_that_nobody_listens_at_the_daemon_is_unreachable(
    ctl: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind("dead.sock")
    (tmp_path / "file").touch()
    for name, word in (
        ("none.sock", "there is no daemon"),
        ("dead.sock", "is gone"),
        ("file", "is not a socket"),
        (str(tmp_path), "is not a socket"),
    ):
        for command in (("status",), ("sla", "breaches", "--watch")):
            ran = ctl(*command, "--socket", name)
            assert ran.code == Exit.UNREACHABLE
            assert word in ran.err


def test_a_socket_that_this_user_may_not_use_is_a_lack_of_permission() -> None:
    assert door.unreachable(Path("x"), PermissionError()).code == Exit.FORBIDDEN


def test_wrong_usage_is_2_on_stderr(ctl: Program, host: Program) -> None:
    for program, arguments in (
        (ctl, ["nothing"]),
        (ctl, ["usage", "report", "--by", "moon"]),
        (ctl, ["usage", "report", "--since", "yesterday"]),
        (ctl, ["sla", "breaches", "--watch", "--state", "open"]),
        (ctl, ["delegation", "inspect", "@/nowhere"]),
        (ctl, ["delegation", "inspect", f"@{sys.executable}"]),
        (host, ["demo", "--seconds", "0"]),
    ):
        ran = program(*arguments)
        assert (ran.code, ran.out) == (Exit.USAGE, "")
        assert "Usage: " in ran.err


def test_a_bug_is_70_with_its_trace_and_an_interrupt_130(capsys: pytest.CaptureFixture[str]) -> None:
    @click.group()
    def program() -> None: ...

    @program.command()
    @click.argument("what")
    def fail(what: str) -> None:
        raise {"bug": ZeroDivisionError("oh"), "no": Failure(Exit.NO, "no"), "stop": KeyboardInterrupt()}[what]

    assert run(program, "p", ["fail", "bug"]) == Exit.INTERNAL
    assert "internal failure, which is a bug: ZeroDivisionError: oh" in capsys.readouterr().err
    assert run(program, "p", ["fail", "no"]) == Exit.NO
    assert run(program, "p", ["fail", "stop"]) == Exit.INTERRUPTED


def test_output_that_nobody_reads_ends_without_a_trace(daemon: Daemon) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", "import sys; from asapd.cli.asapctl import main; sys.exit(main())", "audit", "log"]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (Exit.BROKEN_PIPE, b"")


def test_version_and_help_go_to_stdout(ctl: Program, host: Program) -> None:
    for name, program in (("asapctl", ctl), ("asapd", host)):
        assert program("--version").out == f"{name} {asapd.__version__}\n"
        assert program("--help").out.startswith(f"Usage: {name} ")


def commands(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], click.Command]]:
    found = []
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found += commands(command, (*path, name))
        else:
            found.append(((*path, name), command))
    return found


@pytest.mark.parametrize(("path", "command"), commands(asapctl), ids=str)
def test_every_asapctl_command_has_json_socket_and_an_example(
    path: tuple[str, ...], command: click.Command, ctl: Program
) -> None:
    options = {option for parameter in command.params for option in parameter.opts}
    assert {"--json", "--socket"} <= options
    assert f"asapctl {' '.join(path)}" in ctl(*path, "--help").out.replace("--json ", "")


def test_help_loads_nothing_of_the_daemon_and_no_http_client() -> None:
    script = (
        "import sys; from asapd.cli.outcome import run; from asapd.cli.asapctl import asapctl; "
        "from asapd.cli.asapd import asapd; run(asapctl, 'asapctl', ['--help']); run(asapd, 'asapd', ['--help']); "
        "print([name for name in ('trio', 'http.client', 'pydantic', 'apsw', 'rich', 'nacl') if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"
