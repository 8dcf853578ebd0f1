"""Gate cost: what a client pays for `mode: auto` against `mode: off`, on real prompts, over the API.

`python -m tests.bench.gate_cost [vLLM's options]` serves the demo and asks prompts of some held sets in both modes:
streamed and one at a time in random order, for the wait for the first text; and many at a time, in rounds of the one
and the other mode, for the throughput. A pair is a block of prompts, or two rounds. Results are kept in
`tests/bench/results/`. `trimtab bench --only gate` measures the engine alone.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from server.bench.gateway import _server
from server.bench.report import load, ratio_of, write
from steering.evaluate.suites import find_suite
from steering.fit.datasets import DataDirectory

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "artifacts" / "demo"
SUITES = ("xstest-safe", "xstest-unsafe", "jbb-benign", "jbb-harmful", "cast-harmless", "gpteacher-code")
MOST = 100
"""Prompts of each set."""
LONGEST = 1200
"""Characters of a prompt, so that it fits the demo's context."""
BLOCK, PASSES = 50, 4
"""Prompts of a pair, and how often each prompt is asked in either mode."""
WARM_UP = 60
TOKENS = 4
TOGETHER, OF_ROUND, ANSWER, ROUNDS = 32, 96, 64, 32
"""Requests at a time and of a round, tokens of each answer, and pairs of rounds."""
TARGET = 0.97
NAME = "trimtab-demo"


def prompts() -> list[str]:
    """Prompts of every set, in random order."""
    directory = DataDirectory.resolve()
    found = [record.prompt for name in SUITES for record in find_suite(name).prompts(directory, MOST)]
    found = [prompt for prompt in found if len(prompt) <= LONGEST]
    random.Random(0).shuffle(found)
    return found


def first_token(client: httpx.Client, prompt: str, mode: str) -> tuple[float, str]:
    """Seconds until the first piece with text has arrived, and what was decided.

    The demo's own first token, which says whether it refuses, shows in no text, so that this is its second one.
    """
    body = {"model": NAME, "messages": [{"role": "user", "content": prompt}], "stream": True, "max_tokens": TOKENS}
    began, arrived, decision = time.perf_counter(), 0.0, ""
    with client.stream(
        "POST", "/v1/chat/completions", json={**body, "temperature": 0, "steering": {"mode": mode}}
    ) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            piece = json.loads(line[6:]) if line.startswith("data: {") else {}
            for choice in piece.get("choices", ()):
                if not arrived and (choice["delta"].get("content") or choice.get("finish_reason")):
                    arrived = time.perf_counter()
            decision = (piece.get("steering") or {}).get("decision", decision)
    return arrived - began, decision


def blocks(asked: list[str]) -> Iterator[list[str]]:
    """Whole blocks."""
    for start in range(0, len(asked) - BLOCK + 1, BLOCK):
        yield asked[start : start + BLOCK]


async def throughput(url: str, asked: list[str], mode: str) -> float:
    """Tokens per second of answers of one length to these prompts, so many at a time."""
    prompts_left, tokens = iter(asked), 0
    body = {"model": NAME, "max_tokens": ANSWER, "ignore_eos": True, "temperature": 0, "steering": {"mode": mode}}

    async def client_of_many() -> None:
        nonlocal tokens
        for prompt in prompts_left:
            message = {"messages": [{"role": "user", "content": prompt}]}
            answer = await client.post("/v1/chat/completions", json=body | message)
            answer.raise_for_status()
            tokens += answer.json()["usage"]["completion_tokens"]

    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        began = time.perf_counter()
        await asyncio.gather(*(client_of_many() for _ in range(TOGETHER)))
        return tokens / (time.perf_counter() - began)


def throughputs(url: str, asked: list[str]) -> list[tuple[float, float]]:
    """Pairs of rounds of the same prompts, `off` and `auto`; which comes first changes from pair to pair, as the second
    finds blocks of the first in vLLM's cache.
    """
    pairs = []
    for number in range(-1, ROUNDS):
        start = (number + 1) * OF_ROUND % len(asked)
        of_round = (asked[start:] + asked[:start])[:OF_ROUND]
        order = ["off", "auto"][:: 1 if number % 2 else -1]
        rates = {mode: asyncio.run(throughput(url, of_round, mode)) for mode in order}
        if number >= 0:  # the first is a warm-up
            pairs.append((rates["off"], rates["auto"]))
    return pairs


def first_tokens(url: str, asked: list[str]) -> tuple[list[tuple[float, float]], dict[str, Any]]:
    """Medians of each block's seconds, `off` and `auto`, and what was seen."""
    draw = random.Random(1)
    pairs: list[tuple[float, float]] = []
    decisions: dict[str, int] = {}
    waited: dict[str, list[float]] = {"auto": [], "off": []}
    with httpx.Client(base_url=url, timeout=60) as client:
        for prompt, mode in itertools.product(asked[:WARM_UP], waited):
            first_token(client, prompt, mode)
        for block in blocks(asked * PASSES):
            of_block: dict[str, list[float]] = {mode: [] for mode in waited}
            for prompt in block:
                for mode in draw.sample(list(waited), 2):
                    seconds, decision = first_token(client, prompt, mode)
                    of_block[mode].append(seconds)
                    if mode == "auto":
                        decisions[decision] = decisions.get(decision, 0) + 1
            pairs.append((statistics.median(of_block["off"]), statistics.median(of_block["auto"])))
            for mode, seconds_of in of_block.items():
                waited[mode] += seconds_of
    milliseconds = {mode: round(1000 * statistics.median(seconds), 3) for mode, seconds in waited.items()}
    return pairs, {"prompts": len(asked), "passes": PASSES, "decisions": decisions, "milliseconds": milliseconds}


def main() -> None:
    """Serve, ask, print and keep."""
    options = sys.argv[1:]
    serve = ["--model", str(DEMO / "model"), "--served-model-name", NAME, "--bundle", str(DEMO / "bundle")]
    ours = ["-m", "server.cli", "serve", *serve, "--admin-port", "0", "--", "--max-model-len", "1024", *options]
    asked, before = prompts(), load()
    with _server(ours, {}) as url:
        waits, seen = first_tokens(url, asked)
        rates = throughputs(url, asked)
    ratios = [
        # Rates, as everywhere: 1 over the time.
        ratio_of("auto ÷ off, first token over the API", waits, target=TARGET),
        ratio_of(
            f"auto ÷ off, throughput over the API, {TOGETHER} at a time", [(a, o) for o, a in rates], target=TARGET
        ),
    ]
    found = {
        "what": "auto against off over the API, prompts of held sets, demo",
        "options": options,
        "sets": list(SUITES),
        "first_token": seen,
        "throughput": {"together": TOGETHER, "requests": OF_ROUND, "tokens": ANSWER, "rounds": ROUNDS},
        "load_before": before,
    }
    path = write(ROOT / "tests/bench/results", {"gate_cost": found}, ratios)
    print(json.dumps(found), *(ratio.line() for ratio in ratios), path, sep="\n")  # noqa: T201


if __name__ == "__main__":
    main()
