"""What the gateway makes of vLLM's answers: OpenAI's shapes, without what vLLM adds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from server.vllm_shapes import as_chat, chunk_of, echo_of, plain_chat, plain_completion


class Dumped(SimpleNamespace):
    """An object of vLLM's, as far as it is read."""

    def model_dump(self, **_options: Any) -> dict[str, Any]:
        return dict(vars(self))


def response(choice: SimpleNamespace, **fields: Any) -> SimpleNamespace:
    """A response of one choice."""
    usage = Dumped(prompt_tokens=3, completion_tokens=1, total_tokens=4)
    given = {"id": "cmpl-x-0", "object": "text_completion", "created": 1, "model": "m", "system_fingerprint": None}
    return SimpleNamespace(choices=[choice], usage=usage, **{**given, **fields})


def test_reasoning_and_calls_stay_in_the_message() -> None:
    """A reasoning model's answer keeps its reasoning, and calls their arguments; ids of tokens go."""
    call = Dumped(id="c", type="function", function={"name": "f", "arguments": "{}"})
    message = SimpleNamespace(role="assistant", content=None, refusal=None, reasoning="hm", tool_calls=[call])
    choice = SimpleNamespace(index=0, message=message, logprobs=None, finish_reason="tool_calls", token_ids=[1, 2])
    (told,) = plain_chat(response(choice, object="chat.completion"))["choices"]
    assert told == {
        "index": 0,
        "message": {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "reasoning": "hm",
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        "logprobs": None,
        "finish_reason": "tool_calls",
    }


def test_a_plain_prompts_answer_is_a_message_with_the_prompt_beside_it() -> None:
    """The text is the message's content, the echo stands by itself, and logprobs keep the shape of completions."""
    logprobs = Dumped(tokens=["a"], token_logprobs=[None], text_offset=[0], top_logprobs=[None])
    choice = SimpleNamespace(index=0, text=" b", logprobs=logprobs, finish_reason="length", token_ids=[2])
    body = plain_completion(response(choice), "a")
    assert body["object"] == "chat.completion"
    (told,) = body["choices"]
    assert told["message"] == {"role": "assistant", "content": " b", "refusal": None, "prompt": "a"}
    assert told["logprobs"] == vars(logprobs)
    assert "prompt" not in plain_completion(response(choice), None)["choices"][0]["message"]


def chunk() -> dict[str, Any]:
    """A chunk as vLLM streams it for a plain prompt."""
    choice = {
        "index": 1,
        "text": " b",
        "logprobs": None,
        "finish_reason": None,
        "stop_reason": None,
        "prompt_token_ids": [5],
        "token_ids": [2],
    }
    return {"id": "cmpl-x-0", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]}


def test_a_plain_prompts_chunk_is_a_chats() -> None:
    """Its text is a delta, its token ids go beside it, and what else vLLM adds is gone."""
    made = chunk_of(as_chat(chunk()))
    assert made.tokens == [2]
    assert made.body["object"] == "chat.completion.chunk"
    assert made.body["choices"] == [{"index": 1, "logprobs": None, "finish_reason": None, "delta": {"content": " b"}}]


def test_an_echo_is_a_chunk_of_its_own() -> None:
    """It tells the prompt and brings no token, so that it neither begins its choice nor is read as an answer."""
    given = chunk()
    made = echo_of(given, "a")
    assert made.tokens == ()
    assert made.body["choices"][0]["delta"] == {"role": "assistant", "prompt": "a"}
    assert made.body["choices"][0]["index"] == 1
    assert given == chunk()
