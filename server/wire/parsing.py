"""Parsing: from the bytes of a body to a checked request, or to an error that names the field at fault.

Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

import difflib
import re
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json

from server.wire.schemas import SchemaAllowance
from server.wire.strict import Body
from steering.errors import CallerError, InvalidSpec

AnyBody = TypeVar("AnyBody", bound=Body)

MAX_ERRORS = 100
"""Bodies with more errors than this are refused without naming one."""

MOST_OF_A_KEY = 100
"""Characters of a key that a client made up, to be told and compared with those that there are."""

_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "json_invalid": "invalid_json",
}


def parse(kind: type[AnyBody], body: bytes) -> AnyBody:
    """Check a body and make it a request.

    Args:
        kind: of the endpoint.
        body: as it came.

    Raises:
        CallerError: not JSON; `parameter` is None.
        InvalidSpec: a field is at fault; `parameter` is its path, such as `messages[0].content`.
    """
    try:
        request = kind.model_validate_json(body, context=SchemaAllowance())
    except ValidationError as error:
        raise _explained(kind, error, body) from None
    if b"\\u0000" in body:  # JSON has no other way to write a NUL; the walk is for bodies that may hold one
        path = _path_to_nul(from_json(body))
        if path is not None:
            raise InvalidSpec(f"{_joined(path)} holds a NUL character", parameter=_joined(path), code="invalid_value")
    return request


def _explained(kind: type[Body], error: ValidationError, body: bytes) -> CallerError:
    """The deepest of pydantic's errors: of the members of a union, the one that was meant fails furthest inside."""
    if error.error_count() > MAX_ERRORS:  # telling of each takes pydantic seconds on a body made for it
        return InvalidSpec(f"more than {MAX_ERRORS} fields are at fault", code="invalid_value")
    found = max(error.errors(include_url=False, include_input=False), key=lambda item: len(item["loc"]))
    if found["type"] == "json_invalid":
        return CallerError(f"body is not JSON: {found['ctx']['error']}", code="invalid_json")
    given = from_json(body)
    if not isinstance(given, dict):
        return CallerError("body must be a JSON object", code="invalid_json")
    path = _path_in(given, found)
    name = _joined(path)
    if path and path[0] in kind.refused and found["type"] != "combination":
        why = kind.refused[str(path[0])]
        return InvalidSpec(f"{name} is not accepted: {why}", parameter=name, code="unknown_parameter")
    code = "steering_invalid" if name.partition(".")[0] == "steering" else _code(found["type"])
    return InvalidSpec(_message(kind, found, path, name), parameter=name or None, code=code)


def _path_in(given: object, found: ErrorDetails) -> tuple[str | int, ...]:
    """Pydantic's location without the names of union members: only what is in the body, and a last missing key."""
    if "path" in found.get("ctx", {}):
        return tuple(found["ctx"]["path"].split("."))
    path: list[str | int] = []
    current = given
    for item in found["loc"]:
        below = _member(current, item)
        if below is not _ABSENT:
            current = below
        elif found["type"] != "missing" or item != found["loc"][-1]:
            continue
        path.append(item)
    if found["type"].startswith("union_tag"):
        path.append(_discriminator(found))
    return tuple(path)


_ABSENT = object()


def _member(node: object, key: str | int) -> object:
    if isinstance(node, dict) and isinstance(key, str):
        return node.get(key, _ABSENT)
    if isinstance(node, list) and isinstance(key, int) and key < len(node):
        return node[key]
    return _ABSENT


def _discriminator(found: ErrorDetails) -> str:
    """The key that tells members of a union apart; pydantic names it in quotes, or else the function that tells."""
    given = str(found.get("ctx", {}).get("discriminator", ""))
    return given.strip("'") if given.startswith("'") else "type"


def _message(kind: type[Body], found: ErrorDetails, path: tuple[str | int, ...], name: str) -> str:
    fault = found["type"]
    if fault == "missing":
        return f"{name} is missing"
    if fault == "extra_forbidden":
        key = str(path[0])[:MOST_OF_A_KEY] if len(path) == 1 else ""
        near = difflib.get_close_matches(key, kind.model_fields, n=1)
        return f"{name} is not a known field" + (f"; did you mean {near[0]!r}?" if near else "")
    form = kind.forms.get(re.sub(r"\[\d+\]", "[]", name))
    if form is not None and fault != "combination":
        return f"{name} {form}"
    if name.endswith(".content") and fault in {"string_type", "list_type"}:
        return f"{name} must be a string or a list of text parts"
    if fault.startswith("union_tag"):
        return f"{name} must be one of {found['ctx'].get('expected_tags', 'the known ones')}"
    text = found["msg"][:300]
    return f"{name}: {text[:1].lower()}{text[1:]}" if name else text


def _code(kind: str) -> str:
    if kind in _CODES:
        return _CODES[kind]
    return "invalid_type" if kind.endswith("_type") else "invalid_value"


def _joined(path: tuple[str | int, ...]) -> str:
    """`messages[0].content`; keys a client made up are cut so that no error grows with them."""
    text = ""
    for item in path:
        if isinstance(item, int):
            text += f"[{item}]"
        else:
            text += f".{item[:MOST_OF_A_KEY]}" if text else item[:MOST_OF_A_KEY]
    return text[:300]


def _path_to_nul(node: Any) -> tuple[str | int, ...] | None:
    """Where in a value the first NUL is; None where there is none.

    Depth is bounded: the JSON parser refuses what is nested deeper than 200 levels.
    """
    if isinstance(node, str):
        return () if "\0" in node else None
    members = enumerate(node) if isinstance(node, list) else node.items()
    for key, item in members:
        if isinstance(key, str) and "\0" in key:
            return (key.replace("\0", "?"),)
        if isinstance(item, _HOLDS_TEXT):
            below = _path_to_nul(item)
            if below is not None:
                return (key, *below)
    return None


_HOLDS_TEXT = (str, list, dict)
