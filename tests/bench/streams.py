"""Streams: a locust file whose users ask for chat completions one after another and time them.

`tests/bench/load.py` runs it; what is asked for is in the environment variable `LOAD` as JSON. Latencies are kept as
they are, since locust itself rounds them. Knows nothing of the gateway beyond OpenAI's API.
"""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

from locust import FastHttpUser, events, task

ORDER: dict[str, Any] = json.loads(os.environ.get("LOAD", "{}"))
"""`body` of each request, `warm_up` seconds that do not count, `spread` seconds over which users begin, `out`."""

PATH = "/v1/chat/completions"
_samples: list[tuple[float, float, int]] = []
"""Seconds to the first chunk, seconds in all, and chunks, of each answer."""
_failures: dict[str, int] = {}
_asked = [0]
"""Requests sent, those of the warm-up as well."""
_began = time.perf_counter()


class Asker(FastHttpUser):
    """Sends its next request when it has its answer."""

    connection_timeout = network_timeout = 120.0

    def on_start(self) -> None:
        """Begin at a time of its own, so that not all answers begin together."""
        time.sleep(random.Random(id(self)).uniform(0, ORDER["spread"]))

    @task
    def ask(self) -> None:
        """One request."""
        began = time.perf_counter()
        body = {**ORDER["body"], "messages": [{"role": "user", "content": ORDER["prompt"]}]}
        first, chunks = 0.0, 0
        _asked[0] += 1
        with self.client.post(PATH, json=body, stream=bool(body.get("stream")), catch_response=True) as response:
            if response.status_code != 200:
                _failures[str(response.status_code)] = _failures.get(str(response.status_code), 0) + 1
                response.failure(str(response.status_code))
                return
            if body.get("stream"):
                last = b""
                while event := response._response.readline(b"\n\n"):
                    if event.startswith(b'data: {"id"'):
                        chunks += 1
                        first = first or time.perf_counter() - began
                    last = event.strip() or last
                if last != b"data: [DONE]":
                    _failures["cut"] = _failures.get("cut", 0) + 1
                    response.failure("cut")
                    return
            elif not response.content:
                return
        now = time.perf_counter()
        if began - _began > ORDER["warm_up"]:
            _samples.append((first, now - began, chunks))


@events.quitting.add_listener
def keep(**_: Any) -> None:
    """Write down what was timed."""
    Path(ORDER["out"]).write_text(
        json.dumps({"samples": _samples, "failures": _failures, "asked": _asked[0]}), encoding="utf-8"
    )
