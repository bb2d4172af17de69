"""What holds the repository together: documentation that agrees with the code, commands, rooms that stay apart."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import click
import msgspec
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from pydantic import BaseModel

from asapd.cli.asapctl import asapctl
from asapd.cli.asapd import asapd
from asapd.config import Config
from asapd.core.delegation import Reason
from asapd.core.usage import FLAG_NAMES
from asapd.edge.metrics import render
from asapd.store.audit import AuditFilter, list_entries
from asapd.store.units.exchange import Envelope
from asapd.store.units.house import Note
from asapd.store.writer import Writer, open_for_writing
from asapd.wire.problem import CODES
from asapd.wire.usage import WireEvent
from tests.edge.test_metrics import STATUS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is missing")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    """The part of a page under a heading, up to the next one of its level."""
    level = heading.split(" ", 1)[0]
    return re.split(rf"^{level} ", text.split(f"\n{heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def table_rows(text: str) -> Iterator[list[str]]:
    """The cells of each table row whose first cell is a single name in backticks."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| `") and re.fullmatch(r"`[^`]+`", cells[0]):
            yield [cells[0].strip("`"), *cells[1:]]


# --- the two commands


def readme_commands() -> list[str]:
    return [line for line in README.splitlines() if line.startswith("python3 -m venv .")]


def test_readme_has_one_line_for_the_demo_and_one_for_the_tests_in_separate_environments() -> None:
    demo, tests = readme_commands()
    assert demo.endswith("/bin/asapd demo")
    assert tests.partition(" -m pytest")[2] == " -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder"
    for command in (demo, tests):
        home = command.split()[3]
        assert f"&& {home}/bin/pip install -q " in command
        assert f"&& {home}/bin/" in command.rsplit("install", 1)[1]
    assert demo.split()[3] != tests.split()[3]


def test_the_check_run_calls_exactly_the_test_line_of_the_readme() -> None:
    script = read(".ci/run")
    function = re.search(r"^readme_test_command\(\).*?^}$", script, flags=re.MULTILINE | re.DOTALL)
    assert function is not None
    shell = ["bash", "-euc", f"{function[0]}\nreadme_test_command"]
    found = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == readme_commands()[1]
    assert 'bash -c "$(readme_test_command)"' in script
    assert f"venv={readme_commands()[1].split()[3]}\n" in script


@pytest.mark.parametrize("name", ["asapd", "asapctl"])
def test_console_scripts_lead_to_functions(name: str) -> None:
    project = tomllib.loads(read("pyproject.toml"))["project"]
    module, _, function = project["scripts"][name].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


# --- documentation against code


def settings_of(model: type[BaseModel], prefix: str = "") -> dict[str, bool]:
    """Every setting below a section as it is written in the documentation, and whether it is required."""
    found: dict[str, bool] = {}
    for name, field in model.model_fields.items():
        path = f"{prefix}{field.alias or name}"
        inner, is_list = model_in(field.annotation)
        if inner is None:
            found[path] = field.is_required()
        else:
            found |= settings_of(inner, f"{path}[]." if is_list else f"{path}.")
    return found


