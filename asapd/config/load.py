"""From the text of the file to a `Config`, or to a list of everything that is wrong with it."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar, get_args

import msgspec
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from asapd.config.checks import STAND_INS, Finding, findings
from asapd.config.model import Config
from asapd.config.positions import Place, lines_of
from asapd.config.values import Bind

M = TypeVar("M", bound=BaseModel)

More = Callable[[Config], Iterable[Finding]]
"""Further rules, which may look at what the file names; of a file with problems they judge what is left of it."""

_SECRET_KEYS = frozenset(
    {"secret", "password", "passwd", "passphrase", "token", "key", "api_key", "apikey", "private_key", "bearer"}
)
_SYNTAX_PLACE = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)\Z")


class Problem(msgspec.Struct, frozen=True):
    """One thing wrong with the file. `line` counts from 1; None when no line can be named."""

    line: int | None
    field: str
    reason: str


class ConfigError(Exception):
    """The configuration cannot be used: the operator's to mend, each problem with its line and field."""

    def __init__(self, problems: list[Problem], path: str = "<config>") -> None:
        super().__init__(problems, path)
        self.problems = problems
        self.path = path

    def __str__(self) -> str:
        return "\n".join(
            f"{self.path}:{problem.line}: {problem.field}: {problem.reason}"
            if problem.line is not None
            else f"{self.path}: {problem.field}: {problem.reason}"
            for problem in self.problems
        )


def load(path: Path, more: More = lambda _: ()) -> Config:
    """Read and check a file; relative paths in it are resolved against its directory.

    Raises:
        ConfigError: it cannot be read, is not UTF-8, or has problems.
    """
    return parse_at(path, read(path), more)


def parse_at(path: Path, text: str, more: More = lambda _: ()) -> Config:
    """Check a text as if it stood in a file.

    Raises:
        ConfigError: it has problems.
    """
    base = path.absolute().parent
    return resolve(parse(text, path=str(path), more=lambda config: more(resolve(config, base))), base)


def read(path: Path) -> str:
    """The text of a file.

    Raises:
        ConfigError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}"
        raise ConfigError([Problem(None, "file", reason)], str(path)) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError([Problem(line, "file", "is not UTF-8 text; save it as UTF-8")], str(path)) from None


def parse(text: str, *, path: str = "<config>", more: More = lambda _: ()) -> Config:
    """Check a whole text. `path` only names it in messages.

    Raises:
        ConfigError: with every problem, in the order of their lines.
    """
    raw, lines = _read(text, path)
    problems: list[tuple[Place, str]] = []
    pruned: list[Place] = []
    tree = _Tree(raw)
    # What is wrong is reported, taken out, and the rest judged on, so that one mistake hides no other.
    # Each round takes out at least one node, or puts a right one in its place, so it ends.
    while True:
        try:
            config = Config.model_validate(tree.value)
            break
        except ValidationError as error:
            details = error.errors(include_url=False)
            bad = [(tree.original(tuple(detail["loc"])), detail) for detail in details]
            # A list left empty, or a key now missing, because what was there is wrong is no mistake of its own.
            problems += [
                (place, _reason(place, detail))
                for place, detail in bad
                if not any(_touches(cut, place) for cut in pruned)
                and not (detail["type"] == "too_short" and detail["input"])
            ]
            for place, detail in bad:
                stand_in = STAND_INS.get(_pattern(place)) if isinstance(place[-1], str) else None
                taken = place[:-1] if stand_in is None and detail["type"] == "missing" else place
                pruned.append(taken)
                if stand_in is None:
                    tree.remove(taken)
                else:
                    tree.put(place, stand_in)
    for finding in (*findings(config), *more(config)):
        place, *rests_on = involved = [tree.original(place) for place in (finding.place, *finding.rests_on)]
        # A part of a list that went makes the rest of it no less evidence: a tier without a name is not named either.
        if not any(
            any(_holds(cut, one) for one in involved) or (not rests_on and _touches(cut, place)) for cut in pruned
        ):
            # What was written is to be mended, not a default that it collides with.
            problems.append((next((place for place in involved if place in lines), place), finding.reason))
    if problems:
        found = {Problem(_line(place, lines), _name(place), reason) for place, reason in problems}
        ordered = sorted(found, key=lambda problem: (problem.line, problem.field, problem.reason))
        raise ConfigError(ordered, path)
    return config


def resolve(config: M, base: Path) -> M:
    """The same configuration with each relative path, Unix binds included, taken from the directory `base`."""
    return config.model_copy(
        update={name: _resolved(getattr(config, name), base) for name in type(config).model_fields}
    )


def _resolved(value: Any, base: Path) -> Any:
    match value:
        case Path():
            return base / value
        case Bind(path=Path() as path):
            return msgspec.structs.replace(value, path=base / path)
        case BaseModel():
            return resolve(value, base)
        case tuple():
            return tuple(_resolved(item, base) for item in value)
        case _:
            return value


def _read(text: str, path: str) -> tuple[dict[str, Any], dict[Place, int]]:
    try:
        # Decimal keeps amounts of money as they are written.
        return tomllib.loads(text, parse_float=Decimal), {(): 1, **lines_of(text)}
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        found = _SYNTAX_PLACE.search(message)
        line = int(found[1]) if found and found[1] else len(text.splitlines()) or 1
        message = message[: found.start()] if found else message
        column = f" (column {found[2]})" if found and found[2] else ""
        problem = Problem(line, "syntax", _SYNTAX_WORDS.get(message, message) + column)
        raise ConfigError([problem], path) from None
    except RecursionError:
        raise ConfigError([Problem(1, "syntax", "tables or arrays are nested too deeply")], path) from None


_SYNTAX_WORDS = {
    "Cannot overwrite a value": "this setting is written twice",
    "Invalid value": "this is not a TOML value; text needs quotes",
    "Invalid statement": "this is neither a [section] nor a key = value",
}


class _Tree:
    """The raw document, from which parts are taken while the places of the rest stay known."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.value = raw
        self._left: dict[Place, list[int]] = {}  # original place of a list: original indexes of what is left

    def original(self, place: Place) -> Place:
        """Where something of the present tree stood in the document."""
        found: Place = ()
        for step in place:
            found = (*found, self._left[found][step] if isinstance(step, int) and found in self._left else step)
        return found

    def put(self, place: Place, value: Any) -> None:
        """Write a setting of a table, named by its original place; nothing happens when the table is gone."""
        table: Any = self.value
        for depth, original in enumerate(place[:-1]):
            left = self._left.get(place[:depth])
            if left is not None and original not in left:
                return
            table = table[original if left is None else left.index(int(original))]
        table[place[-1]] = value

    def remove(self, place: Place) -> None:
        """Take out a part, named by its original place; nothing happens when it is gone already."""
        node: Any = self.value
        parent: Any = None
        step: str | int = ""
        for depth, original in enumerate(place):
            parent, step = node, original
            if isinstance(node, list):
                left = self._left.setdefault(place[:depth], list(range(len(node))))
                if original not in left:
                    return
                step = left.index(int(original))
            elif not isinstance(node, dict) or original not in node:
                return
            node = parent[step]
        del parent[step]
        if isinstance(parent, list):
            del self._left[place[:-1]][int(step)]


