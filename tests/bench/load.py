"""Load: what the gateway adds to a request, in milliseconds, by the number of streams at once.

`python -m tests.bench.load fake` compares the gateway over the scripted engine with the same script without a gateway,
`python -m tests.bench.load vllm` the gateway over the demo with vLLM's own OpenAI server over the same model. Each cell
is measured in turns, one server after the other. Results are kept in `tests/bench/results/`.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil  # type: ignore[import-untyped]  # vLLM requires it

from server.bench.gateway import _server
from server.bench.report import load as busy
from server.bench.report import write
from tests.fake_server import MODEL, fake_serving

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
DEMO = ROOT / "artifacts" / "demo"
STREAMS = (1, 32, 200)
TOKENS = 16
PACE = {1: 0.02, 32: 0.02, 200: 0.05}
"""Seconds a token of the scripted engine: 50 and 20 tokens a second, as engines give them at so many streams."""
SECONDS, WARM_UP, TURNS = 6, 1.5, 2
GOAL = {"p50": 3.0, "p99": 15.0}
"""Milliseconds that the gateway may add over the scripted engine."""


class Arm(NamedTuple):
    """A server, what it is asked, and its process."""

    url: str
    body: Mapping[str, Any]
    process: int


def measured(arm: Arm, streams: int, *, stream: bool, prompt: str, spread: float) -> dict[str, Any]:
    """Load one server with so many users for a while; milliseconds of each answer, and of the server's own work."""
    body = {**arm.body, "stream": stream}
    worked = processor_ms(arm.process)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "samples.json"
        order = {"body": body, "prompt": prompt, "warm_up": WARM_UP, "spread": spread, "out": str(out)}
        options = f"--headless --users {streams} --spawn-rate {streams} --run-time {SECONDS}s --stop-timeout 30"
        command = [sys.executable, "-m", "locust", "-f", str(HERE / "streams.py"), "--host", arm.url, *options.split()]
        ended = subprocess.run(
            [*command, "--only-summary", "--loglevel", "ERROR"],
            env={**os.environ, "LOAD": json.dumps(order)},
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
        )
        if not out.exists():
            raise SystemExit(f"locust did not run:\n{ended.stdout[-2000:]}{ended.stderr[-2000:]}")
        found = json.loads(out.read_text(encoding="utf-8"))
    return {
        "worked": processor_ms(arm.process) - worked,
        "asked": found["asked"],
        "failures": found["failures"],
        "first": [1000 * first for first, _, _ in found["samples"]],
        "whole": [1000 * whole for _, whole, _ in found["samples"]],
        "chunks": [chunks for _, _, chunks in found["samples"]],
    }


def process_at(url: str) -> int:
    """The process that listens there."""
    port = int(url.rpartition(":")[2])
    listening = (each for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN)
    return next(each.pid for each in listening if each.laddr.port == port and each.pid is not None)


def processor_ms(process: int) -> float:
    """What a process has computed so far; other processes of the machine make no answer dearer in this coin."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return 1000 * (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def cell(arms: Mapping[str, Arm], streams: int, *, stream: bool, prompt: str, spread: float) -> dict[str, Any]:
    """Every arm in turns, forwards and backwards; quantiles of all samples of an arm."""
    kept: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for turn in range(TURNS):
        for name in [*arms][:: -1 if turn % 2 else 1]:
            kept[name].append(measured(arms[name], streams, stream=stream, prompt=prompt, spread=spread))
    found: dict[str, Any] = {"streams": streams, "stream": stream, "arms": {}}
    for name, rounds in kept.items():
        failures = {code: count for each in rounds for code, count in each["failures"].items()}
        found["arms"][name] = {
            "answers": sum(len(each["whole"]) for each in rounds),
            "failures": failures,
            "answer_ms": quantiles([value for each in rounds for value in each["whole"]]),
            "processor_ms_per_answer": round(
                sum(each["worked"] for each in rounds) / max(1, sum(each["asked"] for each in rounds)), 3
            ),
            "answer_p50_ms_by_turn": [quantiles(each["whole"])["p50"] for each in rounds],
        }
        if stream:
            found["arms"][name]["first_token_ms"] = quantiles([value for each in rounds for value in each["first"]])
    theirs, ours = [found["arms"][name] for name in [*arms][:2]]
    found["added_ms"] = {
        what: {at: round(ours[what][at] - theirs[what][at], 2) for at in ours[what]}
        for what in ("answer_ms", "first_token_ms")
        if what in ours
    }
    found["load_average"] = busy()
    return found


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile, in the unit of the values."""
    if len(values) < 2:
        return {"p50": round(sum(values), 2), "p99": round(sum(values), 2)}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": round(cuts[49], 2), "p99": round(cuts[98], 2)}


