"""What the demo shows: a live view on a terminal, plain lines everywhere else."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import click
from rich.box import HEAVY, ROUNDED, SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

NO_DATA = "no data"
_STATES = {"healthy": "green", "degraded": "yellow", "unhealthy": "bold red", "stale": "yellow"}
_KINDS = {
    "BREACH": "bold white on red",
    "resolved": "bold green",
    "refused": "bold yellow",
    "audit": "cyan",
    "incident": "magenta",
    "health": "red",
    "problem": "bold red",
}
_FEED_KEPT = 200
# Everything that is always there: title, agents, budget, totals, the events' frame, and the line at the bottom.
_FIXED_ROWS = 17
_BREACH_ROWS = 5


@dataclass
class Scene:
    """What is to be seen at the moment; the story changes it, the screen draws it."""

    address: str = ""
    login: str = ""
    agents: list[dict[str, Any]] = field(default_factory=list)
    usage: dict[str, dict[str, Any]] = field(default_factory=dict)
    totals: dict[str, Any] = field(default_factory=dict)
    delegation: dict[str, Any] | None = None
    allowed: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    refused_in_all: Counter[str] = field(default_factory=Counter)
    breach: dict[str, Any] | None = None
    """Parameters of the newest notification `sla.breach`, opened or resolved."""
    breach_note: str = ""
    opened: int = 0
    resolved: int = 0
    first_breach_s: float | None = None
    audit: dict[str, Any] | None = None


def short_name(urn: str | None) -> str:
    """An agent's name without the prefix that all names have."""
    return (urn or "").removeprefix("urn:asap:agent:")


def usd(amount: float | None) -> str:
    """An amount for reading."""
    return NO_DATA if amount is None else f"${amount:,.2f}" if amount >= 0.1 or amount == 0 else f"${amount:.4f}"


def breach_words(params: dict[str, Any]) -> str:
    """A transition of a breach in one sentence."""
    breach = params["breach"]
    term = {"error_rate": "error rate", "availability": "uptime"}.get(breach["breach_type"], "p95 latency")
    name = short_name(breach["agent_id"])
    if params["event"] == "resolved":
        return f"{name} keeps its promise again: {term} within {breach['threshold']}"
    return f"{name} broke its promise: {term} {breach['actual']}, promised {breach['threshold']}"


