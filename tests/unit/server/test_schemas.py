"""Schemas that a client sends: what is refused, and how little time that takes, whatever is in them."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from typing import Any

import pytest

from server.wire import schemas
from server.wire.chat import ChatRequest
from server.wire.parsing import parse
from server.wire.responses import ResponsesRequest
from server.wire.schemas import MAX_SCHEMA_BYTES, MAX_SCHEMAS_BYTES
from steering.errors import CallerError

BODY_BYTES = 2_000_000
SECONDS = 1.0
"""Of the processor for a whole body; it takes about a tenth of them."""


def chat(*parameters: Any, **fields: Any) -> bytes:
    """A body with one tool for each of these."""
    tools = [
        {"type": "function", "function": {"name": f"f{number}", "parameters": each}}
        for number, each in enumerate(parameters)
    ]
    messages = [{"role": "user", "content": "hi"}]
    return json.dumps({"model": "m", "messages": messages, "tools": tools, **fields}).encode()


def chain(count: int, last: Any, *, prefix: str = "") -> dict[str, Any]:
    """A schema of definitions of which each refers to the next, and the last is this."""
    names = [f"{prefix}{number}" for number in range(count)]
    definitions: dict[str, Any] = {name: refer(to) for name, to in pairwise(names)}
    return {"$defs": {**definitions, names[-1]: last}, **refer(names[0])}


def refer(name: str) -> dict[str, str]:
    """A reference to the definition of this name."""
    return {"$ref": "#/$defs/" + name.replace("~", "~0").replace("/", "~1")}


ENDING = {
    "tree": {"type": "object", "properties": {"left": {"$ref": "#"}, "right": {"$ref": "#"}}},
    "chain": chain(500, {"type": "string"}),
    "chain to nowhere": chain(500, {"$ref": "#/$defs/nothing"}),
    "chain to elsewhere": chain(500, {"$ref": "https://example.org/schema"}),
    "chain into a tree": chain(500, {"type": "object", "properties": {"a": refer("0"), "b": refer("499")}}),
    "mutual through properties": {
        "$defs": {"a": {"properties": {"b": refer("b")}}, "b": {"properties": {"a": refer("a")}}},
        **refer("a"),
    },
    "two into one": {"$defs": {"a": refer("c"), "b": refer("c"), "c": {"type": "null"}}},
    "a property of that name": {"properties": {"$ref": {"type": "string"}}},
    "an index that is none": {"anyOf": [{"$ref": "#/anyOf/" + "9" * 5000}, {"$ref": "#/anyOf/2"}]},
    "siblings in a list": {"anyOf": [{"$ref": "#/anyOf/1"}, {"type": "string"}]},
}
CIRCULAR = {
    "root": {"$ref": "#"},
    "itself": {"$defs": {"a": refer("a")}},
    "two": {"$defs": {"a": refer("b"), "b": refer("a")}},
    "beside other words": {"$defs": {"a": {"type": "string", **refer("b")}, "b": refer("a")}},
    "chain to its begin": chain(500, refer("0")),
    "chain to its end": chain(500, refer("499")),
    "chain into a circle": {"$defs": {"a": refer("b"), "b": refer("c"), "c": refer("b")}},
    "escaped": chain(3, refer("a/~0"), prefix="a/~"),
    "escaped as a URI": {"$defs": {"a b": {"$ref": "#/$defs/a%20b"}}},
    "literally what looks escaped": {"$defs": {"%61": {"$ref": "#/$defs/%61"}}},
    "in a list": {"anyOf": [{"$ref": "#/anyOf/1"}, {"$ref": "#/anyOf/0"}]},
    "far inside": {"properties": {"a": {"items": {"$defs": {"b": {"$ref": "#/properties/a/items/$defs/b"}}}}}},
}


@pytest.mark.parametrize("schema", ENDING.values(), ids=ENDING)
def test_references_that_reach_something_are_allowed(schema: dict[str, Any]) -> None:
    """Recursion through properties, long chains, and references that nothing follows."""
    assert parse(ChatRequest, chat(schema)).tools


@pytest.mark.parametrize("schema", CIRCULAR.values(), ids=CIRCULAR)
def test_references_to_nothing_but_references_are_refused(schema: dict[str, Any]) -> None:
    """However long the circle, and however its references are written."""
    with pytest.raises(CallerError, match=r"\$ref must not lead back") as caught:
        parse(ChatRequest, chat({"type": "object"}, schema))
    assert caught.value.parameter == "tools[1].function.parameters"


def filled(kind: str) -> dict[str, Any]:
    """A schema of nearly the most bytes, of references that take longest to follow."""
    count = 1200
    if kind == "chain":
        return chain(count, {"type": "string"})
    if kind == "chain backwards":
        made = chain(count, {"type": "string"})
        return {"$defs": dict(reversed(made["$defs"].items())), "$ref": made["$ref"]}
    if kind == "escapes":
        return chain(count, {"type": "string"}, prefix="/~/~")
    if kind == "mutual":
        sides = [(number, *side) for number in range(count // 4) for side in ("ab", "ba")]
        return {
            "$defs": {
                f"{number}{one}": {"properties": {"a": refer(f"{number}{other}")}, **refer(f"{number + 1}a")}
                for number, one, other in sides
            }
        }
    if kind == "many into one chain":
        made = chain(count // 2, {"type": "string"})
        return {**made, "anyOf": [refer("0")] * (count // 2)}
    deep: Any = {"type": "string"}
    for _ in range(28):
        deep = {"a": deep}
    return {"a": deep, "anyOf": [{"$ref": "#" + "/a" * 28}] * 800}


KINDS = ["chain", "chain backwards", "escapes", "mutual", "many into one chain", "deep"]


@pytest.fixture
def followed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """References that were followed."""
    found: list[str] = []
    follow = schemas._target

    def target(schema: dict[str, Any], reference: str) -> object:
        found.append(reference)
        return follow(schema, reference)

    monkeypatch.setattr(schemas, "_target", target)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_reference_is_followed_once(kind: str, followed: list[str]) -> None:
    """The work grows with the size of a schema and not with its square: no chain is walked again from its middle."""
    schema = filled(kind)
    written = json.dumps(schema)
    assert len(written) < MAX_SCHEMA_BYTES
    assert parse(ChatRequest, chat(schema)).tools
    assert 0 < len(followed) <= written.count('"$ref"')


@pytest.mark.parametrize("kind", KINDS)
def test_a_body_of_the_worst_schemas_is_decided_quickly(kind: str) -> None:
    """As many as a body has room for, looked through while every other request waits."""
    schema = filled(kind)
    body = chat(*[schema] * min(128, BODY_BYTES // len(json.dumps(schema))))
    assert len(body) > BODY_BYTES * 0.9
    began = time.process_time()
    with pytest.raises(CallerError, match=f"at most {MAX_SCHEMAS_BYTES} bytes together"):
        parse(ChatRequest, body)
    assert time.process_time() - began < SECONDS


def test_what_is_too_deep_or_too_large_is_not_followed(followed: list[str]) -> None:
    """The limits come first, so that nothing beyond them costs anything."""
    deep: Any = {"$ref": "#"}
    for _ in range(40):
        deep = {"properties": {"a": deep}}
    for schema, what in ((deep, "levels deep"), (chain(4000, {}), "bytes")):
        with pytest.raises(CallerError, match=what):
            parse(ChatRequest, chat(schema))
    assert followed == []


def test_the_bound_is_on_all_schemas_of_a_body() -> None:
    """Those of tools and of the answer's format together, whichever endpoint; the next body begins anew."""
    schema = {"description": "x" * (MAX_SCHEMA_BYTES - 100)}
    most = MAX_SCHEMAS_BYTES // MAX_SCHEMA_BYTES
    form = {"name": "n", "schema": schema}
    for _ in range(2):
        assert parse(ChatRequest, chat(*[schema] * most)).tools
    with pytest.raises(CallerError) as caught:
        parse(ChatRequest, chat(*[schema] * most, response_format={"type": "json_schema", "json_schema": form}))
    assert caught.value.parameter == "response_format.json_schema.schema"
    tools = [{"type": "function", "name": "f", "parameters": schema}] * (most + 1)
    with pytest.raises(CallerError) as caught:
        parse(ResponsesRequest, json.dumps({"model": "m", "input": "hi", "tools": tools}).encode())
    assert caught.value.parameter == f"tools[{most}].parameters"
