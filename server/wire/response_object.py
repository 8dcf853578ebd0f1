"""Responses: OpenAI's `response` objects and their output items, made of chat completions.

Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from server.wire.responses import ResponsesRequest

_REASONS = {"length": "max_output_tokens", "content_filter": "content_filter"}
"""Why a response is incomplete, by how a choice of a chat completion ended."""


class ResponseObject:
    """The response to a request, at any time of its making.

    Args:
        request: as it came.
        chat: a `chat.completion` object or chunk, for its id and time.
    """

    def __init__(self, request: ResponsesRequest, chat: Mapping[str, Any]) -> None:
        self._request = request
        self._key = str(chat["id"]).rpartition("-")[2]
        self._created, self._model = chat["created"], chat["model"]

    def item_id(self, kind: str, position: int) -> str:
        """Id of an output item; `kind` is OpenAI's prefix."""
        return f"{kind}_{self._key}{position:04d}"

    def to_json(
        self,
        status: str,
        output: Sequence[Mapping[str, Any]] = (),
        *,
        finish: str | None = None,
        usage: Mapping[str, Any] | None = None,
        error: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """The object.

        Args:
            status: `in_progress`, or `completed`, which becomes `incomplete` where `finish` says so, or `failed`.
            output: items so far.
            finish: how the choice ended.
            usage: of a chat completion.
            error: what went wrong.
        """
        request = self._request
        reason = _REASONS.get(finish or "")
        return {
            "id": f"resp_{self._key}",
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" and reason is None else None,
            "status": "incomplete" if status == "completed" and reason else status,
            "background": False,
            "error": error,
            "incomplete_details": {"reason": reason} if reason else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": request.max_tool_calls,
            "metadata": dict(request.metadata or {}),
            "model": self._model,
            "output": list(output),
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "prompt_cache_key": request.prompt_cache_key,
            "reasoning": {"effort": request.reasoning.effort if request.reasoning else None, "summary": None},
            "safety_identifier": request.safety_identifier,
            "service_tier": "default",
            "store": False,
            "temperature": request.temperature,
            "text": {"format": _format(request)},
            "tool_choice": _tool_choice(request),
            "tools": [tool.model_dump(include=_TOOL) for tool in request.tools or ()],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage),
            "user": request.user,
        }


_TOOL = {"type", "name", "description", "parameters", "strict"}


def reasoning_item(name: str, text: str, status: str) -> dict[str, Any]:
    """Reasoning, as it is."""
    content = [{"type": "reasoning_text", "text": text}]
    return {"id": name, "type": "reasoning", "summary": [], "content": content, "status": status}


def message_item(name: str, parts: Sequence[Mapping[str, Any]], status: str) -> dict[str, Any]:
    """A message of the model."""
    return {"id": name, "type": "message", "role": "assistant", "content": list(parts), "status": status}


def text_part(text: str, logprobs: Sequence[Any] = ()) -> dict[str, Any]:
    """The text of a message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def call_item(name: str, call_id: str, function: str, arguments: str, status: str) -> dict[str, Any]:
    """A call of a function."""
    return {
        "id": name,
        "type": "function_call",
        "call_id": call_id,
        "name": function,
        "arguments": arguments,
        "status": status,
    }


def logprobs_of(choice: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The logprobs of a chat's choice, of which responses have the same shape."""
    return [
        {
            "token": each["token"],
            "bytes": each.get("bytes") or [],
            "logprob": each["logprob"],
            "top_logprobs": [
                {"token": other["token"], "bytes": other.get("bytes") or [], "logprob": other["logprob"]}
                for other in each.get("top_logprobs") or ()
            ],
        }
        for each in (choice.get("logprobs") or {}).get("content") or ()
    ]


def _format(request: ResponsesRequest) -> dict[str, Any]:
    form = request.text.format if request.text is not None else None
    return {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)


def _tool_choice(request: ResponsesRequest) -> Any:
    choice = request.tool_choice
    return "auto" if choice is None else choice if isinstance(choice, str) else choice.model_dump()


def _usage(chat: Mapping[str, Any]) -> dict[str, Any]:
    cached = (chat.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    reasoning = (chat.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    return {
        "input_tokens": chat["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": chat["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": chat["total_tokens"],
    }