def _touches(one: Place, other: Place) -> bool:
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


def _holds(cut: Place, place: Place) -> bool:
    return place[: len(cut)] == cut


def _line(place: Place, lines: Mapping[Place, int]) -> int:
    while place not in lines:
        place = place[:-1]
    return lines[place]


def _name(place: Place) -> str:
    text = ""
    for step in place:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            key = step if re.fullmatch(r"[A-Za-z0-9_-]+", step) else json.dumps(step)
            text += f".{key}" if text else key
    return text


def _reason(place: Place, detail: ErrorDetails) -> str:
    context: dict[str, Any] = detail.get("ctx", {})
    kind = detail["type"]
    is_table, is_list = isinstance(detail["input"], dict), isinstance(detail["input"], list)
    match kind:
        case "extra_forbidden":
            return _unknown(place)
        case "missing":
            return "is missing"
        case "value_error":
            return str(context["error"])
        case "int_type":
            return "must be a whole number, without quotes"
        case "bool_type":
            return "must be true or false, without quotes"
        case "string_type":
            return "must be text in quotes"
        case "literal_error":
            return f"must be {context['expected'].replace(chr(39), chr(34))}"
        case "greater_than_equal":
            return f"must be at least {context['ge']}"
        case "less_than_equal":
            return f"must be at most {context['le']}"
        case "too_short":
            return "must not be empty"
        case "tuple_type" if is_table:
            return f"there can be several: write [[{_name(place)}]], with two brackets"
        case "tuple_type":
            return "must be a list in [ ]"
        case "model_type" if is_list:
            return f"there is only one: write [{_name(place)}], with single brackets"
        case "model_type":
            return f"must be a table: write [{_name(place)}] with its settings below"
        case _:
            return detail["msg"]


def _unknown(place: Place) -> str:
    key = str(place[-1])
    if key.lower() in _SECRET_KEYS:
        return "secrets do not belong in this file: keep it in a file of its own and name that in a *_file setting"
    siblings = _keys_at(place[:-1])
    if close := difflib.get_close_matches(key, siblings, n=1, cutoff=0.8):
        return f'unknown setting; did you mean "{close[0]}"?'
    if homes := [f"[{section}]" if section else _TOP for section, keys in _SECTIONS.items() if key in keys]:
        return f"unknown setting here; it belongs {_TOP if _TOP in homes else 'in ' + ' or '.join(homes)}"
    if close := difflib.get_close_matches(key, siblings, n=1):
        return f'unknown setting; did you mean "{close[0]}"?'
    return f"unknown setting; known here are: {', '.join(siblings)}"


def _pattern(place: Place) -> str:
    steps = [step for step in place if isinstance(step, str)]
    return ".".join(steps)


def _keys_at(place: Place) -> list[str]:
    return _SECTIONS[_pattern(place)]


def _sections(model: type[BaseModel], at: str) -> Iterator[tuple[str, list[str]]]:
    yield at, [field.alias or name for name, field in model.model_fields.items()]
    for name, field in model.model_fields.items():
        for inner in _models_in(field.annotation):
            yield from _sections(inner, f"{at}.{field.alias or name}".lstrip("."))


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


_TOP = "at the top of the file, before the first [section]"
_SECTIONS = dict(_sections(Config, ""))
