"""Load: a process that sends chat completions to one server and times them, one order after the other.

It has a process of its own, so that the time a client takes to read answers is not taken from the server's.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx

from server.bench.companion import serve, take_over_output


def round_of(url: str, model: str, prompts: list[str], concurrency: int, fields: dict[str, Any]) -> dict[str, Any]:
    """Send every prompt once, `concurrency` at a time.

    Args:
        url: of the server's root.
        model: as the server calls it.
        prompts: user messages.
        concurrency: requests in flight; each worker sends its next when it has its answer.
        fields: of the body, beside model and messages.

    Returns:
        seconds for all; sorted latencies in seconds; tokens generated; answers by status; decisions by name.
    """
    return asyncio.run(_round(url, model, prompts, concurrency, fields))


async def _round(url: str, model: str, prompts: list[str], concurrency: int, fields: dict[str, Any]) -> dict[str, Any]:
    waiting = iter(prompts)
    latencies: list[float] = []
    statuses: dict[str, int] = {}
    decisions: dict[str, int] = {}
    tokens = 0

    async def work(client: httpx.AsyncClient) -> None:
        nonlocal tokens
        for prompt in waiting:
            body = {"model": model, "messages": [{"role": "user", "content": prompt}], **fields}
            began = time.perf_counter()
            answer = await client.post("/v1/chat/completions", json=body)
            latencies.append(time.perf_counter() - began)
            statuses[str(answer.status_code)] = statuses.get(str(answer.status_code), 0) + 1
            if answer.status_code == httpx.codes.OK:
                content = answer.json()
                tokens += content["usage"]["completion_tokens"]
                decision = content.get("steering", {}).get("decision", "none")
                decisions[decision] = decisions.get(decision, 0) + 1

    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=120.0, trust_env=False) as client:
        began = time.perf_counter()
        await asyncio.gather(*(work(client) for _ in range(concurrency)))
        seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "latencies": sorted(latencies),
        "tokens": tokens,
        "statuses": statuses,
        "decisions": decisions,
    }


def main() -> None:
    """Send loads for as long as there are orders."""
    serve(take_over_output(), {"client": f"httpx {httpx.__version__}"}, round_of)


if __name__ == "__main__":
    main()
