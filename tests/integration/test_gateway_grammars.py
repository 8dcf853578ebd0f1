"""Schemas that are costly to compile, over the real engine: each is answered, and so is everyone else meanwhile."""

from __future__ import annotations

import concurrent.futures
import time
from typing import Any

import httpx
import pytest

from tests.integration.asking import USER
from tests.integration.serving import MODEL, Server

PATIENCE = 60.0
OTHERS_WAIT = 5.0
"""Seconds for a request of someone else meanwhile; far less than this, but on a machine that is busy with tests."""


def matching(pattern: str) -> dict[str, Any]:
    """A string of this pattern."""
    return {"type": "string", "pattern": pattern}


def nested(levels: int) -> dict[str, Any]:
    """An object schema of so many levels."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def doubling(levels: int) -> dict[str, Any]:
    """Each definition has the next one twice: small as written, and written out as large as two to the levels."""
    definitions: dict[str, Any] = {f"d{levels}": {"type": "string"}}
    for level in range(levels):
        parts = {name: {"$ref": f"#/$defs/d{level + 1}"} for name in "ab"}
        definitions[f"d{level}"] = {"type": "object", "properties": parts, "required": ["a", "b"]}
    return {"$ref": "#/$defs/d0", "$defs": definitions}


SCHEMAS: dict[str, dict[str, Any]] = {
    "catastrophic pattern": matching("^(a+)+$"),
    "catastrophic alternatives": matching("^" + "(a|aa|a?)*" * 40 + "b$"),
    "nested repeats": matching("(.{1,9}){1,9}"),
    "pattern that looks ahead": matching("^(?=.*[a-z])(?!.*bad).{1,99}$"),
    "recursive but finite schema": {
        "type": "object",
        "properties": {"child": {"$ref": "#"}},
        "additionalProperties": False,
    },
    "definitions that double": doubling(60),
    "large enum": {"type": "string", "enum": [f"value-{number:05d}" for number in range(3800)]},
    "many optional properties": {
        "type": "object",
        "properties": {f"property{number}": {"type": "string"} for number in range(1200)},
    },
    "long strings and arrays": {
        "type": "array",
        "items": {"type": "string", "minLength": 1, "maxLength": 10**9},
        "minItems": 1,
        "maxItems": 10**4,
    },
    "at the limit of depth": nested(15),
}


TOO_COSTLY: dict[str, dict[str, Any]] = {
    # Each generated token takes seconds of the engine's only loop, once there are about a hundred of them.
    "large nested repeats": matching("(.{1,999}){1,999}"),
    "repeats of repeats": matching("((((.{1,99}){1,99}){1,99}){1,99}){1,99}"),
    "nested repeats in names": {"type": "object", "patternProperties": {"^(.{1,99}){1,99}$": {"type": "string"}}},
    # Looked through in the gateway's own loop for seconds and gigabytes, then compiled for longer.
    "many properties, some of them": {
        "type": "object",
        "properties": {f"p{number}": {"type": "string"} for number in range(1000)},
        "minProperties": 500,
    },
    # The compiler fails a check of its own, which is told as an error of the server.
    "many counted repeats": matching("[ab]{1,250}c" * 40),
}
"""What is refused before anything compiles it; without, each did what is said of it."""


def post(gateway: Server, **fields: Any) -> httpx.Response:
    """A greedy request for a few tokens."""
    asked = {"model": MODEL, "messages": USER, "temperature": 0, "max_tokens": 64, **fields}
    return httpx.post(f"{gateway.url}/v1/chat/completions", json=asked, timeout=PATIENCE)


def format_of(schema: dict[str, Any]) -> dict[str, Any]:
    """What asks for JSON of a schema."""
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_costly_schema_is_answered_and_so_is_everyone_else(gateway: Server, name: str) -> None:
    """It begins an answer that follows it, or is refused as the caller's fault; nobody who asks meanwhile waits."""
    answer = asked_beside_others(gateway, SCHEMAS[name])
    if answer.status_code != 200:
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error"), answer.text
    else:
        assert answer.json()["choices"][0]["finish_reason"] in ("stop", "length")


@pytest.mark.parametrize("name", TOO_COSTLY)
def test_a_schema_that_costs_too_much_is_refused(gateway: Server, name: str) -> None:
    """Before it reaches a compiler."""
    answer = asked_beside_others(gateway, TOO_COSTLY[name])
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error"), answer.text


def asked_beside_others(gateway: Server, schema: dict[str, Any]) -> httpx.Response:
    """The answer to a request with a schema, while others are answered without waiting."""
    waits: list[float] = []
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        costly = pool.submit(post, gateway, ignore_eos=True, **format_of(schema))
        while not waits or not costly.done():
            began = time.monotonic()
            assert post(gateway, max_tokens=8).status_code == 200
            waits.append(time.monotonic() - began)
        answer = costly.result()
    assert max(waits) < OTHERS_WAIT
    assert post(gateway, **format_of({"type": "object"})).status_code == 200
    return answer
