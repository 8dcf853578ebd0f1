"""The OpenAPI document of what clients reach: bodies, answers, and the error envelope of every status.

For tests and for those who generate clients: `python -m server.schema` prints it. No server answers with it, and none
imports it. Knows nothing of vLLM or torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.errors import TABLE
from server.wire import told
from server.wire.chat import ChatRequest
from server.wire.completions import CompletionRequest
from server.wire.probe import ProbeRequest
from server.wire.responses import ResponsesRequest
from server.wire.tokenize import TokenizeRequest
from steering import __version__

_JSON, _EVENTS = "application/json", "text/event-stream"
_READING = (400, 413, 415)
"""Statuses of whatever reads a body."""
_KEYED = (401, 403, 429)
"""Statuses where keys are used."""


class Operation(NamedTuple):
    """One method of one path.

    Attributes:
        method, path: in OpenAPI's spelling.
        does: in one sentence.
        answer: of a success.
        body: of the request; None where it has none.
        streams: the answer may come as server-sent events.
        needs_key: where keys are used.
        statuses: of errors, besides those that follow from the rest.
    """

    method: str
    path: str
    does: str
    answer: type[BaseModel]
    body: type[BaseModel] | None = None
    streams: bool = False
    needs_key: bool = True
    statuses: tuple[int, ...] = ()


_ENGINE = (404, 500, 503, 504)
_HEALTH: dict[str, Any] = {"answer": told.State, "needs_key": False, "statuses": (503,)}
_ANSWERED: dict[str, Any] = {"streams": True, "statuses": _ENGINE}
OPERATIONS: Sequence[Operation] = (
    Operation("post", "/v1/chat/completions", "Answer a conversation.", told.ChatCompletion, ChatRequest, **_ANSWERED),
    Operation("post", "/v1/completions", "Go on from prompts.", told.TextCompletion, CompletionRequest, **_ANSWERED),
    Operation("post", "/v1/responses", "Answer input items.", told.ResponseObject, ResponsesRequest, **_ANSWERED),
    Operation("post", "/v1/steering/probe", "Read a prompt.", told.ProbeReading, ProbeRequest, statuses=_ENGINE),
    Operation("post", "/tokenize", "Count a prompt's tokens.", told.TokenCount, TokenizeRequest, statuses=_ENGINE),
    Operation("get", "/v1/models", "The model that is served.", told.ModelList),
    Operation("get", "/v1/models/{name}", "One model by name.", told.ServedModel, statuses=(404,)),
    Operation("get", "/v1/steering", "What may be asked for.", told.SteeringDescription),
    Operation("get", "/livez", "Whether this server lives.", **_HEALTH),
    Operation("get", "/health", "Whether this server lives.", **_HEALTH),
    Operation("get", "/readyz", "Whether requests are taken.", **_HEALTH),
)


def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    models: list[type[BaseModel]] = [told.ErrorEnvelope]
    for operation in OPERATIONS:
        models += [operation.answer, *([operation.body] if operation.body is not None else [])]
    # What a request may hold is told as it is validated, and what an answer holds as well: neither has computed fields.
    names, schemas = models_json_schema(
        [(model, "validation") for model in dict.fromkeys(models)], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _described(operation, names)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Trimtab", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _described(operation: Operation, names: Mapping[Any, Any]) -> dict[str, Any]:
    def schema(model: type[BaseModel]) -> dict[str, Any]:
        found: dict[str, Any] = names[model, "validation"]
        return found

    content: dict[str, Any] = {_JSON: {"schema": schema(operation.answer)}}
    if operation.streams:
        content[_EVENTS] = {"schema": {"type": "string"}}
    statuses = {*operation.statuses, *(_READING if operation.body else ()), *(_KEYED if operation.needs_key else ())}
    assert statuses <= {reply.status for reply in TABLE.values()}, "a status that no error has"
    described: dict[str, Any] = {
        "summary": operation.does,
        "responses": {
            "200": {"description": "As asked.", "content": content},
            **{
                str(status): {
                    "description": "An error, told in the envelope.",
                    "content": {_JSON: {"schema": schema(told.ErrorEnvelope)}},
                }
                for status in sorted(statuses)
            },
        },
    }
    if operation.needs_key:
        described["security"] = [{"key": []}, {}]
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": {_JSON: {"schema": schema(operation.body)}}}
    if "{name}" in operation.path:
        described["parameters"] = [
            {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        ]
    return described


def main() -> None:
    """Print the document."""
    json.dump(document(), sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
