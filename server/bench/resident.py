"""Resident: a process that holds one vLLM engine, stock or steering, and generates one batch per order.

The only module of the bench that names vLLM. Run by `server.bench.engine`.
"""

from __future__ import annotations

import asyncio
import json
import random
import secrets
import statistics
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.bench.companion import serve, take_over_output
from steering.plan import PLAN_KEY

PROMPT_TOKENS = 32
FIRST_TOKEN = 20
"""Below it are special tokens in most vocabularies."""


class Resident:
    """One engine.

    Args:
        settings: model: folder; options: of vLLM; bundles: folders, empty for stock vLLM; batch and tokens of a round;
            vocabulary: number of token ids to draw prompts from.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        from vllm import LLM

        from steering.engine.plugin import engine_arguments

        self._settings = settings
        self._is_steering = bool(settings["bundles"])
        own = engine_arguments([Path(path) for path in settings["bundles"]]) if self._is_steering else {}
        self._llm = LLM(model=settings["model"], **settings["options"], **own)

    def about(self) -> dict[str, Any]:
        """What runs here: a steering engine reports its layers, stock vLLM knows no such report."""
        if not self._is_steering:
            loaded = [name for name in sys.modules if name.startswith("steering.engine.model")]
            return {"steering": False, "plugin_modules": loaded}
        return {"steering": True, "report": self._llm.collective_rpc("steering_report")[0]}

    def order(self, seed: int, plans: list[str], *, is_first_token: bool = False) -> dict[str, Any]:
        """Do what the bench asks: see `first_tokens` and `round`."""
        return {"answers": self.first_tokens(seed, plans)} if is_first_token else self.round(seed, plans)

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
        seconds, worked = time.perf_counter() - began, _processor_seconds() - worked
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        return {"seconds": seconds, "processor_seconds": worked, "tokens": tokens, "edited": self._edited()}

    def first_tokens(self, seed: int, plans: list[str]) -> list[dict[str, Any]]:
        """Requests of one token, one after the other: those with a plan and as many without, in turns of random order.

        Whatever slows the machine for longer than two requests slows both kinds alike.

        Args:
            seed: of the prompts and their order.
            plans: one JSON plan per steered request.

        Returns:
            Of the steered, then of the others: seconds, their number times the median; tokens; the layers edited.
        """
        draw = random.Random(seed)
        seconds: dict[bool, list[float]] = {True: [], False: []}
        self._clear_witness()
        for plan in plans:
            for is_steered in draw.sample([True, False], 2):
                prompts = self._prompts(draw, 1)
                parameters = self._parameters(1, plan if is_steered else None)
                began = time.perf_counter()
                self._llm.generate(prompts, parameters, use_tqdm=False)
                seconds[is_steered].append(time.perf_counter() - began)
        edited = {True: self._edited(), False: []}
        return [
            {"seconds": len(plans) * statistics.median(taken), "tokens": len(plans), "edited": edited[is_steered]}
            for is_steered, taken in seconds.items()
        ]

    def _prompts(self, draw: random.Random, count: int) -> list[Any]:
        from vllm.inputs import TokensPrompt

        last = self._settings["vocabulary"]
        return [
            TokensPrompt(prompt_token_ids=[draw.randrange(FIRST_TOKEN, last) for _ in range(PROMPT_TOKENS)])
            for _ in range(count)
        ]

    @staticmethod
    def _parameters(tokens: int, plan: str | None) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=0.0,
            max_tokens=tokens,
            ignore_eos=True,
            extra_args=None if plan is None else {PLAN_KEY: _fresh(plan)},
        )

    def _clear_witness(self) -> None:
        if self._is_steering:
            self._llm.collective_rpc("steering_clear_witness")

    def _edited(self) -> list[int]:
        layers: list[int] = self._llm.collective_rpc("steering_report")[0]["witness"] if self._is_steering else []
        return layers


def _fresh(plan: str) -> str:
    return json.dumps(json.loads(plan) | {"id": secrets.token_hex(16)})


def _processor_seconds() -> float:
    """What this process and its children have taken so far; a neighbour on the machine changes it little."""
    import psutil  # type: ignore[import-untyped]  # vLLM requires it

    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return float(sum(each.user + each.system for each in times))


def _listen() -> None:
    """Receive outcomes as the gateway does, so that sending them is part of what is measured."""
    from steering.engine.outcomes import OutcomeListener

    ready = threading.Event()

    async def receive() -> None:
        OutcomeListener().start()
        ready.set()
        await asyncio.Event().wait()

    threading.Thread(target=lambda: asyncio.run(receive()), daemon=True, name="outcomes").start()
    ready.wait()


def main() -> None:
    """Hold an engine for as long as there are orders."""
    answers = take_over_output()
    settings = json.loads(sys.argv[1])
    if settings["bundles"]:
        _listen()
    resident = Resident(settings)
    serve(answers, resident.about(), resident.order)


if __name__ == "__main__":
    main()
