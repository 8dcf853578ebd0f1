"""OpenAI's types as an OpenAPI document: what its Python SDK says that requests and answers are.

The SDK is generated from OpenAI's own specification, and comes hash-pinned with the environment. Knows nothing of the
gateway.
"""

from __future__ import annotations

import json
from typing import Any

from openai.types import Completion, Model
from openai.types.chat import ChatCompletion
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming as ChatParameters
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming as CompletionParameters
from openai.types.responses import Response
from openai.types.responses.response_create_params import ResponseCreateParamsNonStreaming as ResponseParameters
from pydantic import TypeAdapter

_JSON = "application/json"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
"""The `ErrorResponse` of OpenAI's specification, which the SDK has no type for."""

_ALWAYS = {
    "ChatCompletion": ("id", "object", "created", "model", "choices"),
    "Choice": ("index", "message", "logprobs", "finish_reason"),
    "ChatCompletionMessage": ("role", "content", "refusal"),
}
"""Keys that OpenAI's specification requires, though they may be null, which the SDK's types do not tell."""


def document() -> dict[str, Any]:
    """An OpenAPI 3.1 document of the endpoints that this project has of OpenAI's."""
    schemas: dict[str, Any] = {}
    paths = {
        "/v1/chat/completions": _post(schemas, ChatParameters, ChatCompletion),
        "/v1/completions": _post(schemas, CompletionParameters, Completion),
        "/v1/responses": _post(schemas, ResponseParameters, Response),
        "/v1/models/gpt": {"get": {"responses": _responses(_schema(schemas, Model, "Model"))}},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "OpenAI", "version": "0"},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _post(schemas: dict[str, Any], parameters: Any, answer: Any) -> dict[str, Any]:
    name = answer.__name__
    body = _schema(schemas, parameters, f"Create{name}")
    return {
        "post": {
            "requestBody": {"required": True, "content": {_JSON: {"schema": body}}},
            "responses": _responses(_schema(schemas, answer, name)),
        }
    }


def _responses(schema: dict[str, Any]) -> dict[str, Any]:
    return {
        "200": {"description": "", "content": {_JSON: {"schema": schema}}},
        "default": {"description": "", "content": {_JSON: {"schema": _ERROR}}},
    }


def _schema(schemas: dict[str, Any], kind: Any, name: str) -> dict[str, Any]:
    """Put the schema of a type and of all it is made of among the components; a reference to it."""
    prefix = f"{name}_"
    text = json.dumps(TypeAdapter(kind).json_schema(ref_template=f"#/components/schemas/{prefix}{{model}}"))
    found = json.loads(text)
    for part, schema in found.pop("$defs", {}).items():
        if name == "ChatCompletion" and part in _ALWAYS:
            schema["required"] = sorted({*schema.get("required", ()), *_ALWAYS[part]})
        schemas[prefix + part] = schema
    if name in _ALWAYS:
        found["required"] = sorted({*found.get("required", ()), *_ALWAYS[name]})
    schemas[name] = found
    return {"$ref": f"#/components/schemas/{name}"}
