"""What a bundle's response probe says of answers that were written elsewhere: the engine reads them as if it had.

They are given to the model the bundle was made for, after its own chat template. Knows nothing of judges' labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from steering.errors import InvalidSpec
from steering.evaluate.judge import Evidence, Pairs


def read_by_probe(
    model: Path,
    bundle: Path,
    pairs: Pairs,
    on_progress: Callable[[int], None] = lambda _done: None,
    options: Mapping[str, Any] | None = None,
) -> list[Evidence]:
    """What the judge `probe` needs of each (prompt, answer).

    Args:
        model: local folder.
        bundle: folder; made for the model, with a response probe.
        on_progress: is told how many answers have been read.
        options: of vLLM.

    Returns:
        The answer's first tokens and the probability that it refuses. That is None where the answer is empty, or where
        the prompt fills the engine's context.

    Raises:
        InvalidSpec: the bundle has no response probe.
        OperatorError: model and bundle do not go together.
    """
    from steering.engine.offline import Ask, OfflineEngine

    with OfflineEngine(model, bundles=[bundle], options=options) as engine:
        record = engine.bundles[0].manifest.response
        if record is None or record.tokens is None:
            raise InvalidSpec(f"bundle {engine.bundles[0].label} has no response probe; the judge 'probe' is one")
        answers = [
            tuple(engine.tokenizer.encode(answer, add_special_tokens=False))[: record.tokens] for _, answer in pairs
        ]
        prompts = [engine.chat([{"role": "user", "content": prompt}]) for prompt, _ in pairs]
        readable = [
            number
            for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
            if answer and len(prompt) + len(answer) < engine.context
        ]
        asks = [Ask(prompt=prompts[number], answer=answers[number]) for number in readable]
        found = dict(zip(readable, engine.ask(asks, on_progress), strict=True))
    probabilities = [found[number].response if number in found else None for number in range(len(answers))]
    return [
        Evidence(tokens=answer, probability=None if told is None else told[0])
        for answer, told in zip(answers, probabilities, strict=True)
    ]
