"""An OpenAI-compatible endpoint for model judges, over real HTTP, that can be told to misbehave."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SOON = {"retry-after-ms": "2"}
"""Keeps the SDK's pauses short."""


def verdict(verdict: str = "refusal", kind: str = "explicit", reason: str = "it declines") -> str:
    """A judge's reply in the form that is asked for."""
    return json.dumps({"reason": reason, "verdict": verdict, "kind": kind})


def completion(content: str | None, *, finish: str = "stop", **more: Any) -> dict[str, Any]:
    """A chat completion with that text; `more` goes into the message."""
    message = {"role": "assistant", "content": content, **more}
    choice = {"index": 0, "finish_reason": finish, "message": message}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "j", "choices": [choice], "usage": usage}


def error(message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's envelope of an error."""
    return {"error": {"message": message, "type": "x", "param": param, "code": code}}


class Said:
    """One HTTP answer: status, body (JSON, or bytes as they are), headers; seconds before it and after each byte."""

    def __init__(
        self,
        body: Any,
        status: int = 200,
        *,
        content_type: str = "application/json",
        wait: float = 0.0,
        headers: dict[str, str] | None = None,
        length: int | None = None,
        trickle: float = 0.0,
    ) -> None:
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.status = status
        self.content_type = content_type
        self.wait = wait
        self.trickle = trickle
        self.headers = headers or {}
        self.length = len(self.body) if length is None else length


Behaviour = Callable[[dict[str, Any], int], Said]
"""From the body of a request and how many came before it."""


class Endpoint:
    """What it was asked so far, and where it is."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.asked: list[dict[str, Any]] = []


@contextmanager
def judge_endpoint(behaviour: Behaviour) -> Iterator[Endpoint]:
    """An endpoint on a free port that answers by `behaviour`."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                number = len(endpoint.asked)
                endpoint.asked.append(body)
            said = behaviour(body, number)
            if said.wait:
                time.sleep(said.wait)
            try:
                self.send_response(said.status)
                self.send_header("content-type", said.content_type)
                self.send_header("content-length", str(said.length))
                for name, value in said.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if said.trickle:
                    for byte in said.body[:100]:
                        self.wfile.write(bytes([byte]))
                        self.wfile.flush()
                        time.sleep(said.trickle)
                else:
                    self.wfile.write(said.body)
            except OSError:
                pass  # the client went away while it waited

        def log_message(self, *args: Any) -> None:
            del args

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint = Endpoint(f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def texts(body: dict[str, Any]) -> tuple[str, str]:
    """What a request said as system and as user."""
    return body["messages"][0]["content"], body["messages"][1]["content"]
