"""Gateway bench: requests per second of `trimtab serve` against vLLM's own OpenAI server, in alternating rounds.

Same model, same engine options, same prompts; both servers stay resident and one is loaded at a time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx

from server.bench.companion import START_PATIENCE, Companion, companion, end_of
from server.bench.engine import WITHOUT_PLUGINS
from server.bench.report import Ratio, ratio_of
from server.bench.subject import Subject
from steering.engine.compat import ENVIRONMENT
from steering.errors import EngineError, EngineTimeout

CLIENT = "server.bench.load"
NAME = "bench"
TARGET = 0.9
WARM_UP = 2
STEERED = {"steering": {"mode": "comply"}}


def measure(
    subject: Subject,
    *,
    pairs: int,
    requests: int,
    concurrency: int,
    tokens: int,
    options: Mapping[str, Any],
    say: Callable[[str], None],
) -> tuple[dict[str, Any], list[Ratio]]:
    """Run the gateway, with unsteered and with steered requests, against vLLM's server with unsteered ones.

    Args:
        subject: model and bundle.
        pairs: of rounds.
        requests: of a round.
        concurrency: in flight at a time.
        tokens: of each answer.
        options: vLLM's own, by argument name, the same for both servers.
        say: told of progress.

    Returns:
        Results for the report, and a ratio per arm.
    """
    assert subject.bundle.path is not None
    engine = ["--max-num-seqs", str(concurrency), *_flags(options)]
    shared = ["--model", str(subject.model), "--served-model-name", NAME]
    # vLLM's is started as leanly as ours: no line per request.
    stock = ["-m", "vllm.entrypoints.openai.api_server", *shared, *engine, "--disable-uvicorn-access-log"]
    ours = ["-m", "server.cli", "serve", *shared, "--bundle", str(subject.bundle.path), "--", *engine]
    fields = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True}
    arms: dict[str, dict[str, Any]] = {"gateway": fields, "gateway, steered": {**fields, **STEERED}}
    rounds: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {name: [] for name in arms}
    with contextlib.ExitStack() as stack:
        say("starting vLLM's OpenAI server")
        reference = stack.enter_context(_server(stock, WITHOUT_PLUGINS))
        say("starting the gateway")
        gateway = stack.enter_context(_server(ours, {}))
        client = stack.enter_context(companion(CLIENT, {}))
        client.wait_until_ready()

        def load(url: str, body: dict[str, Any], seed: int) -> dict[str, Any]:
            return _loaded(client, url, body, seed, requests=requests, concurrency=concurrency, tokens=tokens)

        for turn in range(WARM_UP):
            load(reference, fields, -1 - turn)
            for body in arms.values():
                load(gateway, body, -1 - turn)
        seed = 0
        for turn in range(pairs):
            for name, body in arms.items():
                seed += 1
                if turn % 2:
                    theirs, mine = load(reference, fields, seed), load(gateway, body, seed)
                else:
                    mine, theirs = load(gateway, body, seed), load(reference, fields, seed)
                rounds[name].append((mine, theirs))
            said = ", ".join(
                f"{name} {each[-1][1]['seconds'] / each[-1][0]['seconds']:.3f}" for name, each in rounds.items()
            )
            say(f"gateway: pair {turn + 1} of {pairs}: {said}")
    rates = {
        name: [(requests / mine["seconds"], requests / theirs["seconds"]) for mine, theirs in each]
        for name, each in rounds.items()
    }
    ratios = [
        ratio_of(f"{name} ÷ vLLM's server", rates[name], target=TARGET if name == "gateway" else None) for name in rates
    ]
    results = {
        "requests": requests,
        "concurrency": concurrency,
        "tokens": tokens,
        "options": dict(options),
        "rounds": {
            name: {
                "requests_per_second": [round(mine, 2) for mine, _ in rates[name]],
                "vllm_beside": [round(theirs, 2) for _, theirs in rates[name]],
                "latency_ms": _percentiles([mine for mine, _ in each]),
                "vllm_latency_ms": _percentiles([theirs for _, theirs in each]),
            }
            for name, each in rounds.items()
        },
    }
    return results, ratios


def _loaded(
    client: Companion, url: str, fields: dict[str, Any], seed: int, *, requests: int, concurrency: int, tokens: int
) -> dict[str, Any]:
    prompts = [f"Round {seed}, question {number}: what is {number} plus {seed}, and why?" for number in range(requests)]
    answer = client.ask(url=url, model=NAME, prompts=prompts, concurrency=concurrency, fields=fields)
    if answer["statuses"] != {"200": requests} or answer["tokens"] != requests * tokens:
        raise EngineError(f"a round failed: {answer['statuses']}, {answer['tokens']} tokens of {requests * tokens}")
    wanted = "comply" if "steering" in fields else None
    if wanted and answer["decisions"] != {wanted: requests}:
        raise EngineError(f"a steered round was answered with decisions {answer['decisions']}")
    return answer


def _percentiles(rounds: list[dict[str, Any]]) -> dict[str, float]:
    latencies = sorted(latency for each in rounds for latency in each["latencies"])
    return {
        f"p{at}": round(1e3 * latencies[min(len(latencies) - 1, len(latencies) * at // 100)], 2) for at in (50, 95, 99)
    }


def _flags(options: Mapping[str, Any]) -> list[str]:
    """Engine options by argument name as command-line flags."""
    flags = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        flags += [flag] if value is True else [flag, str(value)]
    return flags


@contextlib.contextmanager
def _server(arguments: list[str], environment: Mapping[str, str]) -> Iterator[str]:
    """A server on a free port, from the moment it is ready until the block ends; yields its address."""
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    if "--" in arguments:
        at = arguments.index("--")
        arguments = [*arguments[:at], "--port", str(port), *arguments[at:]]
    else:
        arguments = [*arguments, "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=log,
            stderr=log,
            env={**ENVIRONMENT, **os.environ, **environment},
            # A group of its own, to be ended with all its processes, in this session: an engine that waits yields its
            # core to processes of its session alone (Linux's autogroup), and a client elsewhere would wait for it.
            process_group=0,
        )
        deadline = time.monotonic() + START_PATIENCE
        try:
            while not _is_ready(url):
                if process.poll() is not None:
                    raise EngineError(f"{arguments[1]} ended before it was ready{end_of(log)}")
                if time.monotonic() > deadline:
                    raise EngineTimeout(f"{arguments[1]} was not ready within {START_PATIENCE:g} s{end_of(log)}")
                time.sleep(0.5)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _is_ready(url: str) -> bool:
    """Ours says so under `/readyz`; vLLM's, which has no such address, under `/health`."""
    try:
        ready = httpx.get(f"{url}/readyz", trust_env=False, timeout=5.0)
        if ready.status_code == httpx.codes.NOT_FOUND:
            ready = httpx.get(f"{url}/health", trust_env=False, timeout=5.0)
    except httpx.TransportError:
        return False
    return ready.status_code == httpx.codes.OK


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
