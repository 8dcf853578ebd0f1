"""JSON schemas that a client sends, within limits on what becomes a grammar.

Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal
from urllib.parse import unquote

from pydantic import AfterValidator, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError, to_json

from server.wire.patterns import fault_of
from server.wire.strict import Identifier, Strict

MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH = 64 * 1024, 16
MAX_SCHEMAS_BYTES = 512 * 1024
"""Of all schemas of one body together: each is looked through at once, while every other request waits."""

MAX_ITEMS = 10_000
"""Of `minItems` and `maxItems`: compilers write them out."""

MAX_COUNTED_PROPERTIES = 1000
"""Properties of an object, times how many of them `minProperties` or `maxProperties` counts."""

_MOST_DIGITS = 6
"""Of an index in a reference; no list of a schema is as long."""


@dataclass(slots=True)
class SchemaAllowance:
    """What the schemas of one body may still take; the context of its validation."""

    bytes_left: int = MAX_SCHEMAS_BYTES

    def take(self, size: int) -> None:
        """Count one more schema; raises where all of them are too large together."""
        self.bytes_left -= size
        if self.bytes_left < 0:
            raise PydanticCustomError(
                "schemas_too_large", f"schemas of one request must have at most {MAX_SCHEMAS_BYTES} bytes together"
            )


def _bounded_schema(schema: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    """Limits on what becomes a grammar: size, depth, regular expressions and counts; then where it refers to.

    Takes time in proportion to the schema's size, whatever is in it.
    """
    size = len(to_json(schema))
    if size > MAX_SCHEMA_BYTES:
        raise PydanticCustomError("schema_too_large", f"schema must have at most {MAX_SCHEMA_BYTES} bytes")
    if isinstance(info.context, SchemaAllowance):
        info.context.take(size)
    if _refers_to_itself(schema, _referring(schema)):
        raise PydanticCustomError(
            "schema_is_circular", "a $ref must not lead back to itself without anything in between"
        )
    return schema


def _referring(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """Every object of a schema that has a reference; raises where it is too deep, or a pattern or count too costly."""
    referring: list[dict[str, Any]] = []
    level: list[Any] = [schema]
    for _ in range(MAX_SCHEMA_DEPTH * 2):  # a level of a schema is an object and the map of its properties
        deeper: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                _check_costs(node)
                if isinstance(node.get("$ref"), str):
                    referring.append(node)
                deeper.extend(node.values())
            elif isinstance(node, list):
                deeper.extend(node)
        if not deeper:
            return referring
        level = deeper
    raise PydanticCustomError("schema_too_deep", f"schema must be at most {MAX_SCHEMA_DEPTH} levels deep")


def _check_costs(node: dict[str, Any]) -> None:
    """Refuse patterns and counts of one object that cost a compiler too much.

    Where it is a map of properties and no schema, their names may be those of keywords; what is below them is looked at
    as a schema anyway, and a property called `pattern` is no string here.
    """
    named = node.get("patternProperties")
    for pattern in (node.get("pattern"), *(named if isinstance(named, dict) else ())):
        fault = fault_of(pattern) if isinstance(pattern, str) else None
        if fault is not None:
            raise PydanticCustomError("pattern_too_costly", f"a pattern {fault}")
    for name in ("minItems", "maxItems"):
        if isinstance(count := node.get(name), int | float) and count > MAX_ITEMS:
            raise PydanticCustomError("too_many_items", f"{name} must be at most {MAX_ITEMS}")
    properties = node.get("properties")
    counts = [node.get(name) for name in ("minProperties", "maxProperties")]
    counted = max((count for count in counts if isinstance(count, int | float)), default=0)
    if isinstance(properties, dict) and len(properties) * min(counted, len(properties)) > MAX_COUNTED_PROPERTIES:
        raise PydanticCustomError(
            "too_many_counted_properties",
            "properties, times minProperties or maxProperties where there are such, must be at most "
            f"{MAX_COUNTED_PROPERTIES}",
        )


def _refers_to_itself(schema: dict[str, Any], referring: list[dict[str, Any]]) -> bool:
    """Whether a chain of references never reaches anything but references, which grammar compilers cannot follow.

    Each object has one reference at most, which is followed once: chains that end are not walked again by those that
    lead into them.
    """
    ending: set[int] = set()
    for first in referring:
        chain: set[int] = set()
        node: object = first
        while isinstance(node, dict) and id(node) not in ending and isinstance(reference := node.get("$ref"), str):
            if id(node) in chain:
                return True
            chain.add(id(node))
            node = _target(schema, reference)
        ending |= chain
    return False


def _target(schema: dict[str, Any], reference: str) -> object:
    """What a local reference such as `#/$defs/a` points to; None for others and for those that point nowhere.

    Compilers differ in whether they undo the escapes of a URI: it is read as it is, and undone where that is nowhere.
    """
    if not reference.startswith("#"):
        return None
    found = _at(schema, reference)
    return _at(schema, unquote(reference)) if found is None and "%" in reference else found


def _at(schema: dict[str, Any], reference: str) -> object:
    """What a JSON pointer behind `#` points to; looks no deeper than the schema is."""
    node: object = schema
    for step in reference[1:].split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict):
            node = node.get(key)
        elif isinstance(node, list) and key.isascii() and key.isdigit() and len(key) <= _MOST_DIGITS:
            node = node[int(key)] if int(key) < len(node) else None
        else:
            return None
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
