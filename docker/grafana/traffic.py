"""A little traffic for a picture: prompts asked with the OpenAI SDK in every mode, streamed and not, some mistakes.

    python docker/grafana/traffic.py --url http://127.0.0.1:8000/v1 --model trimtab-demo --minutes 10 prompts.txt

Files hold one prompt a line. No load test: a few clients that ask and think.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import openai

MODES: tuple[Any, ...] = (None, None, None, {"mode": "off"}, {"mode": "comply"}, {"mode": "refuse"})
"""What `steering` is in a request: most ask for nothing and get the default profile."""
MISTAKES: tuple[dict[str, Any], ...] = (
    {"extra_body": {"steering": {"mode": "loud"}}},
    {"extra_body": {"steering": {"profile": "nobody"}}},
    {"extra_body": {"steering": {"mode": "comply", "strength": 1e6}}},
    {"model": "nothing"},
    {"n": 0},
)


async def main() -> None:
    """Ask until the time is over, then say what came back."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", type=Path, nargs="+")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="trimtab-demo")
    parser.add_argument("--key", action="append", help="API key; repeatable. A few requests then come with a wrong one")
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between two requests of a client, on average")
    arguments = parser.parse_args()
    prompts = [line for path in arguments.prompts for line in path.read_text(encoding="utf-8").splitlines() if line]
    end = time.monotonic() + 60 * arguments.minutes
    counts: Counter[str] = Counter()
    async with openai.AsyncOpenAI(base_url=arguments.url, api_key="unused", max_retries=0) as client:
        await asyncio.gather(
            *(_ask(client, arguments, prompts, random.Random(seed), end, counts) for seed in range(arguments.clients))
        )
    sys.stderr.write("".join(f"{count:6d} {what}\n" for what, count in counts.most_common()))


async def _ask(
    client: openai.AsyncOpenAI,
    arguments: argparse.Namespace,
    prompts: list[str],
    chance: random.Random,
    end: float,
    counts: Counter[str],
) -> None:
    while time.monotonic() < end:
        request: dict[str, Any] = {
            "model": arguments.model,
            "messages": [{"role": "user", "content": chance.choice(prompts)}],
            "max_tokens": chance.choice((16, 32, 48)),
            "temperature": 0.0,
        }
        if mode := chance.choice(MODES):
            request["extra_body"] = {"steering": mode}
        if chance.random() < 0.06:
            request |= chance.choice(MISTAKES)
        asker = client
        if arguments.key:
            asker = client.with_options(api_key="wrong" if chance.random() < 0.02 else chance.choice(arguments.key))
        try:
            counts[await _answer(asker, request, chance)] += 1
        except openai.APIStatusError as error:
            counts[f"{error.status_code} {error.code}"] += 1
        except openai.APIError as error:
            counts[type(error).__name__] += 1
        await asyncio.sleep(chance.expovariate(1 / arguments.pause))


async def _answer(client: openai.AsyncOpenAI, request: dict[str, Any], chance: random.Random) -> str:
    """One answer: whole, streamed, or streamed and left in the middle."""
    if chance.random() < 0.5:
        await client.chat.completions.create(**request)
        return "whole"
    async with await client.chat.completions.create(**request, stream=True) as stream:
        leaves = chance.random() < 0.05
        async for _ in stream:
            if leaves:
                return "left"
    return "streamed"


if __name__ == "__main__":
    asyncio.run(main())
