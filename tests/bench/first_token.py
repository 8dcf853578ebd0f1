"""First token: what a client waits for it under `mode: auto` and under `mode: off`, on real prompts, over the API.

`python -m tests.bench.first_token [vLLM's options]` serves the demo and asks every prompt of some held sets in both
modes, one request at a time and in random order, streamed. A pair is a block of prompts: the median of one mode against
that of the other. Results are kept in `tests/bench/results/`. `trimtab bench --only gate` measures the engine alone.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

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
BLOCK = 50
WARM_UP = 60
TOKENS = 4
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


def main() -> None:
    """Serve, ask, print and keep."""
    options = sys.argv[1:]
    serve = ["--model", str(DEMO / "model"), "--served-model-name", NAME, "--bundle", str(DEMO / "bundle")]
    ours = ["-m", "server.cli", "serve", *serve, "--admin-port", "0", "--", "--max-model-len", "1024", *options]
    asked, draw = prompts(), random.Random(1)
    pairs: list[tuple[float, float]] = []
    decisions: dict[str, int] = {}
    waited: dict[str, list[float]] = {"auto": [], "off": []}
    before = load()
    with _server(ours, {}) as url, httpx.Client(base_url=url, timeout=60) as client:
        for prompt, mode in itertools.product(asked[:WARM_UP], waited):
            first_token(client, prompt, mode)
        for block in blocks(asked):
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
    # Rates, as everywhere: 1 over the time.
    ratio = ratio_of("auto ÷ off, first token over the API", [(off, auto) for off, auto in pairs], target=TARGET)
    found = {
        "what": "first token over the API, one request at a time, prompts of held sets, demo",
        "options": options,
        "prompts": len(waited["off"]),
        "sets": list(SUITES),
        "decisions": decisions,
        "milliseconds": {mode: round(1000 * statistics.median(seconds), 3) for mode, seconds in waited.items()},
        "load_before": before,
    }
    path = write(ROOT / "tests/bench/results", {"first_token": found}, [ratio])
    print(json.dumps(found), ratio.line(), path, sep="\n")  # noqa: T201


if __name__ == "__main__":
    main()
