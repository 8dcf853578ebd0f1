"""Resident: a process that holds one vLLM engine, stock or steering, and generates one batch per order.

The only module of the bench that names vLLM. Run by `server.bench.engine`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import secrets
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from server.bench.companion import serve, take_over_output
from steering.engine.outcomes import listen
from steering.errors import EditNotApplied
from steering.outcome import Outcome, Report
from steering.plan import PLAN_KEY, Plan

PROMPT_TOKENS = 32
FIRST_TOKEN = 20
"""Below it are special tokens in most vocabularies."""

SPIN_SECONDS = 1.0
"""How long a worker without work looks for some before it sleeps (vLLM 0.32 `shm_broadcast.SpinCondition`)."""


class Resident:
    """One engine.

    Args:
        settings: model: folder; options: of vLLM; bundles: folders, empty for stock vLLM; batch and tokens of a round;
            vocabulary: number of token ids to draw prompts from; key: under which a plan travels, where it is another
            plugin's.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        from vllm import LLM

        from steering.engine.plugin import engine_arguments

        self._settings = settings
        self._is_steering = bool(settings["bundles"])
        bundles = [Path(path) for path in settings["bundles"]]
        own = engine_arguments(bundles, is_reporting=True) if self._is_steering else {}
        self._llm = LLM(model=settings["model"], **settings["options"], **own)
        self._reports: list[Report] = []
        if self._is_steering:  # outcomes are read as the gateway does, so that it is part of what is measured
            listen(self._llm.llm_engine, self._reports.append)
        _keep_apart()

    def close(self) -> None:
        """End the engine's processes, which the end of this one alone leaves waiting."""
        self._llm.llm_engine.engine_core.shutdown()

    def about(self) -> dict[str, Any]:
        """What runs here: a steering engine reports its layers, stock vLLM knows no such report."""
        if not self._is_steering:
            loaded = [name for name in sys.modules if name.startswith("steering.engine.model")]
            return {"steering": False, "plugin_modules": loaded, "limits": self._limits()}
        report = self._llm.collective_rpc("steering_report")[0]
        return {"steering": True, "report": report, "limits": self._limits()}

    def order(
        self,
        seed: int,
        plans: list[str],
        *,
        first_token_after: int | None = None,
        cell: Mapping[str, Any] | None = None,
        is_memory: bool = False,
    ) -> dict[str, Any]:
        """Do what the bench asks, see `first_tokens`, `cell`, `peak_bytes`, `round`; answer once the engine rests."""
        if is_memory:
            return {"peak_bytes": peak_bytes()}
        if cell is not None:
            answer = self.cell(seed, plans, **cell)
        elif first_token_after is not None:
            answer = {"answers": self.first_tokens(seed, plans, first_token_after)}
        else:
            answer = self.round(seed, plans)
        self._rest()
        return answer

    def _rest(self) -> None:
        """Wait until this engine's worker sleeps. vLLM binds the workers of all engines to the same cores of a CPU, so
        that one that still looks for work would take half the time of the engine whose turn comes next.
        """
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            time.sleep(1.25 * SPIN_SECONDS)

    def cell(
        self, seed: int, plans: list[str], *, requests: int, length: int, tokens: int, is_one_by_one: bool = False
    ) -> dict[str, Any]:
        """Answer random prompts of one length, and say when the first tokens came.

        Args:
            seed: as of `round`.
            plans: one JSON plan per request, or none at all.
            requests: how many.
            length: tokens of each prompt.
            tokens: generated for each.
            is_one_by_one: each request waits for the one before it; otherwise all come at once.

        Returns:
            seconds; tokens; first_seconds: median of the seconds to a request's first token; seconds_per_token:
            between two tokens of a request once all have their first, None where none is left then; answers: digest of
            all tokens; edited: layers that edited a token.
        """
        prompts = self._prompts(random.Random(seed), requests, length)
        wanted: list[str | None] = [*plans] or [None] * requests
        parameters = [self._parameters(tokens, plan, is_timed=True) for plan in wanted]
        together = 1 if is_one_by_one else requests
        self._clear_witness()
        runs = [
            self._timed(prompts[start : start + together], parameters[start : start + together])
            for start in range(0, requests, together)
        ]
        late_tokens = sum(run.late_tokens for run in runs)
        late_seconds = sum(run.late_seconds for run in runs)
        answers = hashlib.sha256(repr([run.answers for run in runs]).encode()).hexdigest()
        return {
            "seconds": sum(run.seconds for run in runs),
            "tokens": sum(len(answer) for run in runs for answer in run.answers),
            "first_seconds": statistics.median(first for run in runs for first in run.firsts),
            "seconds_per_token": late_seconds * together / late_tokens if late_tokens else None,
            "answers": answers,
            "edited": self._edited(),
        }

    def _timed(self, prompts: list[Any], parameters: list[Any]) -> _Run:
        """Have the engine answer these together, step by step, to see when what came."""
        engine, mine = self._llm.llm_engine, secrets.token_hex(4)
        names = [f"bench-{mine}-{number}" for number in range(len(prompts))]
        answers: dict[str, list[int]] = {name: [] for name in names}
        firsts: dict[str, float] = {}
        late_tokens, all_begun = 0, 0.0
        began = now = time.perf_counter()
        for name, prompt, asked in zip(names, prompts, parameters, strict=True):
            engine.add_request(name, prompt, asked)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter()
            is_late = len(firsts) == len(names)
            for output in outputs:
                made: list[int] = output.outputs[0].token_ids  # type: ignore[index, assignment]
                answers[output.request_id] += made
                late_tokens += len(made) if is_late else 0
                if made and output.request_id not in firsts:
                    firsts[output.request_id] = now - began
            if not is_late and len(firsts) == len(names):
                all_begun = now
        return _Run(
            seconds=now - began,
            firsts=list(firsts.values()),
            late_seconds=now - all_begun,
            late_tokens=late_tokens,
            answers=list(answers.values()),
        )

    def _limits(self) -> dict[str, int]:
        config = self._llm.llm_engine.vllm_config
        cache = config.cache_config
        return {
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "kv_tokens": int(cache.num_gpu_blocks or 0) * int(cache.block_size),
        }

    def round(self, seed: int, plans: list[str]) -> dict[str, Any]:
        """Generate one batch of random prompts.

        Args:
            seed: of the prompts; the same in both rounds of a pair, and never used twice in one engine.
            plans: one JSON plan per request, or none at all; each gets an id of its own, as every request's has.

        Returns:
            seconds; seconds of processor time, of this process and its engine's; tokens generated; and the layers that
            edited a token of this round.
        """
        prompts = self._prompts(random.Random(seed), self._settings["batch"])
        parameters = [
            self._parameters(self._settings["tokens"], plans[number] if plans else None)
            for number in range(len(prompts))
        ]
        self._clear_witness()
        worked, began = _processor_seconds(), time.perf_counter()
        outputs = self._llm.generate(prompts, parameters, use_tqdm=False)
        self._take_outcomes()
        seconds, worked = time.perf_counter() - began, _processor_seconds() - worked
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        return {"seconds": seconds, "processor_seconds": worked, "tokens": tokens, "edited": self._edited()}

    def first_tokens(self, seed: int, plans: list[str], length: int) -> list[dict[str, Any]]:
        """Requests of one token, one after the other: those with a plan and as many without, in turns of random order.

        Whatever slows the machine for longer than two requests slows both kinds alike.

        Args:
            seed: of the prompts and their order.
            plans: one JSON plan per steered request.
            length: tokens of each prompt.

        Returns:
            Of the steered, then of the others: seconds, their number times the median; tokens; the layers edited.
        """
        draw = random.Random(seed)
        seconds: dict[bool, list[float]] = {True: [], False: []}
        self._take_outcomes()
        self._clear_witness()
        for plan in plans:
            for is_steered in draw.sample([True, False], 2):
                prompts = self._prompts(draw, 1, length)
                parameters = self._parameters(1, plan if is_steered else None)
                began = time.perf_counter()
                self._llm.generate(prompts, parameters, use_tqdm=False)
                told = self._take_outcomes() if is_steered else 0
                seconds[is_steered].append(time.perf_counter() - began)
                if told != is_steered:
                    raise EditNotApplied(f"{told} outcomes came with the first token of a request")
        edited = {True: self._edited(), False: []}
        return [
            {"seconds": len(plans) * statistics.median(taken), "tokens": len(plans), "edited": edited[is_steered]}
            for is_steered, taken in seconds.items()
        ]

    def _prompts(self, draw: random.Random, count: int, length: int = PROMPT_TOKENS) -> list[Any]:
        from vllm.inputs import TokensPrompt

        last = self._settings["vocabulary"]
        return [
            TokensPrompt(prompt_token_ids=[draw.randrange(FIRST_TOKEN, last) for _ in range(length)])
            for _ in range(count)
        ]

    def _parameters(self, tokens: int, plan: str | None, *, is_timed: bool = False) -> Any:
        """With `is_timed` every step gives the new tokens alone and no text: neither is what is measured."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        # Another plugin's key where one is measured beside ours: its orders have no ids.
        key = self._settings.get("key", PLAN_KEY)
        return SamplingParams(
            temperature=0.0,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=not is_timed,
            output_kind=RequestOutputKind.DELTA if is_timed else RequestOutputKind.CUMULATIVE,
            extra_args=None if plan is None else {key: _fresh(plan) if key == PLAN_KEY else plan},
        )

    def _take_outcomes(self) -> int:
        """Forget what the engine has told; how many samples' outcomes were among it."""
        told = sum(isinstance(report, Outcome) for report in self._reports)
        self._reports.clear()
        return told

    def _clear_witness(self) -> None:
        if self._is_steering:
            self._llm.collective_rpc("steering_clear_witness")

    def _edited(self) -> list[int]:
        layers: list[int] = self._llm.collective_rpc("steering_report")[0]["witness"] if self._is_steering else []
        return layers


