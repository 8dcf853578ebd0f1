"""Schemathesis: requests made of schemas, those of OpenAI's SDK and our own, to a gateway over the scripted engine.

`TRIMTAB_SCHEMA_CASES=300 python -m pytest tests/conformance/test_schemas.py` runs more of each operation than CI does.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from server import schema
from server.app import create_app, create_gateway
from server.settings import Settings
from tests.conformance import openai_types
from tests.fake_server import MODEL, FakeServer, fake_serving
from tests.fakes import FakeEngine, make_catalog

CASES = int(os.environ.get("TRIMTAB_SCHEMA_CASES", "25"))
"""Requests of each operation."""

POSTED = [operation.path for operation in schema.OPERATIONS if operation.method == "post"]
OPENAI = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
PLAIN: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
}
"""What takes the place of a prompt that is refused; a `prompt` of responses is a template, and stays left out."""


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    """A gateway; in the end it still lives."""
    with fake_serving("--gated", "--quiet") as found:
        yield found
        assert found.process.poll() is None


def load(document: dict[str, Any], mode: GenerationMode) -> Any:
    """A schema whose requests are of one mode."""
    config = schemathesis.Config.from_dict({"generation": {"mode": mode.value, "allow-x00": False}})
    return schemathesis.openapi.from_dict(document, config=config)


def try_each(operation: Any, mode: GenerationMode, ask: Callable[[Case], None]) -> None:
    """Ask everything that is made of an operation."""

    @settings(
        max_examples=CASES,
        deadline=None,
        database=None,
        derandomize="TRIMTAB_SCHEMA_CASES" not in os.environ,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def each(case: Case) -> None:
        ask(case)

    each()


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["as told", "otherwise"])
@pytest.mark.parametrize("path", POSTED)
def test_answers_are_as_our_schema_tells(server: FakeServer, path: str, mode: GenerationMode) -> None:
    """No 5xx, no status, media type or body that is not in the document; a body that it rules out is refused."""
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    checks += [unsupported_method, *([negative_data_rejection] if mode is GenerationMode.NEGATIVE else [])]
    statuses: Counter[int] = Counter()

    def ask(case: Case) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body["model"] = MODEL
        response = case.call(base_url=server.url)
        statuses[response.status_code] += 1
        case.validate_response(response, checks=checks)

    try_each(load(schema.document(), mode)[path]["POST"], mode, ask)
    assert statuses[200] if mode is GenerationMode.POSITIVE else statuses[400], statuses


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/{name}", "/v1/steering", "/livez", "/health", "/readyz"])
def test_what_is_told_is_as_our_schema_tells(server: FakeServer, path: str) -> None:
    """The same for what is only asked for."""
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]

    def ask(case: Case) -> None:
        case.call_and_validate(base_url=server.url, checks=checks)

    try_each(load(schema.document(), GenerationMode.POSITIVE)[path]["GET"], GenerationMode.POSITIVE, ask)


@pytest.mark.parametrize("path", OPENAI)
def test_answers_are_as_openais_types_tell(server: FakeServer, path: str) -> None:
    """Whatever OpenAI's own types allow is answered in their shape, or refused in OpenAI's envelope; never a 5xx.

    A field that is refused is left out, and the rest sent again, until there is an answer: else few would be answered.
    """
    checks = [not_a_server_error, content_type_conformance, response_schema_conformance]
    statuses: Counter[int] = Counter()

    def ask(case: Case) -> None:
        body = case.body
        assert isinstance(body, dict)
        body["model"] = MODEL
        for _ in range(2 * len(body) + len(PLAIN[path])):
            response = case.call(base_url=server.url)
            statuses[response.status_code] += 1
            case.validate_response(response, checks=checks)
            if response.status_code == 200:
                return
            if (parameter := response.json()["error"]["param"]) is None:  # the body as a whole is at fault
                return
            name = at_fault(body, parameter)
            body.pop(name, None)
            if name in PLAIN[path]:
                body[name] = PLAIN[path][name]
        raise AssertionError(f"nothing is left to leave out, and there is no answer: {body}")

    operation = load(openai_types.document(), GenerationMode.POSITIVE)[path]["POST"]
    try_each(operation, GenerationMode.POSITIVE, ask)
    assert statuses[200] >= CASES // 2, statuses
    assert not [status for status in statuses if status >= 500]


def at_fault(body: Mapping[str, Any], parameter: str) -> str:
    """The field of a body that a parameter such as `messages[0].content` is in."""
    names = (name for name in body if parameter == name or parameter.startswith((f"{name}.", f"{name}[")))
    return max(names, key=len, default=parameter)


def test_the_schema_tells_of_every_route() -> None:
    """A route that is not in the document, or an operation that is not served, is a mistake."""
    edge: Any = create_app(create_gateway(FakeEngine(), make_catalog(), Settings()))
    app: FastAPI = edge._app
    served = {
        (method.lower(), route.path.replace("{name:path}", "{name}"))  # type: ignore[attr-defined]
        for route in app.routes
        for method in route.methods  # type: ignore[attr-defined]
        if method != "HEAD"
    }
    assert served == {(operation.method, operation.path) for operation in schema.OPERATIONS}
