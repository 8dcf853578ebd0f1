"""Streamed completions: order, verdict, errors after the first byte, disconnects, shutdown."""

from __future__ import annotations

import asyncio
import json
from collections.abc import MutableMapping
from typing import Any

import pytest

from steering.errors import EngineError
from tests.fakes import FakeEngine
from tests.unit.server.conftest import Make, Spoken, chat_body, content_of, read_events, scrape


async def test_chunks_come_in_openais_order(make: Make) -> None:
    """Role first, text, one finish per choice, then the end; the steering object is on the choices' last chunk."""
    events = await make().events(steering={"mode": "comply"})
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert content_of(events) == "Hello there!"
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * (len(events) - 1) + ["stop"]
    assert events[-1]["steering"]["decision"] == "comply"
    assert events[-1]["steering"]["verdict"]["refused"] is False
    assert not any("steering" in event for event in events[:-1])
    assert not any("usage" in event for event in events)


async def test_stream_headers(make: Make) -> None:
    """The decision is in the header, and proxies are told to neither cache nor buffer."""
    response = await make().chat(stream=True, steering={"mode": "refuse"})
    assert response.headers["x-trimtab-decision"] == "refuse"
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-request-id"].startswith("req_")
    assert "content-length" not in response.headers


async def test_usage_comes_last_when_asked_for(make: Make) -> None:
    """A chunk without choices carries the usage, the others a null; the steering object stays with the choices."""
    events = await make().events(stream_options={"include_usage": True})
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 4
    assert all(event["usage"] is None for event in events[:-1])
    assert "steering" in events[-2]


async def test_steering_is_on_the_finish_of_the_last_choice(make: Make) -> None:
    """With n > 1 the object comes once, when every verdict is known."""
    events = await make().events(n=3, steering={"mode": "refuse"})
    with_steering = [event for event in events if "steering" in event]
    assert with_steering == [events[-1]]
    assert [verdict["category"] for verdict in events[-1]["steering"]["verdicts"]] == ["Safety"] * 3
    assert [content_of(events, index) for index in range(3)] == ["Hello there!"] * 3


async def test_report_none_leaves_the_object_out(make: Make) -> None:
    """Asked for nothing, told nothing."""
    assert not any("steering" in event for event in await make().events(steering={"report": "none"}))


async def test_markers_that_are_text_never_show(make: Make) -> None:
    """Streamed or not, the first token's text is kept out, and no empty chunk is sent in its place."""
    events = await make(FakeEngine(shows_markers=True)).events()
    assert content_of(events) == "Hello there!"
    assert all(event["choices"][0]["delta"] for event in events[1:-1])


async def test_error_after_the_first_byte_is_a_frame(make: Make) -> None:
    """The status cannot change any more: a frame tells, the stream ends, and `[DONE]` does not follow."""
    response = await make(FakeEngine(fails=EngineError("broke"), fails_after=2)).chat(stream=True)
    events = read_events(response.text)
    assert response.status_code == 200
    assert events[-1]["error"] == {"message": "broke", "type": "server_error", "param": None, "code": "engine_error"}
    assert "[DONE]" not in response.text


async def test_bug_after_the_first_byte_is_a_frame_without_its_text(make: Make) -> None:
    """What broke inside is logged, not told."""
    response = await make(FakeEngine(fails=RuntimeError("secret"), fails_after=2)).chat(stream=True)
    assert read_events(response.text)[-1]["error"]["code"] == "engine_error"
    assert "secret" not in response.text


async def test_later_sample_without_confirmation_ends_the_stream(make: Make) -> None:
    """Each sample's text waits for its own confirmation; one that never comes is an error, not text."""
    response = await make(FakeEngine(silent=(1,))).chat(stream=True, n=2, steering={"mode": "comply"})
    events = read_events(response.text)
    assert events[-1]["error"]["code"] == "steering_not_applied"
    assert content_of(events, 1) == ""


async def test_silence_between_chunks_ends_the_stream(make: Make) -> None:
    """An engine that stops in mid-answer is told as a timeout, and the generation is aborted."""
    engine = FakeEngine(gate=asyncio.Event(), gate_after=2)
    response = await make(engine, between_timeout=0.05).chat(stream=True)
    assert read_events(response.text)[-1]["error"]["code"] == "engine_timeout"
    assert engine.aborted


class Wire:
    """One raw ASGI request, so that a client can leave when a test wants it to."""

    def __init__(self, spoken: Spoken, **fields: Any) -> None:
        self._body = json.dumps(chat_body(**fields)).encode()
        self._app = spoken.app
        self.gone = asyncio.Event()
        self.sent: list[MutableMapping[str, Any]] = []
        self._read = False

    async def receive(self) -> dict[str, Any]:
        if not self._read:
            self._read = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        self.sent.append(message)

    async def run(self) -> None:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/v1/chat/completions",
            "raw_path": b"/v1/chat/completions",
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
        }
        await self._app(scope, self.receive, self.send)


@pytest.mark.parametrize(("stream", "after"), [(False, 0), (False, 2), (True, 0), (True, 2)])
async def test_client_that_leaves_ends_the_generation(make: Make, stream: bool, after: int) -> None:
    """Before the first token and in mid-answer, streamed or not: the engine's work is aborted, and it is counted once,
    by how far its answer had come.
    """
    engine = FakeEngine(gate=asyncio.Event(), gate_after=after)
    spoken = make(engine)
    wire = Wire(spoken, stream=stream, steering={"mode": "comply"})
    request = asyncio.create_task(wire.run())
    while not engine.calls or (stream and after and len(wire.sent) < 2):
        await asyncio.sleep(0.001)
    wire.gone.set()
    await asyncio.wait_for(request, 1)
    assert engine.aborted == [engine.calls[0].request_id]
    assert spoken.gateway.service.inflight == 0
    left = {"before_first_byte": 0, "streaming": 0, "streaming" if stream and after else "before_first_byte": 1}
    found = await scrape(spoken)
    assert {labels["phase"]: count for labels, count in found["steering_client_disconnects_total"]} == left
    assert engine.forgotten == [call.plan.id for call in engine.calls if call.plan]


async def test_shutdown_ends_what_is_left_with_an_error(make: Make) -> None:
    """When the grace of a drain is over, a stream gets a frame and a plain request gets a 503."""
    engine = FakeEngine(gate=asyncio.Event(), gate_after=2)
    spoken = make(engine)
    tasks = [asyncio.create_task(spoken.chat(stream=stream)) for stream in (False, True)]
    while spoken.gateway.service.inflight < 2 or len(engine.calls) < 2:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.02)
    spoken.gateway.service.is_draining = True
    spoken.gateway.service.abort_all()
    plain, stream = await asyncio.wait_for(asyncio.gather(*tasks), 1)
    assert plain.status_code == 503
    assert plain.json()["error"]["code"] == "server_is_overloaded"
    assert read_events(stream.text)[-1]["error"]["code"] == "server_is_overloaded"
    assert (await spoken.chat()).status_code == 503
