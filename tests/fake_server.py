"""The gateway over an engine that follows a script, as a process: for conformance, faults, soak and load.

`python -m tests.fake_server --help`. What the engine does is written in the prompt, so that one server can be asked for
every fault: see `SCRIPT`. Nothing here imports torch or vLLM.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import hashlib
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import AsyncGenerator, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.catalog import BundleView
from server.engine import Call, Chunk, Completion, Prompting, ServedModel
from steering.errors import CapacityExceeded, EditNotConfirmed, EngineDied, EngineError, EngineOverloaded
from steering.outcome import Outcome, Scores
from tests.fakes import MODEL, FakeEngine, make_bundle, make_catalog, make_gated_bundle, read

SCRIPT = re.compile(r"#([a-z-]+)(?::([0-9.]+))?")
"""`#word` or `#word:number` in the prompt: `tokens`, `pace` (seconds a token), `hang` (after so many tokens), `fail`,
`raise` (no error of ours), `malformed` (a chunk that is none), `cut` (the stream ends without its end), `full`, `busy`,
`nan` (what the probe read), `late` (the confirmation never comes), `poison` (a text that is no UTF-8)."""

RUNNING = "vllm:num_requests_running"
KEPT = 64
"""Calls a scripted engine remembers; a soak sends hundreds of thousands."""


class Dead(RuntimeError):
    """What a library raises that knows nothing of our errors."""


@dataclass
class ScriptedEngine(FakeEngine):
    """Does what the prompt says; otherwise answers `words` over and over until `max_tokens`.

    Attributes:
        name: of the model.
        pace: seconds a token, where the prompt says nothing.
        running: requests being generated now.
    """

    name: str = MODEL
    pace: float = 0.0
    running: int = 0
    _live: dict[str, Mapping[str, float | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.calls = deque(maxlen=KEPT)  # type: ignore[assignment]
        self.aborted = deque(maxlen=KEPT)  # type: ignore[assignment]
        self.forgotten = deque(maxlen=KEPT)  # type: ignore[assignment]
        self.read = deque(maxlen=KEPT)  # type: ignore[assignment]

    @property
    def model(self) -> ServedModel:
        return ServedModel(name=self.name, created=1_700_000_000, context=4096)

    async def complete(self, call: Call) -> Completion:
        with self._running(call):
            completion = await super().complete(call)
            completion.body["model"] = self.name
            return completion

    async def stream(self, call: Call) -> AsyncGenerator[Chunk, None]:
        script = script_of(call)
        with self._running(call):
            written = itertools.count()
            async for chunk in super().stream(call):
                chunk.body["model"] = self.name
                if chunk.tokens:
                    count = next(written)
                    if "malformed" in script and count >= (script["malformed"] or 0):
                        yield Chunk(body={"choices": [{"nonsense": 1}]}, tokens=chunk.tokens)
                    if "cut" in script and count >= (script["cut"] or 0):
                        return
                yield chunk

    def forget(self, plan_id: str) -> None:
        super().forget(plan_id)
        self._outcomes.pop(plan_id, None)
        self._live.pop(plan_id, None)

    async def outcomes(self, plan_id: str, samples: Collection[int], wait: float) -> Mapping[int, Outcome]:
        if "late" in self._live.get(plan_id, {}):
            await asyncio.sleep(wait)
            raise EditNotConfirmed(f"no sample confirmed the edit within {wait:g} s")
        return await super().outcomes(plan_id, samples, wait)

    def exposition(self, *, is_open: bool = False) -> bytes:
        return f"# TYPE {RUNNING} gauge\n{RUNNING} {float(self.running)}\n".encode()

    @contextmanager
    def _running(self, call: Call) -> Iterator[None]:
        self.running += 1
        if call.plan is not None:
            self._live[call.plan.id] = script_of(call)
        try:
            yield
        finally:
            self.running -= 1

    def _ruled(self, order: Any, strength: float, bundle: Any, scores: Scores) -> dict[str, Any]:
        if any("nan" in script for script in self._live.values()):
            scores = Scores(names=scores.names, logits=(math.nan,) * len(scores.logits))
        return super()._ruled(order, strength, bundle, scores)

    async def _tokens(self, call: Call) -> AsyncGenerator[tuple[int, int, str], None]:
        script = script_of(call)
        asked = min(call.fields.get("max_tokens") or len(self.words) + 1, self.model.context)
        limit = int(script.get("tokens") or asked)
        pace = script["pace"] if script.get("pace") is not None else self.pace
        _raise_at_start(script)
        produced, clock = 0, asyncio.get_running_loop().time
        began = clock()
        for step in range(limit):
            for index in range(call.samples):
                # An engine does not wait for the gateway: what is late makes nothing after it later.
                await _follow(script, produced, began + (step + 1) * (pace or 0.0) - clock())
                produced += 1
                self.generated += 1
                if step:
                    text = "\ud800" if "poison" in script else self.words[(step - 1) % len(self.words)]
                    yield index, 1, text
                else:
                    yield index, self._first(call, index), ""


def script_of(call: Call) -> dict[str, float | None]:
    """What the prompt of a call asks of the engine."""
    if call.prompting is Prompting.PLAIN:
        text = call.fields["prompt"] if isinstance(call.fields["prompt"], str) else ""
    else:
        text = str(call.fields["messages"][-1].get("content"))
    return {word: float(number) if number else None for word, number in SCRIPT.findall(text)}


def _raise_at_start(script: Mapping[str, float | None]) -> None:
    if "full" in script:
        raise CapacityExceeded("no row is left for a steered request; try again")
    if "busy" in script:
        raise EngineOverloaded("the queue is full; try again")
    if "gone" in script:
        raise EngineDied("the engine is gone")


async def _follow(script: Mapping[str, float | None], produced: int, wait: float) -> None:
    if "hang" in script and produced >= (script["hang"] or 0):
        await asyncio.sleep(3600)
    if "fail" in script and produced >= (script["fail"] or 0):
        raise EngineError("the engine failed")
    if "raise" in script and produced >= (script["raise"] or 0):
        raise Dead("secret internals")
    await asyncio.sleep(max(0.0, wait))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; whatever follows is read from `TRIMTAB_*` variables, as in production."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=MODEL, help="name of the model")
    parser.add_argument("--pace", type=float, default=0.0, help="seconds a token")
    parser.add_argument("--score", type=float, default=0.95, help="refusal probability that the gate reads")
    parser.add_argument("--gated", action="store_true", help="serve the bundle with a gate")
    parser.add_argument("--quiet", action="store_true", help="no line per request")
    return parser.parse_args(arguments)


def main() -> None:
    """Serve until told to stop, as `trimtab serve` does once its engine is up."""
    import uvloop
    from prometheus_client import disable_created_metrics

    from server.observe.log import configure_log
    from server.process import serve_engine
    from server.settings import Settings

    def say(clients: str, operators: str) -> None:
        print(f"Ready on {clients} administered on {operators}", flush=True)  # noqa: T201

    disable_created_metrics()  # type: ignore[no-untyped-call]
    # What asks for no length gets the words once: this engine goes on for as long as it may.
    chosen, settings = parse_arguments(), Settings(port=0, admin_port=0, default_max_tokens=len(FakeEngine.words) + 1)
    if not chosen.quiet:
        configure_log(settings.log_format)
    bundle = make_gated_bundle() if chosen.gated else make_bundle()
    folder = settings.bundle_folder
    loadable = {} if folder is None else {path.resolve(): _named(bundle, path.name) for path in folder.iterdir()}
    engine = ScriptedEngine(
        name=chosen.model, pace=chosen.pace, scores=(read(chosen.score),), bundles=[bundle], loadable=loadable
    )
    serving = serve_engine(
        engine,
        make_catalog(bundle),
        settings,
        on_ready=say,
        check=lambda path: loadable[path],
        engine_version="fake",
    )
    uvloop.run(serving)


def _named(bundle: BundleView, name: str) -> BundleView:
    """The bundle under another name, and so with another digest."""
    digest = f"sha256:{hashlib.sha256(name.encode()).hexdigest()}"
    return dataclasses.replace(bundle, name=name, label=f"{name}@{digest[:19]}", digest=digest)


@dataclass
class FakeServer:
    """A running fake server: addresses for clients and for operators, its process and what it wrote."""

    url: str
    admin: str
    process: subprocess.Popen[str]
    log: list[str]

    @property
    def port(self) -> int:
        """Where clients connect."""
        return int(self.url.rpartition(":")[2])

    def resident_bytes(self) -> int:
        """Memory of the process, as the kernel counts it."""
        return resident_bytes(self.process.pid)


def resident_bytes(process: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def fake_serving(*arguments: str, module: str = "tests.fake_server", **environment: str) -> Iterator[FakeServer]:
    """A fake server, or another module that says alike where it serves, from when it is ready until the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).resolve().parent.parent,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
    )
    assert process.stdout is not None
    log: list[str] = []
    while (found := re.match(r"Ready on (\S+) administered on (\S+)", line := process.stdout.readline())) is None:
        log.append(line.rstrip())
        if not line:
            process.stdout.close()
            process.wait(timeout=10)
            raise AssertionError("the fake server ended before it was ready:\n" + "\n".join(log[-40:]))

    def drain() -> None:
        assert process.stdout is not None
        with process.stdout:
            log.extend(each.rstrip() for each in process.stdout)

    reader = threading.Thread(target=drain, daemon=True)
    reader.start()
    try:
        yield FakeServer(url=found.group(1), admin=found.group(2), process=process, log=log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
            if process.poll() is None:
                process.kill()
                process.wait()
        reader.join(timeout=10)


if __name__ == "__main__":
    main()
