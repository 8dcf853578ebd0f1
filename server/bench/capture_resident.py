"""Capture resident: a process that gives residuals of random prompts, or answers to them, by one of three ways.

`engine` is vLLM that captures, `plain` vLLM without, `transformers` the reference in batches of one length. Run by
`server.bench.capture`.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from server.bench.companion import serve, take_over_output
from steering.errors import NotSupported

FIRST_TOKEN = 20
"""Below it are special tokens in most vocabularies."""


class Way(Protocol):
    """How residuals and answers come about."""

    def capture(self, prompts: list[tuple[int, ...]]) -> int:
        """Residuals of all layers at the last token of each prompt; how many prompts."""
        ...

    def answer(self, prompts: list[tuple[int, ...]], tokens: int) -> int:
        """Answers of requests that do not ask for residuals; how many tokens."""
        ...


class EngineWay:
    """An offline engine, with capture into a folder or without."""

    def __init__(self, settings: Mapping[str, Any], *, is_capturing: bool) -> None:
        from steering.engine.offline import CaptureSettings, OfflineEngine

        self._folder = tempfile.TemporaryDirectory(prefix="trimtab-capture-")
        capture = CaptureSettings(folder=Path(self._folder.name)) if is_capturing else None
        self._engine = OfflineEngine(Path(settings["model"]), capture=capture, options=settings["options"])
        self._engine.__enter__()

    def capture(self, prompts: list[tuple[int, ...]]) -> int:
        """As a fit does it, into files."""
        from steering.engine.offline import Ask

        self._engine.capture([Ask(prompt=prompt) for prompt in prompts])
        return len(prompts)

    def answer(self, prompts: list[tuple[int, ...]], tokens: int) -> int:
        """Greedy answers."""
        from steering.engine.offline import Ask

        answers = self._engine.ask([Ask(prompt=prompt, max_tokens=tokens) for prompt in prompts])
        return sum(len(answer.samples[0].tokens) for answer in answers)


class TransformersWay:
    """The transformers reference: groups of one length, at most 64 together."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        from steering.fit.activations import load_model

        self._loaded = load_model(Path(settings["model"]))

    def capture(self, prompts: list[tuple[int, ...]]) -> int:
        """All layers at once, in memory."""
        from steering.fit.activations import last_residuals

        return len(last_residuals(self._loaded, prompts))

    def answer(self, prompts: list[tuple[int, ...]], tokens: int) -> int:
        """Nothing is generated this way."""
        raise NotSupported(f"transformers only captures here, not {tokens} tokens for {len(prompts)} prompts")


def main() -> None:
    """Hold one way for as long as there are orders."""
    answers = take_over_output()
    settings = json.loads(sys.argv[1])
    name = settings["way"]
    way: Way = (
        TransformersWay(settings) if name == "transformers" else EngineWay(settings, is_capturing=name == "engine")
    )

    def work(seed: int, lengths: list[int], tokens: int = 0) -> dict[str, Any]:
        """Residuals of prompts of these lengths, or with `tokens` answers; seconds, and how much came of it."""
        draw = random.Random(seed)
        prompts = [
            tuple(draw.randrange(FIRST_TOKEN, settings["vocabulary"]) for _ in range(length)) for length in lengths
        ]
        began = time.perf_counter()
        made = way.answer(prompts, tokens) if tokens else way.capture(prompts)
        return {"seconds": time.perf_counter() - began, "made": made}

    serve(answers, {"way": name}, work)


if __name__ == "__main__":
    main()
