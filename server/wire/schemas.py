"""JSON schemas that a client sends, within limits on what becomes a grammar.

Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError, to_json

from server.wire.strict import Identifier, Strict

MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH, MAX_PATTERN_CHARACTERS = 64 * 1024, 16, 512


def _bounded_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Limits on what becomes a grammar: size, depth and the length of regular expressions."""
    if len(to_json(schema)) > MAX_SCHEMA_BYTES:
        raise PydanticCustomError("schema_too_large", f"schema must have at most {MAX_SCHEMA_BYTES} bytes")
    if _refers_to_itself(schema):
        raise PydanticCustomError(
            "schema_is_circular", "a $ref must not lead back to itself without anything in between"
        )
    level: list[Any] = [schema]
    for _ in range(MAX_SCHEMA_DEPTH * 2):  # a level of a schema is an object and the map of its properties
        deeper: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                pattern = node.get("pattern")
                if isinstance(pattern, str) and len(pattern) > MAX_PATTERN_CHARACTERS:
                    raise PydanticCustomError(
                        "pattern_too_long", f"a pattern must have at most {MAX_PATTERN_CHARACTERS} characters"
                    )
                deeper.extend(node.values())
            elif isinstance(node, list):
                deeper.extend(node)
        if not deeper:
            return schema
        level = deeper
    raise PydanticCustomError("schema_too_deep", f"schema must be at most {MAX_SCHEMA_DEPTH} levels deep")


def _refers_to_itself(schema: dict[str, Any]) -> bool:
    """Whether a chain of references never reaches anything but references, which grammar compilers cannot follow."""
    waiting: list[Any] = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            waiting.extend(node.values())
            seen: set[str] = set()
            while isinstance(node, dict) and isinstance(reference := node.get("$ref"), str):
                if reference in seen:
                    return True
                seen.add(reference)
                node = _target(schema, reference)
        elif isinstance(node, list):
            waiting.extend(node)
    return False


def _target(schema: dict[str, Any], reference: str) -> object:
    """What a local reference such as `#/$defs/a` points to; None for others and for those that point nowhere."""
    if not reference.startswith("#"):
        return None
    node: object = schema
    for step in reference[1:].split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        node = node.get(key) if isinstance(node, dict) else None
    return node


Schema = Annotated[dict[str, Any], AfterValidator(_bounded_schema)]


class JsonSchema(Strict):
    """The schema an answer must follow."""

    name: Identifier
    description: str | None = None
    schema_: Schema = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """Structured output: plain text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_needed(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError("json_schema", "json_schema goes with type 'json_schema', and only with it")
        return self
