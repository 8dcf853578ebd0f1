"""Bare: an application that answers what the scripted engine would, with nothing between it and uvicorn.

What a request takes here is the client's, the kernel's, uvicorn's and the script's time; what it takes more with the
gateway is the gateway's.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import uvicorn

from tests.fake_server import SCRIPT

_CHUNK = (
    b'data: {"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion.chunk","created":1700000001,'
    b'"model":"fake-model","choices":[{"index":0,"delta":{"content":"Hello"},"logprobs":null,"finish_reason":null}]}\n\n'
)
_WHOLE = b'{"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion","choices":[]}'


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Sleep and send, as the prompt's script says."""
    body, has_more = b"", True
    while has_more:
        message = await receive()
        body += message.get("body", b"")
        has_more = message.get("more_body", False)
    asked = json.loads(body)
    script = dict(SCRIPT.findall(asked["messages"][-1]["content"]))
    tokens, pace, clock = int(script["tokens"]), float(script["pace"]), asyncio.get_running_loop().time
    began = clock()
    if not asked.get("stream"):
        await asyncio.sleep(tokens * pace)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(_WHOLE)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": _WHOLE})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    for number in range(tokens):
        await asyncio.sleep(began + (number + 1) * pace - clock())
        await send({"type": "http.response.body", "body": _CHUNK, "more_body": True})
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def main() -> None:
    """Serve on a free port and say which."""
    config = uvicorn.Config(
        application, port=0, http="httptools", loop="uvloop", lifespan="off", access_log=False, log_config=None
    )
    server = uvicorn.Server(config)

    async def run() -> None:
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        print(f"Ready on http://127.0.0.1:{port} administered on none", flush=True)  # noqa: T201
        await serving

    import uvloop

    uvloop.run(run())


if __name__ == "__main__":
    main()
