"""On which line of a TOML text each table, element and key stands.

The text must already have been accepted by tomllib: this scanner only looks for places, and takes
the grammar (TOML 1.0.0) for granted.
"""

from __future__ import annotations

import re
import tomllib

Place = tuple[str | int, ...]
"""Keys and list indexes from 0, outermost first: ("agents", 1, "url")."""

_BLANK = re.compile(r"(?:[ \t\n]|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_STRING = re.compile(
    r'"""(?:[^\\]|\\.)*?"""{1,3}(?!")'
    r"|'''.*?'''(?:'{0,2})(?!')"
    r'|"(?:[^"\\]|\\.)*"'
    r"|'[^']*'",
    re.DOTALL,
)
_PLAIN = re.compile(r"[^,\]}\n#]*")


def lines_of(text: str) -> dict[Place, int]:
    """The line, from 1, where each path of a valid TOML text is first written."""
    return _Scanner(text.replace("\r\n", "\n")).scan()


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[Place, int] = {}
        self.lengths: dict[Place, int] = {}  # of arrays of tables, by the path of the array
        self.counted_to = 0
        self.line = 1

    def scan(self) -> dict[Place, int]:
        table: Place = ()
        while True:
            self.skip(_BLANK)
            if self.at >= len(self.text):
                return self.lines
            if self.text.startswith("[[", self.at):
                self.at += 2
                table = self.array_header()
            elif self.text[self.at] == "[":
                self.at += 1
                table = self.table_header()
            else:
                self.pair(table)

    def skip(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self.text, self.at)
        assert found is not None, "the text is not the TOML that tomllib accepted"
        self.at = found.end()
        return found[0]

    def note(self, path: Place) -> None:
        self.line += self.text.count("\n", self.counted_to, self.at)
        self.counted_to = self.at
        self.lines.setdefault(path, self.line)

    def key(self) -> list[str]:
        parts: list[str] = []
        while True:
            self.skip(_SPACE)
            if self.text[self.at] in "\"'":
                quoted = self.skip(_STRING)
                parts.append(tomllib.loads(f"x = {quoted}")["x"])
            else:
                parts.append(self.skip(_BARE_KEY))
            self.skip(_SPACE)
            if self.text[self.at] != ".":
                return parts
            self.at += 1

    def note_parents(self, base: Place, keys: list[str]) -> Place:
        # A header or dotted key that passes through an array of tables means its last element.
        path = base
        for key in keys:
            path = (*path, key)
            self.note(path)
            if path in self.lengths:
                path = (*path, self.lengths[path] - 1)
        return path

    def table_header(self) -> Place:
        keys = self.key()
        path = self.note_parents((), keys)
        self.at += 1
        return path

    def array_header(self) -> Place:
        keys = self.key()
        array = (*self.note_parents((), keys[:-1]), keys[-1])
        self.note(array)
        index = self.lengths.get(array, 0)
        self.lengths[array] = index + 1
        self.note((*array, index))
        self.at += 2
        return (*array, index)

    def pair(self, base: Place) -> None:
        path = self.note_parents(base, self.key())
        self.at += 1  # the equals sign
        self.skip(_SPACE)
        self.value(path)

    def value(self, path: Place) -> None:
        match self.text[self.at]:
            case '"' | "'":
                self.skip(_STRING)
            case "[":
                self.array(path)
            case "{":
                self.inline_table(path)
            case _:
                self.skip(_PLAIN)

    def array(self, path: Place) -> None:
        self.at += 1
        index = 0
        while True:
            self.skip(_BLANK)
            if self.text[self.at] == "]":
                self.at += 1
                return
            self.note((*path, index))
            self.value((*path, index))
            index += 1
            self.skip(_BLANK)
            if self.text[self.at] == ",":
                self.at += 1

    def inline_table(self, path: Place) -> None:
        self.at += 1
        while True:
            self.skip(_BLANK)  # TOML 1.1 allows line breaks here; 1.0 has none, and then none is found
            if self.text[self.at] == "}":
                self.at += 1
                return
            self.pair(path)
            self.skip(_BLANK)
            if self.text[self.at] == ",":
                self.at += 1
