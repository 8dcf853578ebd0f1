"""Resident: a process that holds one vLLM engine, stock or steering, and generates one batch per order.

The only module of the bench that names vLLM. Run by `server.bench.engine`.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.bench.companion import serve, take_over_output

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

    def round(self, seed: int, plans: list[str], is_first_token: bool = False) -> dict[str, Any]:
        """Generate one batch of random prompts.

        Args:
            seed: of the prompts; the same in both rounds of a pair, and never used twice in one engine.
            plans: one JSON plan per request, or none at all.
            is_first_token: one request after the other, one token each: the time to the first token of an idle engine.

        Returns:
            seconds; seconds of processor time, of this process and its engine's; tokens generated; and the layers that
            edited a token of this round.
        """
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        draw, settings = random.Random(seed), self._settings
        prompts = [
            TokensPrompt(
                prompt_token_ids=[draw.randrange(FIRST_TOKEN, settings["vocabulary"]) for _ in range(PROMPT_TOKENS)]
            )
            for _ in range(settings["batch"])
        ]
        parameters = [
            SamplingParams(
                temperature=0.0,
                max_tokens=1 if is_first_token else settings["tokens"],
                ignore_eos=True,
                extra_args={"trimtab": plans[number]} if plans else None,
            )
            for number in range(settings["batch"])
        ]
        if self._is_steering:
            self._llm.collective_rpc("steering_clear_witness")
        worked, began = _processor_seconds(), time.perf_counter()
        if is_first_token:
            outputs = [
                self._llm.generate([prompt], [asked], use_tqdm=False)[0]
                for prompt, asked in zip(prompts, parameters, strict=True)
            ]
        else:
            outputs = self._llm.generate(prompts, parameters, use_tqdm=False)
        seconds, worked = time.perf_counter() - began, _processor_seconds() - worked
        edited = self._llm.collective_rpc("steering_report")[0]["witness"] if self._is_steering else []
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        return {"seconds": seconds, "processor_seconds": worked, "tokens": tokens, "edited": edited}


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
    serve(answers, resident.about(), resident.round)


if __name__ == "__main__":
    main()
