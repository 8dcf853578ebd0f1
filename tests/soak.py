"""Soak: clients of every kind at once, for minutes, against one server; what was lost, what was left, what grew.

`python -m tests.soak --minutes 5` runs a gateway over the scripted engine, with `--serve` `trimtab serve` with the
demo, or with the arguments that follow. Bundles come and go meanwhile, connections are reset in the middle of requests
and answers or closed halfway, and client processes are killed. Ends with 1 where something was lost, a gauge is not
back at zero, memory grew, or the server does not live any more.

The engine is not killed: that ends the server by design, so that whatever started it starts it again, as
`tests/integration/test_gateway_process.py` shows. Engines that fail, hang or break off are in `tests/faults`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.dying import WAYS, die, kill_a_process, request_of
from tests.fake_server import MODEL, RUNNING, fake_serving, resident_bytes

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "artifacts" / "demo"
PATHS = {"/v1/chat/completions": 6, "/v1/completions": 2, "/v1/responses": 2}
KINDS = {"whole": 30, "stream": 35, "leaves": 15, "leaves at once": 10, "bad": 5, "fault": 5, **dict.fromkeys(WAYS, 3)}
"""What a client does, and how often."""

FAULTS = ("#fail", "#fail:3", "#raise:2", "#cut:2", "#malformed:2", "#full", "#busy", "#nan")
VICTIMS, BETWEEN_KILLS = 8, 1.0
"""Requests that a process makes which is going to be killed, and seconds between two of them."""

MOST_GROWTH = 0.10
"""Of resident memory, from a fifth of the time to its end."""

GAUGES = ("steering_inflight_requests", "steering_rows_wanted", RUNNING, "vllm:num_requests_waiting")

SETTLES = 10.0
"""Seconds in which gauges go back to zero once nobody asks any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server: addresses, main process, name of the model, a bundle that comes and goes, and if it is scripted."""

    url: str
    admin: str
    process: int
    model: str
    bundle: str | None
    is_scripted: bool


@dataclass(slots=True, kw_only=True)
class Tally:
    """What became of requests: `lost` ones were acknowledged and ended without an end.

    `killed` counts the ways in which clients ended; what they had asked for is owed to nobody.
    """

    ended: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    reloads: Counter[str] = field(default_factory=Counter)
    killed: Counter[str] = field(default_factory=Counter)
    resident: dict[str, list[tuple[float, float]]] = field(default_factory=dict)


async def soak(target: Target, *, seconds: float, streams: int, seed: int = 0) -> dict[str, Any]:
    """Ask for so long, then look what is left."""
    tally, began = Tally(), time.monotonic()
    end = began + seconds
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=streams)
    async with httpx.AsyncClient(base_url=target.url, limits=limits, timeout=120.0, trust_env=False) as client:
        asking = [
            asyncio.create_task(_ask_until(end, client, target, tally, random.Random(seed + number)))
            for number in range(streams)
        ]
        beside = [asyncio.create_task(_watch(target, tally, began))]
        killing = asyncio.create_task(_kill(end, target, tally, random.Random(seed - 1)))
        if target.bundle is not None:
            beside.append(asyncio.create_task(_reload(target, tally)))
        await asyncio.gather(*asking, killing)
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
    return await _judged(target, tally, time.monotonic() - began)


async def _ask_until(end: float, client: httpx.AsyncClient, target: Target, tally: Tally, dice: random.Random) -> None:
    kinds = [kind for kind in KINDS if target.is_scripted or kind != "fault"]
    while time.monotonic() < end:
        (kind,) = dice.choices(kinds, [KINDS[kind] for kind in kinds])
        (path,) = dice.choices([*PATHS], [*PATHS.values()])
        body = _body(path, kind, target, dice)
        try:
            if kind in WAYS:
                asked = request_of(path, {**body, "stream": dice.random() < 0.7})
                outcome = await die(kind, target.url, asked, dice)
                tally.killed[kind] += 1
            else:
                outcome = await _one(client, path, kind, body, tally, dice)
        except httpx.TransportError as error:
            outcome = f"lost: {type(error).__name__} {error} of {kind} {path}"
        tally.ended[outcome.partition(":")[0]] += 1
        if outcome.startswith("lost"):
            tally.lost.append(f"{end - time.monotonic():.1f} s before the end, {outcome[:500]}")


def _body(path: str, kind: str, target: Target, dice: random.Random) -> dict[str, Any]:
    text = dice.choice(("How do detectives investigate a murder?", "Tell me of tea.", "x " * dice.randrange(1, 60)))
    if target.is_scripted:
        text += dice.choice(FAULTS) if kind == "fault" else f" #pace:{dice.choice((0, 0.005, 0.02))} "
    limit = dice.randrange(1, 24)
    steering = dice.choice(({"mode": "off"}, {"mode": "auto"}, {"mode": "refuse"}, None, {"mode": "auto"}))
    body: dict[str, Any] = {"model": target.model, **({"steering": steering} if steering else {})}
    if target.bundle and dice.random() < 0.1:
        body["steering"] = {"profile": f"{target.bundle}/refusal-control"}  # loaded at times, at others a 400
    if path == "/v1/chat/completions":
        body |= {"messages": [{"role": "user", "content": text}], "max_tokens": limit}
        if dice.random() < 0.2:
            body["n"] = 2
    elif path == "/v1/completions":
        body |= {"prompt": [text, "and"] if dice.random() < 0.2 else text, "max_tokens": limit}
    else:
        body |= {"input": text, "max_output_tokens": limit}
    if kind == "bad":
        body[dice.choice(("temperature", "steering", "vllm_xargs", "model"))] = dice.choice(
            (-1, "no", {"a": 1}, [None])
        )
    return body


async def _one(
    client: httpx.AsyncClient, path: str, kind: str, body: dict[str, Any], tally: Tally, dice: random.Random
) -> str:
    """One request: `complete`, `error`, `frame`, `left`, or `lost` with what is missing."""
    if kind == "leaves at once":
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(dice.uniform(0.0, 0.05)):
                await client.post(path, json={**body, "stream": dice.random() < 0.5})
        return "left"
    if kind == "whole" or (kind in ("bad", "fault") and dice.random() < 0.5):
        answer = await client.post(path, json=body)
        tally.statuses[answer.status_code] += 1
        if answer.status_code != 200:
            return "error" if set(answer.json()) == {"error"} else f"lost: {answer.status_code} {answer.text[:200]}"
        return "complete" if _is_whole(answer.json()) else f"lost: {answer.text[:300]}"
    leaves_after = dice.randrange(0, 8) if kind == "leaves" else None
    last, count = "", 0
    async with client.stream("POST", path, json={**body, "stream": True}) as response:
        tally.statuses[response.status_code] += 1
        if response.status_code != 200:
            await response.aread()
            return "error" if set(response.json()) == {"error"} else f"lost: {response.text[:200]}"
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                last, count = line.removeprefix("data: "), count + 1
                if leaves_after is not None and count > leaves_after:
                    return "left"
    if last == "[DONE]":
        return "complete"
    told = json.loads(last) if last.startswith("{") else {}
    if told.get("type") in ("response.completed", "response.incomplete"):
        return "complete"
    return (
        "frame" if "error" in told or told.get("type") == "response.failed" else f"lost: stream of {path}: {last[:300]}"
    )


def _is_whole(body: dict[str, Any]) -> bool:
    if body["object"] == "response":
        return body["status"] in ("completed", "incomplete") and bool(body["output"])
    return all(choice["finish_reason"] for choice in body["choices"]) and "steering" in body


async def _watch(target: Target, tally: Tally, began: float) -> None:
    """Resident memory of the server and of each of its children, every two seconds."""
    while True:
        at = time.monotonic() - began
        for process in family(target.process):
            with contextlib.suppress(OSError):
                name = "gateway" if process == target.process else _name_of(process)
                tally.resident.setdefault(name, []).append((at, resident_bytes(process) / 1e6))
        await asyncio.sleep(2)


def _name_of(process: int) -> str:
    return Path(f"/proc/{process}/comm").read_text(encoding="utf-8").strip()


async def _kill(end: float, target: Target, tally: Tally, dice: random.Random) -> None:
    """Kill client processes, one after the other, each in the middle of several streams."""
    path = "/v1/chat/completions"
    while time.monotonic() < end:
        bodies = [_body(path, "stream", target, dice) for _ in range(VICTIMS)]
        asked = [request_of(path, {**body, "stream": True}) for body in bodies]
        outcome = await kill_a_process(target.url, asked, dice)
        tally.killed["processes"] += 1
        if outcome != "killed":
            tally.lost.append(f"{end - time.monotonic():.1f} s before the end, {outcome}")
        await asyncio.sleep(BETWEEN_KILLS)


async def _reload(target: Target, tally: Tally) -> None:
    """Load and unload a bundle, over and over."""
    async with httpx.AsyncClient(base_url=target.admin, timeout=60.0, trust_env=False) as client:
        while True:
            for act, fields in (("load", {"name": target.bundle}), ("unload", {"bundle": target.bundle})):
                answer = await client.post(f"/admin/bundles/{act}", json=fields)
                tally.reloads[f"{act} {answer.status_code}"] += 1
                await asyncio.sleep(1.5)


def family(process: int) -> list[int]:
    """A process and all below it that still live."""
    found = [process]
    for each in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{each}/task").iterdir():
                found.extend(map(int, (task / "children").read_text(encoding="ascii").split()))
    return [each for each in found if Path(f"/proc/{each}/statm").exists()]


async def _judged(target: Target, tally: Tally, seconds: float) -> dict[str, Any]:
    left: dict[str, float] = {}
    text = ""
    async with httpx.AsyncClient(timeout=30.0, trust_env=False) as client:
        settling = time.monotonic() + SETTLES
        while True:
            text = (await client.get(f"{target.admin}/metrics")).text
            left = _values(text, GAUGES)
            if not any(left.values()) or time.monotonic() > settling:
                break
            await asyncio.sleep(0.2)
        states = [(await client.get(f"{target.url}{path}")).status_code for path in ("/livez", "/readyz")]
    resident = {name: _growth(looks, seconds) for name, looks in tally.resident.items()}
    return {
        "seconds": round(seconds),
        "requests": sum(tally.ended.values()),
        "ended": dict(sorted(tally.ended.items())),
        "statuses": {str(status): count for status, count in sorted(tally.statuses.items())},
        "lost": tally.lost[:20],
        "reloads": dict(tally.reloads),
        "killed": dict(sorted(tally.killed.items())),
        "gauges": left,
        "counted": _values(text, ("steering_client_disconnects_total", "steering_stream_stalls_total")),
        "states": states,
        "resident_mb": resident,
        "passed": not tally.lost
        and not any(left.values())
        and states == [200, 200]
        and all(each["last_quarter"] <= each["first_quarter"] * (1 + MOST_GROWTH) for each in resident.values())
        and all(name.endswith(" 200") for name in tally.reloads),
    }


def _growth(looks: Sequence[tuple[float, float]], seconds: float) -> dict[str, float]:
    """Quarters rather than single looks, since what a moment needs goes up and down with what is being answered."""
    warm = [size for at, size in looks if at >= seconds / 5] or [0.0]
    quarter = max(1, len(warm) // 4)
    first, last = sum(warm[:quarter]) / quarter, sum(warm[-quarter:]) / quarter
    return {"first_quarter": round(first, 1), "last_quarter": round(last, 1), "most": round(max(warm), 1)}


def _values(text: str, wanted: Sequence[str]) -> dict[str, float]:
    lines = [line for line in text.splitlines() if line.partition(" ")[0].partition("{")[0] in wanted]
    sums: dict[str, float] = {}
    for line in lines:
        name = line.partition(" ")[0].partition("{")[0]
        sums[name] = sums.get(name, 0.0) + float(line.rpartition(" ")[2])
    return sums


@contextlib.contextmanager
def scripted() -> Iterator[Target]:
    """A gateway over the scripted engine, with a folder of bundles to load from."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "second").mkdir()
        (Path(folder) / "second" / "manifest.json").write_text("{}", encoding="utf-8")
        with fake_serving("--gated", "--quiet", TRIMTAB_BUNDLE_FOLDER=folder) as server:
            yield Target(
                url=server.url,
                admin=server.admin,
                process=server.process.pid,
                model=MODEL,
                bundle="second",
                is_scripted=True,
            )