class Screen:
    """Shows a scene and the events of it.

    `elapsed_s` tells the seconds since the start. `left` is called when nobody is there any more to see it.
    """

    def __init__(self, scene: Scene, elapsed_s: Callable[[], float], left: Callable[[], None]) -> None:
        self._scene = scene
        self.elapsed_s = elapsed_s
        self._left = left
        self.was_left = False
        self._console = Console()
        self._feed: deque[tuple[float, str, str]] = deque(maxlen=_FEED_KEPT)
        self.is_live = self._console.is_terminal and not self._console.is_dumb_terminal

    @contextmanager
    def open(self) -> Iterator[None]:
        """Draw on a terminal while this lasts. What was drawn last stays there."""
        if not self.is_live:
            yield
            return
        # Drawn by the story's own task: a thread of rich's would draw scenes that are half changed.
        with Live(self._view(), console=self._console, auto_refresh=False, vertical_overflow="crop") as self._live:
            yield

    def draw(self) -> None:
        """Bring the live view up to date; plain output has nothing to draw."""
        if self.is_live:
            with self._noticing():
                self._live.update(self._view(), refresh=True)

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        """Take a reader that has left, or a terminal that was closed, as the wish to end."""
        try:
            yield
        except OSError:
            # What is still buffered is flushed once more at the end, which must not fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self.was_left = True
            self._left()

    def _write(self, line: str) -> None:
        with self._noticing():
            click.echo(line)

    def say(self, kind: str, text: str) -> None:
        """One event."""
        self._feed.append((self.elapsed_s(), kind, text))
        if not self.is_live:
            self._write(f"{self.elapsed_s():6.1f}s  {kind:<10}  {text}")

    def say_breach(self, params: dict[str, Any], frame: str, note: str) -> None:
        """A notification as the subscriber received it, big."""
        self._scene.breach, self._scene.breach_note = params, note
        breach = params["breach"]
        kind = "resolved" if params["event"] == "resolved" else "BREACH"
        if not self.is_live and kind == "BREACH":
            self._write(f"\n{'=' * 20}  SLA BREACH {params['event']}: {short_name(breach['agent_id'])}  {'=' * 20}")
        samples = "" if kind == "resolved" else f"{breach['samples']} samples, "
        self.say(kind, f"{breach_words(params)} ({breach['severity']}, {samples}{note})")
        if not self.is_live:
            self._write(f"{'':19}received on /ws: {frame}")
            if kind == "BREACH":
                self._write("=" * 80 + "\n")

    def close(self, lines: list[tuple[str, str]]) -> None:
        """The last words: names and values."""
        if not self.is_live:
            self._write("")
            for name, value in lines:
                self._write(f"{name:<12}  {value}")
            return
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, value in lines:
            table.add_row(Text(name, "bold"), Text(value))
        with self._noticing():
            self._console.print(table)

    # --- the live view

    def _view(self) -> RenderableType:
        scene, height = self._scene, self._console.height
        parts: list[RenderableType] = [self._title(), self._agents()]
        room = height - _FIXED_ROWS
        if scene.breach is not None:
            parts.append(self._breach(scene.breach))
            room -= _BREACH_ROWS
        parts += [self._budget(), self._totals()]
        if room >= 1:
            parts.append(self._events(room))
        parts.append(Text("Ctrl-C ends the demo; nothing of it stays behind.", "dim"))
        return Group(*parts)

    def _title(self) -> RenderableType:
        # The address with its key may take two rows: cut off it could be neither clicked nor copied.
        login = self._scene.login
        address = Text(login or "starting…", f"underline link {login}" if login else "dim", overflow="fold")
        line = Text.assemble((" asapd demo ", "bold white on blue"), f"  {self.elapsed_s():.0f} s   ")
        return Group(line.append("Dashboard, open it in a browser:", "dim"), address)

    def _agents(self) -> RenderableType:
        table = Table(box=SIMPLE_HEAD, expand=True, pad_edge=False, padding=(0, 1, 0, 0))
        for name in ("Agent", "State"):
            table.add_column(name, no_wrap=True)
        for name in ("p95 / limit", "Errors", "Uptime", "Tasks", "Tokens", "Cost"):
            table.add_column(name, justify="right", no_wrap=True)
        for agent in self._scene.agents:
            sla, used = agent["sla"] or {}, self._scene.usage.get(agent["id"], {})
            limit_ms = sla.get("max_latency_p95_ms")
            p95, errors = agent["latency_p95_ms"], agent["error_rate_percent"]
            max_errors = float((sla.get("max_error_rate") or "100%").rstrip("%"))
            is_slow = p95 is not None and limit_ms is not None and p95 > limit_ms
            limit = f" / {limit_ms:,} ms" if limit_ms is not None else " ms"
            table.add_row(
                Text(short_name(agent["id"]), "bold"),
                Text(f"● {agent['state']}", _STATES.get(agent["state"], "dim")),
                _figure(p95, "{:,.0f}", broken=is_slow).append(limit, "dim"),
                _figure(errors, "{:.1f}%", broken=errors is not None and errors > max_errors),
                _figure(agent["uptime_percent"], "{:.1f}%"),
                _figure(used.get("total_tasks"), "{:,}"),
                _figure(used.get("total_tokens"), "{:,}"),
                Text(usd(used.get("total_cost_usd")) if used else NO_DATA, "" if used else "dim"),
            )
        for _ in range(3 - len(self._scene.agents)):
            table.add_row(Text("…", "dim"))
        return table

    def _breach(self, params: dict[str, Any]) -> RenderableType:
        breach, is_over = params["breach"], params["event"] == "resolved"
        style = "green" if is_over else "red"
        body = Text.assemble(
            (breach_words(params) + "\n", f"bold {style}"),
            (f"{breach['severity']}, {breach['breach_type']} over {breach['window']}, {breach['id']}\n", ""),
            (
                f"WebSocket /ws: sla.breach, event {params['event']}, seq {params['seq']}; {self._scene.breach_note}",
                "dim",
            ),
            no_wrap=True,
            overflow="ellipsis",
        )
        title = Text(f" SLA BREACH {params['event']} ", f"bold white on {style}")
        return Panel(body, title=title, border_style=style, box=ROUNDED if is_over else HEAVY, padding=(0, 1))

    def _budget(self) -> RenderableType:
        grid = Table.grid(expand=True, padding=(0, 1))
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True)
        found = self._scene.delegation
        if found is None:
            grid.add_row(Text("Delegation", "bold"), Text("none yet", "dim"), "")
            return grid
        limit, left = found["constraints"]["max_cost_usd"], found["remaining"]["cost_usd"]
        share = left / limit if limit else 0
        style = "green" if share > 0.4 else "yellow" if share > 0.1 else "red"
        parties = f"{short_name(found['delegator'])} → {short_name(found['delegate'])}"
        bar = ProgressBar(total=limit, completed=left, complete_style=style, finished_style=style)
        left_words = Text(f"{usd(left)} of {usd(limit)} left", f"bold {style}")
        grid.add_row(Text.assemble(("Delegation ", "bold"), parties), bar, left_words)
        refused = ", ".join(f"{count} x {code}" for code, count in self._scene.refused.items())
        counts = Text(f"           authorizations: {self._scene.allowed} allowed, ", no_wrap=True, overflow="ellipsis")
        counts.append(f"refused: {refused or 'none'}", "yellow" if refused else "dim")
        return Group(grid, counts)

    def _totals(self) -> RenderableType:
        totals, audit = self._scene.totals, self._scene.audit
        line = Text.assemble(("Usage ", "bold"), no_wrap=True, overflow="ellipsis")
        if totals:
            line.append(f"{totals['total_tasks']:,} tasks, {totals['total_tokens']:,} tokens, ")
            line.append(usd(totals["total_cost_usd"]))
        else:
            line.append(NO_DATA, "dim")
        line.append("   Audit ", "bold")
        if audit is None:
            line.append("not verified yet", "dim")
        elif audit["valid"]:
            line.append(f"{audit['verified']:,} entries intact, head {audit['last_hash'][:12]}…", "green")
        else:
            line.append("BROKEN", "bold white on red")
        return line

    def _events(self, room: int) -> RenderableType:
        lines = Text(no_wrap=True, overflow="ellipsis")
        for index, (at_s, kind, text) in enumerate(list(self._feed)[-room:]):
            lines.append(("\n" if index else "") + f"{at_s:6.1f}s  ", "dim")
            lines.append(f"{kind:<10}", _KINDS.get(kind, "blue"))
            lines.append(f"  {text}")
        return Panel(lines, title="Events", title_align="left", border_style="dim", padding=(0, 1), height=room + 2)


def _figure(value: float | None, form: str, *, broken: bool = False) -> Text:
    if value is None:
        return Text(NO_DATA, "dim")
    return Text(form.format(value), "bold red" if broken else "")


def frame_text(frame: dict[str, Any]) -> str:
    """A received frame as one line."""
    return json.dumps(frame, separators=(",", ":"), ensure_ascii=True)
