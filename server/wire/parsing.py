"""Parsing: from the bytes of a body to a checked request, or to an error that names the field at fault.

Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json

from server.wire.chat import ChatRequest
from steering.errors import CallerError, InvalidSpec

REFUSED = {
    "add_generation_prompt": "how the prompt is built is the server's",
    "add_special_tokens": "how the prompt is built is the server's",
    "allowed_token_ids": "it would bypass steering",
    "audio": "this server reads and writes text only",
    "bad_words": "it would bypass steering",
    "best_of": "use n",
    "chat_template": "how the prompt is built is the server's",
    "chat_template_kwargs": "how the prompt is built is the server's",
    "continue_final_message": "how the prompt is built is the server's",
    "documents": "how the prompt is built is the server's",
    "ec_transfer_params": "it is internal to the engine",
    "echo": "how the prompt is built is the server's",
    "extra_args": "it is internal to the engine",
    "function_call": "it is deprecated; use tool_choice",
    "functions": "it is deprecated; use tools",
    "kv_transfer_params": "it is internal to the engine",
    "logits_processors": "code is never accepted",
    "media_io_kwargs": "this server reads and writes text only",
    "mm_processor_kwargs": "this server reads and writes text only",
    "moderation": "this server does not moderate; see steering",
    "prediction": "this server does not do it",
    "priority": "it is internal to the engine",
    "prompt_embeds": "tensors are never accepted",
    "prompt_logprobs": "it is internal to the engine",
    "request_id": "the server makes its own",
    "return_token_ids": "it would show refusal tokens",
    "session_id": "it is internal to the engine",
    "skip_special_tokens": "it would show refusal tokens",
    "spaces_between_special_tokens": "it would show refusal tokens",
    "structured_outputs": "use response_format",
    "truncate_prompt_tokens": "how the prompt is built is the server's",
    "use_beam_search": "it is not proved to work with steering",
    "vllm_xargs": "use steering",
    "web_search_options": "this server does not search",
}
"""Fields that other servers know and this one refuses by name, with the reason."""

MAX_ERRORS = 100
"""Bodies with more errors than this are refused without naming one."""

_SHAPES = {
    "steering": "must be an object, the name of a profile, or false",
    "steering.category": "must be 'auto', the name of a category, or a list of 1 to 16 names",
    "stop": "must be a string or a list of at most 4 strings",
    "tool_choice": "must be 'none', 'auto', 'required' or an object that names a function",
}
"""What a field of several shapes may be; pydantic would tell of one of them only."""

_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "json_invalid": "invalid_json",
}


def parse_chat_request(body: bytes) -> ChatRequest:
    """Check a body and make it a request.

    Raises:
        CallerError: not JSON; `parameter` is None.
        InvalidSpec: a field is at fault; `parameter` is its path, such as `messages[0].content`.
    """
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _explained(error, body) from None
    if b"\\u0000" in body:  # JSON has no other way to write a NUL; the walk is for bodies that may hold one
        for path in _paths_with_nul(from_json(body), ()):
            raise InvalidSpec(f"{_joined(path)} holds a NUL character", parameter=_joined(path), code="invalid_value")
    return request


def _explained(error: ValidationError, body: bytes) -> CallerError:
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
    code = "steering_invalid" if name.partition(".")[0] == "steering" else _code(found["type"])
    return InvalidSpec(_message(found, path, name), parameter=name or None, code=code)


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
        path.append("role")  # the only discriminator in the wire models
    return tuple(path)


_ABSENT = object()


def _member(node: object, key: str | int) -> object:
    if isinstance(node, dict) and isinstance(key, str):
        return node.get(key, _ABSENT)
    if isinstance(node, list) and isinstance(key, int) and key < len(node):
        return node[key]
    return _ABSENT


def _message(found: ErrorDetails, path: tuple[str | int, ...], name: str) -> str:
    kind = found["type"]
    if kind == "missing":
        return f"{name} is missing"
    if kind == "extra_forbidden":
        return _unknown(str(path[-1]), name, is_top_level=len(path) == 1)
    if name in _SHAPES and kind != "combination":
        return f"{name} {_SHAPES[name]}"
    if name.endswith(".content") and kind in {"string_type", "list_type"}:
        return f"{name} must be a string or a list of text parts"
    if kind.startswith("union_tag"):
        return f"{name} must be one of 'system', 'developer', 'user', 'assistant', 'tool'"
    text = found["msg"][:300]
    return f"{name}: {text[:1].lower()}{text[1:]}" if name else text


def _unknown(key: str, name: str, *, is_top_level: bool) -> str:
    if is_top_level and key in REFUSED:
        return f"{key} is not accepted: {REFUSED[key]}"
    near = difflib.get_close_matches(key, ChatRequest.model_fields, n=1) if is_top_level else []
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{name} is not a known field{hint}"


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
            text += f".{item[:100]}" if text else item[:100]
    return text[:300]


def _paths_with_nul(node: Any, path: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
    """Depth is bounded: the JSON parser refuses what is nested deeper than 200 levels."""
    if isinstance(node, str):
        if "\0" in node:
            yield path
    elif isinstance(node, list):
        for index, item in enumerate(node):
            yield from _paths_with_nul(item, (*path, index))
    elif isinstance(node, dict):
        for key, item in node.items():
            if "\0" in key:
                yield (*path, key.replace("\0", "?"))
            yield from _paths_with_nul(item, (*path, key))
