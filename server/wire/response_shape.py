"""The shape of responses: `response` objects, and the events that tell how one comes to be.

Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from typing import Any, Protocol

from server.confirmed import OpenStream
from server.wire.response_object import (
    ResponseObject,
    call_item,
    logprobs_of,
    message_item,
    reasoning_item,
    text_part,
)
from server.wire.responses import ResponsesRequest
from server.wire.shape import Event
from steering.errors import TrimtabError


class ResponseShape:
    """Answers as `response` objects.

    Args:
        request: whose fields a response repeats.
    """

    ends_with_done = False

    def __init__(self, request: ResponsesRequest) -> None:
        self._request = request

    def whole(self, body: dict[str, Any]) -> dict[str, Any]:
        """The response, with the `steering` object beside its output."""
        response = ResponseObject(self._request, body)
        (choice,) = body["choices"]
        message, finish = choice["message"], choice["finish_reason"]
        delta = {"reasoning": message.get("reasoning"), "content": message.get("content")}
        calls = [{"index": index, **call} for index, call in enumerate(message.get("tool_calls") or ())]
        making = _Making(response)
        for _ in making.took({**choice, "delta": {**delta, "tool_calls": calls}}):
            pass
        for _ in making.ended(finish):
            pass
        told = response.to_json("completed", making.output, finish=finish, usage=body.get("usage"))
        return told | ({"steering": body["steering"]} if "steering" in body else {})

    async def events(self, opened: OpenStream) -> AsyncGenerator[Event, None]:
        """OpenAI's sequence; an error is told by `response.failed`, with what there was until then."""
        numbered = _Numbered()
        response = ResponseObject(self._request, opened.first)
        making = _Making(response)
        usage: dict[str, Any] | None = None
        steering: dict[str, Any] = {}
        finish: str | None = None
        async with aclosing(opened.rest) as rest:
            for kind in ("created", "in_progress"):
                yield numbered.event(f"response.{kind}", response=response.to_json("in_progress"))
            try:
                chunk: dict[str, Any] | None = opened.first
                while chunk is not None:
                    usage = chunk.get("usage") or usage
                    if "steering" in chunk:
                        steering = {"steering": chunk["steering"]}
                    for choice in chunk["choices"]:
                        finish = choice["finish_reason"] or finish
                        for kind, fields in making.took(choice):
                            yield numbered.event(kind, **fields)
                    chunk = await anext(rest, None)
            except TrimtabError as error:
                told = {"code": "server_error", "message": error.message}
                failed = response.to_json("failed", making.unfinished(), error=told)
                yield numbered.event("response.failed", response=failed)
                return
            for kind, fields in making.ended(finish):
                yield numbered.event(kind, **fields)
            told = response.to_json("completed", making.output, finish=finish, usage=usage)
            yield numbered.event(f"response.{told['status']}", response=told | steering, **steering)


class _Numbered:
    """Makes events, which OpenAI numbers."""

    def __init__(self) -> None:
        self._next = 0

    def event(self, kind: str, **fields: Any) -> Event:
        number, self._next = self._next, self._next + 1
        return Event(kind, {"type": kind, "sequence_number": number, **fields})


Told = Iterator[tuple[str, dict[str, Any]]]
"""Types of events and their fields."""


class _Making:
    """The output items, made of the deltas of a chat completion.

    Attributes:
        output: items that have ended.
    """

    def __init__(self, response: ResponseObject) -> None:
        self.output: list[dict[str, Any]] = []
        self._response = response
        self._open: _Item | None = None

    def took(self, choice: Mapping[str, Any]) -> Told:
        """What a choice's delta adds."""
        delta = choice["delta"]
        if reasoning := delta.get("reasoning"):
            if not isinstance(self._open, _ReasoningItem):
                yield from self._next(_ReasoningItem(*self._place("rs")))
            yield from self._adds(reasoning)
        logprobs = logprobs_of(choice)
        content = delta.get("content") or ""
        is_text = bool(content) or (bool(logprobs) and isinstance(self._open, _MessageItem))
        if is_text:
            if not isinstance(self._open, _MessageItem):
                yield from self._next(_MessageItem(*self._place("msg")))
            yield from self._adds(content, logprobs)
        for call in delta.get("tool_calls") or ():
            function = call.get("function") or {}
            if not isinstance(self._open, _CallItem) or self._open.index != call["index"]:
                yield from self._close("completed")
                made = _CallItem(*self._place("fc"), call["index"], call.get("id") or "", function.get("name") or "")
                yield from self._next(made)
            if arguments := function.get("arguments"):
                yield from self._adds(arguments)

    def ended(self, finish: str | None) -> Told:
        """The end of what is open; an answer without anything is an empty message."""
        if self._open is None and not self.output:
            yield from self._next(_MessageItem(*self._place("msg")))
        yield from self._close("incomplete" if finish == "length" else "completed")

    def unfinished(self) -> list[dict[str, Any]]:
        """The items, with what is open as far as it came."""
        return [*self.output, *([self._open.to_json("incomplete")] if self._open is not None else [])]

    def _place(self, kind: str) -> tuple[str, int]:
        position = len(self.output) + (self._open is not None)
        return self._response.item_id(kind, position), position

    def _next(self, item: _Item) -> Told:
        yield from self._close("completed")
        self._open = item
        yield "response.output_item.added", {"output_index": item.position, "item": item.begun()}
        yield from item.opened()

    def _adds(self, text: str, logprobs: list[dict[str, Any]] | None = None) -> Told:
        assert self._open is not None
        yield self._open.adds(text, logprobs or [])

    def _close(self, status: str) -> Told:
        item, self._open = self._open, None
        if item is not None:
            yield from item.closed()
            self.output.append(item.to_json(status))
            yield "response.output_item.done", {"output_index": item.position, "item": self.output[-1]}