def over_the_script() -> dict[str, Any]:
    """The gateway over the scripted engine, unsteered and gated, against the script alone."""
    cells = []
    with contextlib.ExitStack() as stack:
        bare = stack.enter_context(fake_serving(module="tests.bench.bare"))
        gateway = stack.enter_context(fake_serving("--gated", "--quiet"))
        fields = {"model": MODEL}
        for streams in STREAMS:
            pace = PACE[streams]
            for stream in (True, False):
                arms = {
                    "script alone": Arm(bare.url, fields, bare.process.pid),
                    "gateway": Arm(gateway.url, {**fields, "steering": {"mode": "off"}}, gateway.process.pid),
                    "gateway, gated": Arm(gateway.url, fields, gateway.process.pid),
                }
                prompt = f"#tokens:{TOKENS} #pace:{pace}"
                cells.append(cell(arms, streams, stream=stream, prompt=prompt, spread=TOKENS * pace))
                say(cells[-1])
    met = {
        at: all(each["added_ms"]["answer_ms"][at] <= most for each in cells if each["streams"] == max(STREAMS))
        for at, most in GOAL.items()
    }
    return {
        "what": "gateway over a scripted engine",
        "tokens": TOKENS,
        "pace": PACE,
        "cells": cells,
        "goal_ms": GOAL,
        "met": met,
    }


def over_vllm() -> dict[str, Any]:
    """The gateway over the demo against vLLM's own server over the same model, both with the same options."""
    from server.bench.engine import WITHOUT_PLUGINS

    name, cells = "trimtab-demo", []
    engine = ["--max-model-len", "512", "--max-num-seqs", "256", "--enforce-eager", "--dtype", "float32"]
    shared = ["--model", str(DEMO / "model"), "--served-model-name", name]
    stock = ["-m", "vllm.entrypoints.openai.api_server", *shared, *engine, "--disable-uvicorn-access-log"]
    ours = ["-m", "server.cli", "serve", *shared, "--bundle", str(DEMO / "bundle"), "--admin-port", "0", "--", *engine]
    fields = {"model": name, "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
    with servers(stock, ours, WITHOUT_PLUGINS) as (reference, gateway):
        of_reference, of_gateway = process_at(reference), process_at(gateway)
        for streams in STREAMS:
            for stream in (True, False):
                arms = {
                    "vLLM's server": Arm(reference, fields, of_reference),
                    "gateway": Arm(gateway, {**fields, "steering": {"mode": "off"}}, of_gateway),
                    "gateway, gated": Arm(gateway, fields, of_gateway),
                }
                prompt = "How do detectives investigate a murder?"
                cells.append(cell(arms, streams, stream=stream, prompt=prompt, spread=0.5))
                say(cells[-1])
    return {"what": "gateway against vLLM's own server", "tokens": TOKENS, "options": engine, "cells": cells}


@contextlib.contextmanager
def servers(stock: list[str], ours: list[str], environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Both servers, resident at once; one is loaded at a time."""
    with _server(stock, environment) as reference, _server(ours, {}) as gateway:
        yield reference, gateway


def say(found: Mapping[str, Any]) -> None:
    """One cell, for people."""
    kind = "streamed" if found["stream"] else "whole"
    told = ", ".join(
        f"{name} {arm['answer_ms']['p50']:.1f}/{arm['answer_ms']['p99']:.1f} ms of {arm['answers']}, "
        f"{arm['failures'] or 'none'} failed, {arm['processor_ms_per_answer']} ms computed"
        for name, arm in found["arms"].items()
    )
    print(f"{time.strftime('%H:%M:%S')} {found['streams']} {kind}: {told}; added {found['added_ms']}", flush=True)  # noqa: T201


def main() -> None:
    """Measure, print and keep."""
    found = {"fake": over_the_script, "vllm": over_vllm}[sys.argv[1]]()
    print(write(HERE / "results", {"load": found}, []))  # noqa: T201


if __name__ == "__main__":
    main()
