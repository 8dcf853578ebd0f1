"""Shapes: vLLM's responses and chunks as the gateway knows them, OpenAI's chat completions without what vLLM adds.

Reads attributes and dictionaries; imports nothing of vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from server.engine import Chunk, WorkerReport


def plain_chat(response: Any) -> dict[str, Any]:
    """The response as OpenAI shapes it, without what vLLM adds; much faster than a full dump."""
    choices = []
    for choice in response.choices:
        message = choice.message
        said: dict[str, Any] = {"role": message.role, "content": message.content, "refusal": message.refusal}
        if message.reasoning is not None:
            said["reasoning"] = message.reasoning
        if message.tool_calls:
            said["tool_calls"] = [call.model_dump() for call in message.tool_calls]
        choices.append(
            {
                "index": choice.index,
                "message": said,
                "logprobs": None if choice.logprobs is None else choice.logprobs.model_dump(),
                "finish_reason": choice.finish_reason,
            }
        )
    return {
        "id": response.id,
        "object": response.object,
        "created": response.created,
        "model": response.model,
        "choices": choices,
        "usage": response.usage.model_dump(exclude_none=True),
        "system_fingerprint": response.system_fingerprint,
    }


def plain_completion(response: Any, echoed: str | None) -> dict[str, Any]:
    """The response of a plain prompt in the shape of a chat completion; logprobs stay as completions give them.

    Args:
        response: vLLM's.
        echoed: text of the prompt, where it is to be told.
    """
    prompt = {} if echoed is None else {"prompt": echoed}
    choices = [
        {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None, **prompt},
            "logprobs": None if choice.logprobs is None else choice.logprobs.model_dump(),
            "finish_reason": choice.finish_reason,
        }
        for choice in response.choices
    ]
    return {
        "id": response.id,
        "object": "chat.completion",
        "created": response.created,
        "model": response.model,
        "choices": choices,
        "usage": response.usage.model_dump(exclude_none=True),
        "system_fingerprint": response.system_fingerprint,
    }


def prompt_of(response: Any) -> Sequence[int]:
    """Ids of the prompt of a whole answer, of a chat or of a plain prompt."""
    told = getattr(response, "prompt_token_ids", None) or getattr(response.choices[0], "prompt_token_ids", None)
    return told or ()


def as_chat(body: dict[str, Any]) -> dict[str, Any]:
    """A chunk of a plain prompt's answer in the shape of a chat completion's."""
    body["object"] = "chat.completion.chunk"
    for choice in body["choices"]:
        choice["delta"] = {"content": choice.pop("text")}
        if told := choice.pop("prompt_token_ids", None):
            body["prompt_token_ids"] = told
    return body


def echo_of(body: dict[str, Any], echoed: str) -> Chunk:
    """A chunk that tells the text of the prompt, to go before the first of a choice."""
    (choice,) = body["choices"]
    told = {"role": "assistant", "prompt": echoed}
    chosen = {"index": choice["index"], "delta": told, "logprobs": None, "finish_reason": None}
    return Chunk(body={**body, "choices": [chosen]})


def chunk_of(body: dict[str, Any]) -> Chunk:
    """A chunk without what vLLM adds, and the token ids it brings."""
    prompt = body.pop("prompt_token_ids", None) or ()
    for name in ("prompt_text", "metrics"):
        body.pop(name, None)
    if not body["choices"]:
        return Chunk(body=body)
    choice = body["choices"][0]
    tokens = choice.pop("token_ids", None) or ()
    choice.pop("stop_reason", None)
    return Chunk(body=body, tokens=tokens, prompt=prompt)


def report_of(facts: Mapping[str, Any]) -> WorkerReport:
    """What a worker says of itself."""
    return WorkerReport(
        version=facts["version"],
        architecture=facts["architecture"],
        runner=facts["runner"],
        hidden_size=facts["hidden_size"],
        layers=tuple(facts["layers"]),
        bundles={digest: tuple(names) for digest, names in facts["bundles"].items()},
        rows=facts["rows"],
        witness=tuple(facts["witness"]),
        gates={digest: tuple(names) for digest, names in facts.get("gates", {}).items()},
        responses=dict(facts.get("responses", {})),
    )