class _Item(Protocol):
    """An output item that is being made."""

    position: int

    def begun(self) -> dict[str, Any]:
        """The item before anything is in it."""
        ...

    def to_json(self, status: str) -> dict[str, Any]:
        """The item as it is now."""
        ...

    def opened(self) -> Told:
        """Events after it was added."""
        ...

    def adds(self, text: str, logprobs: list[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
        """The event of more text."""
        ...

    def closed(self) -> Told:
        """Events before it is done."""
        ...


class _ReasoningItem:
    def __init__(self, name: str, position: int) -> None:
        self.position, self._name, self._text = position, name, ""
        self._at = {"item_id": name, "output_index": position, "content_index": 0}

    def begun(self) -> dict[str, Any]:
        return {**reasoning_item(self._name, "", "in_progress"), "content": []}

    def to_json(self, status: str) -> dict[str, Any]:
        return reasoning_item(self._name, self._text, status)

    def opened(self) -> Told:
        yield "response.content_part.added", {**self._at, "part": {"type": "reasoning_text", "text": ""}}

    def adds(self, text: str, _logprobs: list[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
        self._text += text
        return "response.reasoning_text.delta", {**self._at, "delta": text}

    def closed(self) -> Told:
        yield "response.reasoning_text.done", {**self._at, "text": self._text}
        yield "response.content_part.done", {**self._at, "part": {"type": "reasoning_text", "text": self._text}}


class _MessageItem:
    def __init__(self, name: str, position: int) -> None:
        self.position, self._name, self._text = position, name, ""
        self._logprobs: list[dict[str, Any]] = []
        self._at = {"item_id": name, "output_index": position, "content_index": 0}

    def begun(self) -> dict[str, Any]:
        return message_item(self._name, [], "in_progress")

    def to_json(self, status: str) -> dict[str, Any]:
        return message_item(self._name, [text_part(self._text, self._logprobs)], status)

    def opened(self) -> Told:
        yield "response.content_part.added", {**self._at, "part": text_part("")}

    def adds(self, text: str, logprobs: list[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
        self._text += text
        self._logprobs += logprobs
        return "response.output_text.delta", {**self._at, "delta": text, "logprobs": logprobs}

    def closed(self) -> Told:
        yield "response.output_text.done", {**self._at, "text": self._text, "logprobs": self._logprobs}
        yield "response.content_part.done", {**self._at, "part": text_part(self._text, self._logprobs)}


class _CallItem:
    def __init__(self, name: str, position: int, index: int, call_id: str, function: str) -> None:
        self.position, self.index = position, index
        self._name, self._call_id, self._function, self._arguments = name, call_id, function, ""
        self._at = {"item_id": name, "output_index": position}

    def begun(self) -> dict[str, Any]:
        return self.to_json("in_progress")

    def to_json(self, status: str) -> dict[str, Any]:
        return call_item(self._name, self._call_id, self._function, self._arguments, status)

    def opened(self) -> Told:
        return iter(())

    def adds(self, text: str, _logprobs: list[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
        self._arguments += text
        return "response.function_call_arguments.delta", {**self._at, "delta": text}

    def closed(self) -> Told:
        done = {**self._at, "name": self._function, "arguments": self._arguments}
        yield "response.function_call_arguments.done", done
