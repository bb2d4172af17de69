"""`asapctl prices`: the table in force, checks without a daemon, and pricing again."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from asapd.cli import price_seed
from asapd.cli.door import Door
from asapd.cli.outcome import Exit
from tests.cli.programs import PRICES, Daemon, Program

GOOD = '[[price]]\nmodel = "m"\ninput_per_mtok = 1\n\n[[price]]\nmodel = "m"\ninput_per_mtok = 2\n'
WRONG = """color = "red"
[[price]]
model = ["m*m", ""]
input_per_mtok = "dear"
provider = 3
valid_from = "soon"
shape = "round"
[[price]]
tint = 1
model = 7
[[price]]
"""
BAD = 'currency = "EUR"\n[[price]]\nmodel = "m"\ninput_per_mtok = -1\noutput = 2\n'


def report(daemon: Daemon, model: str, count: int = 1) -> None:
    metrics = {"tokens_in": 1_000_000, "cache_write_tokens": 1_000, "cache_write_1h_tokens": 1_000}
    event = {"task_id": "t", "agent": "urn:asap:agent:p", "consumer": "c", "model": model, "metrics": metrics}
    now = datetime.now(UTC).isoformat()
    events = [{**event, "id": uuid4().hex, "timestamp": now} for _ in range(count)]
    Door(daemon.socket).post("/usage", {"events": events})


def test_a_list_of_several_pages_is_shown_as_one(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asapd.cli.door.PAGE", 1)
    door = Door(daemon.socket)
    keys = {door.post("/keys", {"name": name, "role": "reader"})["id"] for name in ("one", "two")}
    found = door.whole("/keys")
    assert keys < {row["id"] for row in found["data"]}
    assert (found["count"], found["next_cursor"]) == (len(found["data"]), None)
    assert door.whole("/prices")["version"].startswith("1+")


def test_the_table_in_force_is_shown(daemon: Daemon, ctl: Program) -> None:
    shown = ctl("prices", "show").out.splitlines()
    assert shown[0].startswith("version: 1+")
    assert shown[2].endswith("prices.toml")
    assert shown[-1].split()[:4] == ["m", "-", "1.5", "2"]
    assert ctl("prices", "show", "--json").json["data"][0]["input_per_mtok"] == 1.5
    found = ctl("prices", "show", "--model", "m", "--provider", "p", "--at", "1h")
    assert (found.code, found.out.splitlines()[-1].split()[0]) == (Exit.DONE, "m")
    missing = ctl("prices", "show", "--model", "x")
    assert (missing.code, "no row prices x" in missing.err) == (Exit.NO, True)
    assert ctl("prices", "show", "--at", "1h").code == Exit.USAGE


def test_a_daemon_without_a_table_says_so(own_daemon: Daemon, ctl: Program) -> None:
    text = own_daemon.config.read_text()
    own_daemon.config.write_text(text.replace('[metering.pricing]\nfile = "prices.toml"\n', ""))
    assert ctl("reload").code == Exit.DONE
    assert "there is no price table" in ctl("prices", "show").err


def test_a_table_is_checked_without_a_daemon(tmp_path: Path, ctl: Program) -> None:
    file = tmp_path / "prices.toml"
    file.write_text(GOOD)
    ran = ctl("prices", "check", str(file))
    assert (ran.code, ran.out.split()[-2:]) == (Exit.DONE, ["2", "rows"])
    remark = f"{file}:5: price[1]: is never used: price[0] has the same model, provider and days"
    assert ran.err.splitlines() == [remark]
    told = ctl("prices", "check", str(file), "--json").json
    assert (told["valid"], told["rows"], told["remarks"]) == (True, 2, [remark])

    file.write_text(BAD)
    ran = ctl("prices", "check", str(file))
    assert (ran.code, ran.out) == (Exit.USAGE, "")
    assert ran.err.splitlines() == [
        f'{file}:1: currency: must be "USD"',
        f"{file}:4: price[0].input_per_mtok: must be USD, not negative, with at most six decimals",
        f"{file}:5: price[0].output: is not a setting of a price",
    ]
    told = ctl("prices", "check", str(file), "--json").json
    assert (told["valid"], told["version"], len(told["problems"])) == (False, None, 3)

    file.write_text(WRONG)
    assert [
        line.removeprefix(f"{file}:").split(": ")[:2] for line in ctl("prices", "check", str(file)).err.splitlines()
    ] == [
        ["1", "color"],
        ["3", "price[0].model"],
        ["4", "price[0].input_per_mtok"],
        ["5", "price[0].provider"],
        ["6", "price[0].valid_from"],
        ["7", "price[0].shape"],
        ["9", "price[1].tint"],
        ["10", "price[1].model"],
        ["11", "price[2].model"],
        ["11", "price[2]"],
    ]

    file.write_text("version = \n")
    assert ctl("prices", "check", str(file)).err.startswith(f"{file}:1: syntax: ")
    file.write_bytes(b'version = "1"\n# \xff')
    assert ctl("prices", "check", str(file)).err.startswith(f"{file}:2: file: is not UTF-8")
    assert ctl("prices", "check", str(tmp_path / "none")).code == Exit.USAGE


def test_what_was_recorded_is_priced_again(own_daemon: Daemon, ctl: Program) -> None:
    report(own_daemon, "m", 3)
    report(own_daemon, "new", 2)
    report(own_daemon, "nobody")
    would = ctl("prices", "reprice", "--dry-run")
    assert (would.code, "nothing to do" in would.err) == (Exit.DONE, True)

    table = own_daemon.directory / "prices.toml"
    table.write_text(PRICES.replace("1.5", "2.5") + '[[price]]\nmodel = "new"\ncache_write_1h_per_mtok = 10\n')
    assert ctl("reload").out.startswith("applied: prices: 1+")
    would = ctl("prices", "reprice", "--dry-run")
    heading, *rows = would.out.splitlines()
    assert heading.split()[:2] == ["MODEL", "EVENTS"]
    assert [row.split() for row in rows] == [
        ["m", "3", "3", "0", "0", "0", "4.5", "7.5", "3"],
        ["new", "2", "2", "2", "0", "0", "-", "0.02", "0.02"],
        ["nobody", "1", "0", "0", "1", "1", "-", "-", "0"],
    ]
    assert "5 events would be corrected by 3.02 USD" in would.err
    only = ctl("prices", "reprice", "--dry-run", "--model", "n*", "--since", "1h", "--json").json
    assert [row["model"] for row in only["data"]] == ["new", "nobody"]
    assert ctl("prices", "reprice", "--dry-run", "--until", "1h", "--json").json["data"] == []

    did = ctl("prices", "reprice", "--json").json
    assert (did["changed"], did["dry_run"], did["estimates_kept"]) == (5, False, 0)
    assert "nothing to do" in ctl("prices", "reprice").err
    cost = ctl("usage", "report", "--by", "model")
    assert [row.split()[-1] for row in cost.out.splitlines()[1:]] == ["7.5", "0.02", "-"]
    assert "1 events have no known cost" in cost.err
    assert [line.split()[-1] for line in ctl("status").out.splitlines() if "unknown cost" in line] == ["1"]


def test_parts_of_a_run_add_up_and_estimates_that_stay_are_told(ctl: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"changed": 1, "first_priced": 0, "not_in_table": 0, "unpriced_events": 0}

    def part(cursor: str | None, **row: Any) -> dict[str, Any]:
        money = {"old_cost_usd": None, "new_cost_usd": Decimal("0.5"), "difference_usd": Decimal("0.5")}
        rows = [{"model": "m", "events": 2, **counts, **money, **row}, {"model": None, "events": 1, **counts, **money}]
        return {"data": rows[: 1 if cursor else 2], "estimates_kept": 1, "price_version": "v", "next_cursor": cursor}

    parts = {None: part("x"), "x": part("y", old_cost_usd=Decimal("0.25")), "y": part(None)}
    monkeypatch.setattr(Door, "post", lambda self, path, body=None, **given: parts[given["cursor"]])
    ran = ctl("prices", "reprice")
    assert [row.split()[:3] + row.split()[-3:] for row in ran.out.splitlines()[1:]] == [
        ["-", "1", "1", "-", "0.5", "0.5"],
        ["m", "6", "3", "0.25", "1.5", "1.5"],
    ]
    assert "4 events were corrected by 2.0 USD, to v" in ran.err
    assert "3 reservations stay settled at their estimate" in ran.err


# --- a table to begin with


def test_a_table_is_written_from_the_package_and_passes_the_check(tmp_path: Path, ctl: Program) -> None:
    file = tmp_path / "prices.toml"
    ran = ctl("prices", "seed", "--provider", "openai", "--provider", "groq", "--out", str(file), "--json")
    assert (ran.code, ran.json["providers"], ran.json["file"]) == (Exit.DONE, ["openai", "groq"], str(file))
    assert {one["provider"] for one in ran.json["left_out"]} == {"openai", "groq"}
    checked = ctl("prices", "check", str(file))
    assert (checked.code, checked.err) == (Exit.DONE, "")
    assert ctl("prices", "seed", "--provider", "openai", "--provider", "groq").out == file.read_text()
    assert ctl("prices", "seed", "--provider", "groq", "--json").json["table"].endswith("\n")
    assert "# --- Anthropic" in ctl("prices", "seed").out


def test_a_provider_that_the_package_does_not_know_is_refused(ctl: Program) -> None:
    ran = ctl("prices", "seed", "--provider", "nobody")
    assert (ran.code, "knows no provider nobody" in ran.err, "openai" in ran.err) == (Exit.USAGE, True, True)


def test_figures_of_another_shape_are_no_bug_of_asapd(ctl: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise price_seed.NotUnderstoodError("the figures of genai-prices 9 are not understood")

    monkeypatch.setattr(price_seed, "seed", fail)
    ran = ctl("prices", "seed")
    assert (ran.code, "install the version that asapd[prices] asks for" in ran.err) == (Exit.USAGE, True)


def test_without_the_package_it_says_what_to_install(ctl: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "genai_prices.data", None)
    ran = ctl("prices", "seed")
    assert (ran.code, ran.out) == (Exit.USAGE, "")
    assert "pip install 'asapd[prices]'" in ran.err