class _Run(NamedTuple):
    """What came of requests that were answered together.

    Attributes:
        seconds: from the first request's start to the last token.
        firsts: seconds to each request's first token.
        late_seconds, late_tokens: after all requests had their first.
        answers: token ids of each.
    """

    seconds: float
    firsts: list[float]
    late_seconds: float
    late_tokens: int
    answers: list[list[int]]


def _keep_apart() -> None:
    """Keep this process and the scheduler's off the cores that vLLM has bound its workers to.

    It leaves a core of a CPU free for them and binds only the workers: whichever of them happens to run where a worker
    does takes half of that core, for a whole round or for none of it, and rounds come out a fifth apart. Does nothing
    where workers are bound to no cores or to all.
    """
    import psutil  # type: ignore[import-untyped]  # vLLM requires it

    me = psutil.Process()
    every = set(me.cpu_affinity())
    family = [me, *me.children(recursive=True)]
    bound = [cores for cores in (set(process.cpu_affinity()) for process in family) if cores < every]
    rest = sorted(every.difference(*bound))
    for process in family:
        if bound and rest and set(process.cpu_affinity()) == every:
            for thread in process.threads():
                os.sched_setaffinity(thread.id, rest)


def peak_bytes() -> int:
    """Most memory that this process and its children have had resident, each counted for itself."""
    import psutil

    me = psutil.Process()
    total = 0
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a compiler's worker that has just ended
            lines = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines()
            total += next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)
    return total


def _fresh(plan: str) -> str:
    return msgspec.structs.replace(Plan.from_json(plan), id=secrets.token_hex(16)).to_json()


def _processor_seconds() -> float:
    """What this process and its children have taken so far; a neighbour on the machine changes it little."""
    import psutil

    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return float(sum(each.user + each.system for each in times))


def main() -> None:
    """Hold an engine for as long as there are orders."""
    answers = take_over_output()
    settings = json.loads(sys.argv[1])
    resident = Resident(settings)
    serve(answers, resident.about(), resident.order)
    resident.close()


if __name__ == "__main__":
    main()