@contextlib.contextmanager
def served(arguments: Sequence[str]) -> Iterator[Target]:
    """`trimtab serve`, the demo without arguments; a copy of the bundle under another name comes and goes."""
    from steering.bundle import load_bundle, save_bundle
    from tests.integration.serving import serving

    with tempfile.TemporaryDirectory() as folder:
        if not arguments:
            loaded = load_bundle(DEMO / "bundle")
            manifest = {**loaded.manifest.model_dump(mode="json"), "name": "second"}
            save_bundle(Path(folder) / "second", manifest, dict(loaded.edits), dict(loaded.probes))
        with serving(*arguments, TRIMTAB_BUNDLE_FOLDER=folder) as server:
            model = httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"]
            yield Target(
                url=server.url,
                admin=server.admin,
                process=server.process.pid,
                model=model,
                bundle=None if arguments else "second",
                is_scripted=False,
            )


def main() -> None:
    """Soak one server and print what became of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--serve", action="store_true", help="trimtab serve instead of the scripted engine")
    parser.add_argument("arguments", nargs="*", help="of trimtab serve, after --")
    chosen = parser.parse_args()
    with served(chosen.arguments) if chosen.serve else scripted() as target:
        found = asyncio.run(soak(target, seconds=60 * chosen.minutes, streams=chosen.streams, seed=os.getpid()))
    print(json.dumps(found, indent=1))  # noqa: T201
    sys.exit(not found["passed"])


if __name__ == "__main__":
    main()
