"""The description of what is live, held to the methods, notifications and events that there are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import asapd
from asapd.edge.description.asyncapi import ASKED, STREAMED, TOLD, document

PACKAGE = Path(asapd.__file__).parent
DOCUMENT = document("1.2.3")


def source(name: str) -> str:
    return (PACKAGE / name).read_text(encoding="utf-8")


def resolved(pointer: str) -> Any:
    found: Any = DOCUMENT
    for part in pointer.removeprefix("#/").split("/"):
        found = found[part]
    return found


def every_reference(value: Any) -> set[str]:
    if isinstance(value, dict):
        here = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return here.union(*(every_reference(one) for one in value.values()))
    return set().union(*(every_reference(one) for one in value)) if isinstance(value, list) else set()


def test_every_method_of_the_websocket_is_described_and_every_described_one_exists() -> None:
    cases = re.findall(r"^ +case ((?:\"[\w.]+\"(?: \| )?)+)(?: as \w+)?:$", source("edge/ws.py"), flags=re.MULTILINE)
    assert {name for case in cases for name in re.findall(r"[\w.]+", case.replace("|", " "))} == set(ASKED)


def test_every_notification_is_described_and_every_described_one_exists() -> None:
    said = "".join(map(source, ("edge/ws.py", "edge/alert_stream.py", "actors/revocations.py")))
    names = re.findall(r"(?:notification\(|_gap\(|told\.append\(\()\"([\w.]+)\"", said)
    assert set(names) == set(TOLD)


def test_every_event_of_a_stream_is_described_and_every_described_one_exists() -> None:
    for address, module in {"/events": "edge/http/events.py", "/usage/stream": "edge/http/usage_stream.py"}.items():
        assert set(re.findall(r"event: ([\w.]+)", source(module))) == set(STREAMED[address])


def test_the_document_is_whole() -> None:
    for pointer in every_reference(DOCUMENT):
        assert resolved(pointer)
    addresses = {channel["address"] for channel in DOCUMENT["channels"].values()}
    assert addresses == {"/ws", "/asap/ws", *STREAMED}
    for operation in DOCUMENT["operations"].values():
        for message in operation["messages"]:
            assert message["$ref"].startswith(f"{operation['channel']['$ref']}/messages/")