def model_in(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The section that a field holds, if any, and whether it holds a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    if get_origin(annotation) in (Union, UnionType, tuple):
        for argument in get_args(annotation):
            inner, _ = model_in(argument)
            if inner is not None:
                return inner, get_origin(annotation) is tuple
    return None, False


def example_defaults(table: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """The values that the example configuration sets, all of them defaults, as they are written."""
    found: dict[str, str] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            found |= example_defaults(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = json.dumps(value)
    return found


def documented_settings() -> dict[str, str]:
    return {
        row[0]: row[1].strip("`") for row in table_rows(read("docs/configuration.md")) if re.match(r"[a-z]", row[0])
    }


def test_every_setting_is_documented_and_every_documented_setting_exists() -> None:
    assert sorted(documented_settings()) == sorted(settings_of(Config))


def test_documented_defaults_are_those_of_the_example_file_and_required_settings_say_so() -> None:
    documented = documented_settings()
    required = settings_of(Config)
    assert {name for name, default in documented.items() if default == "required"} == {
        name for name, is_required in required.items() if is_required
    }
    for name, default in example_defaults(tomllib.loads(read("config/asapd.toml"))).items():
        assert documented[name] == default, name


def test_every_error_code_is_documented_with_its_status() -> None:
    documented = {row[0]: int(row[1]) for row in table_rows(section(read("docs/http.md"), "## Error codes"))}
    denials = {str(reason) for reason in Reason} - {"malformed", "jti_reused"}
    stated = {code: status for code, (status, _) in CODES.items() if code not in denials}
    assert documented == stated


def named_commands() -> Iterator[tuple[str, str]]:
    """Every command of ours that pages, documents and code name, and where."""
    files = [*PAGES, *(ROOT / "config").iterdir(), *(ROOT / "asapd").rglob("*.py"), *(ROOT / "asapd").rglob("*.html")]
    for file in files:
        text = file.read_text(encoding="utf-8").replace("\\\n", " ")
        found = re.findall(r"(?:`|<code>)((?:asapctl|asapd) [^`<\n]+)(?:`|</code>)", text)
        if file.suffix == ".md":
            for block in re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
                found += re.findall(r"^\s*(?:\.venv/bin/)?((?:asapctl|asapd) [^#\n]+)", block, flags=re.MULTILINE)
        yield from ((str(file.relative_to(ROOT)), command) for command in found)


def test_every_command_that_is_named_exists_with_its_options() -> None:
    unknown = []
    for where, line in named_commands():
        program, *words = [word for word in shlex.split(line) if word != "--json"]
        command: click.Command | None = {"asapctl": asapctl, "asapd": asapd}[program]
        while isinstance(command, click.Group) and words and not words[0].startswith("-"):
            command = command.get_command(click.Context(command), words.pop(0))
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        if command is None or given - {option for one in command.params for option in one.opts} - {"--help"}:
            unknown.append(f"{where}: {line}")
    assert unknown == []


def test_every_route_is_documented_and_every_documented_route_exists() -> None:
    rows = [line for line in read("docs/http.md").splitlines() if line.startswith("| ")]
    documented = {route for row in rows for route in re.findall(r"`((?:GET|POST|PUT|DELETE|WS) /[^`?]*)", row)}
    offered = set()
    for file in (ROOT / "asapd" / "edge").rglob("*.py"):
        declarations = re.findall(r'@app\.(get|post|put|delete|websocket)\("([^"]+)"', file.read_text(encoding="utf-8"))
        for method, path in declarations:
            choice = re.search(r"<any\(([^)]+)\):\w+>", path)
            verb = "WS" if method == "websocket" else method.upper()
            for option in choice[1].split(", ") if choice else [""]:
                offered.add(f"{verb} {path.replace(choice[0], option) if choice else path}")
    assert {re.sub(r"\{\w+\}", "{}", route) for route in documented} == {
        re.sub(r"<[^>]+>", "{}", route) for route in offered
    }


def test_every_bound_of_a_text_in_an_event_is_documented() -> None:
    bounds = {}
    for name, schema in msgspec.json.schema(WireEvent)["$defs"]["WireEvent"]["properties"].items():
        for part in schema.get("anyOf", []):
            if "maxLength" in part and not name.endswith(("agent_id", "consumer_id")):
                bounds[name] = f"{part.get('minLength', 0)} to {part['maxLength']}"
    rows = [line.split("|")[1:3] for line in section(read("docs/http.md"), "## Usage").splitlines()]
    documented = {
        name: found[1]
        for names, text in (row for row in rows if len(row) == 2)
        if (found := re.match(r" (\d+ to \d+)\b", text))
        for name in re.findall(r"`(\w+)`", names)
    }
    assert documented == bounds


def test_every_metric_is_documented_with_its_kind_and_labels_and_every_documented_one_exists() -> None:
    offered: dict[str, tuple[str, set[str], set[str]]] = {}
    for family in text_string_to_metric_families(render(STATUS, [(0.001, 1), ("+Inf", 2)], 0.5).decode()):
        labels = {label for sample in family.samples for label in sample.labels}
        offered[family.name] = (family.type, labels, {sample.name for sample in family.samples})
    rows = list(table_rows(section(read("docs/operations.md"), "## Metrics")))
    documented = {row[0]: (row[1], set(re.findall(r"`(\w+)`", row[2]))) for row in rows}
    assert documented == {name: (kind, labels) for name, (kind, labels, _) in offered.items()}
    assert all(row[3] for row in rows)
    named = set(re.findall(r"`(asapd_[a-z_]+)", "".join(page.read_text(encoding="utf-8") for page in PAGES)))
    assert named <= set(offered) | {sample for _, _, samples in offered.values() for sample in samples}


def test_every_denial_code_and_every_flag_of_usage_is_documented() -> None:
    page = read("docs/delegation.md")
    assert [row[0] for row in table_rows(section(page, "## Denial codes"))] == [str(reason) for reason in Reason]
    assert [row[0] for row in table_rows(section(page, "## Limits and reservations"))] == list(FLAG_NAMES.values())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_module_paths_in_a_page_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    for link in links:
        target, _, anchor = link.partition("#")
        file = page.parent / target if target else page
        assert file.exists(), link
        headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in headings], link
    for path in re.findall(r"`(asapd/[a-z_/]+(?:\.py)?)`", text):
        assert (ROOT / path).exists(), path


def test_the_verifier_printed_in_the_documentation_accepts_a_real_log_and_finds_every_change(tmp_path: Path) -> None:
    block = re.search(r"```python\n(.*?)```", read("docs/audit.md"), flags=re.DOTALL)
    assert block is not None
    script = tmp_path / "verify.py"
    script.write_text(block[1], encoding="utf-8")
    details = {
        "text": 'quote " backslash \\ tab \t bell \x07 delete \x7f é \u2028 😀',
        "list": [1, None, True],
        "b": {"a": -1},
    }
    connection = open_for_writing(tmp_path / "asapd.db")
    notes = [Note("test.noted", "käthe", f"subject {number}", details, 1_000_000 * number) for number in range(3)]
    Writer(connection).run([Envelope(number, note, urgent=False) for number, note in enumerate(notes)])
    entries = list_entries(connection, AuditFilter(), 10, 0, descending=False)
    connection.close()

    def verdict(log: list[dict[str, Any]]) -> subprocess.CompletedProcess[str]:
        lines = "".join(json.dumps(entry) + "\n" for entry in log)
        return subprocess.run([sys.executable, script], input=lines, capture_output=True, text=True, check=False)

    assert verdict(entries).stdout == f"3 entries, head {entries[-1]['hash']}\n"
    erased = dict.fromkeys(("actor", "subject", "details", "salt"))
    assert verdict([entries[0], {**entries[1], **erased}, entries[2]]).returncode == 0
    for field, value in [
        ("actor", "mallory"),
        ("subject", "other"),
        ("details", {}),
        ("timestamp", "2026-11-20T09:00:01.123456Z"),
        ("event_type", "test.other"),
        ("id", "aud_0"),
        ("hash", "0" * 64),
    ]:
        assert verdict([entries[0], {**entries[1], field: value}, entries[2]]).returncode == 1, field
    assert "entry 2 is missing" in verdict([entries[0], entries[2]]).stderr


def leaves(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    """Every command below one, by its whole name."""
    if not isinstance(command, click.Group):
        yield name, command
        return
    for word, inner in command.commands.items():
        yield from leaves(inner, f"{name} {word}")


def test_every_command_of_asapctl_takes_json_and_socket() -> None:
    wanted = {"--json", "--socket"}
    lacking = [
        name
        for name, command in leaves(asapctl, "asapctl")
        if wanted - {option for one in command.params for option in one.opts}
    ]
    assert lacking == []


# --- rooms and files


def test_imports_keep_to_the_rooms() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
def test_no_file_names_a_machine_or_a_package_registry() -> None:
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    # The brackets keep this line from finding itself.
    unwanted = re.compile(
        r"/[r]oot/|/[w]ork/|/[h]ome/[a-z]|/[U]sers/|/[t]mp/|/[o]pt/(?!asapd\b)"
        r"|[p]ypi\.org|[p]ythonhosted\.org|[n]pmjs\.|[i]ndex-url"
    )
    found = [
        f"{name}:{number}: {line.strip()}"
        for name in filter(None, names)
        if (ROOT / name).is_file()
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if unwanted.search(line)
    ]
    assert found == []


# --- systemd


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units as this machine's systemd can judge them: the program exists, and the type is one it knows."""
    home = tmp_path / "units"
    shutil.copytree(ROOT / "systemd", home)
    version = subprocess.run(["systemd-analyze", "--version"], capture_output=True, text=True, check=True).stdout
    service = (home / "asapd.service").read_text(encoding="utf-8").replace("/opt/asapd/bin/asapd", "/bin/true")
    if int(version.split()[1]) < 253:
        service = service.replace("Type=notify-reload\n", "")
    else:
        shutil.rmtree(home / "asapd.service.d")
    (home / "asapd.service").write_text(service, encoding="utf-8")
    return home


@pytest.mark.systemd
@needs_systemd
def test_the_systemd_units_have_no_fault(units: Path) -> None:
    files = [units / "asapd.service", units / "asapd.socket"]
    outcome = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *files], capture_output=True, text=True, check=False
    )
    complaints = [line for line in (outcome.stdout + outcome.stderr).splitlines() if "asapd" in line]
    assert complaints == []


@pytest.mark.systemd
@needs_systemd
def test_the_service_is_hardened(units: Path) -> None:
    command = ["systemd-analyze", "security", "--offline=yes", "--no-pager", units / "asapd.service"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=True)
    exposure = re.search(r"exposure level for asapd\.service: ([0-9.]+)", outcome.stdout)
    assert exposure is not None
    assert float(exposure[1]) < 2.0, outcome.stdout


@pytest.mark.systemd
@needs_systemd
def test_the_user_and_the_directories_can_be_made(tmp_path: Path) -> None:
    etc = tmp_path / "etc"
    etc.mkdir()
    (etc / "passwd").write_text("root:x:0:0::/:/bin/sh\n", encoding="utf-8")
    (etc / "group").write_text("root:x:0:\n", encoding="utf-8")
    file = ROOT / "systemd" / "sysusers.d" / "asapd.conf"
    command = ["systemd-sysusers", f"--root={tmp_path}", "--dry-run", file]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    assert "asapd" in outcome.stdout + outcome.stderr


@pytest.mark.systemd
def test_the_service_reloads_is_watched_and_leaves_the_last_commit_to_the_daemon() -> None:
    service = read("systemd/asapd.service")
    for line in ("Type=notify-reload", "WatchdogSec=30", "KillMode=mixed", "RestartPreventExitStatus=2"):
        assert f"\n{line}\n" in service
    assert "\nFileDescriptorName=http\n" in read("systemd/asapd.socket")
