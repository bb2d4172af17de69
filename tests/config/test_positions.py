"""The position scanner finds what tomllib finds, on the line where it is written."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asapd.config.positions import Place, lines_of


def places_in(value: Any, at: Place = ()) -> set[Place]:
    found = {at} if at else set()
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in items:
        found |= places_in(inner, (*at, step))
    return found


DOCUMENT = """\
# comment with [brackets] and "quotes
top = 1
"quoted key" = 'its'
dotted.inner."last one" = true

[table] # comment
text = \"\"\"
[not a table]
not_a_key = 1 \\\"\"\" still text\"\"\"\"\"
after = '''
# no comment'''
empty = ""
list = [ # comment ]
  "a,]", # comment
  ['b'],
  { x = 1, "y z" = [1, 2] },
]
date = 1979-05-27 07:32:00
[table.sub]
n = 0x1F

[[rows]]
id = 1
[rows.inner]
a = 1
[[rows.deep]]
b = 1
[[rows]]
id = 2
inner.a = 2
[[rows.deep]]
[[rows.deep]]
b = 2
"""


def test_each_place_of_a_document_has_its_line() -> None:
    lines = lines_of(DOCUMENT)
    assert set(lines) == places_in(tomllib.loads(DOCUMENT))
    texts = DOCUMENT.splitlines()
    expected = {
        ("top",): "top = 1",
        ("quoted key",): '"quoted key"',
        ("dotted", "inner", "last one"): "dotted.inner",
        ("table",): "[table] #",
        ("table", "after"): "after = '''",
        ("table", "empty"): "empty",
        ("table", "list", 0): '"a,]"',
        ("table", "list", 1, 0): "['b']",
        ("table", "list", 2, "y z", 1): "{ x = 1",
        ("table", "sub", "n"): "n = 0x1F",
        ("rows", 0, "inner", "a"): "a = 1",
        ("rows", 1, "id"): "id = 2",
        ("rows", 1, "deep", 1, "b"): "b = 2",
    }
    for place, start in expected.items():
        assert texts[lines[place] - 1].lstrip().startswith(start), place


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_both_line_endings_count_once(ending: str) -> None:
    text = ending.join(["a = 1", "", "[b]", "c = '''x", "'''", "d = 2"])
    assert lines_of(text) == {("a",): 1, ("b",): 3, ("b", "c"): 4, ("b", "d"): 6}


def test_a_line_separator_inside_a_string_is_no_new_line() -> None:
    assert lines_of('a = "x\u2028y\u0085z"\nb = 1') == {("a",): 1, ("b",): 2}


BARE = st.text("abc-_1", min_size=1, max_size=3)
QUOTED = st.text("a \"'\\[]{}=#.\u00e9\u2028,", max_size=4)


def basic(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def written(value: Any, draw: Any) -> str:
    """A value as TOML, in one of the ways it can be written."""
    pad = draw(st.sampled_from(["", " ", "\n", " # ] } , x = 1 \" '\n"]))
    match value:
        case dict():
            return "{" + ", ".join(f"{basic(key)} = {written(inner, draw)}" for key, inner in value.items()) + "}"
        case list():
            comma = draw(st.sampled_from(["", ","])) if value else ""
            return "[" + pad + f",{pad}".join(written(inner, draw) for inner in value) + comma + pad + "]"
        case str():
            body = value.replace("\\", "\\\\").replace('"', '\\"')
            if "'" not in value and draw(st.booleans()):
                return draw(st.sampled_from([f"'{value}'", f"'''\n{value}\n'''"]))
            return draw(st.sampled_from([f'"{body}"', f'"""{body}"""', f'"""\n{body}\\\n  """', f'"""{body}""""']))
        case _:
            return str(value).lower()


VALUES = st.recursive(
    st.booleans() | st.integers(-9, 9) | QUOTED,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(QUOTED, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def documents(draw: Any) -> str:
    lines = []
    for body in draw(st.lists(st.dictionaries(BARE, VALUES, max_size=3), max_size=4)):
        lines.append(draw(st.sampled_from(["", "# [x]\n"])))
        lines += [f"{key} = {written(value, draw)}\n" for key, value in body.items()]
        lines.append(f"[{draw(BARE)}]\n" if draw(st.booleans()) else f"[[r{draw(BARE)}]]\n")
    return "".join(lines)


@given(documents())
def test_the_scanner_and_tomllib_see_the_same_places(text: str) -> None:
    """Whatever tomllib accepts, the scanner walks through, finding each place once and on a line that exists."""
    try:
        expected = places_in(tomllib.loads(text))
    except tomllib.TOMLDecodeError:
        return
    lines = lines_of(text)
    assert set(lines) == expected
    assert all(1 <= line <= text.count("\n") + 1 for line in lines.values())
